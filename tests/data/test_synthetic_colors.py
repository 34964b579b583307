"""Colors measured in pixels are those that were drawn, and need nothing but the pixels that they are measured in."""

import numpy as np
import pytest
import torch

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, measured_colors
from mirror_modules.data.synthetic_drawing import CENTER_RAMPS, PETAL_RAMPS

N = 211


@pytest.mark.parametrize("resolution", [32, 64])
def test_measures_what_was_drawn(resolution):
    samples = [SyntheticFlowers(N, resolution=resolution, seed=5)[i] for i in range(N)]
    measured = measured_colors(torch.from_numpy(np.stack([sample.image for sample in samples])))
    for name, least in (("petal_color", 0.985), ("center_color", 0.995)):
        right = [value == sample.attributes[name] for value, sample in zip(measured[name], samples)]
        assert sum(right) / N >= least


def flat(petal, center, resolution=17):
    """A ring of one color around a disc of another, by loops."""
    image = torch.zeros(1, resolution, resolution, 3, dtype=torch.uint8)
    for i in range(resolution):
        for j in range(resolution):
            radius = np.hypot((2 * i + 1) / resolution - 1, (2 * j + 1) / resolution - 1)
            color = center if radius < 0.25 else petal
            image[0, i, j] = torch.tensor([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return image


@pytest.mark.parametrize("petal", ATTRIBUTES["petal_color"])
@pytest.mark.parametrize("center", ATTRIBUTES["center_color"])
def test_each_color_alone(petal, center):
    image = flat(PETAL_RAMPS[petal][1], CENTER_RAMPS[center][1])
    assert measured_colors(image) == {"petal_color": [petal], "center_color": [center]}


def test_an_image_alone_is_measured_as_among_others():
    images = torch.cat([flat("#f00818", "#2a1c1a"), flat("#1440f8", "#7fd414")] * 30)
    assert measured_colors(images)["petal_color"] == ["red", "blue"] * 30
    assert measured_colors(images[1:2])["center_color"] == ["green"]


def test_other_images_raise():
    with pytest.raises(ValueError, match=r"measured_colors: images must be uint8 \(B, H, W, 3\), but they are torch"):
        measured_colors(torch.zeros(2, 3, 8, 8))
