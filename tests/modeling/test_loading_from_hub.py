"""What the Hub holds is loaded as what is on disk, and refused as that is."""

import json
import shutil

import pytest
from hub_server import HubServer
from PIL import Image

from openvla_hf.testing import fake_episode


OFT_FILE = "action_head--150000_checkpoint.pt"

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
        load.from_pretrained("someone/oft")
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
AutoModel.from_pretrained("someone/good")
try:
    AutoModel.from_pretrained("someone/oft")
except ValueError as error:
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
        shutil.copytree(good, oft)
        shutil.copytree(good, oft / "plain")
        (oft / OFT_FILE).write_bytes(b"weights")

        loaded, refused, again = run_python(LOAD, image, **hub.env).stdout.splitlines()
        assert json.loads(loaded) == action
        assert refused == again
        assert f"someone/oft is an OpenVLA-OFT checkpoint (it holds '{OFT_FILE}')" in refused
        # Both Auto classes ask which commit it is, and the model for the files (the tree is for chat templates).
        asked = [request for request in hub.requests if "/api/models/someone/good" in request]
        assert len([request for request in asked if "/tree/" not in request]) == 3
        # What is refused is not downloaded first.
        weights = [request for request in hub.requests if "/oft/resolve/" in request and "safetensors" in request]
        assert "/plain/" in weights[0]

        # Where there is no list the model loads as ever, and what was fetched of it is looked at.
        assert run_python(LOAD_WITHOUT_THE_LIST, **hub.env).stdout.strip() == refused
        assert run_python(LOAD_WITHOUT_THE_LIST, **hub.env, HF_HOME=str(tmp_path / "empty")).stdout == ""
    assert run_python(LOAD_WITHOUT_THE_LIST, HF_HUB_OFFLINE="1").stdout.strip() == refused
