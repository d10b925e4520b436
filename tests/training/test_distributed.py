"""Two processes (gloo) compared with one at the same global batch size, with the shipped configs of accelerate."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from openvla_hf.data import write_rlds
from openvla_hf.testing import fake_episode


CONFIGS = Path(__file__).resolve().parents[2] / "src" / "openvla_hf" / "configs"
STREAM_STEPS = 30  # of four frames: four passes over the 30 frames, two of each process
INSTRUCTIONS = ("push", "open the drawer and look inside", "pick up the red block")
# Performs several runs, because a launch starts three processes, which takes longer than a run.
TRAIN = """
import gc, json, sys
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
        "processor": tiny_processor(tokenizer, config), "action_tokenizer": model.action_tokenizer,
        "stats": model.get_action_stats(), "augment": Augmentation(size=56),
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
        with open(f"{output}-{index}.txt", "w") as file:
            file.write(str(error))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with open(f"{output}-{index}.json", "w") as file:
        json.dump([index, losses, Watched.seen], file)

gc.freeze()  # what is imported, which each run would go through several times to collect garbage
for arguments in json.loads(sys.argv[1]):
    run(**arguments)
gc.collect()  # the trainers, which keep the group alive
PartialState().destroy_process_group()
assert not [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Episodes of different lengths and with instructions of different lengths, each in its own file."""
    folder = tmp_path_factory.mktemp("data") / "arm"
    episodes = [fake_episode(seed=seed, steps=4 + seed, instruction=INSTRUCTIONS[seed % 3]) for seed in range(5)]
    write_rlds(episodes, folder, episodes_per_file=1)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory, data, interpreters):
    """Return a function `train(config, output={...})` that performs runs and returns the folder of their outputs."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "train.py"
    script.write_text(TRAIN)

    def train(config=None, **runs):
        processes = 1 if config is None else 2
        command = []
        if config is not None:
            command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
            command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
        common = {"data": str(data), "batch_size": 4 // processes}
        jobs = [common | {"output": str(folder / output)} | more for output, more in runs.items()]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        result = interpreters.run(*command, str(script), json.dumps(jobs), env=os.environ | environment)
        assert result.returncode == 0, result.stderr[-3000:]
        return folder

    return train


@pytest.fixture(scope="module")
def of_one(train):
    """Outputs of the runs with one process, for comparison."""
    return train(one_lora={"name": "lora"}, one_full={"name": "full"}, one_oft={"name": "oft"})


@pytest.fixture(scope="module")
def of_two(train):
    """Outputs of two processes for tables, for a stream, and for a batch that contains NaN in one process."""
    return train(
        "ddp.yaml",
        two_lora={"name": "lora"},
        two_oft={"name": "oft"},
        stream={"name": "lora", "streaming": True, "steps": STREAM_STEPS},
        spoilt={"name": "lora", "spoil": True},
    )


def told_by(folder, output):
    """Return what each process wrote about a run: its losses and the frames that it drew, by episode."""
    told = sorted(json.loads(file.read_text()) for file in folder.glob(f"{output}-*.json"))
    assert [process for process, _, _ in told] == list(range(len(told)))
    return told


def check_same(folder, name):
    ((_, losses, drawn),) = told_by(folder, f"one_{name}")
    told = told_by(folder, f"two_{name}")
    assert len(told) == 2
    assert told[0][1] == pytest.approx(losses, rel=1e-4)
    assert {*map(tuple, told[0][2] + told[1][2])} == {*map(tuple, drawn)}
    file = "adapter_model.safetensors" if name != "full" else "model.safetensors"
    expected, actual = (load_file(folder / f"{count}_{name}" / "checkpoint-4" / file) for count in ("one", "two"))
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert (actual[key] - tensor).abs().max() < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "oft"])
def test_two_processes_learn_what_one_does(of_one, of_two, name):
    check_same(of_one, name)


@pytest.mark.slow
def test_two_processes_that_share_the_weights_learn_what_one_does(of_one, train):
    train("fsdp2.yaml", two_full={"name": "full"})
    check_same(of_one, "full")


@pytest.mark.slow
def test_two_processes_draw_every_frame_of_a_stream_equally(of_two):
    (_, one, some), (_, other, rest) = told_by(of_two, "stream")
    for drawn in (some, rest):
        # The loader prefetches one batch.
        assert set(Counter(map(tuple, drawn[: 2 * STREAM_STEPS])).values()) == {2}
    assert len({*map(tuple, some)}) == 30
    assert not {*map(tuple, some[:12])} & {*map(tuple, rest[:12])}
    assert len(one) == STREAM_STEPS
    assert one == other


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(of_two):
    told = told_by(of_two, "spoilt")
    assert len(told) == 2
    for index, losses, _ in told:
        assert len(losses) == 2
        assert "The loss is nan at step 3" in (of_two / f"spoilt-{index}.txt").read_text()
    assert not (of_two / "spoilt" / "checkpoint-4").exists()
