"""Two processes (gloo) compared with one at the same global batch size, with the shipped configs of accelerate."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import datasets
import distributed_runs
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import AutoModel

from openvla_hf.data import write_rlds
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode


CONFIGS = Path(__file__).resolve().parents[2] / "src" / "openvla_hf" / "configs"
STREAM_STEPS = 30  # of four frames: four passes over the 30 frames, two of each process
# `accelerate launch` after the imports that the forked processes share.
# Several launches in one process, so that all of their processes are forked after the same imports.
LAUNCH = """
import json, sys
import openvla_hf.data, openvla_hf.testing, openvla_hf.training.trainer
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != -9:  # a run that kills itself
            raise
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
def of_one(outputs, data):
    """Outputs of the runs with one process, for comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", outputs / "cache")
        for name in ("lora", "full", "oft"):
            distributed_runs.run(str(data), str(outputs / f"one_{name}"), name, batch_size=4, export=name == "full")
    return outputs


@pytest.fixture(scope="module")
def of_several(outputs, data, interpreters):
    """Outputs of several processes, with each of the configurations."""

    def launch(config, processes, runs):
        jobs = [{"data": str(data), "output": str(outputs / name)} | run for name, run in runs.items()]
        return [
            *("--config_file", str(CONFIGS / config), "--num_processes", str(processes)),
            *("--mixed_precision", "no", "--main_process_port", "0", distributed_runs.__file__, json.dumps(jobs)),
        ]

    table = {"name": "full", "batch_size": 2}
    stream = table | {"streaming": True, "steps": 6, "save_steps": 3}
    by_four = stream | {"batch_size": 1, "save_steps": 1}
    middle = str(outputs / "straight" / "checkpoint-3")
    launches = [
        launch(
            "ddp.yaml",
            2,
            {
                "two_lora": {"name": "lora", "batch_size": 2},
                "two_oft": {"name": "oft", "batch_size": 2},
                "stream": {"name": "lora", "batch_size": 2, "streaming": True, "steps": STREAM_STEPS},
                "spoilt": {"name": "lora", "batch_size": 2, "spoil": True},
            },
        ),
        launch(
            "fsdp2.yaml",
            2,
            {
                "two_full": table | {"export": True},
                "two_compiled": table | {"compiled": True},
                "straight": stream,
                "killed": stream | {"dies_after": 4},
            },
        ),
        launch("fsdp2.yaml", 2, {"killed": stream}),
        launch("hsdp.yaml", 4, {"by_four": by_four | {"resume": middle, "dies_after": 5}}),
        launch("hsdp.yaml", 4, {"by_four": by_four}),
        launch("fsdp2.yaml", 1, {"by_one": stream | {"batch_size": 4, "resume": middle}}),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(outputs / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        # As options of torchrun: fork the processes of the launch, instead of starting Python.
        "PET_RUN_PATH": "1",
        "PET_START_METHOD": "fork",
    }
    result = interpreters.run("-c", LAUNCH, json.dumps(launches), env=os.environ | environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return outputs


def told_by(folder, output):
    """Return what each process wrote about a run: its losses and the frames that it drew, by episode."""
    told = sorted(json.loads(file.read_text()) for file in folder.glob(f"{output}-*.json"))
    assert [process for process, _, _ in told] == list(range(len(told)))
    return told


def losses_of(folder, output):
    """Return the losses of a run, in which all processes agree."""
    (losses, *others) = (losses for _, losses, _ in told_by(folder, output))
    assert all(other == losses for other in others)
    return losses


def check_same(folder, name, final):
    ((_, losses, drawn),) = told_by(folder, f"one_{name}")
    told = told_by(folder, f"two_{name}")
    assert losses_of(folder, f"two_{name}") == pytest.approx(losses, rel=1e-4)
    assert {tuple(frame) for _, _, some in told for frame in some} == {*map(tuple, drawn)}
    file = "adapter_model.safetensors" if name != "full" else "model.safetensors"
    expected = load_file(folder / f"one_{name}" / "checkpoint-4" / file)
    actual = load_file(final / file)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert (actual[key] - tensor).abs().max() < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "oft"])
def test_two_processes_learn_what_one_does(of_one, of_several, name):
    check_same(of_one, name, of_several / f"two_{name}" / "checkpoint-4")


@pytest.mark.slow
def test_two_processes_that_shard_the_model_learn_what_one_does_and_export_it(of_one, of_several):
    check_same(of_one, "full", of_several / "two_full-export")


@pytest.mark.slow
def test_two_processes_learn_the_same_with_a_compiled_model(of_several):
    assert losses_of(of_several, "two_compiled") == pytest.approx(losses_of(of_several, "two_full"), rel=1e-4)


@pytest.mark.slow
def test_an_evaluation_by_two_processes_that_shard_the_model_gives_the_figures_of_one(of_one, of_several):
    (expected,) = (json.loads(file.read_text()) for file in of_one.glob("one_full-*.figures"))
    found = [json.loads(file.read_text()) for file in of_several.glob("two_full-*.figures")]
    assert len(found) == 2
    for name in ("eval_loss", "eval_action_accuracy", "eval_action_l1"):
        assert [figures[name] for figures in found] == pytest.approx([expected[name]] * 2, abs=1e-3), name


@pytest.mark.slow
def test_a_killed_run_that_shards_the_model_continues_with_the_same_losses(of_several):
    straight = losses_of(of_several, "straight")
    assert len(straight) == 6
    assert losses_of(of_several, "killed") == straight


@pytest.mark.slow
@pytest.mark.parametrize("run", ["by_one", "by_four"])
def test_a_checkpoint_of_two_processes_continues_with_one_and_with_two_times_two(of_several, run):
    assert losses_of(of_several, run) == pytest.approx(losses_of(of_several, "straight"), rel=1e-4)
    drawn = [{tuple(frame) for _, _, some in told_by(of_several, one) for frame in some} for one in (run, "straight")]
    assert drawn[0] <= drawn[1]


@pytest.mark.slow
def test_a_killed_run_of_two_times_two_continues_at_its_last_checkpoint(of_several):
    drawn = [len(frames) for _, _, frames in told_by(of_several, "by_four")]
    assert drawn == [3] * 4  # those of steps 5 and 6, and one ahead


@pytest.mark.slow
def test_weights_of_a_sharded_checkpoint_can_be_merged_and_loaded(of_one, of_several, tmp_path):
    checkpoint = of_several / "two_full" / "checkpoint-4"
    folder = shutil.copytree(checkpoint, tmp_path / "policy")
    merge_fsdp_weights(checkpoint / "pytorch_model_fsdp_0", folder)
    exports = [of_several / f"{count}_full-export" for count in ("one", "two")]
    code, *others = ({file.name for file in path.glob("*.py")} for path in (*exports, folder))
    assert others == [code, code]
    configs = [json.loads((path / "config.json").read_text()) for path in exports]
    assert configs[0] == configs[1]
    merged, exported = (AutoModel.from_pretrained(path) for path in (folder, exports[1]))
    assert type(merged) is type(exported) is OpenVLAForActionPrediction
    for (name, one), (_, other) in zip(merged.state_dict().items(), exported.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_two_processes_draw_every_frame_of_a_stream_equally(of_several):
    (_, one, some), (_, other, rest) = told_by(of_several, "stream")
    for drawn in (some, rest):
        # The loader prefetches one batch.
        assert set(Counter(map(tuple, drawn[: 2 * STREAM_STEPS])).values()) == {2}
    assert len({*map(tuple, some)}) == 30
    assert not {*map(tuple, some[:12])} & {*map(tuple, rest[:12])}
    assert len(one) == STREAM_STEPS
    assert one == other


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(of_several):
    told = told_by(of_several, "spoilt")
    assert len(told) == 2
    for index, losses, _ in told:
        assert len(losses) == 2
        assert "The loss is nan at step 3" in (of_several / f"spoilt-{index}.txt").read_text()
    assert not (of_several / "spoilt" / "checkpoint-4").exists()
