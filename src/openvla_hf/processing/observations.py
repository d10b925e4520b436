"""Camera images and robot states of observations."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature


class ObservationInputs(BatchFeature):
    """Inputs of the model. Its method `to` leaves the state as it is.

    `inputs.to("cuda", torch.bfloat16)` converts the pixels. A state in bfloat16 would lose most of its precision
    before the model normalises it, and some devices have no float64, so the state stays on the CPU in float64.
    """

    def to(self, *args: Any, **kwargs: Any) -> "ObservationInputs":
        """Move all inputs except the state to a device, and convert those that are floats."""
        state = self.data.pop("state", None)
        super().to(*args, **kwargs)
        if state is not None:
            self.data["state"] = state
        return self


def flatten_observations(images: Any, cameras: Sequence[str]) -> list[Any]:
    """List the images of one observation or a batch, each observation's images in the order of the cameras.

    Args:
        images: One observation or a list of them. An observation is a list with an image for each camera, or a dict
            from camera names to images. With a single camera, it may also be the image itself.
        cameras: Names of the cameras, in order.

    Raises:
        ValueError: A camera is missing or unknown, or an observation has the wrong number of images.
    """
    batch = _split_batch(images, len(cameras))
    flat: list[Any] = []
    for index, observation in enumerate(batch):
        name = f"Observation {index}" if len(batch) > 1 else "The observation"
        in_order = _pick_cameras(observation, cameras, name) if isinstance(observation, Mapping) else observation
        in_order = in_order if isinstance(in_order, (list, tuple)) else [in_order]
        if len(in_order) != len(cameras) or not all(map(_is_one_image, in_order)):
            raise ValueError(
                f"{name} must have one image from each camera ({_listed(cameras)}), got {_describe(in_order)}. Pass a "
                "list of the images in this order or a dict, and for a batch a list of these."
            )
        flat.extend(in_order)
    return flat


def read_frame_images(frame: Mapping[str, Any], cameras: Sequence[str] | None, name: str) -> Any:
    """Return the image of a recorded frame, or the list of its images in the order of the cameras.

    Args:
        frame: Frame with `image`, or with `images`, a dict from camera names to images in any order.
        cameras: The processor's cameras; `None` for a single camera without a name.
        name: What to call the frame in messages.

    Raises:
        ValueError: A camera is missing or unknown.
    """
    if "images" not in frame:
        return frame["image"]
    images = frame["images"]
    if cameras is not None:
        return _pick_cameras(images, cameras, name)
    if len(images) > 1:
        refuse_camera_names(images)
    return next(iter(images.values()))


def refuse_several_cameras(images: Any) -> None:
    """Raise `ValueError` for observations that a processor without camera names does not take.

    Args:
        images: An image, or a list with an image for each observation, which may itself be in a list.

    Raises:
        ValueError: The images have camera names, or an observation is a list of other than one image.
    """
    refuse_camera_names(images)
    for index, observation in enumerate(images if isinstance(images, (list, tuple)) else ()):
        in_list = observation if isinstance(observation, (list, tuple)) else [None]
        if len(in_list) != 1 or not _is_one_image(in_list[0]):
            raise ValueError(
                f"Observation {index} must be one image, since this processor has a single camera, got "
                f"{_describe(in_list)}. Pass a batch as a flat list of images, or load the processor with `cameras=`."
            )


def refuse_camera_names(images: Any) -> None:
    """Raise `ValueError` for images by camera name, which a processor without camera names does not take."""
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    if isinstance(first, Mapping):
        raise ValueError(
            f"Got images by camera name ({_listed(first)}), but this processor has a single camera without a name: "
            "pass the image itself, or load the processor with `cameras=`."
        )


def read_state(state: Any, state_dim: int | None, batch_size: int) -> np.ndarray | None:
    """Copy the states of a batch to float64.

    Args:
        state: (P,) for a single observation or (B, P), as an array, a tensor or nested lists, in robot units.
        state_dim: P; `None` if the model takes no state.
        batch_size: B.

    Returns:
        (B, P) float64, or `None` without a state.

    Raises:
        ValueError: The state is missing, has another shape or is not finite, or the model takes none.
        TypeError: The state does not consist of numbers.
    """
    if state_dim is None:
        if state is None:
            return None
        raise ValueError(
            "Got a state, but the policy of this processor takes none: leave `state=` out. If the policy does take a "
            "state, load the processor with `state_dim=`."
        )
    if state is None:
        raise ValueError(f"The state is missing: pass `state=` with the {state_dim} dimensions of the robot's state.")
    values = _to_float64(state)
    if values.ndim not in (1, 2) or values.shape[-1] != state_dim:
        got = f"{values.shape[-1]} dimensions" if values.ndim in (1, 2) else f"shape {values.shape}"
        raise ValueError(f"The state must have {state_dim} dimensions for each observation, got {got}.")
    values = np.atleast_2d(values)
    if len(values) != batch_size:
        raise ValueError(
            f"Got {len(values)} states for {batch_size} observations: give a state of {state_dim} dimensions for each."
        )
    if not np.isfinite(values).all():
        row, dimension = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"Dimension {dimension} of state {row} is {values[row, dimension]}: give {state_dim} finite numbers for "
            "each observation."
        )
    return values


def _split_batch(images: Any, num_cameras: int) -> list[Any]:
    """Return the observations of a batch. A flat list of images is one observation, unless there is one camera."""
    if not isinstance(images, (list, tuple)):
        is_batch = num_cameras == 1 and getattr(images, "ndim", 0) > 3
        return list(images) if is_batch else [images]
    if not images:
        raise ValueError("The list of images is empty: pass an observation or a list of them.")
    is_batch = num_cameras == 1 or any(isinstance(one, (list, tuple, Mapping)) for one in images)
    return list(images) if is_batch else [images]


def _pick_cameras(observation: Mapping[str, Any], cameras: Sequence[str], name: str) -> list[Any]:
    """Return the images of a dict in the order of the cameras."""
    known = (
        f"This processor's cameras are {_listed(cameras)}: use these names, or load the processor with your own names "
        "as `cameras=`, in the order of the model's images."
    )
    for camera in observation:
        if camera not in cameras:
            raise ValueError(f"{name} has the unknown camera {camera!r}.{suggest(camera, cameras)} {known}")
    if missing := [camera for camera in cameras if camera not in observation]:
        raise ValueError(f"{name} has no image from {_listed(missing)}. {known}")
    return [observation[camera] for camera in cameras]


def _is_one_image(image: Any) -> bool:
    if isinstance(image, (list, tuple, Mapping)):
        return False
    return not isinstance(image, (np.ndarray, torch.Tensor)) or image.ndim <= 3


def _describe(images: Sequence[Any]) -> str:
    batches = [image for image in images if not _is_one_image(image)]
    if not batches:
        return f"{len(images)} images" if len(images) != 1 else "1 image"
    shape = f" of shape {tuple(batches[0].shape)}" if isinstance(batches[0], (np.ndarray, torch.Tensor)) else ""
    return f"a {type(batches[0]).__name__}{shape} as an image"


def _to_float64(values: Any) -> np.ndarray:
    """Copy numbers in any nesting of lists, arrays and tensors."""
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64, copy=True).numpy()
    if isinstance(values, (list, tuple)):
        rows = [_to_float64(each) for each in values]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(
                f"The states differ in length ({', '.join(str(row.size) for row in rows)} dimensions): give all "
                "observations a state of the same length."
            )
        return np.array(rows, dtype=np.float64)
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"A state must consist of numbers, got {values!r:.80}.")
    return array.astype(np.float64)


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return a sentence that suggests the known name nearest to an unknown one, or an empty string."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


__all__ = [
    "ObservationInputs",
    "flatten_observations",
    "read_frame_images",
    "read_state",
    "refuse_camera_names",
    "refuse_several_cameras",
    "suggest",
]
