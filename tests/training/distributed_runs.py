"""Several training runs of tiny policies in one process, alone or as one of the processes of a launch.

    accelerate launch ... distributed_runs.py '[{"data": ..., "output": ..., "name": "lora", "batch_size": 2}]'

A launch performs several runs, because it starts three processes, which takes longer than a run.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from openvla_hf.data import Augmentation, load
from openvla_hf.modeling.action_networks import add_action_networks
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import ActionCollator, ChunkCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.trainer import ActionTrainer


class Watched:
    """Records the frames of all batches, and makes the third one NaN if `spoil` is set."""

    spoil = False

    def __call__(self, frames):
        Watched.seen.extend((frame["episode_index"], frame["frame_index"]) for frame in frames)
        Watched.calls += 1
        batch = super().__call__(frames)
        if Watched.spoil and Watched.calls == 3:
            batch["pixel_values"] *= float("nan")
        return batch


class Collator(Watched, ActionCollator):
    pass


class Chunks(Watched, ChunkCollator):
    pass


def run(data, output, name, batch_size, streaming=False, steps=4, spoil=False):
    """Train with a recipe, and write the losses and the frames that this process drew beside the output."""
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
    trainer = ActionTrainer(
        model=chosen.prepare(model),
        args=chosen.training_arguments(
            output, max_steps=steps, save_steps=steps, logging_steps=1, use_cpu=True, disable_tqdm=True
        ),
        data_collator=collator,
        train_dataset=load(data, streaming=streaming, **options),
    )
    index = trainer.args.process_index
    Watched.spoil = spoil and index == 1
    try:
        trainer.train()
    except ValueError as error:
        if not spoil:
            raise
        Path(f"{output}-{index}.txt").write_text(str(error))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(f"{output}-{index}.json").write_text(json.dumps([index, losses, Watched.seen]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported, which each run would go through several times to collect garbage
    for arguments in json.loads(sys.argv[1]):
        run(**arguments)
    gc.collect()  # the trainers, which keep the group alive
    PartialState().destroy_process_group()
    assert not [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
