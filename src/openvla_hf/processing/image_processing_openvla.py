"""Prepare camera images for OpenVLA, with PIL and numpy only."""

import base64
import inspect
import io
import math
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from typing import Any, Literal, get_args
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs
from transformers.utils import PROCESSOR_NAME, TensorType, cached_file, try_to_load_from_cache
from transformers.utils.hub import LocalEntryNotFoundError, httpx, is_offline_mode

from .image_resizing import center_crop, resize_lanczos3


ResizeStrategy = Literal["resize-naive", "letterbox", "resize-crop"]
# The value of `resample` for the filter of `image_resizing`.
LANCZOS3 = "lanczos3"

# The statistics for DINOv2 of published OpenVLA are rounded to bfloat16.
DINOV2_MEAN, DINOV2_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# Modes of PIL with a fixed white level. "I", "F" and the 16-bit modes have none, and PIL clips them.
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
# Bicubic resizing overshoots an edge by up to an eighth of the range. An image that reaches further below 0 is more
# likely normalised to [-1, 1].
OVERSHOOT = 1 / 8
# Smallest maximum of a float image in [0, 255]. Normalised and linear (HDR) images have a lower maximum.
MIN_FLOAT_LEVEL = 16
# Time limit for a download in seconds, and its largest size in bytes.
URL_TIMEOUT = 30.0
MAX_DOWNLOAD = 64 * 2**20
DOWNLOAD_CHUNK = 2**16
# Errors of PIL's decoders for files that are damaged, truncated or closed.
UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SyntaxError, AssertionError, EOFError,
    struct.error, zlib.error,
)  # fmt: skip

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")

IMAGE_HELP = (
    "pass a PIL image, an (H, W, 3) or (3, H, W) array or tensor (uint8, or float in [0, 1]), "
    "a path, a URL, or a list of these"
)


class OpenVLAImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Fields that `from_pretrained` may override, besides those of all image processors."""

    image_resize_strategy: ResizeStrategy
    letterbox_fill: Sequence[int]
    center_crop_area: float | None
    resample: int | str | None


class OpenVLAImageProcessor(BaseImageProcessor):
    """Resize an image once and normalise it for each vision tower.

    The defaults are those of openvla-7b. A published `preprocessor_config.json` is read into the same fields.

    Args:
        image_resize_strategy: How an image is brought to `size`: "resize-naive" stretches it, "letterbox" pads it to a
            square first, "resize-crop" scales the short side and crops the long one.
        size: Height and width of the result in pixels (int, (height, width) or dict).
        image_mean: One list of three for each tower, in the order of the channels. A flat list is for one tower.
        image_std: The standard deviations in the same form.
        resample: PIL's resampling filter, or "lanczos3" for TensorFlow's, which the original uses in training and in
            evaluation in simulators.
        letterbox_fill: RGB levels (0..255) of the padding.
        center_crop_area: Fraction of the area that a centre crop keeps before it is scaled back to `size`.
            Set it to 0.9 to evaluate a model that was trained with random crops.

    Raises:
        ValueError: A field is out of its range.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    valid_kwargs = OpenVLAImagesKwargs

    def __init__(
        self,
        image_resize_strategy: ResizeStrategy = "resize-naive",
        size: int | Sequence[int] | dict[str, int] = 224,
        image_mean: Sequence[float] | Sequence[Sequence[float]] = (DINOV2_MEAN, SIGLIP_MEAN),
        image_std: Sequence[float] | Sequence[Sequence[float]] = (DINOV2_STD, SIGLIP_STD),
        resample: int | str = Image.Resampling.BICUBIC,
        letterbox_fill: Sequence[int] = (127, 127, 127),
        center_crop_area: float | None = None,
    ):
        super().__init__()
        if image_resize_strategy not in get_args(ResizeStrategy):
            options = ", ".join(map(repr, get_args(ResizeStrategy)))
            raise ValueError(f"Unknown `image_resize_strategy` {image_resize_strategy!r}: give one of {options}.")
        if center_crop_area is not None and not 0 < center_crop_area <= 1:
            raise ValueError(f"`center_crop_area` must be a fraction in (0, 1], got {center_crop_area}.")
        self.image_resize_strategy = image_resize_strategy
        self.size = dict(get_size_dict(size))
        if set(self.size) != {"height", "width"}:
            raise ValueError(f"`size` must be a height and a width, got {self.size}.")
        if image_resize_strategy != "resize-naive" and self.size["height"] != self.size["width"]:
            raise ValueError(f"{image_resize_strategy!r} needs a square `size`, got {self.size}.")
        self.image_mean = np.reshape(image_mean, (-1, 3)).tolist()
        self.image_std = np.reshape(image_std, (-1, 3)).tolist()
        if len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"`image_mean` is for {len(self.image_mean)} towers, but `image_std` for {len(self.image_std)}: give "
                "one list of three for each tower."
            )
        if isinstance(resample, str) and resample != LANCZOS3:
            raise ValueError(f"resample={resample!r} is not a filter: pass one of PIL's filters or {LANCZOS3!r}.")
        self.resample = resample if isinstance(resample, str) else int(resample)
        self.letterbox_fill = list(letterbox_fill)
        self.center_crop_area = center_crop_area

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `processor_config.json`, or `preprocessor_config.json` if the checkpoint has none."""
        # If the Hub refuses the first file, transformers would read the second, which may differ.
        find_file(pretrained_model_name_or_path, PROCESSOR_NAME, **select_hub_kwargs(kwargs))
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the processor from our config or a published one; unknown keys are dropped."""
        if image_processor_dict.get("image_processor_type") == "PrismaticImageProcessor":
            image_processor_dict = read_published_config(image_processor_dict)
        fields = inspect.signature(cls.__init__).parameters
        return super().from_dict({k: v for k, v in image_processor_dict.items() if k in fields}, **kwargs)

    def preprocess(self, images: ImageInput, return_tensors: str | TensorType | None = "pt") -> BatchFeature:
        """Convert one image or a batch of any sizes to `pixel_values`.

        The EXIF orientation of a photo is not applied, as in the original: a path, a URL and an open PIL image of the
        same file give the same pixels.

        Args:
            images: PIL images, arrays, tensors, paths, URLs or base64 texts; one, or a list of them. Arrays and
                tensors are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, or a batch of these, and contain

                - uint8 levels, or other integers from 0 to 255 with a maximum above 1,
                - floats from 0 to 1; bicubic overshoot of up to 1/8 on either side is clipped,
                - floats from 0 to 255 with a maximum of at least 16.

                Anything else has an uncertain brightness and is refused: booleans, integers of 0 and 1, images that
                are normalised already, and PIL's modes "I", "F" and "I;16".
            return_tensors: "pt", "np", or `None` for numpy.

        Returns:
            `pixel_values` (B, 3 * towers, height, width), float32; numpy with `return_tensors=None`.

        Raises:
            ValueError: An input is not an image, its brightness is uncertain, or it has too many pixels.
            TypeError: An input has another type.
            OSError: A file or URL cannot be read: it is damaged, or does not answer in time.
        """
        sized = [np.asarray(self.resize(image)) for image in iterate_images(images)]
        levels = np.ascontiguousarray(np.stack(sized).transpose(0, 3, 1, 2))  # (B, 3, H, W), uint8
        mean, std = (np.array(stats, np.float32)[..., None, None] for stats in (self.image_mean, self.image_std))
        pixels = np.divide(levels, 255, dtype=np.float32)[:, None] - mean  # (B, towers, 3, H, W)
        pixels /= std
        pixels = pixels.reshape(len(sized), -1, *levels.shape[2:])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image to `size`, and apply the centre crop if one is set."""
        height, width = self.size["height"], self.size["width"]
        if self.image_resize_strategy == "resize-naive":
            image = self._resample(image, width, height)
        else:
            if self.image_resize_strategy == "letterbox":
                image = self._pad_to_square(image)
            # As in torchvision: the long side is rounded down, the crop's offset to the nearest pixel.
            short = min(image.size)
            scaled = (image.width * width // short, image.height * height // short)
            _refuse_huge(scaled)
            image = self._resample(image, *scaled)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        if self.center_crop_area is not None:
            image = Image.fromarray(center_crop(np.asarray(image), self.center_crop_area))
        return image

    def _resample(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if isinstance(self.resample, str):
            return Image.fromarray(resize_lanczos3(np.asarray(image), height, width))
        return image.resize((width, height), self.resample)

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        # Both sides get the same border: an odd difference leaves the square one pixel short, as in training.
        side = max(image.size)
        _refuse_huge((side, side))
        border = ((side - image.width) // 2, (side - image.height) // 2)
        return ImageOps.expand(image, border, tuple(self.letterbox_fill)) if any(border) else image


def read_published_config(published: dict[str, Any]) -> dict[str, Any]:
    """Translate a `PrismaticImageProcessor` config.

    The stored `tvf_*` values are what the original applies after a reload; `means`, `stds` and the strategy's
    name may disagree with them and are not read.

    Raises:
        ValueError: The `tvf_*` values are missing, or the towers need differently resized images (no released
            checkpoint does).
    """
    missing = {"tvf_resize_params", "tvf_crop_params", "tvf_normalize_params", "tvf_do_letterbox"} - {*published}
    if missing:
        raise ValueError(f"The published image processor config lacks {sorted(missing)}.")
    resizes, crops = published["tvf_resize_params"], published["tvf_crop_params"]
    if any(resize != resizes[0] for resize in resizes) or any(crop != crops[0] for crop in crops):
        raise ValueError(
            "The towers of this checkpoint need differently resized images, but only one size is supported."
        )
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
    """Yield every image of any accepted input as RGB, see `OpenVLAImageProcessor.preprocess`.

    Raises:
        ValueError: An array, string or PIL image is not a valid image, or its brightness is uncertain.
        TypeError: An input has another type.
        OSError: A file or URL cannot be read.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"The list of images is empty; {IMAGE_HELP}.")
        for image in images:
            yield from iterate_images(image)
    elif isinstance(images, Image.Image):
        yield _to_rgb(images, "The image")
    elif isinstance(images, (str, os.PathLike)):
        yield _open(os.fsdecode(images))
    elif isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        yield from _from_array((images.float() if images.is_floating_point() else images).numpy())
    elif isinstance(images, np.ndarray):
        yield from _from_array(images)
    else:
        raise TypeError(f"An image cannot be a {type(images).__name__}; {IMAGE_HELP}.")


