"""Colors measured from pixels match the drawn attributes, whatever the other images in the batch."""

import numpy as np
import pytest
import torch

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, measured_colors
from mirror_modules.data.flowers.drawing import CENTER_RAMPS, PETAL_RAMPS

N = 211


@pytest.mark.parametrize("resolution", [32, 64])
def test_measured_colors_match_the_attributes(resolution):
    samples = [SyntheticFlowers(N, resolution=resolution, seed=5)[i] for i in range(N)]
    measured = measured_colors(torch.from_numpy(np.stack([sample.image for sample in samples])))
    for name, least in (("petal_color", 0.985), ("center_color", 0.995)):
        correct = [value == sample.attributes[name] for value, sample in zip(measured[name], samples)]
        assert sum(correct) / N >= least


def flat(petal, center, resolution=17):
    """A disc of one color on a field of another, by loops."""
    image = torch.zeros(1, resolution, resolution, 3, dtype=torch.uint8)
    for i in range(resolution):
        for j in range(resolution):
            radius = np.hypot((2 * i + 1) / resolution - 1, (2 * j + 1) / resolution - 1)
            color = center if radius < 0.25 else petal
            image[0, i, j] = torch.tensor([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return image


@pytest.mark.parametrize("petal", ATTRIBUTES["petal_color"])
@pytest.mark.parametrize("center", ATTRIBUTES["center_color"])
def test_every_pair_of_colors(petal, center):
    image = flat(PETAL_RAMPS[petal][1], CENTER_RAMPS[center][1])
    assert measured_colors(image) == {"petal_color": [petal], "center_color": [center]}


def test_an_image_alone_equals_the_same_image_in_a_batch():
    images = torch.cat([flat("#f00818", "#2a1c1a"), flat("#1440f8", "#7fd414")] * 30)
    assert measured_colors(images)["petal_color"] == ["red", "blue"] * 30
    assert measured_colors(images[1:2])["center_color"] == ["green"]


def test_images_other_than_bytes_are_refused():
    with pytest.raises(ValueError, match=r"measured_colors: images must be uint8 \(B, H, W, 3\), but they are torch"):
        measured_colors(torch.zeros(2, 3, 8, 8))
