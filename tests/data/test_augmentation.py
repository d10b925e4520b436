import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image

from openvla_hf.data import Augmentation
from openvla_hf.data.augmentation import change_colour
from openvla_hf.processing.image_resizing import resize_lanczos3
from openvla_hf.testing import tiny_processor


NOTHING = {"crop_area": 1.0, "brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 90)))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (256, 256), (90, 120), (224, 1), (7, 300)])
def test_without_any_change_it_resizes_like_tensorflow(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    distance = np.abs(Augmentation(**NOTHING)(noise).astype(int) - resize_lanczos3(noise, 224, 224))
    assert distance.max() <= 1
    assert np.mean(distance > 0) < 1e-3


def test_pictures_and_read_only_arrays_are_augmented_alike(image):
    augment = Augmentation(**NOTHING)
    assert not image.flags.writeable
    np.testing.assert_array_equal(augment(image), augment(Image.fromarray(image)))


def test_the_same_state_of_torch_draws_the_same_view_and_the_next_draw_another(image):
    torch.manual_seed(5)
    first, second = (Augmentation()(image) for _ in range(2))
    torch.manual_seed(5)
    np.testing.assert_array_equal(Augmentation()(image), first)
    assert np.abs(first.astype(int) - second).mean() > 1


@pytest.mark.parametrize("saturation", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("hue", [-0.05, 0.0, 0.05])
def test_colours_change_as_in_hsv(saturation, hue):
    levels = np.random.default_rng(1).random((3, 8, 8)).astype(np.float32)
    levels[:, 0, 0] = 0.5  # grey has no hue
    changed = change_colour(levels, saturation, hue)
    for before, after in zip(levels.reshape(3, -1).T, changed.reshape(3, -1).T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)
        np.testing.assert_allclose(after, expected, atol=1e-5)


def test_the_crop_keeps_its_share_of_the_area_wherever_it_falls():
    # Red gives the column and green the row, so the colours of a view show where it was cropped.
    ramp = np.linspace(0, 255, 224).round().astype(np.uint8)
    picture = np.stack([np.tile(ramp, (224, 1)), np.tile(ramp[:, None], (1, 224)), np.zeros((224, 224), np.uint8)], -1)
    crop = Augmentation(**NOTHING | {"crop_area": 0.9})
    lefts = []
    for _ in range(30):
        view = crop(picture).astype(float)
        width, height = np.ptp(view[100, :, 0]) / 255, np.ptp(view[:, 100, 1]) / 255
        assert width == pytest.approx(math.sqrt(0.9), abs=0.02)
        assert height == pytest.approx(math.sqrt(0.9), abs=0.02)
        lefts.append(view[100, 0, 0])
    assert np.ptp(lefts) > 5


def test_prediction_crops_the_centre_by_itself(image, tmp_path):
    processor = tiny_processor()
    saved = Augmentation().for_prediction(processor)
    saved.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert processor.image_processor.center_crop_area is None
    assert loaded.image_processor.center_crop_area == 0.9
    inputs = [each(image, instruction="push")["pixel_values"] for each in (processor, loaded)]
    assert not torch.equal(*inputs)
    assert Augmentation(crop_area=1.0).for_prediction(processor).image_processor.center_crop_area is None


def test_a_wrong_area_is_refused():
    with pytest.raises(ValueError, match="crop_area"):
        Augmentation(crop_area=1.5)
