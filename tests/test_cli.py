import json

import numpy as np
import pytest
import torch
from PIL import Image

from openvla_hf.cli import main
from openvla_hf.data import load
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode, tiny_config, tiny_processor, tiny_tokenizer


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A saved policy that knows nothing, and an image."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    OpenVLAForActionPrediction(config).save_pretrained(folder)
    tiny_processor(tokenizer, config).save_pretrained(folder)
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save(folder / "frame.png")
    return folder


def predict(policy, *more):
    image = ["--image", str(policy / "frame.png"), "--instruction", "pick up the red block"]
    return main(["predict", "--model", str(policy), *image, *more])


def test_predict_prints_the_action_as_json(policy, capsys):
    assert predict(policy, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["names"][-1] == "gripper"
    assert len(result["action"]) == len(result["token_ids"]) == len(result["probabilities"]) == 7
    assert np.isfinite(result["action"]).all()
    assert np.abs(result["normalized_action"]).max() <= 1


def test_predict_prints_a_table_for_people(policy, capsys):
    assert predict(policy) == 0
    table = capsys.readouterr().out
    assert "dx" in table
    assert "gripper" in table


def test_a_wrong_key_is_one_sentence(policy, capsys):
    assert predict(policy, "--unnorm-key", "tinny") == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_where_one_is_asked_for_is_one_sentence(policy, capsys):
    assert predict(policy, "--device", "cuda") == 2
    assert main(["bench", "--random", "tiny", "--device", "cuda"]) == 2
    sentence = "openvla-hf: PyTorch finds no CUDA device: leave --device out to run on the CPU.\n"
    assert capsys.readouterr().err == 2 * sentence


def test_demo_writes_pictures_and_evaluate_counts(policy, capsys, tmp_path):
    more = ["--model", str(policy), "--episodes", "2", "--json"]
    assert main(["demo", *more, "--output", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"]["as told"]["all"]["episodes"] == 2
    assert Image.open(result["gif"]).n_frames > 10
    assert Image.open(result["strip"]).width > 1000
    assert main(["evaluate", *more, "--condition", "swapped"]) == 0
    assert list(json.loads(capsys.readouterr().out)["results"]) == ["swapped"]


@pytest.mark.parametrize("kind", ["lerobot", "rlds"])
def test_recorded_demonstrations_can_be_loaded(kind, capsys, tmp_path):
    folder = tmp_path / "tabletop_lift"
    assert main(["record", str(folder), "--task", "lift", "--episodes", "2", "--format", kind, "--json"]) == 0
    frames = load(json.loads(capsys.readouterr().out)["folder"], "tabletop")
    assert frames[0]["instruction"].startswith("lift the")
    assert np.asarray(frames[0]["image"]).shape == (224, 224, 3)
    assert main(["record", str(folder) + "2", "--task", "fold"]) == 2
    assert "known: put, push, stack, lift" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "evaluate", "predict", "record"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"openvla-hf {command}" in capsys.readouterr().out.split("example:")[1]
