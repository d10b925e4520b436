"""The functions of a transform: small conversions of one field of a trajectory.

Shapes: T steps of a trajectory. Every function keeps the type of floating-point numbers.
"""

import zlib
from collections.abc import Callable

import numpy as np


# A gripper counts as open above and as closed below these values.
OPEN, CLOSED = 0.95, 0.05
# A command to a gripper counts only above this size.
COMMAND = 0.1
# Twice the resolution of float32: unit quaternions are shrunk by it, and divisors moved away from 0.
EPSILON = np.float32(2**-22)
# Rotations whose sine of the pitch is this close to 1 have no unique roll and yaw.
GIMBAL_LOCK = 1e-6


def clip(values: np.ndarray) -> np.ndarray:
    """Clip values to [0, 1]."""
    return np.clip(values, 0, 1)


def invert(values: np.ndarray) -> np.ndarray:
    """Exchange 0 and 1."""
    return 1 - values


def to_float(values: np.ndarray) -> np.ndarray:
    """Convert numbers or bools to float32."""
    return values.astype(np.float32)


def change(values: np.ndarray) -> np.ndarray:
    """Subtract each step from the next one, (T, ...). The last step becomes 0."""
    return np.diff(values, axis=0, append=values[-1:])


def settle_gripper(openings: np.ndarray) -> np.ndarray:
    """Replace the openings (T, ...) of a moving gripper with the end that it reaches next.

    After the last time that the gripper is open or closed, the last opening is repeated as recorded.

    Raises:
        ValueError: There are no steps.
    """
    if not len(openings):
        raise ValueError("the trajectory has no steps, so the gripper's values can't be settled.")
    backwards = openings[::-1]
    is_open = backwards > OPEN
    ends = np.where(is_open, 1, backwards[:1]).astype(openings.dtype)
    ends = np.where(backwards < CLOSED, 0, ends).astype(openings.dtype)
    return _hold(ends, is_open | (backwards < CLOSED))[::-1]


def follow_commands(commands: np.ndarray) -> np.ndarray:
    """Convert commands (T, ...) to close (positive) or open (negative) a gripper to its state, 1 = open.

    Before the first command, the gripper is in the opposite state, or open if there is no command.
    """
    asked = np.where(commands > COMMAND, 0, np.where(commands < -COMMAND, 1, 0.5)).astype(commands.dtype)
    is_command = asked != 0.5
    first = np.take_along_axis(asked, is_command.argmax(0)[None], 0) if len(asked) else asked
    before = np.where(first == 0.5, 1, 1 - first)
    return _hold(np.concatenate([before, asked]), np.concatenate([before > -1, is_command]))[1:]


def _hold(values: np.ndarray, is_new: np.ndarray) -> np.ndarray:
    """Repeat each new value (T, ...) until the next one. The first value is always taken."""
    steps = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    return np.take_along_axis(values, np.maximum.accumulate(np.where(is_new, steps, 0)), 0)


def quaternion_to_euler(quaternions: np.ndarray) -> np.ndarray:
    """Convert unit quaternions x, y, z, w (..., 4) to roll, pitch, yaw (..., 3) in radians.

    The arithmetic follows the original, in float32, which matters near a pitch of 90 degrees.

    Raises:
        ValueError: There are not four columns.
    """
    if quaternions.shape[1:] != (4,):
        raise ValueError(f"a quaternion has 4 columns, but the given values have the shape {quaternions.shape[1:]}.")
    x, y, z, w = np.moveaxis(quaternions.astype(np.float32), -1, 0)
    shrink = 1 - EPSILON
    tx, ty, tz = (shrink * (2 * each) for each in (x, y, z))
    r00 = shrink * (1 - (ty * y + tz * z))
    r10 = shrink * (ty * x + tz * w)
    r20 = shrink * (tz * x - ty * w)
    r21 = shrink * (tz * y + tx * w)
    r22 = shrink * (1 - (tx * x + ty * y))
    r01 = shrink * (ty * x - tz * w)
    r02 = shrink * (tz * x + ty * w)
    pitch = -np.arcsin(np.clip(r20, -1, 1))
    side = _sign(np.cos(pitch))
    general = (
        np.arctan2(side * r21, side * _away_from_zero(r22)),
        pitch,
        np.arctan2(side * r10, side * _away_from_zero(r00)),
    )
    up = _sign(r20)
    locked = (np.arctan2(-up * r01, -up * _away_from_zero(r02)), -up * np.float32(np.pi / 2), np.zeros_like(x))
    is_locked = np.abs(np.abs(r20) - 1) < GIMBAL_LOCK
    return np.stack([np.where(is_locked, *pair) for pair in zip(locked, general, strict=True)], -1)


def _sign(values: np.ndarray) -> np.ndarray:
    """Return the sign, which is 1 for 0."""
    return np.where(values < 0, np.float32(-1), np.float32(1))


def _away_from_zero(values: np.ndarray) -> np.ndarray:
    return values + _sign(values) * EPSILON


def decompress(values: np.ndarray, width: int) -> np.ndarray:
    """Decode zlib bytes (T,) to float32 numbers (T, width). Numbers that are already decoded stay as they are."""
    if values.dtype.kind not in "SO":
        return values
    return np.frombuffer(b"".join(map(zlib.decompress, values)), "<f4").reshape(-1, width)


def decode_text(code_points: np.ndarray) -> np.ndarray:
    """Decode rows of Unicode code points (T, N), which end at the first 0, to texts (T,)."""
    texts = ["".join(map(chr, row)).partition("\0")[0] for row in code_points.tolist()]
    return np.array(texts, object)


PRIMITIVES: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function
    for function in (
        clip,
        invert,
        to_float,
        change,
        settle_gripper,
        follow_commands,
        quaternion_to_euler,
        decompress,
        decode_text,
    )
}

__all__ = ["PRIMITIVES", "decode_text"]
