"""Colors of a drawn flower, measured from its pixels without a network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mirror_modules.data.flowers.drawing import BACKGROUND_RAMPS, CENTER_RAMPS, PETAL_RAMPS, pixel_axes, stops_of
from mirror_modules.data.transforms import check_bytes

# Inner and outer radius, in half image widths. Petals of both sizes and of all shapes cross this ring.
PETAL_RING = (0.32, 0.56)
# The center of the flower covers this disc at every shift.
CENTER_DISC = (0.0, 0.16)
SHADES = 9  # samples of each color ramp
CHUNK = 50  # images per distance computation


def measured_colors(images: Tensor) -> dict[str, list[str]]:
    """Measure the petal color and the center color of each flower.

    Each pixel in the petal ring votes for the color ramp with the nearest color in RGB distance; votes for background
    ramps are discarded. The center color is found in the same way from a disc, without background ramps.

    Args:
        images: Bytes (N, H, W, 3) of drawn or generated flowers.

    Returns:
        A value of `ATTRIBUTES` for each image, under "petal_color" and "center_color".

    Raises:
        ValueError: The images are not uint8 (N, H, W, 3).

    Examples:
        >>> import torch
        >>> from mirror_modules.data import SyntheticFlowers, measured_colors
        >>> sample = SyntheticFlowers(1, resolution=64)[0]
        >>> measured = measured_colors(torch.from_numpy(sample.image).unsqueeze(0))
        >>> measured["petal_color"] == [sample.attributes["petal_color"]]
        True
    """
    check_bytes("measured_colors", images)
    return {
        "petal_color": _vote(images, PETAL_RING, PETAL_RAMPS, BACKGROUND_RAMPS),
        "center_color": _vote(images, CENTER_DISC, CENTER_RAMPS, {}),
    }


def _vote(
    images: Tensor,
    ring: tuple[float, float],
    ramps: Mapping[str, tuple[str, str, str]],
    others: Mapping[str, tuple[str, str, str]],
) -> list[str]:
    x, y = pixel_axes(images.shape[1])
    radius = torch.from_numpy(np.hypot(x, y))
    pixels_NP3 = images[:, (radius >= ring[0]) & (radius < ring[1])].float()
    shades_KS3 = torch.stack([_shades(stops) for stops in [*ramps.values(), *others.values()]])
    names, values = list(ramps), []
    for chunk in pixels_NP3.split(CHUNK):
        distance_NPK = torch.cdist(chunk, shades_KS3.flatten(0, 1)).unflatten(2, shades_KS3.shape[:2]).amin(3)
        nearest_NP = distance_NPK.argmin(2)
        votes = torch.stack([(nearest_NP == i).sum(1) for i in range(len(names))], dim=1)
        values += [names[i] for i in votes.argmax(1).tolist()]
    return values


def _shades(stops: tuple[str, str, str]) -> Tensor:
    """Evenly spaced colors of a ramp, from shadow to light, (S, 3)."""
    s = torch.linspace(0, 1, SHADES).unsqueeze(1)
    shadow, body, light = torch.from_numpy(stops_of(stops))
    return (1 - s) ** 2 * shadow + 2 * s * (1 - s) * body + s**2 * light
