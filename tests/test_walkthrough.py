"""docs/walkthrough.md, run block by block: a 14-dimensional robot at 50 Hz from its recordings to the Hub."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer

from openvla_hf.testing import BRIDGE_LIKE_STATS


PAGE = (Path(__file__).parents[1] / "docs/walkthrough.md").read_text(encoding="utf-8")
BLOCK = re.compile(r'```(python|bash)(?: title="([\w.]+)")?\n(.*?)```', re.DOTALL)
DIMENSIONS, HELD_OUT = 14, 2
# A tiny model on a CPU: a few steps instead of thousands.
SMALLER = {"finetune": "--steps 4 --save-steps 2 --logging-steps 1 --workers 0 --set batch_size=2 lora_rank=2"}


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """Run a command in a folder of its own, and beside it a Hub that has a small openvla-7b."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with HubServer(tmp_path / "hub") as server:
        for one in tiny(norm_stats={"bridge_orig": {"action": BRIDGE_LIKE_STATS}}):
            one.save_pretrained(server.root / "openvla/openvla-7b")
        for name, value in {**server.env, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)

        def run(*command: str) -> str:
            result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{command}\n{result.stderr}"
            return result.stdout

        run.hub = server
        yield run


@pytest.mark.slow
def test_the_walk_from_recordings_to_the_hub_runs_as_it_is_written(run):
    told = []  # by each command, as JSON
    for language, title, code in BLOCK.findall(PAGE):
        if title:
            Path(title).write_text(code)
        elif language == "python":
            run(
                "-c", code if "predict_action" not in code else f"{code}\nprint(action.shape, left.shape, right.shape)"
            )
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            program, *arguments = shlex.split(line)
            if program == "openvla-hf":
                small = shlex.split(SMALLER.get(arguments[0], ""))
                told.append((arguments[0], json.loads(run("-m", "openvla_hf.cli", *arguments, *small, "--json"))))
    assert [command for command, _ in told] == ["doctor", "doctor", "finetune", "evaluate", "predict", "push"]
    (_, at_50_hz), (_, at_10_hz), _, (_, evaluation), (_, prediction), _ = told

    assert Path("actions.png").stat().st_size > 0
    assert at_50_hz["frequency"] == 50
    assert at_10_hz["frequency"] == 10
    assert at_10_hz["frames"] < at_50_hz["frames"] / 5  # a fifth, without the pauses
    assert at_10_hz["motionless_start"] < at_50_hz["motionless_start"]

    training = json.loads(Path("outputs/two_arms/training.json").read_text())
    statistics = json.loads(Path("outputs/two_arms/dataset_statistics.json").read_text())["recordings"]
    assert len(training["held_out"]["recordings"]["episodes"]) == HELD_OUT
    assert len(statistics["action"]["q01"]) == DIMENSIONS
    assert [index for index, scaled in enumerate(statistics["action"]["mask"]) if not scaled] == [6, 13]

    assert evaluation["episodes"] == HELD_OUT
    assert len(evaluation["mean_absolute_error"]) == DIMENSIONS
    assert np.isfinite(evaluation["mean_absolute_error"]).all()

    assert prediction["names"][:7:6] == ["left_waist", "left_gripper"]
    low, high = (np.array(statistics["action"][bound]) for bound in ("q01", "q99"))
    low[[6, 13]], high[[6, 13]] = -1, 1  # not scaled
    assert ((low <= prediction["action"]) & (prediction["action"] <= high)).all()

    pushed = run.hub.files("someone/openvla-7b-two-arms")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "dataset_statistics.json",
        "README.md",
    } <= pushed.keys()
    assert "14" in pushed["README.md"].decode()
