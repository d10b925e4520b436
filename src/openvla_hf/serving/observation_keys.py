"""Read observations with the keys that clients of openpi and OpenVLA-OFT send.

- openpi on LIBERO: `observation/image`, `observation/wrist_image`, `observation/state` and `prompt`,
- openpi on DROID: `observation/exterior_image_1_left`, `observation/wrist_image_left`, `observation/joint_position`,
  `observation/gripper_position` and `prompt`,
- openpi on ALOHA: `images` with `cam_high`, `cam_left_wrist` and `cam_right_wrist`; `state` and `prompt`,
- OpenVLA-OFT: `full_image`, `wrist_image` or `left_wrist_image` and `right_wrist_image`; `state` and `instruction`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import TooLarge, Unprocessable
from .policy import Observation
from .service import Service


PREFIXES = ("observation/", "images/")
"""Groups of keys that are ignored: `observation/images/cam_high` is read as `cam_high`."""
MAIN_CAMERA = ("exterior_image_1_left", "cam_high")
CAMERA_ALIASES = {
    "image": ("full_image", *MAIN_CAMERA),
    "full_image": ("image", *MAIN_CAMERA),
    "wrist_image": ("wrist_image_left",),
    "left_wrist_image": ("cam_left_wrist",),
    "right_wrist_image": ("cam_right_wrist",),
}
"""Camera of a policy -> keys for its image, if no key has the camera's own name."""
STATES = (("state",), ("joint_position", "gripper_position"))
"""Keys of states, whose values are joined in this order."""
INSTRUCTIONS = ("prompt", "instruction", "task")
UNNORM_KEY = "unnorm_key"
MAX_UNNORM_KEY = 200
MAX_LISTED = 24
"""Largest number of keys that an error lists."""
MAX_NAME = 100
"""Longest key in an error, in characters."""


def read_observation(message: Any, service: Service) -> Observation:
    """Read an observation by the names of its keys.

    Args:
        message: Map, flat with keys such as "observation/image" or nested. Images are arrays that the processor takes.
            Keys that the policy does not need are ignored, such as a state if the policy does not see it.
        service: The service, for the policy's cameras and the options `camera_keys` and `max_pixels`.

    Raises:
        Unprocessable: A key is missing or ambiguous, or its value has the wrong type.
        TooLarge: An image has too many pixels.
    """
    if not isinstance(message, Mapping):
        raise Unprocessable(f"An observation must be a map from keys to values, got a {type(message).__name__}.")
    sent = _Sent(message)
    policy, options = service.policy, service.options
    cameras: dict[str, str] = {}  # key -> camera
    for camera in policy.cameras:
        key = _find_camera(sent, camera, policy.cameras, options.camera_keys)
        if key in cameras:
            raise Unprocessable(
                f"The cameras {cameras[key]!r} and {camera!r} would both see the image {key!r}. Name the key of each "
                "camera with `--camera` when you start the server."
            )
        cameras[key] = camera
    images = {camera: _check_image(key, sent.values[key], options.max_pixels) for key, camera in cameras.items()}
    return Observation(
        images,
        _read_instruction(sent),
        None if policy.state_dim is None else _read_state(sent),
        _read_unnorm_key(sent),
    )


class _Sent:
    """The values of an observation by their full keys, and the full keys by their names without `PREFIXES`."""

    def __init__(self, message: Mapping[Any, Any]):
        self.values: dict[str, Any] = {}
        self._flatten(message, "")
        self._keys: dict[str, list[str]] = {}
        for key in self.values:
            name = key
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            self._keys.setdefault(name, []).append(key)

    def _flatten(self, message: Mapping[Any, Any], group: str) -> None:
        for name, value in message.items():
            if not isinstance(name, str):
                raise Unprocessable(f"The keys of an observation must be text, got a {type(name).__name__}.")
            key = group + name
            if isinstance(value, Mapping):
                self._flatten(value, f"{key}/")
            elif key in self.values:
                raise Unprocessable(
                    f"The observation has the key {key[:MAX_NAME]!r} twice, flat and nested: send one."
                )
            else:
                self.values[key] = value

    def find(self, names: Iterable[str]) -> list[str]:
        """List the full keys with one of the names."""
        return [key for name in names for key in self._keys.get(name, ())]

    def __str__(self) -> str:
        if not self.values:
            return "is empty"
        names = [repr(key[:MAX_NAME]) for key in self.values]
        if len(names) > MAX_LISTED:
            names[MAX_LISTED:] = [f"{len(names) - MAX_LISTED} more"]
        return f"has the keys {_join(names)}"


