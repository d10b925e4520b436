import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from openvla_hf.processing import OpenVLAImageProcessor


VARIANTS = ["resize-crop-fused", "resize-crop-fused-f32stats", "letterbox-fused", "resize-naive-siglip"]
STRATEGIES = ["resize-naive", "letterbox", "resize-crop"]


@pytest.fixture
def processor():
    return OpenVLAImageProcessor()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_original_bit_for_bit(golden, variant):
    folder = golden / "image-processor"
    cases = json.loads((folder / "cases.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    processor = OpenVLAImageProcessor.from_pretrained(folder / variant)
    indices = cases["variants"][variant]["images"]
    batch = processor([Image.open(folder / cases["images"][index]) for index in indices])["pixel_values"]
    for index, pixels in zip(indices, batch, strict=True):
        torch.testing.assert_close(pixels, expected[f"{variant}.{index}"], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["fused-224", "siglip-224", "sharded"])
def test_published_checkpoint(golden, case):
    processor = AutoImageProcessor.from_pretrained(golden / case / "checkpoint")
    expected = load_file(golden / ("fused-224" if case == "sharded" else case) / "expected.safetensors")
    paths = sorted(str(path) for path in (golden / case / "images").iterdir())
    torch.testing.assert_close(processor(paths)["pixel_values"], expected["pixel_values"], rtol=0, atol=0)


def test_published_config_becomes_ours(golden, tmp_path):
    published = golden / "image-processor" / "letterbox-fused"
    processor = AutoImageProcessor.from_pretrained(published)
    fields = processor.to_dict()
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "auto_map": {"AutoImageProcessor": "image_processing_openvla.OpenVLAImageProcessor"},
        "image_mean": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
        "image_processor_type": "OpenVLAImageProcessor",
        "image_resize_strategy": "letterbox",
        "image_std": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
        "letterbox_fill": [127, 127, 127],
        "resample": 3,
        "size": {"height": 224, "width": 224},
    }
    assert (tmp_path / "image_processing_openvla.py").is_file()
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == fields


def test_towers_of_different_sizes_are_refused(golden):
    config = json.loads((golden / "fused-224" / "checkpoint" / "preprocessor_config.json").read_text())
    config["tvf_resize_params"][1]["size"] = [384, 384]
    with pytest.raises(ValueError, match="differently resized"):
        OpenVLAImageProcessor.from_dict(config)


def test_a_published_config_without_its_transforms_is_refused():
    with pytest.raises(ValueError, match="config lacks"):
        OpenVLAImageProcessor.from_dict({"image_processor_type": "PrismaticImageProcessor", "means": []})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_is_resized_once_for_both_towers(strategy, images, monkeypatch):
    processor, calls, resize = OpenVLAImageProcessor(strategy), [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kwargs: calls.append(1) or resize(*args, **kwargs))
    assert processor(images[1])["pixel_values"].shape == (1, 6, 224, 224)
    assert len(calls) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("center_crop_area", [None, 0.9])
def test_round_trip_is_equal_pixel_for_pixel(strategy, center_crop_area, images, tmp_path):
    processor = OpenVLAImageProcessor(
        strategy, 32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], Image.Resampling.LANCZOS, (1, 2, 3), center_crop_area
    )
    processor.save_pretrained(tmp_path)
    again = OpenVLAImageProcessor.from_pretrained(tmp_path)
    pixels = processor(images)["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32)
    assert torch.equal(again(images)["pixel_values"], pixels)


def test_all_forms_of_an_image_are_equal(processor, images, tmp_path):
    image, array = images[1], np.asarray(images[1])
    image.save(tmp_path / "image.png")
    forms = [
        array,
        array.transpose(2, 0, 1),
        array.astype(np.int64),
        array.astype(np.float32),
        (array / 255).astype(np.float32),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array / 255).permute(2, 0, 1).requires_grad_(),
        np.concatenate([array, array[..., :1]], -1),
        array[None],
        [array],
        ([image],),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
    ]
    expected = processor(image)["pixel_values"]
    for form in forms:
        assert torch.equal(processor(form)["pixel_values"], expected)
    gray = image.convert("L")
    gray_pixels = processor(gray)["pixel_values"]
    for form in (np.asarray(gray), np.asarray(gray)[..., None], np.asarray(gray)[None]):
        assert torch.equal(processor(form)["pixel_values"], gray_pixels)
    # A dark image of integers is dark: only floats may mean [0, 1].
    dark = np.ones((8, 8, 3), np.int64)
    assert torch.equal(processor(dark)["pixel_values"], processor(dark.astype(np.uint8))["pixel_values"])


def test_a_batch_equals_its_images(processor, images):
    batch = processor(images)["pixel_values"]
    assert batch.shape == (3, 6, 224, 224)
    assert batch.dtype == torch.float32
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(processor(image)["pixel_values"][0], pixels)
    assert isinstance(processor(images, return_tensors=None)["pixel_values"], np.ndarray)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (None, TypeError, "cannot be a NoneType; pass a PIL image"),
        (3, TypeError, "cannot be a int"),
        ([[1, 2], [3, 4]], TypeError, "cannot be a int"),
        (b"bytes", TypeError, "cannot be a bytes"),
        ("pick up the red block", ValueError, "'pick up the red block' is not a file"),
        ([], ValueError, "empty list"),
        (np.zeros((1, 1, 4, 4, 3)), ValueError, "shape"),
        (np.zeros((2, 5, 5)), ValueError, r"shape \(2, 5, 5\) is no image"),
        (np.zeros((0, 5, 3)), ValueError, "is no image"),
        (np.zeros(5), ValueError, "is no image"),
        (np.full((4, 4, 3), -1.0), ValueError, "leave the normalisation"),
        (np.full((4, 4, 3), np.nan), ValueError, "nan"),
    ],
)
def test_what_is_no_image_is_refused_with_the_way_out(processor, bad, error, message):
    with pytest.raises(error, match=message):
        processor(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_resize_strategy": "stretch"}, "is none of"),
        ({"size": {"shortest_edge": 224}}, "height and a width"),
        ({"center_crop_area": 0.0}, r"fraction in \(0, 1\]"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "for 1 towers, image_std for 2"),
        ({"image_resize_strategy": "letterbox", "size": (224, 320)}, "square"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAImageProcessor(**fields)


def test_centre_crop_keeps_the_fraction_of_the_area(images):
    # On a ramp the crop is exact: pixel i samples 111.5 (1 - s) + s i of the old ones, s the side that stays.
    ramp = Image.fromarray(np.repeat(np.tile(np.arange(224, dtype=np.uint8), (224, 1))[..., None], 3, -1))
    processor = OpenVLAImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3, center_crop_area=0.81)
    levels = processor(ramp)["pixel_values"][0, 0] * 255
    expected = 111.5 * (1 - 0.9) + 0.9 * torch.arange(224.0)
    assert (levels - expected).abs().max() <= 0.51
    whole = OpenVLAImageProcessor(center_crop_area=1.0)(images[0])["pixel_values"]
    assert torch.equal(whole, OpenVLAImageProcessor()(images[0])["pixel_values"])


def test_centre_crop_is_set_at_load(tmp_path):
    OpenVLAImageProcessor().save_pretrained(tmp_path)
    assert OpenVLAImageProcessor.from_pretrained(tmp_path, center_crop_area=0.9).center_crop_area == 0.9
