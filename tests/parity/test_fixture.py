"""A part of the original code's outputs that is kept here: README.md says which."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from openvla_hf import OpenVLAImageProcessor


HERE = Path(__file__).resolve().parent
CASE = HERE / "fused-224"
VOCABULARY, TAIL, PIXEL_STRIDE = 32064, 31744, 16
FEATURES, PROJECTOR, LOGITS, PIXELS = 5e-5, 1e-4, 1e-4, 1e-6
IMAGES = load_file(HERE / "image-processor" / "expected.safetensors")


def error(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


@pytest.fixture(scope="module")
def model(tower_overrides, tmp_path_factory):
    """The checkpoint in the published layout; rows of the vocabulary that no recording uses are zero."""
    folder = tmp_path_factory.mktemp("checkpoint")
    weights = load_file(CASE / "weights.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        whole = weights[name].new_zeros(VOCABULARY, weights[name].shape[1])
        whole[weights.pop(f"{name}.ids")] = weights[name]
        weights[name] = whole
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((CASE / "config.json").read_text())
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **tower_overrides(CASE))


@pytest.fixture(scope="module")
def expected():
    return load_file(CASE / "expected.safetensors")


@pytest.fixture(scope="module")
def pixel_values():
    return OpenVLAImageProcessor.from_pretrained(CASE)(Image.open(CASE / "image.png"))["pixel_values"]


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    variant, image = name.split("/")
    config = json.loads((HERE / "image-processor" / f"{variant}.json").read_text())
    processor = OpenVLAImageProcessor.from_dict(config)
    pixels = processor(HERE / "image-processor" / image)["pixel_values"][0]
    assert error(pixels[:, ::PIXEL_STRIDE, ::PIXEL_STRIDE], IMAGES[name]) <= PIXELS


@torch.no_grad()
def test_features(model, expected, pixel_values):
    assert error(pixel_values[0, :, ::PIXEL_STRIDE, ::PIXEL_STRIDE], expected["pixel_values"]) <= PIXELS
    features = torch.cat([expected["dino_features"], expected["siglip_features"]], dim=-1)
    assert error(model.model.vision_backbone(pixel_values)[0], features) <= FEATURES
    assert error(model.get_image_features(pixel_values)[0], expected["projector_output"]) <= PROJECTOR


def test_actions(model, expected, pixel_values):
    for prediction in json.loads((CASE / "predictions.json").read_text()):
        k, input_ids = prediction["k"], torch.tensor([prediction["input_ids"]])
        details = model.predict_action(
            input_ids, pixel_values, unnorm_key=prediction["key"], constrained=False, return_details=True
        )
        assert details.token_ids.tolist() == [prediction["token_ids"]]
        assert np.array_equal(details.actions[0], expected[f"{k}.actions"])
        steps = len(prediction["token_ids"])
        outputs = model.generate(
            input_ids,
            pixel_values=pixel_values,
            max_new_tokens=steps,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert error(torch.cat(outputs.logits)[:, TAIL:], expected[f"{k}.step_logits_tail"]) <= LOGITS
