"""Flowers drawn from their attributes with numpy alone, at any resolution.

Every component is a smooth function of image position, so a flower looks the same at all resolutions. Outlines are
signed distances (negative inside), which give the antialiased coverage of a pixel:

    coverage = clip(1/2 - distance / pixel, 0, 1)

Lengths are in half image widths: x and y run from -1 to 1, y downwards. Within the flower, lengths are in flower radii.
K is the number of petals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules._checks import check_positive
from mirror_modules.data.flowers.attributes import check_attributes
from mirror_modules.data.flowers.backgrounds import BACKGROUNDS
from mirror_modules.data.sample import KeyPoint, SubjectBox

Array = NDArray[np.floating[Any]]

# Shadow, body and light of each color ramp.
PETAL_RAMPS = {
    "red": ("#8c0014", "#f00818", "#ff5a3c"),
    "orange": ("#d84a00", "#ff8000", "#ffc050"),
    "yellow": ("#f0ac00", "#fff000", "#fffca0"),
    "pink": ("#d2387c", "#ff7fb8", "#ffd8ea"),
    "purple": ("#3c0886", "#8424e0", "#c68cff"),
    "blue": ("#0a1a90", "#1440f8", "#74a8ff"),
    "white": ("#a6aac8", "#ffffff", "#ffffff"),
    "maroon": ("#33000e", "#780826", "#b04058"),
}
CENTER_RAMPS = {
    "golden": ("#7a3c00", "#ffa800", "#ffe070"),
    "black": ("#0a0606", "#2a1c1a", "#6a5248"),
    "green": ("#2c6a00", "#7fd414", "#d8ff8c"),
    "turquoise": ("#00706e", "#10d8cc", "#b4fff6"),
}
BACKGROUND_RAMPS = {
    "sky": ("#5aa8e8", "#a8d8f8", "#ffffff"),
    "meadow": ("#1c5a1e", "#4c9a34", "#a8d860"),
    "night": ("#05071c", "#2a2a78", "#fffbe0"),
    "sand": ("#b08a54", "#e2c48e", "#f8e8c4"),
    "stripes": ("#3c7a80", "#5f9ea0", "#86bcb8"),
    "dots": ("#8e86b4", "#b0a8d4", "#f6f2ff"),
}
COUNTS = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
FLOWER_RADIUS = {"small": 0.64, "large": 0.9}
CENTER_RADIUS = 0.31
MIN_RESOLUTION = 8
SEEDS = 34  # drawn on the center
POINT_NAMES = ("center", *(f"petal {i + 1}" for i in range(max(COUNTS.values()))))
HIDDEN = (0.0, 0.0, 0.0)


class DrawnFlower(NamedTuple):
    """A drawn flower, and where it is."""

    image: NDArray[np.uint8]
    """RGB, (resolution, resolution, 3)."""
    box: SubjectBox
    """Bounding box of petals and center, as shares of the image. It may extend slightly beyond the image."""
    points: tuple[KeyPoint, ...]
    """The center, and the tip of each petal: the end of its axis, from which a heart's lobes reach out."""


