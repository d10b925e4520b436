import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from openvla_hf.serving.errors import TooLarge, Unprocessable
from openvla_hf.serving.observation_keys import read_observation
from openvla_hf.serving.service import Service, ServiceOptions


PLAIN = ["image"]
LIBERO = ["full_image", "wrist_image"]
ALOHA = ["full_image", "left_wrist_image", "right_wrist_image"]


def service(cameras, state_dim=None, **options):
    return SimpleNamespace(
        policy=SimpleNamespace(cameras=cameras, state_dim=state_dim), options=ServiceOptions(**options)
    )


def image(level=0, shape=(4, 5, 3)):
    return np.full(shape, level, np.uint8)


LIBERO_CLIENT = {
    "observation/image": image(1),
    "observation/wrist_image": image(2),
    "observation/state": np.arange(8.0),
    "prompt": "open the drawer",
}
DROID_CLIENT = {
    "observation/exterior_image_1_left": image(1),
    "observation/wrist_image_left": image(2),
    "observation/joint_position": np.arange(7.0),
    "observation/gripper_position": np.array([7.0]),
    "prompt": "open the drawer",
}
ALOHA_CLIENT = {
    "state": np.arange(14.0),
    "images": {
        "cam_high": image(1, (3, 4, 5)),
        "cam_low": image(4, (3, 4, 5)),
        "cam_left_wrist": image(2, (3, 4, 5)),
        "cam_right_wrist": image(3, (3, 4, 5)),
    },
    "prompt": "open the drawer",
}
OFT_CLIENT = {"full_image": image(1), "wrist_image": image(2), "state": [0, 1, 2, 3, 4, 5, 6, 7], "task": "open it"}
OFT_ALOHA_CLIENT = {
    "full_image": image(1), "left_wrist_image": image(2), "right_wrist_image": image(3), "state": np.arange(14.0),
    "instruction": "open the drawer",
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "cameras", "state_dim"),
    [
        (LIBERO_CLIENT, LIBERO, 8),
        (DROID_CLIENT, LIBERO, 8),
        (ALOHA_CLIENT, ALOHA, 14),
        (ALOHA_CLIENT, ["high", "left_wrist", "right_wrist"], 14),
        (ALOHA_CLIENT, ["cam_high", "cam_left_wrist"], 14),
        (OFT_CLIENT, LIBERO, 8),
        (OFT_ALOHA_CLIENT, ALOHA, 14),
        (LIBERO_CLIENT, PLAIN, None),
        (DROID_CLIENT, PLAIN, None),
        (ALOHA_CLIENT, PLAIN, None),
        (OFT_CLIENT, PLAIN, None),
        ({"observation": {"images": {"front": image(1)}, "state": np.zeros(2)}, "prompt": "open it"}, ["front"], None),
    ],
)
def test_the_keys_of_known_clients_name_the_cameras_the_state_and_the_instruction(message, cameras, state_dim):
    observation = read_observation(message, service(cameras, state_dim))
    assert {name: one.flat[0] for name, one in observation.images.items()} == {
        name: index + 1 for index, name in enumerate(cameras)
    }
    assert observation.instruction in ("open the drawer", "open it")
    if state_dim is None:
        assert observation.state is None
    else:
        np.testing.assert_array_equal(observation.state, np.arange(float(state_dim)))


@pytest.mark.parametrize(
    "shape_and_dtype", [((4, 5, 3), "u1"), ((3, 4, 5), "u1"), ((4, 5, 3), "f4"), ((3, 4, 5), "f8")]
)
def test_images_in_any_order_and_scale_give_the_same_inputs(plain_policy, make_observation, shape_and_dtype):
    shape, dtype = shape_and_dtype
    levels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    sent = levels if shape[-1] == 3 else levels.transpose(2, 0, 1)
    sent = sent if dtype == "u1" else (sent / 255).astype(dtype)
    observation = read_observation({"image": sent, "prompt": "go"}, Service(plain_policy))
    pixels = plain_policy.prepare(observation).inputs["pixel_values"]
    expected = plain_policy.prepare(dataclasses.replace(observation, images={"image": levels})).inputs["pixel_values"]
    np.testing.assert_array_equal(pixels, expected)


def test_a_camera_key_wins_over_the_usual_names():
    message = LIBERO_CLIENT | {"cameras": {"front": image(9)}}
    observation = read_observation(message, service(LIBERO, 8, camera_keys={"full_image": "cameras/front"}))
    assert [one.flat[0] for one in observation.images.values()] == [9, 2]


def test_two_cameras_never_see_the_same_image():
    with pytest.raises(Unprocessable, match="'full_image' and 'wrist_image' would both see the image"):
        read_observation(LIBERO_CLIENT, service(LIBERO, 8, camera_keys={"wrist_image": "observation/image"}))


def test_a_camera_key_for_an_unknown_camera_is_refused(chunk_policy):
    with pytest.raises(ValueError, match="no camera 'front': its cameras are 'full_image', 'wrist_image'"):
        Service(chunk_policy, ServiceOptions(camera_keys={"front": "image"}))


