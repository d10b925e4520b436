"""Checkpoints on the Hub are loaded and refused like those on disk."""

import json
import shutil

import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from transformers import AutoModel, AutoProcessor

from openvla_hf import load_adapter
from openvla_hf.checkpoints.identity import identify
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, write_tiny_oft
from openvla_hf.training.recipes import recipe


INSTRUCTION = "pick up the red block"


@pytest.fixture
def repositories(tiny, owner, tmp_path):
    """A policy, and one that predicts chunks with a plain policy in a folder of its own."""
    for one in tiny():
        one.save_pretrained(owner.root / "someone/good")
    write_tiny_oft(owner.root / "someone/oft")
    shutil.copytree(owner.root / "someone/good", owner.root / "someone/oft/plain")
    return owner


def test_a_checkpoint_on_the_hub_acts_as_its_files_do(repositories):
    image = fake_episode(steps=1)[0]["image"]

    def act(source):
        model, processor = AutoModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
        return model.predict_action(**processor(image, instruction=INSTRUCTION)).tolist()

    assert act("someone/good") == act(repositories.root / "someone/good")
    # Both Auto classes ask which commit it is, and the model for the files (the tree is for chat templates).
    asked = [request for request in repositories.requests if "/api/models/someone/good" in request]
    assert len([request for request in asked if "/tree/" not in request]) == 3
    AutoModel.from_pretrained("someone/good", local_files_only=True)


def test_weights_on_the_hub_that_are_refused_are_not_downloaded(repositories):
    for load in (AutoModel, OpenVLAForActionPrediction):
        with pytest.raises(
            ValueError, match=r"`action_dim=6` contradicts action_head--latest_checkpoint\.pt of someone/oft"
        ):
            load.from_pretrained("someone/oft", num_images=1, action_dim=6)
    AutoModel.from_pretrained("someone/oft", subfolder="plain")
    weights = [one for one in repositories.requests if "/oft/resolve/" in one and "safetensors" in one]
    assert "/plain/" in weights[0]


def test_without_a_list_of_files_the_cache_is_loaded_and_nothing_else(repositories, monkeypatch, tmp_path):
    def kinds():
        configs = [AutoModel.from_pretrained(repo).config for repo in ("someone/good", "someone/oft")]
        return [(config.action_head, config.num_images) for config in configs]

    def fail(*args, **kwargs):
        raise ConnectionError("no list today")

    AutoModel.from_pretrained("someone/good")
    snapshot_download("someone/oft")
    monkeypatch.setattr(HfApi, "model_info", fail)
    assert kinds() == [("none", 1), ("l1", 2)]
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        for repo in ("someone/good", "someone/oft"):
            with pytest.raises(OSError, match=f"Cannot read the weights of {repo}: the Hub does not answer"):
                AutoModel.from_pretrained(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert kinds() == [("none", 1), ("l1", 2)]


@pytest.fixture
def shared(tiny, owner, monkeypatch):
    """A policy and an adapter with its own statistics, on a Hub whose client retries without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    model, processor = tiny()
    for one in (model, processor):
        one.save_pretrained(owner.root / "someone/policy")
    base = OpenVLAForActionPrediction.from_pretrained("someone/policy")
    adapter = owner.root / "someone/adapter"
    recipe("lora", dtype="float32", lora_rank=2).prepare(base).save_pretrained(adapter, save_embedding_layers=False)
    (adapter / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": BRIDGE_LIKE_STATS}}))
    return owner


def from_pretrained(repo):
    return OpenVLAForActionPrediction.from_pretrained(repo)


def onto_a_base(repo):
    return load_adapter(OpenVLAForActionPrediction.from_pretrained("someone/policy"), repo)


@pytest.mark.parametrize("load", [from_pretrained, onto_a_base])
def test_an_adapter_is_told_from_its_base(shared, load):
    repos = ("someone/adapter", "someone/policy")
    of_adapter, of_base = [{"model_id": one, "revision": shared.commit(one), "digest": None} for one in repos]
    assert of_adapter["revision"] != of_base["revision"]
    assert identify(load("someone/adapter"), "someone/adapter") == {**of_adapter, "base": of_base}
    assert identify(from_pretrained("someone/policy"), "someone/policy") == {**of_base, "base": None}


@pytest.mark.parametrize("load", [from_pretrained, onto_a_base])
@pytest.mark.parametrize("status", [401, 403, 429, 500, 0])
def test_statistics_of_an_adapter_that_cannot_be_read_are_not_those_of_its_base(shared, load, status):
    shared.faults["/someone/adapter/*/dataset_statistics.json"] = status
    with pytest.raises(OSError, match=r"Cannot read dataset_statistics\.json of someone/adapter"):
        load("someone/adapter")
    shared.faults.clear()
    assert list(load("someone/adapter").norm_stats) == ["mine"]


def test_without_a_network_an_adapter_is_not_reported_as_something_else(shared, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"adapter: it is not in the cache, there is no folder .*, and offline mode"):
        onto_a_base("someone/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert list(onto_a_base("someone/adapter").norm_stats) == ["mine"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list(onto_a_base("someone/adapter").norm_stats) == ["mine"]
