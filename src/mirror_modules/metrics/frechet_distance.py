"""Fréchet distance between Gaussians fitted to two sets of features: FID (Heusel et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import shape_of
from mirror_modules.metrics._features import check_measurable


@torch.no_grad()
def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Fréchet distance between Gaussians with the features' means and covariances (Heusel et al., Sec. 3).

        distance = |mean_a - mean_b|^2 + tr( S_a + S_b - 2 (S_a S_b)^(1/2) )

    For centered features A and B, divided by sqrt(N - 1) and sqrt(M - 1), S_a = A^T A, S_b = B^T B, and the trace of
    the root is the sum of the singular values of A B^T. The computation therefore needs neither the inverse of a
    covariance nor the square root of an eigenvalue that is a rounding error, and is stable with fewer images than
    features, although the estimate is then poor.

    Args:
        features_a: Features of one set of images, (N, D).
        features_b: Features of the other set, by the same extractor, (M, D). The extractor defines the distance.

    Returns:
        The distance, at least 0. It is a squared length: doubling the features quadruples it.

    Raises:
        ValueError: Not (N, D) and (M, D), fewer than two images in a set, or a feature is not finite.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import frechet_distance
        >>> features = torch.randn(50, 5)
        >>> round(frechet_distance(features, features), 4)
        0.0
        >>> round(frechet_distance(features, features + 2), 4)  # 5 * 2^2
        20.0
    """
    check_measurable("frechet_distance", "features_a", features_a, "(N, D)", (2,))
    check_measurable("frechet_distance", "features_b", features_b, "(M, D)", (2,))
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"frechet_distance: features_a are {shape_of(features_a)} and features_b {shape_of(features_b)}; both "
            "need the same number of features, from the same extractor."
        )
    mean_a, root_a = _mean_and_root(features_a)
    mean_b, root_b = _mean_and_root(features_b)
    shared = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * shared
    return max(0.0, float(distance))


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean (D,) and some R with at most D rows and R^T R = covariance, in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    # The R of a QR decomposition has the same R^T R, and its size does not grow with the number of images.
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root
