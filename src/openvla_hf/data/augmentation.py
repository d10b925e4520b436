"""Image augmentation for training, like the original's: a random crop and random colours."""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing.image_resizing import crop_and_resize, lanczos_weights, to_floats, to_levels


# Rows of a matrix product. An output depends on few inputs, so more rows would multiply more zeros.
BLOCK = 16


@dataclass(frozen=True)
class Augmentation:
    """Draw a random view of an image at each call, with torch's random number generator.

    The image is resized first. The other steps follow in the order of the arguments, each with its own draw and with
    its result clipped to [0, 1].

    Args:
        size: Pixels along a side of the result.
        crop_area: Fraction of the area that the random crop keeps; 1 for no crop. The crop lies on the diagonal.
        brightness: Largest shift of the levels in [0, 1].
        contrast: Range of the factor that scales each channel about its mean.
        saturation: Range of the factor that scales the saturation.
        hue: Largest shift, in turns of the colour circle.

    Raises:
        ValueError: `crop_area` is not in (0, 1].
    """

    size: int = 224
    crop_area: float = 0.9
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area must be in (0, 1], got {self.crop_area}.")

    def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """Augment an RGB image, uint8 (H, W, 3), to uint8 (size, size, 3)."""
        levels = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else image
        offset, brightness, contrast, saturation, hue = torch.rand(5, dtype=torch.float64).tolist()
        side = math.sqrt(self.crop_area)
        # As in the original, one draw moves the box along the diagonal.
        start = offset * (1 - side)
        return change_image(
            resize(levels, self.size),
            (start, start, start + side, start + side) if self.crop_area < 1 else None,
            (2 * brightness - 1) * self.brightness,
            _between(self.contrast, contrast),
            _between(self.saturation, saturation),
            (2 * hue - 1) * self.hue,
        )

    def for_prediction(self, processor: Any) -> Any:
        """Copy the processor with a centre crop of the same area as the random crops.

        When saved with the checkpoint, the copy shows objects to the model at the same scale in prediction as in
        training.
        """
        processor = copy.deepcopy(processor)
        processor.image_processor.center_crop_area = self.crop_area if self.crop_area < 1 else None
        return processor


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def resize(levels: np.ndarray, size: int) -> np.ndarray:
    """Resize an RGB image, uint8 (H, W, 3), to uint8 (size, size, 3) by TensorFlow's Lanczos filter.

    The result is that of `resize_lanczos3` in a tenth of the time. Very few values differ by one level, since matrix
    products add in another order.
    """
    height, width, channels = levels.shape
    values = torch.from_numpy(levels.reshape(height, -1).astype(np.float32))
    rows = _filter_rows(values, size).view(size, width, channels)
    columns = _filter_rows(rows.transpose(0, 1).reshape(width, -1), size).view(size, size, channels)
    return columns.round_().clamp_(0, 255).byte().transpose(0, 1).numpy()


def _filter_rows(values: torch.Tensor, count: int) -> torch.Tensor:
    """Filter (H, X) float32 to `count` rows."""
    filtered = torch.empty(count, values.shape[1])
    for number, (first, weights) in enumerate(_lanczos_blocks(len(values), count)):
        block = filtered[number * BLOCK : (number + 1) * BLOCK]
        torch.mm(weights, values[first : first + weights.shape[1]], out=block)
    return filtered


@functools.lru_cache(maxsize=16)
def _lanczos_blocks(length: int, count: int) -> list[tuple[int, torch.Tensor]]:
    """Return the first input and the weights (outputs, inputs) of each block of neighbouring outputs."""
    first, weights = lanczos_weights(length, count)
    dense = np.zeros((count, length + weights.shape[1]), np.float32)
    np.put_along_axis(dense, first[:, None] + np.arange(weights.shape[1]), weights, axis=1)
    blocks = []
    for start in range(0, count, BLOCK):
        near = slice(first[start], min(first[start : start + BLOCK].max() + weights.shape[1], length))
        blocks.append((int(near.start), torch.from_numpy(dense[start : start + BLOCK, near].copy())))
    return blocks


def change_image(
    levels: np.ndarray,
    box: tuple[float, float, float, float] | None,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> np.ndarray:
    """Apply all steps with the given parameters.

    Args:
        levels: (H, W, 3) uint8.
        box: Top, left, bottom and right edge of the crop as shares of the size, or `None` for no crop.
        brightness: Shift of the values in [0, 1].
        contrast: Factor on the distance from the mean of the channel.
        saturation: Factor on the saturation.
        hue: Shift of the hue, in turns.

    Returns:
        (H, W, 3) uint8.
    """
    values = to_floats(levels) if box is None else crop_and_resize(to_floats(levels), *box)
    # With one contiguous plane per channel, the arithmetic takes half the time.
    values = np.ascontiguousarray(values.transpose(2, 0, 1))
    values = change_brightness(values, brightness).clip(0, 1)
    values = change_contrast(values, contrast).clip(0, 1)
    return np.ascontiguousarray(to_levels(change_colour(values, saturation, hue)).transpose(1, 2, 0))


def change_brightness(values: np.ndarray, shift: float) -> np.ndarray:
    """Add a shift to values (3, H, W)."""
    return values + np.float32(shift)


def change_contrast(values: np.ndarray, factor: float) -> np.ndarray:
    """Scale the distance of values (3, H, W) from the mean of their channel."""
    mean = values.mean((1, 2), keepdims=True)
    return (values - mean) * np.float32(factor) + mean


def change_colour(levels: np.ndarray, saturation: float = 1.0, hue: float = 0.0) -> np.ndarray:
    """Scale the HSV saturation of RGB values (3, H, W) in [0, 1], limited to 1, and shift their hue (in turns)."""
    red, green, blue = levels
    value = levels.max(0)
    chroma = value - levels.min(0)
    safe = np.where(chroma > 0, chroma, np.float32(1))
    sector = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector += 6 * hue
    # Saturation is chroma divided by value, so chroma is at most the value.
    chroma = np.minimum(chroma * saturation, value)
    changed = np.empty_like(levels)
    # Each channel lies below the value by a part of the chroma that grows with its distance from the hue.
    for channel, offset in zip(changed, (5, 3, 1), strict=True):
        place = sector + offset
        place -= 6 * np.floor(place / 6)
        channel[...] = value - chroma * np.clip(np.minimum(place, 4 - place), 0, 1)
    return changed


__all__ = ["Augmentation", "change_brightness", "change_colour", "change_contrast", "change_image"]