def _find_camera(sent: _Sent, camera: str, cameras: Sequence[str], camera_keys: Mapping[str, str]) -> str:
    """Return the key of a camera's image."""
    known = f"This policy's cameras are {_join(map(repr, cameras))}"
    if camera in camera_keys:
        if camera_keys[camera] not in sent.values:
            raise Unprocessable(
                f"The observation has no {camera_keys[camera]!r}, which `--camera` names as the image of {camera!r}. "
                f"It {sent}."
            )
        return camera_keys[camera]
    aliases = CAMERA_ALIASES.get(camera, (f"cam_{camera}",))
    found = sent.find([camera]) or sent.find(aliases)
    if not found:
        raise Unprocessable(
            f"The observation has no image of the camera {camera!r}: it {sent}. {known}. Send these "
            f"names, or start the server with `--camera {camera}=KEY`."
        )
    if len(found) > 1:
        raise Unprocessable(
            f"The image of the camera {camera!r} could be {_join(map(repr, found), 'or')}. {known}. Send one of them, "
            f"or start the server with `--camera {camera}=KEY`."
        )
    return found[0]


def _check_image(key: str, image: Any, max_pixels: int) -> np.ndarray:
    # Refuse text, which the processor would open as a path or a URL, and batches.
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        shape = f"of shape {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise Unprocessable(f"The image {key!r} must be an array of shape (H, W, 3) or (3, H, W), got {shape}.")
    pixels = image.size // (min(image.shape) if image.ndim == 3 else 1)
    if pixels > max_pixels:
        raise TooLarge(
            f"The image {key!r} has {pixels} pixels, and this server takes at most {max_pixels}: send a smaller one."
        )
    return image


def _read_instruction(sent: _Sent) -> str:
    found = sent.find(INSTRUCTIONS)
    texts = {key: sent.values[key] for key in found}
    if not found:
        raise Unprocessable(
            f"The observation has no instruction: it {sent}. Send the instruction as "
            f"{_join(map(repr, INSTRUCTIONS), 'or')}."
        )
    for key, text in texts.items():
        if not isinstance(text, str):
            raise Unprocessable(f"The instruction {key!r} must be text, got a {type(text).__name__}.")
    if len({*texts.values()}) > 1:
        raise Unprocessable(f"The observation has different instructions in {_join(map(repr, found))}: send one.")
    return texts[found[0]]


def _read_state(sent: _Sent) -> np.ndarray:
    """Join the parts of the state, in float64."""
    parts = [[sent.find([name]) for name in names] for names in STATES]
    complete = [keys for keys in parts if all(keys)]
    if not complete:
        raise Unprocessable(
            f"The observation has no state, which this policy needs: it {sent}. Send the state as "
            f"{' or '.join(_join(map(repr, names)) for names in STATES)}."
        )
    keys = [key for part in complete for alternatives in part for key in alternatives]
    if len(complete) > 1 or len(keys) > len(complete[0]):
        raise Unprocessable(f"The state could be any of {_join(map(repr, keys))}: send one state.")
    return np.concatenate([_read_numbers(key, sent.values[key]) for key in keys])


def _read_numbers(key: str, value: Any) -> np.ndarray:
    """Return a vector. A single number gives a vector of length 1."""
    is_list = isinstance(value, list) and all(isinstance(one, int | float | np.generic) for one in value)
    if not is_list and not isinstance(value, int | float | np.ndarray | np.generic):
        raise Unprocessable(f"The state {key!r} must be an array of numbers, got a {type(value).__name__}.")
    try:
        numbers = np.atleast_1d(np.asarray(value))
        if numbers.dtype.kind not in "iuf" or numbers.ndim != 1:
            raise Unprocessable(
                f"The state {key!r} must be a vector of numbers, got {numbers.dtype} of shape {numbers.shape}."
            )
        return numbers.astype(np.float64)
    except OverflowError as error:
        raise Unprocessable(f"The state {key!r} has a number that is too large.") from error


def _read_unnorm_key(sent: _Sent) -> str | None:
    key = sent.values.get(UNNORM_KEY)
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= MAX_UNNORM_KEY):
        raise Unprocessable(f"The value of {UNNORM_KEY!r} must be text of 1 to {MAX_UNNORM_KEY} characters.")
    return key


def _join(names: Iterable[str], last: str = "and") -> str:
    """List names in words."""
    listed = list(names)
    return ", ".join(listed[:-1]) + f" {last} {listed[-1]}" if len(listed) > 1 else "".join(listed)


__all__ = ["read_observation"]
