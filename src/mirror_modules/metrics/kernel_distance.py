"""Kernel distance between two sets of features: KID (Bińkowski et al., 2018)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive, shape_of
from mirror_modules.metrics._features import check_generator, check_measurable


class KernelDistance(NamedTuple):
    """The squared distance. The estimate is unbiased, so it may be negative where the two sets hardly differ."""

    mean: float
    standard_deviation: float
    """Root mean square deviation of the subsets from `mean`. Subsets overlap, so it understates the uncertainty."""


@torch.no_grad()
def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Compute the maximum mean discrepancy of two sets of features under a cubic kernel (Bińkowski et al., Sec. 4).

        distance = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)
        k(x, y) = (x . y / D + 1)^3

    The result is the unbiased estimate of the squared discrepancy, averaged over subsets that are drawn from each set
    without replacement.

    Args:
        features_a: Features of one set of images, (N, D).
        features_b: Features of the other set, by the same extractor, (M, D). The extractor defines the distance.
        subsets: Number of subsets.
        subset_size: Images of each set in a subset, at least 2, at most N and M.
        generator: Source of the draws; None uses torch's global generator.

    Returns:
        Mean and deviation over the subsets. Published tables often print the value times 100 or 1000.

    Raises:
        ValueError: Not (N, D) and (M, D), a feature is not finite, a set is smaller than a subset, or an argument has
            another type.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import kernel_distance
        >>> kernel_distance(torch.zeros(9, 5), torch.ones(9, 5), subset_size=4)  # 1 + (1 + 1)^3 - 2
        KernelDistance(mean=7.0, standard_deviation=0.0)
    """
    check_measurable("kernel_distance", "features_a", features_a, "(N, D)", (2,))
    check_measurable("kernel_distance", "features_b", features_b, "(M, D)", (2,))
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"kernel_distance: features_a are {shape_of(features_a)} and features_b {shape_of(features_b)}; both "
            "need the same number of features, from the same extractor."
        )
    check_positive("kernel_distance", subsets=subsets, subset_size=subset_size)
    check_generator("kernel_distance", generator)
    if subset_size < 2:
        raise ValueError("kernel_distance: subset_size must be at least 2, but it is 1.")
    smaller = min(len(features_a), len(features_b))
    if smaller < subset_size:
        raise ValueError(
            f"kernel_distance: subset_size={subset_size} exceeds the {smaller} images of the smaller set; pass more "
            "images, or lower it."
        )
    distances = torch.stack(
        [
            _discrepancy(_draw(features_a, subset_size, generator), _draw(features_b, subset_size, generator))
            for _ in range(subsets)
        ]
    )
    return KernelDistance(float(distances.mean()), float(distances.std(correction=0)))


def _draw(features: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    drawn = torch.randperm(len(features), generator=generator, device=device)[:size]
    return features[drawn.to(features.device)].double()


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    within_a, within_b, between = ((x @ y.mT / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    pairs = len(a) * (len(a) - 1)
    # Without the diagonal: pairs of an image with itself would bias the estimate upwards.
    same_a, same_b = ((kernel.sum() - kernel.diagonal().sum()) / pairs for kernel in (within_a, within_b))
    return same_a + same_b - 2 * between.mean()
