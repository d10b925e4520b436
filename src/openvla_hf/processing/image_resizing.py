"""The image resizing of the original's training and evaluation, in numpy instead of TensorFlow.

The functions keep TensorFlow's arithmetic: float32, in the same order of operations. PIL's own Lanczos and bilinear
filters round between their two passes, and differ by one level in a quarter of the values of a crop.
"""

import functools

import numpy as np


LANCZOS_RADIUS = 3
# pi as the float32 constant of TensorFlow's kernel.
PI = np.float32(3.14159265359)


def resize_lanczos3(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize like `tf.image.resize(..., method="lanczos3", antialias=True)`, then round.

    Args:
        levels: (H, W, C) uint8.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        (height, width, C) uint8.
    """
    rows = _filter_rows(levels.astype(np.float32), height)
    resized = _filter_rows(rows.swapaxes(0, 1), width).swapaxes(0, 1)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def center_crop(levels: np.ndarray, area: float) -> np.ndarray:
    """Crop the centre and scale it back, as `tf.image.crop_and_resize` and `convert_image_dtype` do.

    Args:
        levels: (H, W, C) uint8.
        area: Fraction of the area that is kept, in (0, 1].

    Returns:
        (H, W, C) uint8.
    """
    side = np.sqrt(np.float32(area))
    start = (1 - side) / np.float32(2)
    return to_levels(crop_and_resize(to_floats(levels), start, start, start + side, start + side))


def crop_and_resize(values: np.ndarray, top: float, left: float, bottom: float, right: float) -> np.ndarray:
    """Crop a box and scale it back by bilinear interpolation between the corners, as `tf.image.crop_and_resize` does.

    Args:
        values: (H, W, C) float32.
        top: Upper edge of the box, as a share of the height.
        left: Left edge.
        bottom: Lower edge.
        right: Right edge.

    Returns:
        (H, W, C) float32.
    """
    return _crop_axis(
        _crop_axis(values, 1, np.float32(left), np.float32(right)), 0, np.float32(top), np.float32(bottom)
    )


def to_floats(levels: np.ndarray) -> np.ndarray:
    """Convert levels (uint8) to values in [0, 1] (float32), as `tf.image.convert_image_dtype` does."""
    return levels * np.float32(1 / 255)


def to_levels(values: np.ndarray) -> np.ndarray:
    """Clip values (float32) to [0, 1] and convert them to levels (uint8), as `tf.image.convert_image_dtype` does."""
    # TensorFlow truncates 255.5 times the value.
    return (values.clip(0, 1) * np.float32(255.5)).astype(np.uint8)


def _filter_rows(values: np.ndarray, count: int) -> np.ndarray:
    """Filter (H, W, C) float32 to `count` rows."""
    first, weights = lanczos_weights(len(values), count)
    filtered = np.zeros((count, *values.shape[1:]), np.float32)
    # Add one tap after another, like TensorFlow: another order moves some values across a rounding edge.
    for tap, weight in enumerate(weights.T):
        filtered += weight[:, None, None] * values[np.minimum(first + tap, len(values) - 1)]
    return filtered


@functools.lru_cache(maxsize=16)
def lanczos_weights(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the weights with which TensorFlow's Lanczos filter resizes `length` inputs to `count` outputs.

    Returns:
        Each output's first input (count,), and the weights of the inputs from there (count, taps), float32. A weight
        beyond the last input is 0.
    """
    one = np.float32(1)
    step = one / (np.float32(count) / np.float32(length))
    stretch = max(step, one)  # the kernel widens when the image shrinks
    reach = np.float32(LANCZOS_RADIUS) * stretch
    center = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * step
    first = np.maximum(np.ceil(center - reach - np.float32(0.5)), 0).astype(int)
    last = np.minimum(np.floor(center + reach - np.float32(0.5)), length - 1).astype(int)
    inputs = first[:, None] + np.arange((last - first).max() + 1)
    distance = np.abs((inputs.astype(np.float32) + np.float32(0.5) - center[:, None]) * (one / stretch))
    weights = np.where(inputs <= last[:, None], _lanczos(distance), np.float32(0))
    total = np.zeros(count, np.float32)
    for weight in weights.T:
        total += weight
    return first, weights * (one / total)[:, None]


def _lanczos(x: np.ndarray) -> np.ndarray:
    """Compute the Lanczos kernel of distances (float32)."""
    radius = np.float32(LANCZOS_RADIUS)
    near = np.maximum(x, np.float32(1e-3))  # the quotient is 0 / 0 at 0
    kernel = radius * _sin(PI * near) * _sin(PI * near / radius) / (PI * PI * near * near)
    return np.where(x > radius, np.float32(0), np.where(x <= np.float32(1e-3), np.float32(1), kernel))


def _sin(x: np.ndarray) -> np.ndarray:
    """Compute the sine of float32, rounded once: numpy's own is sometimes off by a unit in the last place."""
    return np.sin(x.astype(np.float64)).astype(np.float32)


def _crop_axis(values: np.ndarray, axis: int, start: np.float32, end: np.float32) -> np.ndarray:
    """Resample the rows (axis 0) or columns (axis 1) of (H, W, C) float32 between two shares to their old number."""
    count = values.shape[axis]
    last = np.float32(max(count - 1, 1))
    # Compute the box's height as the difference of its edges, like TensorFlow, since the rounding matters.
    position = start * last + np.arange(count, dtype=np.float32) * ((end - start) * last / last)
    above = np.floor(position).astype(int)
    below = np.minimum(np.ceil(position).astype(int), count - 1)
    share = (position - above.astype(np.float32)).reshape(-1, *[1] * (2 - axis))
    first = values.take(above, axis)
    between = values.take(below, axis)
    between -= first
    between *= share
    between += first
    return between


__all__ = ["center_crop", "crop_and_resize", "resize_lanczos3", "to_floats", "to_levels"]
