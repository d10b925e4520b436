"""The state of a tabletop scene, and its drawing with PIL.

The world frame is in metres: x points to the right in the image, y away from the camera, z up. The origin is the
middle of the table's top. A fixed camera looks down from the front. A single frame of it shows the whole state: the
gripper's shadow shows its height, and its fingers and its lamp show whether it is closed. A second camera on the wrist
moves with the hand and shows the grasp from close up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from PIL import Image, ImageDraw

from ..suites.suite import Observation, first_image


__all__ = [
    "CAMERAS",
    "COLOURS",
    "GOAL_KINDS",
    "SHAPES",
    "STATE_NAMES",
    "Goal",
    "Observation",
    "Scene",
    "TableGripper",
    "TableObject",
    "draw_scene",
    "first_image",
    "read_state",
]

Rgb = tuple[int, int, int]
Point = tuple[float, float]

# Pixels along a side.
IMAGE_SIZE = 224
# The fixed camera, and the one on the wrist.
CAMERAS = ("image", "wrist")
# Dimensions of the state: position of the point between the fingertips, and distance between the fingers, metres.
STATE_NAMES = ("x", "y", "z", "opening")
# Half extents in x and y, metres.
TABLE_HALF = (0.25, 0.20)

COLOURS: dict[str, Rgb] = {
    "red": (216, 46, 42),
    "green": (40, 158, 72),
    "blue": (40, 96, 220),
    "yellow": (250, 204, 28),
}
# Shape -> (radius in the xy plane, height), metres.
SHAPES: dict[str, tuple[float, float]] = {
    "cube": (0.024, 0.048),
    "ball": (0.025, 0.050),
    "cylinder": (0.023, 0.050),
}
# Goal -> (half extent, thickness), metres.
GOAL_KINDS: dict[str, tuple[float, float]] = {"plate": (0.058, 0.006), "mat": (0.055, 0.002)}

# Distances of the open and closed fingers from the middle of the hand, and the fingers' length, metres.
FINGER_OPEN = 0.042
FINGER_CLOSED = 0.007
FINGER_LENGTH = 0.054


@dataclass(eq=False)
class TableObject:
    """An object to grasp or push. `position` is the centre of its bottom, float64 (3,), metres."""

    colour: str
    shape: str
    position: np.ndarray

    @property
    def name(self) -> str:
        """The object's name in instructions, such as `"red cube"`."""
        return f"{self.colour} {self.shape}"

    @property
    def radius(self) -> float:
        """Radius in the xy plane, metres."""
        return SHAPES[self.shape][0]

    @property
    def height(self) -> float:
        """Height, metres."""
        return SHAPES[self.shape][1]

    @property
    def top(self) -> float:
        """Height of the top above the table, metres."""
        return float(self.position[2]) + self.height


@dataclass(frozen=True)
class Goal:
    """A flat place to put objects on. Its centre is at `(x, y)` metres."""

    colour: str
    kind: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """The goal's name in instructions, such as `"yellow plate"`."""
        return f"{self.colour} {self.kind}"

    @property
    def xy(self) -> np.ndarray:
        """The centre, (2,), metres."""
        return np.array([self.x, self.y])

    @property
    def half(self) -> float:
        """Radius of a plate, or half the side of a mat, metres."""
        return GOAL_KINDS[self.kind][0]

    @property
    def thickness(self) -> float:
        """Height of the surface above the table, metres."""
        return GOAL_KINDS[self.kind][1]


@dataclass(eq=False)
class TableGripper:
    """The hand, which always points down. `position` is the point between the fingertips, (3,), metres."""

    position: np.ndarray
    is_open: bool = True
    held: TableObject | None = None

    @property
    def spread(self) -> float:
        """Distance of each finger from the middle of the hand, metres."""
        if self.held is not None:
            return self.held.radius + 0.006
        return FINGER_OPEN if self.is_open else FINGER_CLOSED


@dataclass(eq=False)
class Scene:
    """Everything that a frame shows."""

    objects: list[TableObject]
    goals: list[Goal]
    gripper: TableGripper


def read_state(scene: Scene) -> np.ndarray:
    """Return the robot's state, float32 (4,), in metres: see `STATE_NAMES`."""
    return np.array([*scene.gripper.position, 2 * scene.gripper.spread], dtype=np.float32)


