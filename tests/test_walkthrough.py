"""docs/walkthrough.md, run block by block: a 14-dimensional robot at 50 Hz from its recordings to the Hub."""

import json
from pathlib import Path

import numpy as np
import pytest
from interpreters import WITHOUT_THE_PACKAGE
from pages import ROOT, small_hub, walk


DIMENSIONS, CHUNK, HELD_OUT = 14, 25, 2
CAMERAS = ["high", "left_wrist", "right_wrist"]
# A tiny model on a CPU: a few steps instead of thousands.
SMALLER = {
    "finetune": "--steps 4 --save-steps 2 --logging-steps 1 --workers 0 --eval-frames 16 "
    "--set batch_size=2 lora_rank=2 use_cpu=true",
    "evaluate": "--frames 16",
}

__all__ = ["small_hub"]


@pytest.mark.slow
def test_the_walk_from_recordings_to_the_hub_runs_as_written(small_hub, run_python):
    walked = walk(
        ROOT / "docs/walkthrough.md",
        lambda arguments: [*arguments, *SMALLER.get(arguments[0], "").split(), "--json"],
    )
    told = [(arguments[0], json.loads(printed)) for arguments, printed in walked.printed]
    commands = ["doctor", "doctor", "finetune", "evaluate", "predict", "push"]
    in_chunks = ["doctor", "finetune", "evaluate", "merge", "push"]
    assert [command for command, _ in told] == commands + in_chunks
    check_single_actions(walked.names, [answer for _, answer in told[: len(commands)]], small_hub)
    check_chunks(walked.names, [answer for _, answer in told[len(commands) :]], small_hub)

    # Run the last file of the page in a process where the package can't be imported.
    code = WITHOUT_THE_PACKAGE + Path("elsewhere.py").read_text() + "\nprint(chunk.tolist())"
    elsewhere = json.loads(run_python(code, **small_hub.env).stdout)
    np.testing.assert_allclose(elsewhere, walked.names["chunk"], rtol=0, atol=1e-5)


def check_single_actions(names, told, hub):
    """Check the policy with one camera and one action at a time, at 10 Hz."""
    assert [names[name].shape for name in ("action", "left", "right")] == [(14,), (7,), (7,)]
    at_50_hz, at_10_hz, _, evaluation, prediction, _ = told

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

    pushed = hub.files("someone/openvla-7b-two-arms")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "dataset_statistics.json",
        "README.md",
    } <= pushed.keys()
    assert "14" in pushed["README.md"].decode()


def check_chunks(names, told, hub):
    """Check the policy with three cameras and 25 actions at a time, at 50 Hz."""
    examined, _, evaluation, _, _ = told
    assert examined["frequency"] == 50
    assert examined["warnings"] == []

    frame, chunk, statistics = names["frame"], names["chunk"], names["model"].norm_stats["recordings"]
    assert list(frame["images"]) == CAMERAS
    assert chunk.shape == frame["actions"].shape == (CHUNK, DIMENSIONS)
    assert len(statistics["proprio"]["min"]) == DIMENSIONS
    config = names["model"].config
    assert (config.num_images, config.proprio_dim, config.action_normalization) == (3, DIMENSIONS, "bounds")
    # Five predictions for the same observation.
    np.testing.assert_array_equal(names["played"], np.tile(chunk[:10], (5, 1)))

    assert evaluation["episodes"] == HELD_OUT
    assert len(evaluation["mean_absolute_error"]) == DIMENSIONS
    assert np.isfinite(evaluation["mean_absolute_error"]).all()

    pushed = hub.files("someone/openvla-7b-two-arms-chunks")
    assert {"model.safetensors", "config.json", "modeling_openvla.py", "README.md"} <= pushed.keys()
    assert json.loads(pushed["processor_config.json"])["cameras"] == CAMERAS
