"""The Fréchet distance against closed forms and torchmetrics, including rank-deficient covariances."""

import importlib

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from mirror_modules.functional import frechet_distance

N, M, D = 23, 19, 5


def exact_moments(count, mean, covariance):
    """Features with exactly this sample mean and covariance."""
    features = torch.randn(count, len(mean), dtype=torch.float64)
    features = features - features.mean(dim=0)
    root = torch.linalg.cholesky(features.T @ features / (count - 1))
    return torch.linalg.solve_triangular(root, features.T, upper=False).T @ torch.linalg.cholesky(covariance).T + mean


def random_covariance():
    root = torch.randn(D, D, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(D, dtype=torch.float64)


def test_matches_the_formula():
    a, b = 2 * torch.randn(N, D), torch.randn(M, D) @ torch.randn(D, D) + 3
    mean = a.double().mean(dim=0) - b.double().mean(dim=0)
    covariance_a, covariance_b = a.double().T.cov(), b.double().T.cov()
    # The trace of a matrix square root is the sum of the square roots of the eigenvalues.
    shared = torch.linalg.eigvals(covariance_a @ covariance_b).real.sqrt().sum()
    expected = mean.square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_a_set_has_distance_zero_from_itself():
    features = 100 * torch.randn(N, D)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features[torch.randperm(N)]) == pytest.approx(0, abs=1e-9)


def test_a_shift_adds_its_squared_length():
    features = torch.randn(N, D).double()
    shift = torch.arange(1.0, D + 1)
    assert frechet_distance(features, features + shift) == pytest.approx(float(shift.square().sum()))


def test_diagonal_gaussians_match_the_closed_form():
    spread = torch.tensor([[1.0, 2, 3, 4, 5], [2.0, 2, 1, 0.5, 7]], dtype=torch.float64)
    mean = torch.randn(2, D, dtype=torch.float64)
    a, b = (exact_moments(n, m, s.square().diag()) for n, m, s in zip((N, M), mean, spread))
    expected = (mean[0] - mean[1]).square().sum() + (spread[0] - spread[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_a_scaled_covariance_matches_the_closed_form():
    covariance = random_covariance()
    zero = torch.zeros(D, dtype=torch.float64)
    a, b = exact_moments(N, zero, covariance), exact_moments(M, zero, 9 * covariance)
    # tr(S) (1 - 3)^2
    assert frechet_distance(a, b) == pytest.approx(4 * float(covariance.trace()), rel=1e-10)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_fewer_images_than_features_are_handled(count):
    few, many = torch.randn(count, D), torch.randn(N, D)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(few.double(), few.double() + 2) == pytest.approx(4 * D, rel=1e-12)
    covariance = [x.double().T.cov() for x in (few, many)]
    value, vector = torch.linalg.eigh(covariance[1])
    root = vector @ value.sqrt().diag() @ vector.T
    shared = torch.linalg.eigvalsh(root @ covariance[0] @ root).clamp(min=0).sqrt().sum()
    mean = (few.double().mean(0) - many.double().mean(0)).square().sum()
    expected = float(mean + covariance[0].trace() + covariance[1].trace() - 2 * shared)
    assert frechet_distance(few, many) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(many, few) == pytest.approx(frechet_distance(few, many), rel=1e-10)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_constant_and_repeated_features_give_no_nan(size):
    point = size * torch.ones(N, D, dtype=torch.float64)
    assert frechet_distance(point, point) == 0
    assert frechet_distance(point, 2 * point) == pytest.approx(D * size**2)
    repeated = size * torch.randn(N, 1, dtype=torch.float64).expand(N, D)  # rank 1
    assert frechet_distance(repeated, repeated) == pytest.approx(0, abs=1e-11 * size**2)


def test_features_with_little_variance_keep_their_precision():
    # Deviations are 1e-6 of the mean; sums of squares in float32 would lose them.
    features = torch.randn(N, D, dtype=torch.float64)
    expected = frechet_distance(features, 3 * features)
    assert frechet_distance(1e6 + features, 1e6 + 3 * features) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("block", [1, 30, 2**22])
def test_the_block_size_has_no_influence(monkeypatch, block):
    a, b = torch.randn(101, D) + 3, torch.randn(53, D) @ torch.randn(D, D)
    expected = frechet_distance(a, b)
    monkeypatch.setattr(importlib.import_module("mirror_modules.metrics.frechet_distance"), "LARGEST_BLOCK", block)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 67])
