"""Camera images to the `pixel_values` of OpenVLA, by PIL and numpy alone."""

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ImageInput, load_image
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType


ResizeStrategy = Literal["resize-naive", "letterbox", "resize-crop"]

# The released statistics of DINOv2 are rounded to bfloat16; the model was trained with them as they are.
DINOV2_MEAN, DINOV2_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

IMAGE_HELP = (
    "pass a PIL image, an (H, W, 3) or (3, H, W) array or tensor (uint8, or float in [0, 1]), "
    "a path, a URL, or a list of these"
)


class OpenVLAImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What `from_pretrained` may override beside the fields that all image processors know."""

    image_resize_strategy: ResizeStrategy
    letterbox_fill: Sequence[int]
    center_crop_area: float | None


class OpenVLAImageProcessor(BaseImageProcessor):
    """Resizes an image once and normalises it for each vision tower.

    The defaults are those of openvla-7b. A published `preprocessor_config.json` is read into the same fields.

    Args:
        image_resize_strategy: how an image becomes `size`: "resize-naive" stretches it, "letterbox" pads it
            to a square first, "resize-crop" scales the short side and crops the long one.
        size: height and width of the result in pixels (int, (height, width) or dict).
        image_mean: one list of three for each tower, in the order of the channels; a flat list is one tower.
        image_std: likewise.
        resample: PIL's resampling filter.
        letterbox_fill: RGB levels (0..255) of the padding.
        center_crop_area: fraction of the area that a centre crop keeps before it is scaled back to `size`.
            Set it (0.9) to evaluate a model that was trained with random crops.

    Raises:
        ValueError: a field is out of its range.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    valid_kwargs = OpenVLAImagesKwargs

    def __init__(
        self,
        image_resize_strategy: ResizeStrategy = "resize-naive",
        size: int | Sequence[int] | dict[str, int] = 224,
        image_mean: Sequence[float] | Sequence[Sequence[float]] = (DINOV2_MEAN, SIGLIP_MEAN),
        image_std: Sequence[float] | Sequence[Sequence[float]] = (DINOV2_STD, SIGLIP_STD),
        resample: int = Image.Resampling.BICUBIC,
        letterbox_fill: Sequence[int] = (127, 127, 127),
        center_crop_area: float | None = None,
    ):
        super().__init__()
        if image_resize_strategy not in get_args(ResizeStrategy):
            raise ValueError(f"image_resize_strategy {image_resize_strategy!r} is none of {get_args(ResizeStrategy)}.")
        if center_crop_area is not None and not 0 < center_crop_area <= 1:
            raise ValueError(f"center_crop_area is a fraction in (0, 1], not {center_crop_area}.")
        self.image_resize_strategy = image_resize_strategy
        self.size = dict(get_size_dict(size))
        if set(self.size) != {"height", "width"}:
            raise ValueError(f"size is a height and a width, not {self.size}.")
        if image_resize_strategy != "resize-naive" and self.size["height"] != self.size["width"]:
            raise ValueError(f"{image_resize_strategy!r} makes square images, but size is {self.size}.")
        self.image_mean = np.reshape(image_mean, (-1, 3)).tolist()
        self.image_std = np.reshape(image_std, (-1, 3)).tolist()
        if len(self.image_mean) != len(self.image_std):
            raise ValueError(f"image_mean is for {len(self.image_mean)} towers, image_std for {len(self.image_std)}.")
        self.resample = int(resample)
        self.letterbox_fill = list(letterbox_fill)
        self.center_crop_area = center_crop_area

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the processor from a config of ours or a published one; keys of neither are left out."""
        if image_processor_dict.get("image_processor_type") == "PrismaticImageProcessor":
            image_processor_dict = read_published_config(image_processor_dict)
        fields = inspect.signature(cls.__init__).parameters
        return super().from_dict({k: v for k, v in image_processor_dict.items() if k in fields}, **kwargs)

    def preprocess(self, images: ImageInput, return_tensors: str | TensorType | None = "pt") -> BatchFeature:
        """Turns one image or a batch of any sizes into `pixel_values`.

        Returns:
            `pixel_values` (B, 3 * towers, height, width), float32; numpy with `return_tensors=None`.

        Raises:
            ValueError: an array or a string that holds no image.
            TypeError: something of another type.
        """
        sized = [np.asarray(self.resize(image)) for image in iterate_images(images)]
        if not sized:
            raise ValueError(f"There is no image in an empty list; {IMAGE_HELP}.")
        levels = np.ascontiguousarray(np.stack(sized).transpose(0, 3, 1, 2))  # (B, 3, H, W), uint8
        mean, std = (np.array(stats, np.float32)[..., None, None] for stats in (self.image_mean, self.image_std))
        pixels = np.divide(levels, 255, dtype=np.float32)[:, None] - mean  # (B, towers, 3, H, W)
        pixels /= std
        pixels = pixels.reshape(len(sized), -1, *levels.shape[2:])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def resize(self, image: Image.Image) -> Image.Image:
        """Brings an RGB image of any size to `size`, and applies the centre crop if one is set."""
        height, width = self.size["height"], self.size["width"]
        if self.image_resize_strategy == "resize-naive":
            image = image.resize((width, height), self.resample)
        else:
            if self.image_resize_strategy == "letterbox":
                image = self._pad_to_square(image)
            # As torchvision's: the long side is cut to a whole pixel, the crop's offset is rounded.
            short = min(image.size)
            image = image.resize((image.width * width // short, image.height * height // short), self.resample)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        if self.center_crop_area is not None:
            # Bilinear over a box between pixels: the grid that tf.image.crop_and_resize samples in training.
            margin = (1 - math.sqrt(self.center_crop_area)) / 2
            box = (width * margin, height * margin, width * (1 - margin), height * (1 - margin))
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        return image

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        # Both sides get the same border: an odd difference leaves the square one pixel short, as in training.
        side = max(image.size)
        border = ((side - image.width) // 2, (side - image.height) // 2)
        return ImageOps.expand(image, border, tuple(self.letterbox_fill)) if any(border) else image


def read_published_config(published: dict[str, Any]) -> dict[str, Any]:
    """Translates a `PrismaticImageProcessor` config.

    The stored `tvf_*` values are what the original applies after a reload; `means`, `stds` and the strategy's
    name may disagree with them and are not read.

    Raises:
        ValueError: the `tvf_*` values are missing, or the towers take differently resized images, which no
            released checkpoint does.
    """
    missing = {"tvf_resize_params", "tvf_crop_params", "tvf_normalize_params", "tvf_do_letterbox"} - {*published}
    if missing:
        raise ValueError(f"The published image processor config lacks {sorted(missing)}.")
    resizes, crops = published["tvf_resize_params"], published["tvf_crop_params"]
    if any(resize != resizes[0] for resize in resizes) or any(crop != crops[0] for crop in crops):
        raise ValueError("The towers of this checkpoint want differently resized images; one size is supported.")
    short_side_only = isinstance(resizes[0]["size"], int) or len(resizes[0]["size"]) == 1
    letterbox = published["tvf_do_letterbox"]
    config = {
        "image_resize_strategy": ("letterbox" if letterbox else "resize-crop" if short_side_only else "resize-naive"),
        "size": crops[0]["output_size"],
        "image_mean": [stats["mean"] for stats in published["tvf_normalize_params"]],
        "image_std": [stats["std"] for stats in published["tvf_normalize_params"]],
        "resample": resizes[0]["interpolation"],
    }
    return config | ({"letterbox_fill": published["tvf_letterbox_fill"]} if letterbox else {})


def iterate_images(images: Any) -> Iterator[Image.Image]:
    """Yields every image of any accepted input as RGB.

    Raises:
        ValueError: an array or a string that holds no image.
        TypeError: something of another type.
    """
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from iterate_images(image)
    elif isinstance(images, Image.Image):
        yield images if images.mode == "RGB" else images.convert("RGB")
    elif isinstance(images, (str, os.PathLike)):
        yield _open(os.fspath(images))
    elif isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        yield from iterate_images((images.float() if images.is_floating_point() else images).numpy())
    elif isinstance(images, np.ndarray) and images.ndim == 4:
        for image in images:
            yield from iterate_images(image)
    elif isinstance(images, np.ndarray):
        yield _from_array(images)
    else:
        raise TypeError(f"An image cannot be a {type(images).__name__}; {IMAGE_HELP}.")


def _open(source: str) -> Image.Image:
    try:
        return load_image(source)
    except (ValueError, OSError) as error:
        short = source if len(source) < 80 else f"{source[:80]}..."
        raise ValueError(f"{short!r} is not a file, URL or base64 text of an image; {IMAGE_HELP}.") from error


def _from_array(array: np.ndarray) -> Image.Image:
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[-1] not in channels and array.shape[0] in channels:
        array = array.transpose(1, 2, 0)
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in channels):
        raise ValueError(f"An array of shape {array.shape} is no image; {IMAGE_HELP}.")
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 255):  # NaN fails this too
            raise ValueError(
                f"Pixels from {low} to {high} are neither in [0, 1] nor in [0, 255]; {IMAGE_HELP}, "
                "and leave the normalisation to the processor."
            )
        scale = 255 if high <= 1 and np.issubdtype(array.dtype, np.floating) else 1
        array = np.rint(array * scale).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.shape[2:] == (1,) else array)).convert(
        "RGB"
    )


OpenVLAImageProcessor.register_for_auto_class()

__all__ = ["OpenVLAImageProcessor"]