def draw_flower(attributes: Mapping[str, str], resolution: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one flower, with small random rotation, shift and tint and a random layout of the background.

    The draws from `rng` do not depend on the resolution: the same state gives the same flower at any resolution.

    Args:
        attributes: One value for each attribute of `ATTRIBUTES`.
        resolution: Height and width in pixels, at least 8.
        rng: Random generator of everything that the attributes do not determine.

    Returns:
        RGB bytes, (resolution, resolution, 3).

    Raises:
        ValueError: The attributes are not those of `ATTRIBUTES`, or the resolution is not a whole number of at least 8.

    Examples:
        >>> import numpy as np
        >>> from mirror_modules.data import ATTRIBUTES, draw_flower
        >>> flower = {name: values[0] for name, values in ATTRIBUTES.items()}
        >>> image = draw_flower(flower, 32, np.random.default_rng(0))
        >>> image.shape, image.dtype
        ((32, 32, 3), dtype('uint8'))
    """
    return draw_located_flower(attributes, resolution, rng).image


def draw_located_flower(
    attributes: Mapping[str, str],
    resolution: int,
    rng: np.random.Generator,
    *,
    scale: float = 1.0,
    place: tuple[float, float] = (0.0, 0.0),
) -> DrawnFlower:
    """Draw the flower of `draw_flower`, and compute its box and key points, which do not depend on the resolution.

    Args:
        attributes: As of `draw_flower`.
        resolution: As of `draw_flower`.
        rng: As of `draw_flower`.
        scale: Size of the flower relative to that of `draw_flower`, at most 1.
        place: Shift across and down from that of `draw_flower`, from -1, the left or upper border, to 1.

    Raises:
        ValueError: As of `draw_flower`.
    """
    check_attributes(attributes)
    check_positive("draw_flower", resolution=resolution)
    if resolution < MIN_RESOLUTION:
        raise ValueError(f"draw_flower: resolution must be at least {MIN_RESOLUTION} pixels, but it is {resolution}.")
    x, y = pixel_axes(resolution)
    background = attributes["background"]
    image = ramp(BACKGROUND_RAMPS[background], BACKGROUNDS[background](x, y, rng), rng)

    radius = FLOWER_RADIUS[attributes["size"]] * rng.uniform(0.96, 1.04)
    radius *= scale
    room = max(0.93 - radius, 0.0)
    shift_x, shift_y = (rng.uniform(-0.05, 0.05) + room * share for share in place)
    across, down = (x - shift_x) / radius, (y - shift_y) / radius
    pixel = 2 / resolution / radius
    count, shape = COUNTS[attributes["petal_count"]], attributes["petal_shape"]
    angles, lengths = draw_layout(count, rng)
    distance, shade = draw_petals(shape, angles, lengths, across, down, pixel)
    image *= 1 - 0.35 * falloff(distance, 0.22)
    blend(image, coverage(distance, pixel), ramp(PETAL_RAMPS[attributes["petal_color"]], shade, rng))

    # The center is small: compute only the rows and columns that it covers, or, if it is smaller than a pixel, those
    # that it touches.
    reach = 0.3 if pixel < 0.6 else CENTER_RADIUS + pixel / 2
    rows, columns = np.flatnonzero(abs(down) < reach), np.flatnonzero(abs(across) < reach)
    high, wide = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    distance, shade = draw_center(across[:, wide], down[high], pixel, rng)
    blend(image[:, high, wide], coverage(distance, pixel), ramp(CENTER_RAMPS[attributes["center_color"]], shade, rng))
    pixels = np.ascontiguousarray(np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return DrawnFlower(pixels, *_locate(shape, angles, lengths, radius, (shift_x, shift_y)))


def draw_layout(count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw the angle and the length of each petal, both (K,)."""
    angles = rng.uniform(0, 2 * math.pi) + (np.arange(count) + rng.uniform(-0.07, 0.07, count)) * 2 * math.pi / count
    return angles, rng.uniform(0.96, 1.02, count)


def draw_petals(
    shape: str, angles: Array, lengths: Array, across: Array, down: Array, pixel: float
) -> tuple[Array, Array]:
    """Composite the petals, each casting a shadow on those below: distance to their union and shade, both (H, W)."""
    count = len(angles)
    cosines, sines = ((trig(angles) / lengths).astype(np.float32)[:, None, None] for trig in (np.cos, np.sin))
    along_KHW = cosines * across + sines * down
    beside_KHW = np.abs(cosines * down - sines * across)
    distance_KHW, width = PETALS[shape](along_KHW, beside_KHW, math.tan(math.pi / count))

    # Dark at the base and along the vein, light inside, darker again near the outline.
    inside_KHW = np.clip(distance_KHW / (-0.6 * width), 0, 1)
    shade_KHW = 0.04 + 0.58 * along_KHW + 0.34 * inside_KHW * (2 - inside_KHW)
    shade_KHW -= 0.16 * falloff(beside_KHW, 0.05) * (1.15 - along_KHW)
    shade_KHW += 0.035 * np.cos(42 * beside_KHW / (np.abs(along_KHW) + 0.3))
    coverage_KHW = coverage(distance_KHW, pixel)
    shadow_KHW = 0.45 * falloff(distance_KHW, 0.16)

    shade = shade_KHW[0]
    for k in range(1, count):
        shade = shade * (1 - shadow_KHW[k])
        shade += coverage_KHW[k] * (shade_KHW[k] - shade)
    shade *= 1 - 0.7 * falloff(np.hypot(across, down) - CENTER_RADIUS, 0.2)
    return distance_KHW.min(axis=0), np.clip(shade, 0, 1)


def draw_center(across: Array, down: Array, pixel: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """A dome lit from the upper left, with seeds spaced by the golden angle: distance and shade, both (H, W)."""
    radius = np.hypot(across, down)
    rank = np.arange(SEEDS, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi) + rank * math.pi * (3 - math.sqrt(5))
    distance = CENTER_RADIUS * 0.92 * np.sqrt((rank + 0.5) / SEEDS)
    seeds_x, seeds_y = ((distance * trig(angle)).astype(np.float32)[:, None, None] for trig in (np.cos, np.sin))
    to_seed = np.hypot(across - seeds_x, down - seeds_y).min(axis=0)
    shade = 0.66 - 3.5 * radius * radius - 0.5 * (across + down) + 0.4 * falloff(to_seed, 0.05)
    return radius - CENTER_RADIUS, np.clip(shade, 0, 1)


def _locate(
    shape: str, angles: Array, lengths: Array, radius: float, shift: tuple[float, float]
) -> tuple[SubjectBox, tuple[KeyPoint, ...]]:
    """The box of a flower, and its key points, from its layout."""
    cosines, sines = np.cos(angles) * lengths, np.sin(angles) * lengths
    along, beside = outline(shape, len(angles))
    x_KN, y_KN = np.outer(cosines, along) - np.outer(sines, beside), np.outer(sines, along) + np.outer(cosines, beside)
    extents = []
    for middle, values_KN in zip(shift, (x_KN, y_KN)):
        low, high = min(float(values_KN.min()), -CENTER_RADIUS), max(float(values_KN.max()), CENTER_RADIUS)
        extents.append(((1 + middle + radius * low) / 2, radius * (high - low) / 2))
    (left, width), (top, height) = extents
    points = [(0.0, 0.0), *zip(cosines.tolist(), sines.tolist())]
    places = [tuple((1 + middle + radius * part) / 2 for middle, part in zip(shift, point)) for point in points]
    shown = [(x, y, 1.0) if min(x, y) >= 0 and max(x, y) <= 1 else HIDDEN for x, y in places]
    return (left, top, width, height), (*shown, *[HIDDEN] * (len(POINT_NAMES) - len(shown)))


@cache
def outline(shape: str, count: int) -> tuple[Array, Array]:
    """Points (N,) on both sides of the outline of a petal: along its axis, and beside it."""
    along, beside = np.linspace(-0.1, 1.1, 601), np.linspace(0, 0.6, 301)
    distance, _ = PETALS[shape](along[:, None], beside[None, :], math.tan(math.pi / count))
    is_inside = distance <= 0
    # The last position inside, for each position along the axis that has one; a tenth of them, from the tip on.
    rows = np.flatnonzero(is_inside.any(axis=1))[::-10]
    widths = beside[len(beside) - 1 - is_inside[rows, ::-1].argmax(axis=1)]
    return np.concatenate((along[rows], along[rows])), np.concatenate((widths, -widths))


# Petal shapes: (along, beside, spread) -> (distance, half width). A petal extends along its axis from the flower's
# middle, along = 0, to along = 1; beside is the distance from the axis; spread is the tangent of half the angle between
# petals and bounds the width.


def round_petal(along: Array, beside: Array, spread: float) -> tuple[Array, float]:
    """An ellipse."""
    width = min(0.36, 0.64 * spread)
    return ellipse(along - 0.56, beside, 0.44, width), width


def pointed_petal(along: Array, beside: Array, spread: float) -> tuple[Array, float]:
    """The intersection of two discs whose centers lie on opposite sides of the axis."""
    width, half_length = min(0.25, 0.52 * spread), 0.47
    disc = (half_length**2 + width**2) / (2 * width)
    return np.hypot(along - (1.03 - half_length), beside + (disc - width)) - disc, width


def heart_petal(along: Array, beside: Array, spread: float) -> tuple[Array, float]:
    """Two round lobes on a cone that starts at the base. The formula describes one lobe; beside >= 0 mirrors it."""
    width = min(0.42, 0.66 * spread)
    lobe, offset = 0.53 * width, 0.47 * width
    top, base = 1 - lobe, 0.1
    side = math.atan2(offset, top - base) + math.asin(lobe / math.hypot(offset, top - base))
    cosine, sine = math.cos(side), math.sin(side)
    cone = np.maximum(cosine * beside - sine * (along - base), cosine * (along - top) + sine * (beside - offset))
    cone = np.maximum(cone, along - top)
    return np.minimum(np.hypot(along - top, beside - offset) - lobe, cone), 0.45 * width


def narrow_petal(along: Array, beside: Array, spread: float) -> tuple[Array, float]:
    """A capsule, slim at the base and widest beyond its middle."""
    width = 0.03 + 0.32 * along * (1.12 - along)
    return np.hypot(np.maximum(np.abs(along - 0.46) - 0.43, 0), beside) - width, 0.11


PETALS = {"round": round_petal, "pointed": pointed_petal, "heart": heart_petal, "narrow": narrow_petal}


def ellipse(along: Array, beside: Array, half_length: float, half_width: float) -> Array:
    """Signed distance to an ellipse, to first order: f (f - 1) / |grad f^2 / 2| with f = 1 on the outline."""
    along, beside = along / half_length, beside / half_width
    level = np.hypot(along, beside)
    return level * (level - 1) / (np.hypot(along / half_length, beside / half_width) + 1e-6)


def coverage(distance: Array, pixel: float) -> Array:
    """Fraction of each pixel inside the outline."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def falloff(distance: Array, reach: float) -> Array:
    """A soft shadow: 1 inside, decreasing smoothly to 0 at distance `reach` outside."""
    near = np.clip(1 - distance / reach, 0, 1)
    return near * near


def blend(image: Array, coverage: Array, color: Array) -> None:
    """Alpha-blend a color (3, H, W) into the image (3, H, W), in place."""
    image += coverage * (color - image)


def ramp(stops: tuple[str, str, str], shade: Array, rng: np.random.Generator) -> Array:
    """Map shades s in [0, 1] to colors (3, H, W) along a quadratic curve, jointly jittered in brightness and tint.

        color(s) = (1 - s)^2 shadow + 2 s (1 - s) body + s^2 light

    Values lie in 0 to 255, apart from a slight overshoot.
    """
    shadow, body, light = stops_of(stops) * rng.uniform(0.96, 1.07) * rng.uniform(0.97, 1.03, 3)
    coefficients = np.stack([shadow, 2 * (body - shadow), shadow - 2 * body + light], axis=1).astype(np.float32)
    powers = np.stack([np.ones_like(shade), shade, shade * shade])
    return (coefficients @ powers.reshape(3, -1)).reshape(powers.shape)


@cache
def stops_of(stops: tuple[str, ...]) -> Array:
    """RGB values from 0 to 255 of hexadecimal colors, (stops, 3)."""
    return np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], dtype=np.float32)


@lru_cache(maxsize=8)
def pixel_axes(resolution: int) -> tuple[Array, Array]:
    """Coordinates of pixel centers between -1 and 1, as a row (1, W) and a column (H, 1)."""
    axis = ((np.arange(resolution) + 0.5) * (2 / resolution) - 1).astype(np.float32)
    return axis[None, :], axis[:, None]
