"""Two processes (gloo) against one at the same global batch, through the shipped configs of accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAIN = """
import json, sys
import torch
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import ActionCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.trainer import ActionTrainer

output, name, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = tiny_tokenizer()
config = tiny_config(tokenizer)
torch.manual_seed(0)
model = OpenVLAForActionPrediction(config)
fields = {"lora_rank": 4} if name == "lora" else {}
chosen = recipe(name, dtype="float32", batch_size=batch_size, learning_rate=1e-3, **fields)
trainer = ActionTrainer(
    model=chosen.prepare(model),
    args=chosen.training_arguments(
        output, max_steps=4, save_steps=4, logging_steps=1, use_cpu=True, disable_tqdm=True
    ),
    data_collator=ActionCollator(tiny_processor(tokenizer, config), model.action_tokenizer, model.get_action_stats()),
    train_dataset=fake_episode(steps=24),
)
trainer.train()
if trainer.is_world_process_zero():
    print("LOSSES", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
"""


def launch(tmp_path, output, name, processes, config=None):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--cpu"]
        command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    command += [str(script), str(tmp_path / output), name, str(4 // processes)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("LOSSES"))
    return json.loads(line.removeprefix("LOSSES")), tmp_path / output / "checkpoint-4"


@pytest.mark.slow
@pytest.mark.xfail(reason="two processes see other batches than one: not mended yet", strict=True)
@pytest.mark.parametrize(("config", "name"), [("ddp.yaml", "lora"), ("fsdp2.yaml", "full")])
def test_two_processes_learn_what_one_does(tmp_path, config, name):
    one, folder_of_one = launch(tmp_path, "one", name, 1)
    two, folder_of_two = launch(tmp_path, "two", name, 2, config)
    assert two == pytest.approx(one, rel=1e-4)
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    expected, actual = load_file(folder_of_one / file), load_file(folder_of_two / file)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert (actual[key] - tensor).abs().max() < 1e-3, key