def draw_scene(scene: Scene, camera: str = "image") -> np.ndarray:
    """Draw `scene` as one of `CAMERAS` sees it: uint8 RGB of shape (224, 224, 3)."""
    is_fixed = camera == "image"
    image = _backdrop().copy() if is_fixed else Image.new("RGB", (_CANVAS, _CANVAS), _FLOOR)
    view = _View(_FIXED if is_fixed else _on_wrist(scene.gripper), ImageDraw.Draw(image, "RGBA"))
    if not is_fixed:
        _draw_table(view)
    gripper = scene.gripper
    for goal in sorted(scene.goals, key=lambda goal: -goal.y):
        _draw_goal(view, goal)
    objects = [thing for thing in scene.objects if view.camera.is_before(thing)]
    for thing in objects:
        _draw_object_shadow(view, thing)
    _draw_gripper_shadow(view, gripper, 0.0)

    # Painter's order: objects on the table, then objects above it, each far to near. The hand comes right after the
    # object between its fingers.
    layers: list[tuple[tuple[bool, float], Callable[[], None]]] = [
        (_order(thing.position), partial(_DRAW_SHAPE[thing.shape], view, thing)) for thing in objects
    ]
    layers.append((_order(gripper.position, -0.015, -0.012), partial(_draw_gripper, view, gripper, is_fixed)))
    below = _highest_below(scene)
    if below is not None:  # the shadow falls on this object too
        shadow = partial(_draw_gripper_shadow, view, gripper, below.top, radius=0.014)
        layers.append((_order(below.position, 0.0, -1e-6), shadow))
    for _, paint in sorted(layers, key=lambda layer: layer[0]):
        paint()
    return np.array(image.reduce(_SUPERSAMPLE))  # a copy, because PIL's buffer is read-only


def _order(position: np.ndarray, shift_z: float = 0.0, shift_y: float = 0.0) -> tuple[bool, float]:
    """Return the sort key of a position in painter's order."""
    return float(position[2]) + shift_z > 0.03, -float(position[1]) - shift_y


def _highest_below(scene: Scene) -> TableObject | None:
    """Return the highest object below the hand, or below the object that it holds."""
    gripper = scene.gripper
    column = [
        thing
        for thing in scene.objects
        if thing is not gripper.held and math.dist(thing.position[:2], gripper.position[:2]) < thing.radius
    ]
    highest = max(column, key=lambda thing: thing.top, default=None)
    return highest if highest is not None and highest.top < gripper.position[2] else None


# --- Cameras ----------------------------------------------------------------------------------------------

_SUPERSAMPLE = 2
_CANVAS = IMAGE_SIZE * _SUPERSAMPLE
# Smallest distance at which the camera on the wrist sees an object, metres.
_NEAREST = 0.04


class _Camera:
    """A camera that looks at a point from the front, in the plane x = point[0].

    Args:
        point: Where it looks, metres.
        elevation: Angle of its line of sight above the table, degrees.
        distance: Distance from the point, metres.
        focal: Focal length, pixels of the image.
        row: Row of the image in which the point is.
    """

    def __init__(self, point: Iterable[float], elevation: float, distance: float, focal: float, row: float) -> None:
        self.x, self.y, self.z = (float(value) for value in point)
        self.cos, self.sin = math.cos(math.radians(elevation)), math.sin(math.radians(elevation))
        self.distance, self.focal, self.row = distance, focal * _SUPERSAMPLE, row * _SUPERSAMPLE

    def depth(self, y: float, z: float) -> float:
        """Return how far a point is along the line of sight, metres."""
        return self.distance + (y - self.y) * self.cos - (z - self.z) * self.sin

    def pixels_per_metre(self, y: float, z: float) -> float:
        return self.focal / self.depth(y, z)

    def project(self, x: float, y: float, z: float) -> Point:
        """Project world metres to canvas pixels."""
        return self.project_level([(x, y)], z)[0]

    def project_level(self, points: Iterable[Point], z: float) -> list[Point]:
        """Project points (x, y) at one height, which is faster than one by one."""
        lower, higher = (z - self.z) * self.sin, (z - self.z) * self.cos
        middle, projected = _CANVAS / 2, []
        for x, y in points:
            far = y - self.y
            scale = self.focal / (self.distance + far * self.cos - lower)
            projected.append((middle + (x - self.x) * scale, self.row - (far * self.sin + higher) * scale))
        return projected

    def is_before(self, thing: TableObject) -> bool:
        """Return whether all of an object is in front of the camera."""
        return self.depth(float(thing.position[1]) - thing.radius, thing.top) > _NEAREST


