"""Several cameras and the robot's state."""

import re

import numpy as np
import pytest
import torch

from openvla_hf.processing import OpenVLAImageProcessor, OpenVLAProcessor


CAMERAS = ["full_image", "left_wrist_image", "right_wrist_image"]
PATCHES = 4

pytestmark = pytest.mark.usefixtures("silent")


@pytest.fixture
def processor(tokenizer):
    return OpenVLAProcessor(
        OpenVLAImageProcessor(size=28), tokenizer, num_image_tokens=PATCHES, cameras=CAMERAS, state_dim=2
    )


@pytest.fixture
def make(tokenizer):
    """Return a function that builds a processor with the given fields."""
    return lambda **fields: OpenVLAProcessor(
        OpenVLAImageProcessor(size=28), tokenizer, num_image_tokens=PATCHES, **fields
    )


def prepare(processor, observations, **options):
    return processor(observations, instruction="open the drawer", **options)


def test_the_channels_of_one_camera_follow_those_of_the_one_before(processor, images):
    pixels = prepare(processor, images, state=[0.0, 1.0])["pixel_values"]
    assert pixels.shape == (1, 3 * 2 * 3, 28, 28)
    for index, image in enumerate(images):
        alone = processor.image_processor(image)["pixel_values"]
        assert torch.equal(pixels[:, 6 * index : 6 * index + 6], alone)


def test_cameras_are_given_in_order_or_by_name(processor, images):
    expected = prepare(processor, images, state=[0.0, 1.0])
    by_name = dict(zip(CAMERAS, images, strict=True))
    for one in (tuple(images), [images], by_name, dict(reversed(by_name.items())), [by_name]):
        for key, value in prepare(processor, one, state=[0.0, 1.0]).items():
            assert torch.equal(value, expected[key])


def test_a_batch_is_its_observations_one_by_one(processor, images):
    observations = [images, dict(zip(CAMERAS, images[::-1], strict=True)), [images[1]] * 3]
    states = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    tasks = ["open", "pick up the red block", "open the drawer"]
    batch = processor(observations, instruction=tasks, state=states)
    for row, (observation, task, state) in enumerate(zip(observations, tasks, states, strict=True)):
        single = processor(observation, instruction=task, state=state)
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        for key in ("pixel_values", "state"):
            assert torch.equal(batch[key][row], single[key][0])


def test_every_camera_has_its_placeholders_after_bos(processor, images):
    ids = prepare(processor, images, state=[0.0, 1.0])["input_ids"][0].tolist()
    text = prepare(processor, images, state=[0.0, 1.0], add_image_tokens=False)["input_ids"][0].tolist()
    counted = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    assert ids == [text[0]] + [processor.image_token_id] * sum(counted.num_image_tokens) + text[1:]
    assert counted.num_image_tokens == [PATCHES] * 3


def test_a_single_named_camera_takes_what_an_unnamed_one_takes(make, images):
    plain, named = make(), make(cameras=["front"])
    stack = np.stack([np.asarray(image.resize((28, 28))) for image in images])
    for one in (images[0], images, images[:1], stack):
        expected = prepare(plain, one)
        for key, value in prepare(named, one).items():
            assert torch.equal(value, expected[key])
    assert torch.equal(
        prepare(named, [{"front": image} for image in images])["pixel_values"], prepare(plain, images)["pixel_values"]
    )


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        lambda rows: np.array(rows, np.float32),
        torch.tensor,
        lambda rows: [np.array(row) for row in rows],
        lambda rows: [torch.tensor(row) for row in rows],
        lambda rows: [[torch.tensor(one) for one in row] for row in rows],
    ],
)
def test_the_state_is_copied_to_float64(processor, images, convert):
    rows = [[0.5, -1.25], [3.0, 0.0]]
    given = convert(rows)
    state = prepare(processor, [images, images], state=given)["state"]
    assert (state.dtype, state.tolist()) == (torch.float64, rows)
    assert prepare(processor, images, state=given[1])["state"].tolist() == [rows[1]]
    state.zero_()
    assert [[float(one) for one in row] for row in given] == rows


