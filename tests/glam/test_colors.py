"""Color consistency against explicit sums over pixels, and recorded results."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules.functional import color_consistency_loss

PARITY = Path(__file__).parents[1] / "parity"
B, H, W, COARSE_H, COARSE_W = 2, 7, 11, 3, 5


def draw(dtype=torch.float64):
    return tuple(torch.rand(B, 3, *size, dtype=dtype) * 2 - 1 for size in ((H, W), (COARSE_H, COARSE_W)))


def statistics_by_loops(image):
    pixels = [[float(image[c, i, j]) for c in range(3)] for i, j in product(*map(range, image.shape[1:]))]
    mean = [sum(pixel[c] for pixel in pixels) / len(pixels) for c in range(3)]
    covariance = [
        sum((pixel[c] - mean[c]) * (pixel[d] - mean[d]) for pixel in pixels) / len(pixels)
        for c, d in product(range(3), range(3))
    ]
    return mean, covariance


def test_matches_the_loops():
    images, coarser = draw()
    expected = 0.0
    for image, coarse in zip(images, coarser, strict=True):
        for weight, entries, others in zip(
            (0.3, 0.7), statistics_by_loops(image), statistics_by_loops(coarse), strict=True
        ):
            squares = [(a - b) ** 2 for a, b in zip(entries, others, strict=True)]
            expected += weight * sum(squares) / len(squares) / B
    loss = color_consistency_loss(images, coarser, mean_weight=0.3, covariance_weight=0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_recorded_loss_and_gradient():
    with np.load(PARITY / "color_consistency.npz") as file:
        record = {key: torch.from_numpy(file[key]) for key in file}
    fine, coarse = record["fine"].requires_grad_(), record["coarse"]
    loss = color_consistency_loss(fine, coarse)
    assert_close(loss, record["loss"], atol=1e-6, rtol=0)
    loss.backward()
    assert_close(fine.grad, record["fine_gradient"], atol=1e-7, rtol=0)
    alone = color_consistency_loss(fine, coarse, covariance_weight=0)
    assert_close(alone, record["mean_term"], atol=1e-6, rtol=0)
    alone = color_consistency_loss(fine, coarse, mean_weight=0, covariance_weight=1)
    assert_close(alone, record["covariance_term"], atol=1e-6, rtol=0)


def test_gradient():
    images, coarser = draw()
    assert gradcheck(lambda images: color_consistency_loss(images, coarser), images.requires_grad_())


def test_coarser_images_receive_no_gradient():
    images, coarser = (batch.requires_grad_() for batch in draw())
    color_consistency_loss(images, coarser).backward()
    assert images.grad.abs().sum() > 0
    assert coarser.grad is None


def test_a_batch_is_the_mean_of_its_images():
    images, coarser = draw()
    alone = [color_consistency_loss(images[i : i + 1], coarser[i : i + 1]) for i in range(B)]
    assert_close(color_consistency_loss(images, coarser), sum(alone) / B)


def test_half_precision_and_autocast_sum_in_float32():
    images, coarser = draw(torch.bfloat16)
    expected = color_consistency_loss(images.float(), coarser.float())
    assert_close(color_consistency_loss(images, coarser), expected, atol=0, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(color_consistency_loss(images.float(), coarser.float()), expected, atol=0, rtol=0)


def test_compiles_into_one_graph(compiled):
    images, coarser = draw()
    assert_close(compiled(color_consistency_loss)(images, coarser), color_consistency_loss(images, coarser))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"images must be \(B, 3, H, W\), but they are \(2, 7\)",
            lambda a, b: color_consistency_loss(a[:, 0, :, 0], b),
        ),
        (r"coarser: images must be \(B, 3, H, W\), .*\(2, 2, 3, 5\)", lambda a, b: color_consistency_loss(a, b[:, :2])),
        (
            r"batch sizes disagree \(images: \(2, 3, 7, 11\), coarser: \(1,",
            lambda a, b: color_consistency_loss(a, b[:1]),
        ),
        (r"mean_weight must be a finite number", lambda a, b: color_consistency_loss(a, b, mean_weight=float("nan"))),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=r"color_consistency_loss.*" + message):
        call(*draw())
