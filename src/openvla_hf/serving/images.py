"""Decode images that clients send, within limits."""

import base64
import binascii
import io
import math
from dataclasses import dataclass

from PIL import Image

from ..processing.image_processing_openvla import UNREADABLE
from .errors import TooLarge, Unprocessable


FORMATS = ("JPEG", "PNG")
MODES = ("L", "RGB")
MAX_SCANS = 64
"""Largest number of scans of a progressive JPEG. Encoders write about 10. Each takes as long to decode as an image."""
START_OF_SCAN = b"\xff\xda"
PNG_DEPTH = 24
"""Offset of the bits per channel in a PNG file. PIL reduces 16-bit colours to 8 bits without a word."""
MAX_DEPTH = 8
EXIF_ORIENTATION = 0x0112
UPRIGHT = 1


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG or PNG file that a client sent, which is decoded in the thread that prepares the observation.

    Attributes:
        data: The file.
        camera: Name of the camera, for messages.
        max_pixels: Largest number of pixels.
    """

    data: bytes
    camera: str
    max_pixels: int

    def decode(self) -> Image.Image:
        """Decode the image as RGB; see `decode_image`."""
        return decode_image(self.data, self.camera, self.max_pixels)


def decode_image(data: bytes, camera: str, max_pixels: int) -> Image.Image:
    """Decode a JPEG or PNG image as RGB.

    The number of pixels is checked before any is decoded. An image that a viewer would rotate by its EXIF orientation
    is refused, since it is unknown whether the policy was trained on rotated images.

    Args:
        data: The file.
        camera: Name of the camera, for messages.
        max_pixels: Largest number of pixels.

    Raises:
        TooLarge: The image has too many pixels.
        Unprocessable: The image is damaged, or has another format, depth or orientation.
    """
    name = f"The image of {camera[:100]!r}"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if math.prod(image.size) > max_pixels:
                raise TooLarge(
                    f"{name} has {image.width} x {image.height} pixels, more than the {max_pixels} that this server "
                    "takes: send a smaller one."
                )
            if image.format == "PNG":
                if data[PNG_DEPTH] > MAX_DEPTH:
                    raise Unprocessable(
                        f"{name} has {data[PNG_DEPTH]} bits per channel: send 8-bit RGB or grey levels without "
                        "transparency."
                    )
            elif data.count(START_OF_SCAN) > MAX_SCANS:  # in a PNG, these bytes are pixels
                raise Unprocessable(f"{name} has more than {MAX_SCANS} scans: save it as a baseline JPEG.")
            image.load()
            orientation = image.getexif().get(EXIF_ORIENTATION, UPRIGHT)
            opaque = drop_opaque_alpha(image)
    except Image.DecompressionBombError:
        raise TooLarge(
            f"{name} has more than the {max_pixels} pixels that this server takes: send a smaller one."
        ) from None
    except UNREADABLE as error:
        raise Unprocessable(f"{name} is not a readable JPEG or PNG file: send one of these formats.") from error
    if orientation != UPRIGHT:
        raise Unprocessable(
            f"{name} has EXIF orientation {orientation}: rotate its pixels and remove the tag before sending it."
        )
    if opaque.mode not in MODES:
        raise Unprocessable(f"{name} has mode {opaque.mode!r}: send 8-bit RGB or grey levels without transparency.")
    return opaque.convert("RGB")


def drop_opaque_alpha(image: Image.Image) -> Image.Image:
    """Return an image without its palette, and without its transparency if every pixel is opaque."""
    if image.mode in ("P", *MODES) and image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
        return image.convert(image.mode.removesuffix("A"))
    return image


def decode_base64(text: str, camera: str) -> bytes:
    """Decode an image in base64, or raise `Unprocessable`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"The image of {camera[:100]!r} is not valid base64: encode the file.") from error


__all__ = ["EncodedImage", "decode_base64", "decode_image"]
