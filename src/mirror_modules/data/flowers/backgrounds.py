"""Backgrounds of the drawn flowers: each maps x (1, W) and y (H, 1) to a shade (H, W) in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
CELLS = 7  # stars per row of the night sky


def sky(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A gradient towards the horizon with soft clouds."""
    a, b, c = rng.uniform(0, 2 * math.pi, 3).tolist()
    clouds = np.sin(2.3 * x + a + 1.2 * np.sin(2 * y + b)) + np.sin(4.1 * y + c + 0.9 * np.sin(3.1 * x + b))
    return 0.28 + 0.22 * y + 0.4 * smooth(0.5 * clouds)


def smooth(shade: Array) -> Array:
    """Smoothstep: 3 s^2 - 2 s^3 of the shade, clipped to [0, 1]."""
    shade = np.clip(shade, 0, 1)
    return shade * shade * (3 - 2 * shade)


def meadow(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Blades of grass bent by the wind."""
    a, b, c, d = rng.uniform(0, 2 * math.pi, 4).tolist()
    bent = x + 0.12 * np.sin(2.2 * y + a)
    blades = np.sin(17 * bent + b + 1.5 * np.sin(5 * y + c)) + np.sin(29 * bent + d - 2.0 * np.sin(3 * y + b + 4 * x))
    return np.clip(0.42 + 0.14 * y + 0.17 * blades, 0, 1)


def night(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Dark at the top, a glow at the bottom, and one star at a random position in each grid cell."""
    glow = 0.04 + 0.36 * (0.5 + 0.5 * y) ** 2
    places = rng.uniform(0.25, 0.75, (2, CELLS, CELLS)).astype(np.float32)
    brightness = (rng.uniform(0, 1, (CELLS, CELLS)) ** 2).astype(np.float32)
    u, v = (x + 1) * (CELLS / 2), (y + 1) * (CELLS / 2)
    column, row = np.floor(u), np.floor(v)
    cell = row.astype(np.intp), column.astype(np.intp)
    squared = (u - column - places[0][cell]) ** 2 + (v - row - places[1][cell]) ** 2
    return glow + (1 - glow) * brightness[cell] * np.clip(1 - squared / 0.05, 0, 1) ** 2


def sand(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Wind ripples."""
    a, b, c = rng.uniform(0, 2 * math.pi, 3).tolist()
    ripples = np.sin(13 * y + a + 1.4 * np.sin(2.3 * x + b) + 0.6 * np.sin(5.1 * x + c))
    return np.clip(0.5 + 0.22 * ripples - 0.12 * y, 0, 1)


def stripes(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Broad diagonal stripes."""
    slope, phase = rng.uniform(0.6, 1.2), rng.uniform(0, 2 * math.pi)
    return 0.5 + np.clip(2.5 * np.sin(8 * (x + slope * y) + phase), -1, 1) * 0.45


def dots(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Round dots on a slanted grid."""
    shift_x, shift_y = rng.uniform(0, 1, 2).tolist()
    u, v = 2.1 * (x + 0.5 * y) + shift_x, 2.1 * (y - 0.5 * x) + shift_y
    squared = (u - np.floor(u) - 0.5) ** 2 + (v - np.floor(v) - 0.5) ** 2
    return 0.3 + 0.7 * np.clip((0.28 - np.sqrt(squared)) / 0.1 + 0.5, 0, 1)


BACKGROUNDS = {"sky": sky, "meadow": meadow, "night": night, "sand": sand, "stripes": stripes, "dots": dots}
