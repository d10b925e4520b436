"""Image augmentation for training, like the original's: a random crop and random colours."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """Draw a random view of an image at each call, with torch's random number generator.

    The image is resized first. The other steps follow in the order of the arguments, each with its own draw and with
    its result clipped to [0, 1].

    Args:
        size: Pixels along a side of the result.
        crop_area: Fraction of the area that the random crop keeps; 1 for no crop.
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
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
        left, top, brightness, contrast, saturation, hue = torch.rand(6, dtype=torch.float64).tolist()
        if self.crop_area < 1:
            side = self.size * math.sqrt(self.crop_area)
            x, y = left * (self.size - side), top * (self.size - side)
            box = (x, y, x + side, y + side)
            picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        # With one contiguous plane per channel, the arithmetic takes half the time.
        levels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1), np.float32) / 255
        np.clip(levels + (2 * brightness - 1) * self.brightness, 0, 1, out=levels)
        mean = levels.mean((1, 2), keepdims=True)
        np.clip((levels - mean) * _between(self.contrast, contrast) + mean, 0, 1, out=levels)
        levels = _change_colour(levels, _between(self.saturation, saturation), (2 * hue - 1) * self.hue)
        return np.rint(levels * 255).astype(np.uint8).transpose(1, 2, 0).copy()

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


def _change_colour(levels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Scale the HSV saturation of RGB levels (3, H, W) in [0, 1], and shift their hue (in turns)."""
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


__all__ = ["Augmentation"]
