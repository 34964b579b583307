"""The kernel distance against sums over pairs, known values, and torchmetrics."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from mirror_modules.functional import kernel_distance

N, M, D = 13, 11, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel(x, y):
    return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3


def discrepancy_by_loops(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    pairs_a = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
    pairs_b = [kernel(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    return sum(pairs_a) / len(pairs_a) + sum(pairs_b) / len(pairs_b) - 2 * sum(between) / len(between)


def test_matches_the_loops():
    a, b = torch.randn(N, D), torch.randn(M, D) + 0.5
    draws = seeded(3)
    expected = []
    for _ in range(3):
        rows_a, rows_b = (torch.randperm(count, generator=draws)[:7] for count in (N, M))
        expected.append(discrepancy_by_loops(a[rows_a], b[rows_b]))
    mean = sum(expected) / 3
    result = kernel_distance(a, b, subsets=3, subset_size=7, generator=seeded(3))
    assert result.mean == pytest.approx(mean, rel=1e-10)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in expected) / 3)
    assert result.standard_deviation == pytest.approx(deviation, rel=1e-10)


def test_subsets_of_all_images_equal_the_whole():
    a, b = torch.randn(N, D), torch.randn(N, D)
    result = kernel_distance(a, b, subsets=7, subset_size=N)
    assert tuple(result) == pytest.approx((discrepancy_by_loops(a, b), 0.0), abs=1e-12)


def test_constant_sets_match_the_closed_form():
    # k(0, 0) = 1, k(x, x) = (1 + 1)^3, k(0, x) = 1.
    zeros, ones = torch.zeros(N, D), torch.ones(M, D)
    assert tuple(kernel_distance(zeros, ones, subset_size=7)) == pytest.approx((1 + 8 - 2, 0.0))
    assert tuple(kernel_distance(ones, ones, subset_size=7)) == pytest.approx((0.0, 0.0))


def test_shifted_gaussians_match_the_closed_form():
    # One feature: E (xy + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3, with the moments of N(0, 1) and N(1, 1).
    moments = [
        {1: 0, 2: 1, 3: 0},
        {1: 1, 2: 2, 3: 4},
    ]
    same_a, same_b, between = (
        1 + 3 * x[1] * y[1] + 3 * x[2] * y[2] + x[3] * y[3]
        for x, y in ((moments[0], moments[0]), (moments[1], moments[1]), (moments[0], moments[1]))
    )
    a, b = torch.randn(10007, 1, generator=seeded()), 1 + torch.randn(10007, 1, generator=seeded(1))
    result = kernel_distance(a, b, subsets=53, subset_size=503, generator=seeded(2))
    assert result.mean == pytest.approx(same_a + same_b - 2 * between, rel=0.1)


def test_the_estimate_is_unbiased_at_zero():
    # Around 0, and therefore also negative; a biased estimate would always be positive.
    distances = [
        kernel_distance(torch.randn(101, D, generator=g), torch.randn(101, D, generator=g), subsets=1, subset_size=101)
        for g in map(seeded, range(50))
    ]
    values = torch.tensor([distance.mean for distance in distances])
    assert values.mean().abs() < 3 * values.std() / 50**0.5
    assert (values < 0).any()


def test_a_generator_reproduces_the_draw():
    a, b = torch.randn(N, D), torch.randn(M, D)
    results = [kernel_distance(a, b, subsets=2, subset_size=3, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


class GivenFeatures(nn.Module):
    """Stands in for Inception: images are features already."""

    def forward(self, images):
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric")
@pytest.mark.parametrize("size", [17, 64])
def test_agrees_with_torchmetrics(size):
    a, b = torch.randn(211, size), 1.3 * torch.randn(211, size) + 0.2
    reference = KernelInceptionDistance(feature=GivenFeatures(), subsets=2, subset_size=211)
    reference.update(a, real=True)
    reference.update(b, real=False)
    mean, _ = reference.compute()
    assert kernel_distance(a, b, subsets=2, subset_size=211).mean == pytest.approx(float(mean), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_accumulated_in_float64(dtype):
    a, b = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(M, D, dtype=dtype)
    result = kernel_distance(a, b, subset_size=7, generator=seeded())
    assert result == kernel_distance(a.detach().double(), b.double(), subset_size=7, generator=seeded())


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"features_a must be \(N, D\), but they are \(13,\)",
            lambda: kernel_distance(torch.ones(N), torch.ones(N, D)),
        ),
        (
            r"features_b must be \(M, D\) with M at least 2, but they are \(1, 5\); pass more of them",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(1, D)),
        ),
        (
            r"features_a must be floating point, but they are torch\.int64",
            lambda: kernel_distance(torch.ones(N, D).long(), torch.ones(N, D)),
        ),
        (
            r"features_a are \(13, 5\) and features_b \(11, 7\); both need the same number of features",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, 7)),
        ),
        (
            r"subset_size=1000 exceeds the 11 images of the smaller set; pass more images, or lower it",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D)),
        ),
        (
            r"subset_size=12 exceeds the 11 images of the smaller set",
            lambda: kernel_distance(torch.ones(M, D), torch.ones(N, D), subset_size=12),
        ),
        (
            r"subset_size must be at least 2, but it is 1",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subset_size=1),
        ),
        (
            r"subsets must be a whole number of at least 1, but it is 0",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subsets=0),
        ),
        (
            r"subsets must be a whole number of at least 1, but it is 3\.5",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subsets=3.5),
        ),
        (
            r"subset_size must be a whole number of at least 1, but it is 5\.0",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subset_size=5.0),
        ),
        (
            r"features_a must be a tensor, but it is a list",
            lambda: kernel_distance([[1.0, 2.0]], torch.ones(M, D)),
        ),
    ],
)
def test_invalid_arguments_raise(message, call):
    with pytest.raises(ValueError, match="kernel_distance: .*" + message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinite_features_raise(which, value):
    features = [torch.randn(N, D), torch.randn(M, D)]
    features[which][3, 2] = value
    name = "features_" + "ab"[which]
    with pytest.raises(ValueError, match=rf"kernel_distance: {name} contain NaN or infinite values"):
        kernel_distance(*features, subset_size=3)