def _open(source: str) -> Image.Image:
    """Read a path, a URL or base64 text as RGB. The EXIF orientation is ignored, as for a PIL image."""
    name = repr(source if len(source) < 80 else f"{source[:40]}...{source[-40:]}")
    file: str | io.BytesIO
    if source.lower().startswith(("http://", "https://")):
        file = io.BytesIO(_download(source, name))
        not_an_image = f"{name} does not answer with an image"
    elif os.path.isfile(source):
        file = source
        not_an_image = f"{name} is a file, but not an image that PIL can read"
    else:
        not_an_image = f"{name} is not a file, URL or base64 text of an image"
        try:
            file = io.BytesIO(base64.b64decode(source.partition(",")[2] if source.startswith("data:") else source))
        except ValueError as error:
            raise ValueError(f"{not_an_image}; {IMAGE_HELP}.") from error
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{not_an_image}; {IMAGE_HELP}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {_shrink()}.") from error
    except UNREADABLE as error:
        raise OSError(f"{name} cannot be read: {error}.") from error
    with image:
        return _to_rgb(image, name)


def _download(url: str, name: str) -> bytes:
    """Download a URL, within limits of time and size."""
    deadline = time.monotonic() + URL_TIMEOUT
    content = bytearray()
    try:
        with urlopen(Request(url, headers={"User-Agent": "openvla-hf"}), timeout=URL_TIMEOUT) as response:
            while chunk := response.read1(DOWNLOAD_CHUNK):
                content += chunk
                if len(content) > MAX_DOWNLOAD:
                    raise OSError(f"it has more than {MAX_DOWNLOAD} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except (OSError, HTTPException, ValueError) as error:
        cause: Any = error
        if isinstance(error, HTTPError):
            error.close()  # the error is also the response
        elif isinstance(error, URLError):
            cause = error.reason
        problem = f"no answer within {URL_TIMEOUT:g} seconds" if isinstance(cause, TimeoutError) else cause
        raise OSError(f"{name} could not be downloaded: {problem}. Check the address and the network.") from error
    return bytes(content)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode a PIL image, after checks of its mode and size."""
    if image.mode not in IMAGE_MODES:
        raise ValueError(
            f"{name} has mode {image.mode!r}, which has no fixed white level: scale it to levels of 0 to 255 and "
            "convert it to mode 'L' or 'RGB'."
        )
    if 0 in image.size:
        raise ValueError(f"{name} is empty ({image.width} x {image.height} pixels).")
    _refuse_huge(image.size)
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except UNREADABLE as error:
        reason = str(error) or "it was closed before it was read"
        raise OSError(f"{name} is damaged, truncated or closed ({reason}): read or download it again.") from error


def _refuse_huge(size: tuple[int, int]) -> None:
    """Keep a small file from taking all memory; PIL itself only warns up to twice its limit."""
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"An image of {size[0]} x {size[1]} pixels is too large: {_shrink()}.")


def _shrink() -> str:
    return f"resize or crop it to at most {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS)"


def _from_array(array: np.ndarray) -> Iterator[Image.Image]:
    channels = (1, 3, 4)
    batch = array[..., None] if array.ndim == 2 else array
    batch = batch if batch.ndim == 4 else batch[None]
    if batch.ndim == 4 and batch.shape[-1] not in channels and batch.shape[1] in channels:
        batch = batch.transpose(0, 2, 3, 1)
    if array.size == 0 or batch.ndim != 4 or batch.shape[-1] not in channels:
        raise ValueError(f"An array of shape {array.shape} is not an image; {IMAGE_HELP}.")
    for levels in _to_levels(batch):
        levels = levels.squeeze(-1) if levels.shape[-1] == 1 else levels
        yield Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")


def _to_levels(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels of any accepted scale to uint8. A batch has one scale, that of the whole array."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise TypeError(f"An image cannot be an array of dtype {pixels.dtype}; {IMAGE_HELP}.")
    low, high = pixels.min(), pixels.max()
    is_float = pixels.dtype.kind == "f"
    if is_float and low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    if not (low >= 0 and high <= 255):  # NaN fails this too
        raise ValueError(
            f"Pixels from {low} to {high} are neither in [0, 1] nor in [0, 255]; {IMAGE_HELP}, "
            "and leave the normalisation to the processor."
        )
    if (is_float and high < MIN_FLOAT_LEVEL) or high == 1:
        raise ValueError(
            f"Pixels of dtype {pixels.dtype} from {low} to {high} could be in [0, 1] or in [0, 255]: convert them to "
            "float in [0, 1] or to uint8."
        )
    return np.rint(pixels).astype(np.uint8)


def select_hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keep the arguments that locate a file."""
    return {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}


def find_file(source: str | os.PathLike, name: str, **hub_kwargs: Any) -> str | None:
    """Return the path of a checkpoint's file, downloaded if need be, or `None` if there is none.

    A file of a repository counts as absent if the Hub answers HTTP 404, or the cache has a record of that answer. In
    offline mode a file that is not in the cache counts as absent too: a cache that `snapshot_download` filled has no
    such records, and published checkpoints have no `processor_config.json`.

    Raises:
        OSError: The Hub refuses the file or does not answer.
    """
    if os.path.isfile(source):
        return None
    try:
        return cached_file(source, name, **hub_kwargs)
    except (OSError, httpx.HTTPError) as error:
        cause = error.__cause__ if isinstance(error, OSError) else error
        if cause is None:  # the folder or the repository lacks the file
            return None
        if not isinstance(cause, (LocalEntryNotFoundError, httpx.HTTPError)):
            raise
        if hub_kwargs.get("local_files_only") or is_offline_mode():
            return None
        path = os.path.join(hub_kwargs.get("subfolder") or "", name)
        options = {key: hub_kwargs.get(key) for key in ("cache_dir", "revision")}
        if try_to_load_from_cache(str(source), path, **options) is not None:  # a record of HTTP 404
            return None
        raise OSError(
            f"Cannot read {name} of {source}: the Hub refuses the file or does not answer "
            f"({cause.__cause__ or cause}). Check your access and the network, or set HF_HUB_OFFLINE=1 to use the "
            "cached files."
        ) from error


OpenVLAImageProcessor.register_for_auto_class()

__all__ = ["OpenVLAImageProcessor"]
