"""Repositories that an earlier version of the package pushed act as they did then (see pushed_before/README.md)."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from interpreters import WITHOUT_THE_PACKAGE
from PIL import Image
from transformers import AutoModel, AutoProcessor

from openvla_hf import load_adapter
from openvla_hf.checkpoints.describe import describe


KEPT = Path(__file__).parent / "pushed_before"
EXPECTED = json.loads((KEPT / "expected.json").read_text())

REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import json, sys

from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, instruction = sys.argv[1:]
trusted = {"trust_remote_code": True}
model = AutoModel.from_pretrained(f"{folder}/policy", **trusted)
assert type(model).__module__.startswith("transformers_modules."), type(model)
for name in ("policy", "policy-adapter"):
    if name == "policy-adapter":
        model.load_adapter(f"{folder}/policy-adapter")
    processor = AutoProcessor.from_pretrained(f"{folder}/{name}", **trusted)
    inputs = processor(Image.open(f"{folder}/image.png"), instruction=instruction)
    details = model.predict_action(**inputs, return_details=True)
    print(json.dumps({"action": details.actions[0].tolist(), "token_ids": details.token_ids[0].tolist()}))
"""
)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Folder of the two repositories' files."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(KEPT / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def act(model, repository, before):
    processor = AutoProcessor.from_pretrained(repository)
    inputs = processor(Image.open(before / "image.png"), instruction=EXPECTED["instruction"])
    details = model.predict_action(**inputs, return_details=True)
    return {"action": details.actions[0].tolist(), "token_ids": details.token_ids[0].tolist()}


def test_a_policy_and_an_adapter_pushed_before_act_as_they_did(before):
    model = AutoModel.from_pretrained(before / "policy")
    assert type(model).__module__.startswith("openvla_hf.")
    assert act(model, before / "policy", before) == EXPECTED["policy"]
    load_adapter(model, before / "policy-adapter")
    assert act(model, before / "policy-adapter", before) == EXPECTED["adapter"]
    assert describe(before / "policy").has_code
    assert describe(before / "policy-adapter").base_model == "lab/policy"


def test_a_repository_of_an_adapter_pushed_before_finds_its_base(before, owner):
    for name in ("policy", "policy-adapter"):
        shutil.copytree(before / name, owner.root / "lab" / name)
    model = AutoModel.from_pretrained("lab/policy-adapter")
    assert act(model, "lab/policy-adapter", before) == EXPECTED["adapter"]


def test_a_policy_and_an_adapter_pushed_before_act_by_their_own_code(before, run_python):
    result = run_python(REMOTE, before, EXPECTED["instruction"])
    assert [json.loads(line) for line in result.stdout.splitlines()] == [EXPECTED["policy"], EXPECTED["adapter"]]


def test_a_policy_pushed_before_keeps_acting_when_it_is_saved_again(before, tmp_path):
    AutoModel.from_pretrained(before / "policy").save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(before / "policy").save_pretrained(tmp_path / "again")
    assert act(AutoModel.from_pretrained(tmp_path / "again"), tmp_path / "again", before) == EXPECTED["policy"]
