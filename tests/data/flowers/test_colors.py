"""Colors and boxes measured from pixels match what was drawn, whatever the other images in the batch."""

import numpy as np
import pytest
import torch

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, measured_box, measured_colors
from mirror_modules.data.flowers.drawing import BACKGROUND_RAMPS, CENTER_RAMPS, PETAL_RAMPS
from mirror_modules.functional import box_overlap

N = 211


@pytest.mark.parametrize("resolution", [32, 64])
def test_measured_colors_match_the_attributes(resolution):
    samples = [SyntheticFlowers(N, resolution=resolution, seed=5)[i] for i in range(N)]
    measured = measured_colors(torch.from_numpy(np.stack([sample.image for sample in samples])))
    for name, least in (("petal_color", 0.985), ("center_color", 0.995)):
        correct = [value == sample.attributes[name] for value, sample in zip(measured[name], samples)]
        assert sum(correct) / N >= least


@pytest.mark.parametrize("resolution", [8, 9, 10, 11])
def test_colors_of_the_smallest_flowers(resolution):
    """At 8 pixels no pixel has its center in the disc of the flower's center."""
    samples = list(SyntheticFlowers(N, resolution=resolution, seed=5))
    measured = measured_colors(torch.from_numpy(np.stack([sample.image for sample in samples])))
    for name, least in (("petal_color", 0.85), ("center_color", 0.8)):
        correct = [value == sample.attributes[name] for value, sample in zip(measured[name], samples)]
        assert sum(correct) / N >= least


def flat(petal, center, height=17, width=17):
    """A disc of one color on a field of another, by loops."""
    image = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    for i in range(height):
        for j in range(width):
            radius = np.hypot((2 * i + 1) / height - 1, (2 * j + 1) / width - 1)
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


def test_images_need_not_be_square():
    image = flat("#1440f8", "#7fd414", height=11, width=29)
    assert measured_colors(image) == {"petal_color": ["blue"], "center_color": ["green"]}


def test_images_other_than_bytes_are_refused():
    with pytest.raises(ValueError, match=r"measured_colors: images must be uint8 \(B, H, W, 3\), but they are torch"):
        measured_colors(torch.zeros(2, 3, 8, 8))


def test_images_smaller_than_any_flower_are_refused():
    with pytest.raises(ValueError, match=r"images must have at least 8 pixels .* but they are \(1, 11, 7, 3\)"):
        measured_colors(torch.zeros(1, 11, 7, 3, dtype=torch.uint8))


# Boxes


@pytest.mark.parametrize("resolution", [32, 64])
def test_measured_boxes_match_the_drawing(resolution):
    count = 120
    samples = [SyntheticFlowers(count, resolution=resolution, seed=5)[i] for i in range(count)]
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    overlap = box_overlap(measured_box(images), torch.tensor([sample.box for sample in samples]))
    assert overlap.mean() >= 0.9
    assert (overlap > 0.5).float().mean() >= 0.98


def test_a_flower_is_found_wherever_it_is():
    """A drawing on a larger canvas of its own background."""
    size, samples = 32, [SyntheticFlowers(99, resolution=32, seed=2)[i] for i in range(99)]
    samples = [sample for sample in samples if sample.attributes["background"] in ("sand", "stripes")]
    canvases, boxes = [], []
    for i, sample in enumerate(samples):
        stops = BACKGROUND_RAMPS[sample.attributes["background"]][1]
        canvas = np.empty((2 * size, 2 * size, 3), np.uint8)
        canvas[:] = [int(stops[k : k + 2], 16) for k in (1, 3, 5)]
        top, left = 7 * i % 33, 11 * i % 33
        canvas[top : top + size, left : left + size] = sample.image
        canvases.append(canvas)
        x, y, w, h = sample.box
        boxes.append(((x * size + left) / 64, (y * size + top) / 64, w / 2, h / 2))
    overlap = box_overlap(measured_box(torch.from_numpy(np.stack(canvases))), torch.tensor(boxes))
    assert overlap.mean() >= 0.9


def fill(image, rows, columns, color):
    image[0, rows, columns] = torch.tensor([int(color[k : k + 2], 16) for k in (1, 3, 5)], dtype=torch.uint8)


def test_small_sets_of_connected_pixels_do_not_count():
    image = torch.zeros(1, 12, 20, 3, dtype=torch.uint8)
    fill(image, slice(None), slice(None), BACKGROUND_RAMPS["sand"][1])
    fill(image, slice(2, 8), slice(5, 10), PETAL_RAMPS["blue"][1])
    fill(image, slice(8, 9), slice(10, 11), PETAL_RAMPS["blue"][1])  # touches a corner
    fill(image, slice(4, 6), slice(6, 8), CENTER_RAMPS["golden"][1])
    fill(image, slice(10, 12), slice(17, 20), PETAL_RAMPS["blue"][1])
    assert torch.equal(measured_box(image), torch.tensor([[5 / 20, 2 / 12, 6 / 20, 7 / 12]]))


def test_images_without_a_flower_have_an_empty_box():
    image = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    fill(image[1:], slice(None), slice(None), BACKGROUND_RAMPS["meadow"][1])
    fill(image[:1], slice(None), slice(None), BACKGROUND_RAMPS["stripes"][1])
    assert torch.equal(measured_box(image), torch.zeros(2, 4))
    assert measured_box(image[:0]).shape == (0, 4)


def test_a_box_alone_equals_the_same_box_in_a_batch():
    images = torch.from_numpy(np.stack([SyntheticFlowers(60, resolution=16)[i].image for i in range(60)]))
    together = measured_box(images)
    assert torch.equal(measured_box(images[57:58]), together[57:58])


def test_boxes_of_images_other_than_bytes_are_refused():
    with pytest.raises(ValueError, match=r"measured_box: images must be uint8 \(B, H, W, 3\), but they are torch"):
        measured_box(torch.zeros(2, 3, 8, 8))
