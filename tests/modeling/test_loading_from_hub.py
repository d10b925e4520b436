"""Checkpoints on the Hub are loaded and refused like those on disk."""

import json
import shutil

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image

from openvla_hf import load_adapter
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, write_tiny_oft
from openvla_hf.training.recipes import recipe


LOAD = """
import json, sys
import openvla_hf
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("someone/good")
processor = AutoProcessor.from_pretrained("someone/good")
inputs = processor(sys.argv[1], instruction="pick up the red block")
print(json.dumps(model.predict_action(**inputs).tolist()))
AutoModel.from_pretrained("someone/good", local_files_only=True)

for load in (AutoModel, openvla_hf.OpenVLAForActionPrediction):
    try:
        load.from_pretrained("someone/oft", num_images=1, action_dim=6)
    except ValueError as error:
        print(error)
AutoModel.from_pretrained("someone/oft", subfolder="plain")

from huggingface_hub import snapshot_download
snapshot_download("someone/oft")
"""

LOAD_WITHOUT_THE_LIST = """
import openvla_hf
from huggingface_hub import HfApi
from transformers import AutoModel

def fail(*args, **kwargs):
    raise ConnectionError("no list today")

HfApi.model_info = fail
for repo in ("someone/good", "someone/oft"):
    try:
        config = AutoModel.from_pretrained(repo).config
        print(config.action_head, config.num_images)
    except (OSError, ValueError) as error:
        print(error)
"""


@pytest.mark.slow
def test_a_checkpoint_on_the_hub(tiny, run_python, tmp_path):
    model, processor = tiny()
    image = tmp_path / "image.png"
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save(image)
    action = model.predict_action(**processor(image, instruction="pick up the red block")).tolist()
    with HubServer(tmp_path / "hub") as hub:
        good, oft = hub.root / "someone/good", hub.root / "someone/oft"
        model.save_pretrained(good)
        processor.save_pretrained(good)
        write_tiny_oft(oft)
        shutil.copytree(good, oft / "plain")

        loaded, refused, again = run_python(LOAD, image, **hub.env).stdout.splitlines()
        assert json.loads(loaded) == action
        assert refused == again
        assert "`action_dim=6` contradicts action_head--latest_checkpoint.pt of someone/oft" in refused
        # Both Auto classes ask for the commit, and the model for the files (the tree is for chat templates).
        asked = [request for request in hub.requests if "/api/models/someone/good" in request]
        assert len([request for request in asked if "/tree/" not in request]) == 3
        # The weights of a refused checkpoint are never downloaded.
        weights = [request for request in hub.requests if "/oft/resolve/" in request and "safetensors" in request]
        assert "/plain/" in weights[0]

        # Without a list of files, only the files in the cache are examined and loaded.
        cached = ["none 1", "l1 2"]
        assert run_python(LOAD_WITHOUT_THE_LIST, **hub.env).stdout.splitlines() == cached
        unknown = run_python(LOAD_WITHOUT_THE_LIST, **hub.env, HF_HOME=str(tmp_path / "empty")).stdout.splitlines()
        for repo, sentence in zip(("someone/good", "someone/oft"), unknown, strict=True):
            assert sentence.startswith(f"Cannot read the weights of {repo}: the Hub does not answer")
    assert run_python(LOAD_WITHOUT_THE_LIST, HF_HUB_OFFLINE="1").stdout.splitlines() == cached


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
@pytest.mark.parametrize("status", [401, 403, 429, 500, 0])
def test_statistics_of_an_adapter_that_cannot_be_read_are_not_those_of_its_base(shared, load, status):
    shared.faults["/someone/adapter/*/dataset_statistics.json"] = status
    with pytest.raises(OSError, match=r"Cannot read dataset_statistics\.json of someone/adapter"):
        load("someone/adapter")
    shared.faults.clear()
    assert list(load("someone/adapter").norm_stats) == ["mine"]


def test_without_a_network_an_adapter_is_not_reported_as_something_else(shared, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"someone/adapter: it is not in the cache, and offline mode"):
        onto_a_base("someone/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert list(onto_a_base("someone/adapter").norm_stats) == ["mine"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list(onto_a_base("someone/adapter").norm_stats) == ["mine"]
