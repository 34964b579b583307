"""Kernel distance between two sets of features: KID (Bińkowski et al., 2018), CMMD (Jayasumana et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_choice, check_generator, check_positive, shape_of
from mirror_modules.metrics._features import LARGEST_BLOCK, check_above_zero, check_measurable

Kernel = Callable[[Tensor, Tensor], Tensor]


class KernelDistance(NamedTuple):
    """The squared distance. The unbiased estimate may be negative where the two sets hardly differ."""

    mean: float
    standard_deviation: float
    """Root mean square deviation of the subsets from `mean`. Subsets overlap, so it understates the uncertainty; 0 if
    the complete sets were compared."""
    standard_error: float | None = None
    """Standard error of `mean` where the complete sets were compared, of at least three images each; None otherwise."""


@torch.no_grad()
def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    kernel: Literal["polynomial", "rbf"] = "polynomial",
    bandwidth: float | None = None,
    estimate: Literal["unbiased", "biased"] = "unbiased",
    scale: float = 1.0,
    subsets: int = 100,
    subset_size: int | None = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Compute the squared maximum mean discrepancy of two sets of features under a kernel: KID, CMMD.

        distance = scale * ( mean_{i, j} k(a_i, a_j) + mean_{i, j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j) )
        k(x, y) = (x . y / D + 1)^3                         kernel="polynomial"
        k(x, y) = exp( -|x - y|^2 / (2 bandwidth^2) )       kernel="rbf"

    The unbiased estimate has no pairs i = j in the first two means; the biased one has, and is never negative. Both can
    be averaged over subsets, drawn from each set without replacement, or compare the complete sets once. For complete
    sets, the standard error is that of the jackknife (Efron & Stein, 1981), with d_-i for the estimate without image i:

        standard_error^2 = sum over both sets, of N images each:  (N - 1) / N  sum_i (d_-i - mean_j d_-j)^2

    The defaults are KID (Bińkowski et al., Sec. 4). CMMD (Jayasumana et al.) is `kernel="rbf"`, `estimate="biased"`,
    `scale=1000` and `subset_size=None`, on CLIP features that `torch.nn.functional.normalize` has brought to length 1.
    Its paper has the unbiased estimate, but its published code computes the biased one.

    Args:
        features_a: Features of one set of images, (N, D). The polynomial kernel multiplies float64 features in
            float64 and all others in float32; everything else is computed in float64.
        features_b: Features of the other set, by the same extractor, (M, D). The extractor defines the distance.
        kernel: "polynomial" as in KID, or "rbf", the Gaussian kernel of CMMD.
        bandwidth: Distance of features at which the kernel "rbf" falls to exp(-1/2), above 0; None is 10, as in CMMD.
            The polynomial kernel has none.
        estimate: "unbiased", or "biased", which is higher by ( mean_i k(a_i, a_i) - mean_{i != j} k(a_i, a_j) ) / N and
            by the same term of b.
        scale: Factor of the result, above 0. Published tables often print KID times 100 or 1000.
        subsets: Number of subsets; without effect if `subset_size` is None.
        subset_size: Images of each set in a subset, at least 2, at most N and M. None compares the complete sets, once.
        generator: Source of the draws; None uses torch's global generator.

    Returns:
        Mean and deviation over the subsets, or the mean and its standard error for the complete sets.

    Raises:
        ValueError: Not (N, D) and (M, D), a feature is not finite, a set is smaller than a subset, there is a bandwidth
            for the polynomial kernel, or an argument has another type or value.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import kernel_distance
        >>> zeros, ones = torch.zeros(9, 5), torch.ones(9, 5)
        >>> kernel_distance(zeros, ones, subset_size=4)  # 1 + (1 + 1)^3 - 2
        KernelDistance(mean=7.0, standard_deviation=0.0, standard_error=None)
        >>> cmmd = kernel_distance(zeros, ones, kernel="rbf", estimate="biased", scale=1000, subset_size=None)
        >>> round(cmmd.mean, 4)  # 1000 (1 + 1 - 2 exp(-5 / 200))
        49.3802
        >>> kernel_distance(zeros, ones, subset_size=None)  # without any variation, no error
        KernelDistance(mean=7.0, standard_deviation=0.0, standard_error=0.0)
    """
    owner = "kernel_distance"
    check_measurable(owner, "features_a", features_a, "(N, D)", (2,))
    check_measurable(owner, "features_b", features_b, "(M, D)", (2,))
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"{owner}: features_a are {shape_of(features_a)} and features_b {shape_of(features_b)}; both need the same "
            "number of features, from the same extractor."
        )
    check_choice(owner, "kernel", kernel, ("polynomial", "rbf"))
    check_choice(owner, "estimate", estimate, ("unbiased", "biased"))
    check_above_zero(owner, scale=scale)
    function: Kernel = _polynomial_kernel
    if kernel == "rbf":
        bandwidth = 10.0 if bandwidth is None else bandwidth
        check_above_zero(owner, bandwidth=bandwidth)
        function = partial(_rbf_kernel, bandwidth=bandwidth)
    elif bandwidth is not None:
        raise ValueError(f"{owner}: bandwidth={bandwidth!r} needs kernel='rbf'; the polynomial kernel has none.")
    check_positive(owner, subsets=subsets)
    check_generator(owner, generator)
    if subset_size is None:
        distance, error = _discrepancy(features_a, features_b, function, estimate)
        return KernelDistance(scale * distance, 0.0, None if error is None else scale * error)
    check_positive(owner, subset_size=subset_size)
    if subset_size < 2:
        raise ValueError(f"{owner}: subset_size must be at least 2, but it is 1.")
    smaller = min(len(features_a), len(features_b))
    if smaller < subset_size:
        raise ValueError(
            f"{owner}: subset_size={subset_size} exceeds the {smaller} images of the smaller set; pass more images, or "
            "lower it."
        )
    drawn = ([_draw(features, subset_size, generator) for features in (features_a, features_b)] for _ in range(subsets))
    distances = torch.tensor([_discrepancy(a, b, function, estimate)[0] for a, b in drawn], dtype=torch.float64)
    return KernelDistance(scale * float(distances.mean()), scale * float(distances.std(correction=0)))