_FIXED = _Camera((0.0, 0.0, 0.0), elevation=60.0, distance=1.15, focal=445.0, row=146.0)


def _on_wrist(gripper: TableGripper) -> _Camera:
    """Return the camera on the wrist, which looks at the point between the fingertips."""
    return _Camera(gripper.position, elevation=65.0, distance=0.18, focal=190.0, row=140.0)


@dataclass(frozen=True)
class _View:
    """A canvas and the camera whose image is drawn on it."""

    camera: _Camera
    draw: ImageDraw.ImageDraw

    def disc(self, x: float, y: float, z: float, radius: float) -> list[Point]:
        """Outline a horizontal disc, counter-clockwise as seen from above, starting on the +x side."""
        return self.camera.project_level([(x + radius * c, y + radius * s) for c, s in _CIRCLE], z)

    def square(self, x: float, y: float, z: float, half_x: float, half_y: float) -> list[Point]:
        """Return the corners of a horizontal rectangle: near left, near right, far right, far left."""
        corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return self.camera.project_level([(x + sx * half_x, y + sy * half_y) for sx, sy in corners], z)


def image_positions(scene: Scene) -> dict[str, tuple[float, float]]:
    """Return where the fixed camera sees each thing.

    The result is `{name: (u, v)}`, in fractions of the image from the upper left corner. Besides objects and goals,
    "open gripper" or "closed gripper" is the point between the fingertips, and "shadow" is the point on the table
    below it.
    """
    gripper = scene.gripper
    x, y, z = (float(value) for value in gripper.position)
    points = {thing.name: (*thing.position[:2], thing.position[2] + thing.height / 2) for thing in scene.objects}
    points |= {goal.name: (goal.x, goal.y, goal.thickness) for goal in scene.goals}
    points |= {"open gripper" if gripper.is_open else "closed gripper": (x, y, z), "shadow": (x, y, 0.0)}
    projected = {name: _FIXED.project(*point) for name, point in points.items()}
    return {name: (float(u) / _CANVAS, float(v) / _CANVAS) for name, (u, v) in projected.items()}


_CIRCLE = [(math.cos(2 * math.pi * k / 28), math.sin(2 * math.pi * k / 28)) for k in range(28)]


def _mix(colour: Rgb, other: Rgb, share: float) -> Rgb:
    """Mix `share` (0 to 1) of `other` into `colour`."""
    r, g, b = (round(a + (o - a) * share) for a, o in zip(colour, other, strict=True))
    return r, g, b


_WHITE: Rgb = (255, 255, 255)
_INK: Rgb = (24, 22, 30)
# What the camera on the wrist sees next to the table.
_FLOOR: Rgb = (214, 220, 226)


# --- Table and goals --------------------------------------------------------------------------------------


