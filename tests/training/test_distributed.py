"""Two processes (gloo) compared with one at the same global batch size, with the shipped configs of accelerate."""

import json
import os
from collections import Counter
from pathlib import Path

import datasets
import distributed_runs
import pytest
from safetensors.torch import load_file

from openvla_hf.data import write_rlds
from openvla_hf.testing import fake_episode


CONFIGS = Path(__file__).resolve().parents[2] / "src" / "openvla_hf" / "configs"
STREAM_STEPS = 30  # of four frames: four passes over the 30 frames, two of each process
# `accelerate launch` after the imports that the forked processes share.
LAUNCH = """
import openvla_hf.data, openvla_hf.testing, openvla_hf.training.trainer
from accelerate.commands.launch import main
main()
"""
INSTRUCTIONS = ("push", "open the drawer and look inside", "pick up the red block")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Episodes of different lengths and with instructions of different lengths, each in its own file."""
    folder = tmp_path_factory.mktemp("data") / "arm"
    episodes = [fake_episode(seed=seed, steps=4 + seed, instruction=INSTRUCTIONS[seed % 3]) for seed in range(5)]
    write_rlds(episodes, folder, episodes_per_file=1)
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder in which each run has its output, and the processes share a cache."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launch(outputs, data, interpreters):
    """Return a function `launch(config, name={...})` that performs runs with two processes."""

    def launch(config, **runs):
        jobs = [{"data": str(data), "output": str(outputs / name), "batch_size": 2} | runs[name] for name in runs]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(outputs / "cache"),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            # As options of torchrun: fork the processes of the launch, instead of starting Python.
            "PET_RUN_PATH": "1",
            "PET_START_METHOD": "fork",
        }
        result = interpreters.run(
            *("-c", LAUNCH, "--config_file", str(CONFIGS / config), "--num_processes", "2"),
            *("--mixed_precision", "no", "--main_process_port", "0", distributed_runs.__file__, json.dumps(jobs)),
            env=os.environ | environment,
        )
        assert result.returncode == 0, result.stderr[-3000:]

    return launch


@pytest.fixture(scope="module")
def of_one(outputs, data):
    """Outputs of the runs with one process, for comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", outputs / "cache")
        for name in ("lora", "full", "oft"):
            distributed_runs.run(str(data), str(outputs / f"one_{name}"), name, batch_size=4)
    return outputs


@pytest.fixture(scope="module")
def of_two(outputs, launch):
    """Outputs of two processes for tables, for a stream, and for a batch that contains NaN in one process."""
    launch(
        "ddp.yaml",
        two_lora={"name": "lora"},
        two_oft={"name": "oft"},
        stream={"name": "lora", "streaming": True, "steps": STREAM_STEPS},
        spoilt={"name": "lora", "spoil": True},
    )
    return outputs


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
def test_two_processes_that_share_the_weights_learn_what_one_does(of_one, launch):
    launch("fsdp2.yaml", two_full={"name": "full"})
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
