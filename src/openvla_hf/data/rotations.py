"""Rotations as matrices and in the encodings that datasets use."""

from collections.abc import Callable

import numpy as np


def euler_to_matrix(angles: np.ndarray) -> np.ndarray:
    """Convert roll, pitch, yaw (..., 3), radians about the fixed axes x, y, z, to matrices (..., 3, 3)."""
    (cr, cp, cy), (sr, sp, sy) = (np.moveaxis(part(angles), -1, 0) for part in (np.cos, np.sin))
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def matrix_to_euler(matrix: np.ndarray) -> np.ndarray:
    """Convert matrices (..., 3, 3) to roll, pitch, yaw (..., 3) in radians."""
    pitch = np.arcsin(np.clip(-matrix[..., 2, 0], -1.0, 1.0))
    roll = np.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    yaw = np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return np.stack([roll, pitch, yaw], -1)


def axis_angle_to_matrix(vector: np.ndarray) -> np.ndarray:
    """Convert axes times angles in radians (..., 3) to matrices (..., 3, 3)."""
    half = np.linalg.norm(vector, axis=-1, keepdims=True) / 2
    # sin(a / 2) / a, which is 1/2 at 0.
    return quaternion_to_matrix(np.concatenate([vector * np.sinc(half / np.pi) / 2, np.cos(half)], -1))


def quaternion_to_axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Convert unit quaternions x, y, z, w (..., 4) to axes times angles in [0, 2 pi] (..., 3), as robosuite does.

    LIBERO's policies were trained with this convention. If w < 0, the shorter rotation would give another vector.
    """
    w = np.clip(quaternion[..., 3:], -1.0, 1.0)
    length = np.sqrt(1.0 - w * w)
    return quaternion[..., :3] * np.divide(2.0 * np.arccos(w), length, out=np.zeros_like(w), where=length > 0)


def quaternion_to_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Convert quaternions x, y, z, w (..., 4) to matrices (..., 3, 3)."""
    x, y, z, w = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def six_numbers_to_matrix(numbers: np.ndarray) -> np.ndarray:
    """Convert the first two columns of rotation matrices (..., 6), made orthonormal, to matrices (..., 3, 3)."""
    first = numbers[..., :3] / np.linalg.norm(numbers[..., :3], axis=-1, keepdims=True)
    second = numbers[..., 3:] - (first * numbers[..., 3:]).sum(-1, keepdims=True) * first
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], -1)


# Encoding -> its number of values, and its conversion to matrices.
ROTATIONS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "euler": (3, euler_to_matrix),
    "axis_angle": (3, axis_angle_to_matrix),
    "quaternion_xyzw": (4, quaternion_to_matrix),
    "rotation_6d": (6, six_numbers_to_matrix),
}
