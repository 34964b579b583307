"""Diversity against loops over all pairs, and against known values."""

import math

import pytest
import torch

from mirror_modules.functional import diversity

C, S, D = 7, 5, 3


def diversity_by_loops(features):
    means = []
    for samples in features.double().tolist():
        distances = []
        for i, x in enumerate(samples):
            for y in samples[:i]:
                product = sum(p * q for p, q in zip(x, y))
                distances.append(1 - product / math.hypot(*x) / math.hypot(*y))
        means.append(sum(distances) / len(distances))
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))


@pytest.mark.parametrize("samples", [2, 5])
def test_matches_the_loops(samples):
    features = torch.randn(C, samples, D) + 0.5
    assert tuple(diversity(features)) == pytest.approx(diversity_by_loops(features), rel=1e-10)


def test_identical_samples_have_zero_diversity():
    features = torch.randn(C, 1, D).expand(C, S, D)
    assert tuple(diversity(features)) == pytest.approx((0.0, 0.0), abs=1e-15)


def test_orthogonal_samples_have_distance_one_and_opposite_samples_two():
    assert tuple(diversity(torch.eye(S).expand(C, S, S))) == pytest.approx((1.0, 0.0))
    opposite = torch.stack([torch.ones(C, D), -torch.ones(C, D)], dim=1)
    assert tuple(diversity(opposite)) == pytest.approx((2.0, 0.0))


def test_random_directions_have_distance_one():
    result = diversity(torch.randn(211, S, 17))
    assert abs(result.mean - 1) < 3 * result.standard_error


def test_differences_between_captions_do_not_count():
    features = torch.randn(C, S, D)
    rotated = features @ torch.linalg.qr(torch.randn(C, D, D)).Q  # another rotation for each caption
    assert tuple(diversity(rotated)) == pytest.approx(tuple(diversity(features)), rel=1e-5)


def test_lengths_of_features_have_no_influence():
    features = torch.randn(C, S, D)
    scaled = features * torch.rand(C, S, 1).add(0.1)
    assert tuple(diversity(scaled)) == pytest.approx(tuple(diversity(features)), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-300, 1e-22, 1e200])
def test_extreme_scales_change_nothing(scale):
    features = torch.randn(C, S, D, dtype=torch.float64)
    assert tuple(diversity(features * scale)) == pytest.approx(tuple(diversity(features)))


def test_small_angles_keep_their_precision():
    angle = 1e-6
    pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert diversity(pair.expand(C, 2, 2)).mean == pytest.approx(angle**2 / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_accumulated_in_float64(dtype):
    features = torch.randn(C, S, D, dtype=dtype, requires_grad=True)
    assert diversity(features) == diversity(features.detach().double())


@pytest.mark.parametrize(
    ("message", "features"),
    [
        (r"features must be \(C, S, D\), but they are \(5, 3\)", torch.ones(S, D)),
        (r"features must be \(C, S, D\) with C at least 2, but they are \(1, 5, 3\)", torch.ones(1, S, D)),
        (r"features must be \(C, S, D\) with S at least 2, but they are \(7, 1, 3\)", torch.ones(C, 1, D)),
        (r"features must be \(C, S, D\) with D at least 1, but they are \(7, 5, 0\)", torch.ones(C, S, 0)),
        (r"features must be floating point, but they are torch\.int64", torch.ones(C, S, D).long()),
        (
            r"features\[2, 4\] is zero and has no direction; check how it was computed",
            (torch.arange(C * S) != 14).view(C, S, 1) * torch.ones(D),
        ),
        (r"features must be a tensor, but it is a ndarray; torch\.as_tensor makes one", torch.ones(C, S, D).numpy()),
        (r"features contain NaN or infinite values; check how they were computed", torch.full((C, S, D), torch.nan)),
        (r"features contain NaN or infinite values; check how they were computed", torch.full((C, S, D), torch.inf)),
    ],
)
def test_invalid_features_raise(message, features):
    with pytest.raises(ValueError, match="diversity: .*" + message):
        diversity(features)
