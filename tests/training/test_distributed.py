"""Two processes (gloo) against one at the same global batch, through the shipped configs of accelerate."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from openvla_hf.data import write_rlds
from openvla_hf.testing import fake_episode


CONFIGS = Path(__file__).resolve().parents[2] / "src" / "openvla_hf" / "configs"
INSTRUCTIONS = ("push", "open the drawer and look inside", "pick up the red block")
TRAIN = """
import json, os, sys
import torch
from accelerate import PartialState
from openvla_hf.data import Augmentation, load
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import ActionCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.trainer import ActionTrainer

class Collator(ActionCollator):
    seen = []
    calls = 0
    def __call__(self, frames):
        self.seen.extend((frame["episode_index"], frame["frame_index"]) for frame in frames)
        self.calls += 1
        batch = super().__call__(frames)
        if "SPOIL" in os.environ and PartialState().process_index == 1 and self.calls == 3:
            batch["pixel_values"] *= float("nan")
        return batch

data, output, name, batch_size, streaming, steps = sys.argv[1:]
tokenizer = tiny_tokenizer()
config = tiny_config(tokenizer)
torch.manual_seed(0)
model = OpenVLAForActionPrediction(config)
fields = {"lora_rank": 4} if name == "lora" else {}
chosen = recipe(name, dtype="float32", batch_size=int(batch_size), learning_rate=1e-3, **fields)
collator = Collator(
    tiny_processor(tokenizer, config), model.action_tokenizer, model.get_action_stats(), augment=Augmentation(size=56)
)
trainer = ActionTrainer(
    model=chosen.prepare(model),
    args=chosen.training_arguments(
        output, max_steps=int(steps), save_steps=int(steps), logging_steps=1, use_cpu=True, disable_tqdm=True
    ),
    data_collator=collator,
    train_dataset=load(data, streaming=streaming == "stream"),
)
index = trainer.args.process_index
try:
    trainer.train()
except ValueError as error:
    if "SPOIL" not in os.environ:
        raise
    with open(f"{output}-{index}.txt", "w") as file:
        file.write(str(error))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
with open(f"{output}-{index}.json", "w") as file:
    json.dump([index, losses, Collator.seen], file)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Episodes of different lengths, whose instructions differ in length too; a file each."""
    folder = tmp_path_factory.mktemp("data") / "arm"
    episodes = [fake_episode(seed=seed, steps=4 + seed, instruction=INSTRUCTIONS[seed % 3]) for seed in range(5)]
    write_rlds(episodes, folder, episodes_per_file=1)
    return folder


def launch(tmp_path, data, output, name, config=None, kind="table", steps=4, **env):
    """What each process says: its losses and the frames that it drew, by episode; the folder of the checkpoint."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    processes = 1 if config is None else 2
    command = [sys.executable]
    if config is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
        command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    command += [str(script), str(data), str(tmp_path / output), name, str(4 // processes), kind, str(steps)]
    environment = (
        os.environ
        | env
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
    )
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    told = sorted(json.loads(file.read_text()) for file in tmp_path.glob(f"{output}-*.json"))
    assert [process for process, _, _ in told] == list(range(processes))
    return told, tmp_path / output / f"checkpoint-{steps}"


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), [("ddp.yaml", "lora"), ("fsdp2.yaml", "full")])
def test_two_processes_learn_what_one_does(tmp_path, data, config, name):
    ((_, losses, drawn),), folder_of_one = launch(tmp_path, data, "one", name)
    told, folder_of_two = launch(tmp_path, data, "two", name, config)
    assert told[0][1] == pytest.approx(losses, rel=1e-4)
    assert {*map(tuple, told[0][2] + told[1][2])} == {*map(tuple, drawn)}
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    expected, actual = load_file(folder_of_one / file), load_file(folder_of_two / file)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert (actual[key] - tensor).abs().max() < 1e-3, key


@pytest.mark.slow
def test_two_processes_draw_every_frame_of_a_stream_equally(tmp_path, data):
    steps = 30  # of four frames: four passes over the 30 frames, two of each process
    ((_, one, some), (_, other, rest)), _ = launch(tmp_path, data, "out", "lora", "ddp.yaml", "stream", steps)
    for drawn in (some, rest):
        # The loader is a batch ahead.
        assert set(Counter(map(tuple, drawn[: 2 * steps])).values()) == {2}
    assert len({*map(tuple, some)}) == 30
    assert not {*map(tuple, some[:12])} & {*map(tuple, rest[:12])}
    assert len(one) == steps
    assert one == other


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path, data):
    told, folder = launch(tmp_path, data, "out", "lora", "ddp.yaml", SPOIL="1")
    for index, losses, _ in told:
        assert len(losses) == 2
        assert "The loss is nan at step 3" in (tmp_path / f"out-{index}.txt").read_text()
    assert not folder.exists()