# The kernels return float64, whose sums lose nothing.
def _polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    return _products(x, y).div_(x.shape[1]).add_(1).pow_(3)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Compute x y^T. Rounding its entries to float32 leaves their mean as it is, and takes half of the time."""
    if torch.float64 in (x.dtype, y.dtype) or torch.get_float32_matmul_precision() != "highest":
        return x.double() @ y.double().mT
    with torch.autocast(x.device.type, enabled=False):
        return (x.float() @ y.float().mT).double()


def _rbf_kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    x, y = x.double() / bandwidth, y.double() / bandwidth
    squared_distance = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * x @ y.mT
    # Rounding may make the distance of equal features negative.
    return torch.exp(-squared_distance.clamp(min=0.0) / 2)


def _draw(features: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    drawn = torch.randperm(len(features), generator=generator, device=device)[:size]
    return features[drawn.to(features.device)]


def _discrepancy(
    a: Tensor, b: Tensor, kernel: Kernel, estimate: Literal["unbiased", "biased"]
) -> tuple[float, float | None]:
    """Compute the squared discrepancy, and its jackknife error if both sets have at least three images.

    Sums of rows and columns suffice: the estimate without an image lacks its row and column.
    """
    biased = estimate == "biased"
    between_a, between_b = _sums_between(a, b, kernel)
    distance, variance = -2 * float(between_a.sum()) / (len(a) * len(b)), 0.0
    for x, between, other in ((a, between_a, len(b)), (b, between_b, len(a))):
        sums, diagonal = _sums_within(x, kernel)
        if not biased:
            # Pairs of an image with itself would bias the estimate upwards.
            sums, diagonal = sums - diagonal, torch.zeros_like(diagonal)
        count, left = len(x), len(x) - 1
        distance += float(sums.sum()) / (count * (count if biased else left))
        if left < 2:
            variance = math.nan
            continue
        within = (sums.sum() - 2 * sums + diagonal) / (left * (left if biased else left - 1))
        without = within - 2 * (between.sum() - between) / (left * other)
        variance += left / count * float((without - without.mean()).square().sum())
    return max(distance, 0.0) if biased else distance, None if math.isnan(variance) else math.sqrt(variance)


def _sums_between(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Compute sum_j k(x_i, y_j) for each i, and sum_i k(x_i, y_j) for each j, in float64, tile by tile."""
    over_y, over_x = (features.new_zeros(len(features), dtype=torch.float64) for features in (x, y))
    size = math.isqrt(LARGEST_BLOCK)
    for rows, row_sums in zip(x.split(size), over_y.split(size)):
        for columns, column_sums in zip(y.split(size), over_x.split(size)):
            values = kernel(rows, columns)
            row_sums += values.sum(dim=1)
            column_sums += values.sum(dim=0)
    return over_y, over_x


def _sums_within(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Compute sum_j k(x_i, x_j) for each i, and the diagonal k(x_i, x_i), from the tiles on and above the diagonal."""
    sums, diagonal = x.new_zeros(2, len(x), dtype=torch.float64)
    # Small tiles leave out most of the matrix below the diagonal; smaller ones are slower.
    size = max(1, min(len(x) // 6, math.isqrt(LARGEST_BLOCK)))
    tiles = list(zip(x.split(size), sums.split(size), diagonal.split(size)))
    for i, (rows, row_sums, row_diagonal) in enumerate(tiles):
        for columns, column_sums, _ in tiles[i + 1 :]:
            values = kernel(rows, columns)
            row_sums += values.sum(dim=1)
            column_sums += values.sum(dim=0)
        values = kernel(rows, rows)
        row_sums += values.sum(dim=1)
        row_diagonal.copy_(values.diagonal())
    return sums, diagonal
