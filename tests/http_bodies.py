"""Bodies of requests for the HTTP API of a server."""

import base64
import io

from PIL import Image


def as_file(image, file_format="PNG", **options):
    """Encode an array or a PIL image."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def in_base64(data):
    return base64.b64encode(data).decode()


def as_json(observation, **more):
    """The body of a request for an observation."""
    body = {
        "images": {name: in_base64(as_file(image)) for name, image in observation.images.items()},
        "instruction": observation.instruction,
    }
    if observation.state is not None:
        body["state"] = observation.state.tolist()
    return body | more