@pytest.mark.parametrize("as_array", [np.asarray, torch.tensor])
def test_the_callers_float64_state_is_not_shared(processor, images, as_array):
    given = as_array([0.5, 2.0])
    for options in ({}, {"return_tensors": "np"}, {"return_tensors": None}):
        inputs = prepare(processor, images, state=given, **options)
        inputs["state"][:] = 0
        assert given.tolist() == [0.5, 2.0]


def test_a_cast_of_the_inputs_leaves_the_state_exact(processor, images):
    value = 0.123456789012345
    inputs = prepare(processor, images, state=[value, 1.0]).to("cpu", torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["state"].dtype == torch.float64
    assert inputs["state"].tolist() == [[value, 1.0]]
    assert list(inputs) == ["input_ids", "attention_mask", "pixel_values", "state"]


LISTED = "'full_image', 'left_wrist_image', 'right_wrist_image'"
ONE_EACH = rf"must have one image from each camera \({LISTED}\), got "


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        ("image", f"The observation {ONE_EACH}1 image. Pass a list"),
        (["image"] * 2, f"The observation {ONE_EACH}2 images"),
        ([["image"] * 3, ["image"] * 4], f"Observation 1 {ONE_EACH}4 images"),
        ([["image"] * 3, "image"], f"Observation 1 {ONE_EACH}1 image"),
        ([[]], f"The observation {ONE_EACH}0 images"),
        ([], "The list of images is empty"),
        ("batch", rf"The observation {ONE_EACH}a ndarray of shape \(3, 28, 28, 3\) as an image"),
        (["batch", "batch", "batch"], rf"{ONE_EACH}a ndarray of shape \(3, 28, 28, 3\) as an image"),
        ({"full_image": "image"}, f"has no image from 'left_wrist_image', 'right_wrist_image'. .* {LISTED}"),
        (
            {"full_image": "image", "left_wrist": "image"},
            r"unknown camera 'left_wrist'. Did you mean 'left_wrist_image'\?",
        ),
        (
            dict.fromkeys([*CAMERAS, "depth"], "image"),
            rf"unknown camera 'depth'. This .* cameras are {LISTED}: .* as `cameras=`",
        ),
        ({name: ["image"] for name in CAMERAS}, f"{ONE_EACH}a list as an image"),
    ],
)
def test_a_wrong_set_of_cameras_is_refused_in_one_sentence(processor, images, observations, message):
    def fill(value):
        if isinstance(value, dict):
            return {name: fill(each) for name, each in value.items()}
        if isinstance(value, list):
            return [fill(each) for each in value]
        return images[0] if value == "image" else np.zeros((3, 28, 28, 3), np.uint8)

    with pytest.raises(ValueError, match=message):
        prepare(processor, fill(observations), state=[0.0, 1.0])


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, ValueError, "The state is missing: pass `state=` with the 2 dimensions"),
        ([0.0] * 3, ValueError, r"must have 2 dimensions for each observation, got 3 dimensions\.$"),
        ([[0.0] * 7], ValueError, "must have 2 dimensions for each observation, got 7 dimensions"),
        (0.5, ValueError, r"must have 2 dimensions for each observation, got shape \(\)"),
        (np.zeros((1, 1, 2)), ValueError, r"must have 2 dimensions for each observation, got shape \(1, 1, 2\)"),
        ([], ValueError, "must have 2 dimensions for each observation, got 0 dimensions"),
        ([[0.0, 1.0]] * 3, ValueError, "Got 3 states for 1 observations: give a state of 2 dimensions for each"),
        ([[0.0, 1.0], [0.0]], ValueError, r"states differ in length \(2, 1 dimensions\)"),
        ([0.0, float("nan")], ValueError, "Dimension 1 of state 0 is nan: give 2 finite numbers"),
        (torch.tensor([float("inf"), 0]), ValueError, "Dimension 0 of state 0 is inf"),
        ("home", TypeError, "A state must consist of numbers, got 'home'"),
        ([0.0, None], TypeError, "A state must consist of numbers, got None"),
        ({"joints": [0.0, 1.0]}, TypeError, "A state must consist of numbers, got {'joints'"),
    ],
)
def test_a_wrong_state_is_refused_in_one_sentence(processor, images, state, error, message):
    with pytest.raises(error, match=message):
        prepare(processor, images, state=state)


