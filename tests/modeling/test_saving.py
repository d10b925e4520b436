import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from openvla_hf.checkpoints.describe import describe
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode


def assert_equal_weights(model, other):
    expected, actual = model.state_dict(), other.state_dict()
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert (actual[name].dtype, torch.equal(actual[name], tensor)) == (tensor.dtype, True), name


def saved_names(folder):
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal_and_in_our_names(tiny, tmp_path, silent, fused, max_shard_size, dtype):
    model, _ = tiny(fused=fused)
    model = model.to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 or max_shard_size == "1GB"
    assert set(saved_names(tmp_path)) == set(dict(model.named_parameters()))
    again, info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert_equal_weights(model, again)
    assert again.dtype == dtype


@pytest.mark.parametrize("case", ["fused-224", "siglip-224", "sharded"])
@torch.no_grad()
def test_a_published_checkpoint_becomes_ours(recorded, tmp_path, silent, case):
    record = recorded(case)
    model = record.load()
    model.save_pretrained(tmp_path)
    assert not [name for name in saved_names(tmp_path) if ".blocks." in name or "qkv" in name]
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal_weights(model, again)
    assert again.norm_stats == model.norm_stats
    inputs = record.processor(record.cases["prompts"][0], record.images[0])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_state_dict_takes_the_place_of_the_files(tiny):
    model, _ = tiny()
    again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_equal_weights(model, again)


def test_the_statistics_are_a_file_too(tiny, tmp_path):
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    statistics, config_file = tmp_path / "dataset_statistics.json", tmp_path / "config.json"
    assert json.loads(statistics.read_text()) == model.norm_stats
    config = json.loads(config_file.read_text())
    del config["norm_stats"]
    config_file.write_text(json.dumps(config))
    again = AutoModel.from_pretrained(tmp_path)
    assert again.norm_stats == model.norm_stats
    inputs = processor(fake_episode(steps=1)[0]["image"], instruction="open")
    assert np.array_equal(again.predict_action(**inputs), model.predict_action(**inputs))
    statistics.unlink()
    assert AutoModel.from_pretrained(tmp_path).norm_stats is None


def test_the_file_of_statistics_takes_precedence_over_the_config(tiny, tmp_path):
    """Fine-tuning by the original leaves the base's statistics in the config and the run's in the file."""
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert describe(tmp_path).statistics_file == "dataset_statistics.json"
    run = {"run": {"action": model.norm_stats["tiny"]["action"] | {"q99": [1.0] * 7}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(run))
    again = AutoModel.from_pretrained(tmp_path)
    assert again.norm_stats == again.config.norm_stats == run
    assert describe(tmp_path).statistics == run
    # Statistics that the caller gives take precedence.
    other = {"other": {"action": BRIDGE_LIKE_STATS}}
    assert AutoModel.from_pretrained(tmp_path, norm_stats=other).norm_stats == other
    in_config = model.norm_stats
    assert OpenVLAForActionPrediction.from_pretrained(tmp_path, norm_stats=in_config).norm_stats == in_config
    # The saved config and file contain the same statistics.
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "dataset_statistics.json").read_text()) == run
    assert json.loads((tmp_path / "again" / "config.json").read_text())["norm_stats"] == run
    (tmp_path / "dataset_statistics.json").unlink()
    assert describe(tmp_path).statistics_file == "config.json"
    assert AutoModel.from_pretrained(tmp_path).norm_stats == describe(tmp_path).statistics == model.norm_stats