@cache
def _backdrop() -> Image.Image:
    """Draw the wall and the empty table once, because they are the same in every frame."""
    wall_top, wall_bottom = (236, 239, 242), (214, 220, 226)
    image = Image.new("RGB", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(image, "RGBA")
    for row in range(_CANVAS):
        draw.line([(0, row), (_CANVAS, row)], fill=_mix(wall_top, wall_bottom, row / _CANVAS))
    _draw_table(_View(_FIXED, draw))
    return image


def _draw_table(view: _View) -> None:
    half_x, half_y = TABLE_HALF[0] + 0.004, TABLE_HALF[1] + 0.004
    near_left, near_right, far_right, far_left = view.square(0, 0, 0, half_x, half_y)
    wood: Rgb = (208, 199, 186)
    below = [view.camera.project(sx * half_x, -half_y, -0.016) for sx in (1, -1)]
    view.draw.polygon([near_left, near_right, *below], fill=_mix(wood, _INK, 0.35))
    view.draw.polygon([near_left, near_right, far_right, far_left], fill=wood)
    planks = 5
    for k in range(planks):
        left, right = (-half_x + 2 * half_x * edge / planks for edge in (k, k + 1))
        shade = _mix(wood, _WHITE, 0.10) if k % 2 else wood
        corners = [(left, -half_y), (right, -half_y), (right, half_y), (left, half_y)]
        view.draw.polygon([view.camera.project(x, y, 0) for x, y in corners], fill=shade)
    view.draw.line([near_left, near_right], fill=_mix(wood, _WHITE, 0.5), width=2)


def _draw_goal(view: _View, goal: Goal) -> None:
    x, y, half, top = goal.x, goal.y, goal.half, goal.thickness
    colour = COLOURS[goal.colour]
    if goal.kind == "plate":
        view.draw.polygon(view.disc(x + 0.003, y - 0.004, 0, half + 0.002), fill=(*_INK, 60))
        view.draw.polygon(view.disc(x, y, 0, half * 0.9), fill=_mix(colour, _INK, 0.45))
        view.draw.polygon(view.disc(x, y, top, half), fill=_mix(colour, _WHITE, 0.30))
        view.draw.polygon(view.disc(x, y, top, half * 0.80), fill=_mix(colour, _INK, 0.12))
        view.draw.polygon(view.disc(x, y - 0.002, top, half * 0.75), fill=_mix(colour, _WHITE, 0.14))
    else:
        view.draw.polygon(view.square(x + 0.002, y - 0.003, 0, half + 0.001, half + 0.001), fill=(*_INK, 50))
        view.draw.polygon(view.square(x, y, top, half, half), fill=_mix(colour, _INK, 0.10))
        view.draw.polygon(view.square(x, y, top, half * 0.86, half * 0.86), fill=_mix(colour, _WHITE, 0.55))
        view.draw.polygon(view.square(x, y, top, half * 0.78, half * 0.78), fill=_mix(colour, _WHITE, 0.08))


# --- Objects ----------------------------------------------------------------------------------------------


def _draw_object_shadow(view: _View, thing: TableObject) -> None:
    """Draw a soft shadow right below an object; the lower the object, the smaller the shadow."""
    x, y, z = (float(value) for value in thing.position)
    spread = 1.12 + min(z, 0.1) * 2.0
    for grow, alpha in ((1.28, 26), (1.12, 38), (0.95, 52)):
        view.draw.polygon(view.disc(x + 0.004, y - 0.003, 0, thing.radius * spread * grow), fill=(*_INK, alpha))


def _draw_cube(view: _View, thing: TableObject) -> None:
    x, y, z = (float(value) for value in thing.position)
    colour, half = COLOURS[thing.colour], thing.radius
    bottom, top = view.square(x, y, z, half, half), view.square(x, y, z + thing.height, half, half)
    # Beside the middle of the image, a camera sees one of the sides too.
    if x > view.camera.x:
        view.draw.polygon([bottom[0], bottom[3], top[3], top[0]], fill=_mix(colour, _INK, 0.30))
    else:
        view.draw.polygon([bottom[1], bottom[2], top[2], top[1]], fill=_mix(colour, _INK, 0.50))
    view.draw.polygon([bottom[0], bottom[1], top[1], top[0]], fill=_mix(colour, _INK, 0.22))
    view.draw.polygon(top, fill=_mix(colour, _WHITE, 0.20))
    view.draw.line([top[0], top[1]], fill=_mix(colour, _WHITE, 0.45), width=2)


def _draw_cylinder(view: _View, thing: TableObject) -> None:
    x, y, z = (float(value) for value in thing.position)
    colour = COLOURS[thing.colour]
    bottom, top = view.disc(x, y, z, thing.radius), view.disc(x, y, z + thing.height, thing.radius)
    near = [*range(14, 28), 0]  # the half of the rim that faces the camera, from left to right
    for start in range(0, 14, 2):
        # Lit from the left: brightest near the left edge, dark on the right.
        share = abs(start - 3) / 11
        strip = near[start : start + 3]
        wall = [bottom[k] for k in strip] + [top[k] for k in reversed(strip)]
        view.draw.polygon(wall, fill=_mix(_mix(colour, _WHITE, 0.10), _INK, 0.08 + 0.45 * share))
    view.draw.polygon(top, fill=_mix(colour, _WHITE, 0.26))
    view.draw.polygon(view.disc(x, y, z + thing.height, thing.radius * 0.80), fill=_mix(colour, _WHITE, 0.14))


def _draw_ball(view: _View, thing: TableObject) -> None:
    x, y, z = (float(value) for value in thing.position)
    colour = COLOURS[thing.colour]
    u, v = view.camera.project(x, y, z + thing.radius)
    radius = thing.radius * view.camera.pixels_per_metre(y, z + thing.radius)
    for size, shade in ((1.0, _mix(colour, _INK, 0.42)), (0.88, _mix(colour, _INK, 0.18)), (0.68, colour)):
        _dot(view, u, v, radius, size, shade)
    _dot(view, u, v, radius, 0.42, _mix(colour, _WHITE, 0.25))
    _dot(view, u, v, radius, 0.18, _mix(colour, _WHITE, 0.80))


def _dot(view: _View, u: float, v: float, radius: float, size: float, fill: Rgb) -> None:
    """Draw one layer of a ball; smaller layers are nearer to the light at the upper left."""
    u, v, extent = u - radius * (1 - size) * 0.42, v - radius * (1 - size) * 0.52, radius * size
    view.draw.ellipse([u - extent, v - extent, u + extent, v + extent], fill=fill)


_DRAW_SHAPE = {"cube": _draw_cube, "ball": _draw_ball, "cylinder": _draw_cylinder}


# --- TableGripper ----------------------------------------------------------------------------------------------

_STEEL: Rgb = (66, 70, 80)
_TIP: Rgb = (246, 247, 250)
_LAMP_OPEN: Rgb = (150, 240, 250)
_LAMP_CLOSED: Rgb = (236, 30, 190)


def _draw_gripper_shadow(view: _View, gripper: TableGripper, height: float, radius: float = 0.025) -> None:
    x, y, _ = (float(value) for value in gripper.position)
    for grow, alpha in ((1.25, 50), (1.1, 70), (0.95, 110)):
        view.draw.polygon(view.disc(x, y, height, radius * grow), fill=(*_INK, alpha))


def _draw_gripper(view: _View, gripper: TableGripper, with_shaft: bool) -> None:
    x, y, z = (float(value) for value in gripper.position)
    spread = gripper.spread
    palm, wrist = z + FINGER_LENGTH, z + FINGER_LENGTH + 0.014
    for side in (-1, 1):
        _box(view, x + side * spread, y, z, palm, 0.006, 0.006, _STEEL)
        _box(view, x + side * spread, y, z, z + 0.018, 0.0065, 0.007, _TIP)
    _box(view, x, y, palm, wrist, max(spread + 0.008, 0.02), 0.010, _STEEL)
    _box(view, x, y, palm - 0.002, wrist, 0.016, 0.012, _LAMP_OPEN if gripper.is_open else _LAMP_CLOSED)

    if not with_shaft:  # the camera on the wrist hangs next to it
        return
    # The shaft has a fixed width in the image, so that it hides little near the camera.
    _draw_rod(view, view.camera.project(x, y, wrist), view.camera.project(x, y, 0.62), _STEEL)
    for k in range(4):
        ends = [view.camera.project(x, y, wrist + 0.013 * edge) for edge in (k, k + 1)]
        _draw_rod(view, ends[0], ends[1], _INK if k % 2 == 0 else _TIP, width=18)


def _draw_rod(view: _View, foot: Point, head: Point, colour: Rgb, width: int = 14) -> None:
    """Draw an upright rod, lit from the left."""
    view.draw.line([foot, head], fill=_mix(colour, _INK, 0.25), width=width)
    view.draw.line([(foot[0] - 3, foot[1]), (head[0] - 3, head[1])], fill=_mix(colour, _WHITE, 0.30), width=width // 3)


def _box(
    view: _View,
    x: float,
    y: float,
    low: float,
    high: float,
    half_x: float,
    half_y: float,
    colour: Rgb,
) -> None:
    """Draw the front and the top of an upright box."""
    bottom, top = view.square(x, y, low, half_x, half_y), view.square(x, y, high, half_x, half_y)
    view.draw.polygon([bottom[0], bottom[1], top[1], top[0]], fill=_mix(colour, _INK, 0.15))
    view.draw.polygon(top, fill=_mix(colour, _WHITE, 0.25))
