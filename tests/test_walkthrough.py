"""docs/walkthrough.md, run block by block: a 14-dimensional robot at 50 Hz from its recordings to the Hub."""

import json
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, small_hub, walk


DIMENSIONS, HELD_OUT = 14, 2
# A tiny model on a CPU: a few steps instead of thousands.
SMALLER = {
    "finetune": "--steps 4 --save-steps 2 --logging-steps 1 --workers 0 --set batch_size=2 lora_rank=2 use_cpu=true"
}

__all__ = ["small_hub"]


@pytest.mark.slow
def test_the_walk_from_recordings_to_the_hub_runs_as_it_is_written(small_hub):
    walked = walk(
        ROOT / "docs/walkthrough.md",
        lambda arguments: [*arguments, *SMALLER.get(arguments[0], "").split(), "--json"],
    )
    assert [walked.names[name].shape for name in ("action", "left", "right")] == [(14,), (7,), (7,)]
    told = [(arguments[0], json.loads(printed)) for arguments, printed in walked.printed]
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

    pushed = small_hub.files("someone/openvla-7b-two-arms")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "dataset_statistics.json",
        "README.md",
    } <= pushed.keys()
    assert "14" in pushed["README.md"].decode()