def test_any_number_of_features_matches_the_definition(size):
    a, b = torch.randn(101, size, dtype=torch.float64), torch.randn(97, size, dtype=torch.float64) + 1
    copy = a.clone()
    root_a, root_b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    shared = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    mean = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    expected = mean + root_a.square().sum() + root_b.square().sum() - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)
    assert torch.equal(a, copy)


def test_features_without_variance_in_some_directions_match_the_formula():
    # Constant features, repeated features, and a mixture of a few: the covariances are singular despite many images.
    a, b = torch.randn(101, 17, dtype=torch.float64), torch.randn(97, 17, dtype=torch.float64)
    constant = a * (torch.arange(17) % 3 > 0)
    repeated = a[:, torch.arange(17) // 2]
    mixed = a[:, :3] @ torch.randn(3, 17, dtype=torch.float64)
    for singular in (constant, repeated, mixed):
        root_a, root_b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (singular, b))
        shared = torch.linalg.svdvals(root_a @ root_b.mT).sum()
        mean = (singular.mean(dim=0) - b.mean(dim=0)).square().sum()
        expected = mean + root_a.square().sum() + root_b.square().sum() - 2 * shared
        assert frechet_distance(singular, b) == pytest.approx(float(expected), rel=1e-10)


class GivenFeatures(nn.Module):
    """Stands in for Inception: images are features already. torchmetrics probes it with a 3-channel image."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, images):
        return images.flatten(1)[:, : self.size]


@pytest.mark.parametrize(("count", "size"), [(1009, 17), (503, 64)])
def test_agrees_with_torchmetrics(count, size):
    a = torch.randn(count, size) @ torch.randn(size, size)
    b = torch.randn(count + 100, size) @ torch.randn(size, size) + 1
    reference = FrechetInceptionDistance(feature=GivenFeatures(size))
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(reference.compute()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_accumulated_in_float64(dtype):
    a, b = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(M, D, dtype=dtype)
    assert frechet_distance(a, b) == frechet_distance(a.detach().double(), b.double())


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"features_a must be \(N, D\), but they are \(23,\)",
            lambda: frechet_distance(torch.ones(N), torch.ones(N, D)),
        ),
        (
            r"features_b must be \(M, D\) with M at least 2, but they are \(1, 5\); pass more of them",
            lambda: frechet_distance(torch.ones(N, D), torch.ones(1, D)),
        ),
        (
            r"features_a must be \(N, D\) with D at least 1, but they are \(23, 0\)",
            lambda: frechet_distance(torch.ones(N, 0), torch.ones(N, 0)),
        ),
        (
            r"features_b must be floating point, but they are torch\.uint8; convert them",
            lambda: frechet_distance(torch.ones(N, D), torch.ones(N, D).byte()),
        ),
        (
            r"features_a are \(23, 5\) and features_b \(19, 7\); both need the same number of features",
            lambda: frechet_distance(torch.ones(N, D), torch.ones(M, 7)),
        ),
    ],
)
def test_invalid_features_raise(message, call):
    with pytest.raises(ValueError, match="frechet_distance: .*" + message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinite_features_raise(which, value):
    features = [torch.randn(N, D), torch.randn(M, D)]
    features[which][3, 2] = value
    name = "features_" + "ab"[which]
    with pytest.raises(ValueError, match=rf"frechet_distance: {name} contain NaN or infinite values"):
        frechet_distance(*features)