def test_an_unnorm_key_is_passed_on():
    assert read_observation(LIBERO_CLIENT | {"unnorm_key": "arm"}, service(PLAIN)).unnorm_key == "arm"
    assert read_observation(LIBERO_CLIENT | {"unnorm_key": None}, service(PLAIN)).unnorm_key is None


def without(message, *keys):
    return {key: value for key, value in message.items() if key not in keys}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ([1], ["map", "list"]),
        (None, ["map", "NoneType"]),
        ({}, ["no image of the camera 'full_image': it is empty", "--camera full_image=KEY"]),
        (without(LIBERO_CLIENT, "observation/wrist_image"), [
            "'wrist_image'", "'observation/image', 'observation/state' and 'prompt'", "'full_image' and 'wrist_image'",
            "--camera wrist_image=KEY",
        ]),
        (LIBERO_CLIENT | {"image": image()}, ["'full_image' could be 'observation/image' or 'image'"]),
        (LIBERO_CLIENT | {"images": {"cam_high": image()}}, ["could be 'observation/image' or 'images/cam_high'"]),
        (LIBERO_CLIENT | {"observation": {"image": image()}}, ["'observation/image' twice"]),
        (LIBERO_CLIENT | {"observation/image": "/etc/passwd"}, ["'observation/image' must be an array", "str"]),
        (LIBERO_CLIENT | {"observation/image": image(0, (2, 4, 5, 3))}, ["must be an array", "(2, 4, 5, 3)"]),
        (LIBERO_CLIENT | {"observation/image": np.array(1)}, ["must be an array", "()"]),
        (LIBERO_CLIENT | {b"prompt": "go"}, ["keys of an observation must be text", "bytes"]),
        (without(LIBERO_CLIENT, "prompt"), ["no instruction", "'prompt', 'instruction' or 'task'"]),
        (LIBERO_CLIENT | {"prompt": 5}, ["'prompt' must be text", "int"]),
        (LIBERO_CLIENT | {"task": "close the drawer"}, ["different instructions in 'prompt' and 'task'"]),
        (LIBERO_CLIENT | {"unnorm_key": 1}, ["'unnorm_key' must be text"]),
        (LIBERO_CLIENT | {"unnorm_key": ""}, ["of 1 to 200 characters"]),
        (LIBERO_CLIENT | {"unnorm_key": "x" * 10**6}, ["of 1 to 200 characters"]),
        (without(LIBERO_CLIENT, "observation/state"), ["no state", "'state' or 'joint_position' and"]),
        (without(DROID_CLIENT, "observation/gripper_position"), ["no state", "'observation/joint_position'"]),
        (LIBERO_CLIENT | {"state": np.zeros(8)}, ["'observation/state' and 'state'"]),
        (DROID_CLIENT | {"state": np.zeros(8)}, ["'state', 'observation/joint_position' and"]),
        (DROID_CLIENT | {"joint_position": np.zeros(7)}, ["could be any of"]),
        (LIBERO_CLIENT | {"observation/state": "0 0 0"}, ["must be an array of numbers", "str"]),
        (LIBERO_CLIENT | {"observation/state": [0, "1"]}, ["must be an array of numbers"]),
        (LIBERO_CLIENT | {"observation/state": [10**400, 1.5]}, ["state"]),
        (LIBERO_CLIENT | {"observation/state": np.zeros((2, 8))}, ["vector", "(2, 8)"]),
        (LIBERO_CLIENT | {"observation/state": np.zeros(8, bool)}, ["vector", "bool"]),
    ],
)  # fmt: skip
def test_an_observation_that_does_not_say_what_it_holds_is_refused(message, words):
    with pytest.raises(Unprocessable) as raised:
        read_observation(message, service(LIBERO, 8))
    for word in words:
        assert word in raised.value.reason
    assert raised.value.reason.endswith(".")


def test_instructions_that_agree_may_be_sent_twice():
    assert read_observation(LIBERO_CLIENT | {"task": "open the drawer"}, service(PLAIN)).instruction


def test_a_long_list_of_keys_is_cut():
    message = {f"{'k' * 1000}{number}": 0 for number in range(1000)}
    with pytest.raises(Unprocessable) as raised:
        read_observation(message, service(PLAIN))
    assert "and 976 more" in raised.value.reason
    assert len(raised.value.reason) < 4000


@pytest.mark.parametrize("shape", [(4, 5, 3), (3, 4, 5), (4, 5, 4), (4, 5)])
def test_an_image_with_too_many_pixels_is_refused_in_any_order(shape):
    message = {"image": image(0, shape), "prompt": "go"}
    read_observation(message, service(PLAIN, max_pixels=20))
    with pytest.raises(TooLarge, match="has 20 pixels, and this server takes at most 19"):
        read_observation(message, service(PLAIN, max_pixels=19))


@pytest.mark.parametrize("image", ["/etc/hostname", "http://127.0.0.1:1/a.png", np.zeros((2, 4, 4, 3), np.uint8), [0]])
def test_a_policy_opens_no_files_and_takes_no_batches(plain_policy, make_observation, image):
    with pytest.raises(TypeError, match="must be a PIL image or an array"):
        plain_policy.prepare(dataclasses.replace(make_observation(plain_policy), images={"image": image}))
