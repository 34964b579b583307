"""Fréchet distance between Gaussians fitted to two sets of features: FID (Heusel et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import shape_of
from mirror_modules.metrics._features import LARGEST_BLOCK, check_measurable


@torch.no_grad()
def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Fréchet distance between Gaussians with the features' means and covariances (Heusel et al., Sec. 3).

        distance = |mean_a - mean_b|^2 + tr( S_a + S_b - 2 (S_a S_b)^(1/2) )

    With S_a = A^T A and S_b = B^T B, the trace of the root is the sum of the singular values of A B^T. The computation
    therefore needs neither the inverse of a covariance nor the square root of an eigenvalue that is a rounding error,
    and is stable with fewer images than features, although the estimate is then poor. A and B are the centered
    features, divided by sqrt(N - 1) and sqrt(M - 1); of a set with more images than features, a root of the covariance,
    of which eigenvalues below D * 2^-52 of the largest count as 0. All of it is computed in float64.

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
    count, size = features.shape
    if count <= size:
        features = features.double()
        mean = features.mean(dim=0)
        return mean, (features - mean) / (count - 1) ** 0.5
    # Not `features.mean(dtype=torch.float64)`, which converts all features at once on a CPU.
    blocks = features.split(max(1, LARGEST_BLOCK // size))
    mean = torch.stack([block.sum(dim=0, dtype=torch.float64) for block in blocks]).sum(dim=0) / count
    covariance = features.new_zeros(size, size, dtype=torch.float64)
    columns = max(1, size // 8)
    for block in blocks:
        centered = block - mean
        # The matrix is symmetric: only blocks that touch its upper triangle are computed.
        for start in range(0, size, columns):
            stop = start + columns
            covariance[:stop, start:stop].addmm_(centered[:, :stop].mT, centered[:, start:stop])
    values, vectors = torch.linalg.eigh(covariance / (count - 1), UPLO="U")
    # The root of a rounding error would be large.
    is_kept = values > size * torch.finfo(torch.float64).eps * values[-1]
    return mean, values[is_kept].sqrt().unsqueeze(1) * vectors[:, is_kept].mT
