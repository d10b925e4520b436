"""Claims that need the full recordings or Llama's tokenizer: deselected unless `--golden DIR` gives them."""

import json

import pytest
import test_parity as parity
import torch
from make_fixture import main as make_fixture
from PIL import Image
from recordings import KEPT, Recorded, read_tower_overrides, unpack
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.convert import convert


CASES = ["fused-224", "siglip-224"]


def test_the_kept_files_are_made_from_the_full_recordings(golden, tmp_path):
    """Byte for byte, except for numbers to which our own float32 computation contributes, and for images.

    The kept images were compressed again without loss, so their pixels are compared.
    """
    made = tmp_path / "made"
    make_fixture(golden, made)
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in (made, KEPT)]
    assert names[0] == names[1]
    for case in (folder.name for folder in KEPT.iterdir()):
        again = unpack(case, tmp_path / "again" / case, made)
        for path in unpack(case, tmp_path / "kept" / case).rglob("*.*"):
            other = again / path.relative_to(tmp_path / "kept" / case)
            if path.suffix in (".png", ".webp"):
                ours, theirs = Image.open(other).convert("RGBA"), Image.open(path).convert("RGBA")
                assert ours.size == theirs.size, path
                assert ours.tobytes() == theirs.tobytes(), path
                continue
            if path.suffix != ".safetensors":
                assert other.read_bytes() == path.read_bytes(), path
                continue
            ours, theirs = load_file(other), load_file(path)
            assert ours.keys() == theirs.keys(), path
            for name, tensor in theirs.items():
                tolerance = 1e-4 if name == "train.left_out" else 0
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_stand_in_gives_the_ids_of_llamas_tokenizer(golden, case, tmp_path):
    full, kept = Recorded(golden / case), Recorded(unpack(case, tmp_path))
    prompts = json.loads((KEPT / case / "prompts.json").read_text())
    for prompt in prompts:
        assert kept.processor(prompt, kept.images[0])["input_ids"].equal(
            full.processor(prompt, kept.images[0])["input_ids"]
        )


def test_the_recordings_of_the_shards_are_those_of_the_whole(golden):
    whole, sharded = Recorded(golden / "fused-224"), Recorded(golden / "sharded")
    expected = sharded.expected["fp32"]
    assert expected["predictions"] == whole.expected["predictions"]
    assert expected["train"].items() <= whole.expected["train"].items()
    for name, tensor in sharded.tensors.items():
        if name.startswith("fp32."):
            assert torch.equal(whole.tensors[name.removeprefix("fp32.")][: len(tensor)], tensor)


@pytest.mark.parametrize("case", CASES)
def test_recorded_tokenizer_strings_survive_a_save(golden, case, tmp_path):
    strings = json.loads((golden / "action-tokenizer" / "expected.json").read_text())["tokenizer_strings"]
    AutoProcessor.from_pretrained(golden / case / "checkpoint").save_pretrained(tmp_path)
    for folder in (golden / case / "checkpoint", tmp_path):
        tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
        for string in strings:
            assert tokenizer(string["text"])["input_ids"] == string["input_ids"]
            assert tokenizer.decode(string["input_ids"]) == string["decoded"]


@pytest.fixture(scope="module")
def trained(golden, tmp_path_factory):
    """The recorded training run, converted, with the recordings of the checkpoint that has the same weights."""
    run, record = golden / "prismatic-pt", Recorded(golden / "fused-224")
    text_config = json.loads((run / "tiny_dims.json").read_text())["llm"]
    record.checkpoint = convert(
        run,
        tmp_path_factory.mktemp("trained") / "converted",
        tokenizer=record.checkpoint,
        text_config=text_config,
        **read_tower_overrides(run),
    )
    record.overrides = {}
    return record


def test_a_training_run_is_converted_bit_for_bit(golden, trained):
    """The published code converts the recorded run to the same weights."""
    published = Recorded(golden / "fused-224").load(dtype="auto").state_dict()
    ours = AutoModel.from_pretrained(trained.checkpoint, dtype="auto").state_dict()
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in published.items())


def test_a_converted_training_run_meets_every_recording(trained):
    parity.test_pixels(trained)
    parity.test_features_and_projector(trained)
    parity.test_forward(trained)
    for placeholders in (True, False):
        parity.test_every_step_of_every_prediction(trained, placeholders)
    parity.test_training_loss_and_metrics(trained)