def test_a_plain_processor_refuses_a_list_of_images_as_one_observation(make, images):
    image, other, _ = images
    wrong = (
        ([[image, other]], "Observation 0 .* a single camera, got 2 images"),
        ([image, [image, other]], "Observation 1 .* got 2 images"),
        ([[]], "Observation 0 .* got 0 images"),
        ([[[image, other]]], "Observation 0 .* got a list as an image"),
        ([[np.zeros((2, 28, 28, 3), np.uint8)]], r"Observation 0 .* shape \(2, 28, 28, 3\) as an image"),
    )
    for observations, message in wrong:
        with pytest.raises(ValueError, match=f"{message}.* flat list of images, or .* `cameras=`"):
            prepare(make(), observations)
    nested = prepare(make(), [[image], [other]])["pixel_values"]
    assert torch.equal(nested, prepare(make(), [image, other])["pixel_values"])


def test_one_state_does_not_serve_a_batch(processor, images):
    with pytest.raises(ValueError, match="Got 1 states for 2 observations"):
        prepare(processor, [images, images], state=[0.0, 1.0])


def test_a_plain_processor_refuses_a_state_and_names(make, images):
    with pytest.raises(ValueError, match=r"takes none: leave `state=` out\. .* `state_dim=`"):
        prepare(make(), images[0], state=[0.0])
    for one in ({"front": images[0]}, [{"front": images[0]}] * 2):
        with pytest.raises(ValueError, match=r"camera name \('front'\), but .* `cameras=`"):
            prepare(make(), one)
    with pytest.raises(ValueError, match="Got 2 texts for 1 observations: give one of the observations"):
        make(cameras=["front"])(images[0], instruction=["open", "open"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cameras": "front"}, "`cameras` must be a list of different names, got 'front'"),
        ({"cameras": []}, "`cameras` must be a list of different names"),
        ({"cameras": ["front", "front"]}, "`cameras` must be a list of different names"),
        ({"cameras": ["front", 3]}, "`cameras` must be a list of different names"),
        ({"state_dim": 0}, "`state_dim` must be at least 1, or None"),
        ({"state_dim": "8"}, "`state_dim` must be at least 1, or None"),
    ],
)
def test_bad_fields(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_cameras_and_state_are_saved_and_their_absence_leaves_no_trace(processor, make, images, tmp_path):
    processor.save_pretrained(tmp_path / "several")
    again = OpenVLAProcessor.from_pretrained(tmp_path / "several")
    assert (again.cameras, again.state_dim) == (CAMERAS, 2)
    expected = prepare(processor, images, state=[0.0, 1.0])
    for key, value in prepare(again, images, state=[0.0, 1.0]).items():
        assert torch.equal(value, expected[key])
    make().save_pretrained(tmp_path / "plain")
    text = (tmp_path / "plain/processor_config.json").read_text()
    assert not re.search("cameras|state", text)
    plain = OpenVLAProcessor.from_pretrained(tmp_path / "plain")
    assert (plain.cameras, plain.state_dim) == (None, None)
    assert list(prepare(plain, images[0])) == ["input_ids", "attention_mask", "pixel_values"]
    changed = OpenVLAProcessor.from_pretrained(tmp_path / "several", cameras=["front"], state_dim=None)
    assert (changed.cameras, changed.state_dim) == (["front"], None)
