"""Several training runs of tiny policies in one process, alone or as one of the processes of a launch.

    accelerate launch ... distributed_runs.py '[{"data": ..., "output": ..., "name": "lora", "batch_size": 2}]'

A launch performs several runs, because it starts three processes, which takes longer than a run.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from openvla_hf.data import Augmentation, load
from openvla_hf.modeling.action_networks import add_action_networks
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import ActionCollator, ChunkCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.trainer import ActionTrainer, last_checkpoint


sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"


class Watched:
    """Records the frames of all batches, and makes the third one NaN if `spoil` is set."""

    spoil = False

    def __call__(self, frames):
        Watched.seen.extend((frame["episode_index"], frame["frame_index"]) for frame in frames if frame)
        Watched.calls += 1
        batch = super().__call__(frames)
        if Watched.spoil and Watched.calls == 3:
            batch["pixel_values"] *= float("nan")
        return batch


class Collator(Watched, ActionCollator):
    pass


class Chunks(Watched, ChunkCollator):
    pass


class Dies(TrainerCallback):
    """Kills this process after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, *_, **__):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    data,
    output,
    name,
    batch_size,
    streaming=False,
    steps=4,
    save_steps=None,
    spoil=False,
    dies_after=None,
    resume=None,
    export=False,
    compiled=False,
):
    """Train with a recipe, and write the losses and the frames that this process drew beside the output.

    A run whose output has checkpoints continues at the last one.
    """
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config)
    fields = {"lora_rank": 4} if name != "full" else {}
    if name == "oft":
        fields |= {"action_horizon": 3, "use_state": False}
    chosen = recipe(name, dtype="float32", batch_size=batch_size, learning_rate=1e-3, **fields)
    Watched.seen, Watched.calls = [], 0
    shared = {
        "processor": tiny_processor(tokenizer, config),
        "action_tokenizer": model.action_tokenizer,
        "stats": model.get_action_stats(),
        "augment": Augmentation(size=56),
    }
    options = {}
    if name == "oft":  # chunks that are cut at the end of an episode count fewer actions
        add_action_networks(model, chosen.action_fields(7))
        options = {"chunk": 3, "chunk_end": "pad"}
    collator = Chunks(config=config, **shared) if name == "oft" else Collator(**shared)
    args = chosen.training_arguments(
        output,
        max_steps=steps,
        save_steps=save_steps or steps,
        logging_steps=1,
        dataloader_num_workers=0,
        use_cpu=True,
        disable_tqdm=True,
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
    )
    if sharded:
        # accelerate ignores the configuration of FSDP on CPUs, so let it take them for GPUs.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    trainer = ActionTrainer(
        model=chosen.prepare(model),
        args=args,
        data_collator=collator,
        train_dataset=load(data, streaming=streaming, **options),
        callbacks=[Dies(dies_after)] if dies_after else None,
    )
    index = trainer.args.process_index
    Watched.spoil = spoil and index == 1
    try:
        trainer.train(resume_from_checkpoint=resume or last_checkpoint(output))
    except ValueError as error:
        if not spoil:
            raise
        Path(f"{output}-{index}.txt").write_text(str(error))
    if sharded:
        assert trainer.accelerator.is_fsdp2
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    drawn = list(Watched.seen)
    if export:
        trainer.save_model(f"{output}-export")
        figures = trainer.evaluate(load(data, streaming=True))
        Path(f"{output}-{index}.figures").write_text(json.dumps(figures))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(f"{output}-{index}.json").write_text(json.dumps([index, losses, drawn]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported, which each run would go through several times to collect garbage
    for arguments in json.loads(sys.argv[1]):
        run(**arguments)
    gc.collect()  # the trainers, which keep the group alive
    PartialState().destroy_process_group()
    # DTensor caches device meshes, which keep the group of a run with FSDP2.
    assert sharded or not [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
