"""Diversity: how much do images of the same caption differ?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules.metrics._features import check_directions, check_measurable, directions


class Diversity(NamedTuple):
    """Mean distance between two images of the same caption, in [0, 2]; 0 if all images of a caption are identical."""

    mean: float
    standard_error: float
    """Standard error of `mean` over the captions."""


@torch.no_grad()
def diversity(features: Tensor) -> Diversity:
    """Compute the mean pairwise distance between images generated from the same caption with different noise.

        diversity = mean_c mean_{i < j} ( 1 - cos(features[c, i], features[c, j]) )

    The cosine distance has the same bounds for every extractor and, unlike the Euclidean one, does not grow with the
    length of the features. It is half the squared Euclidean distance of features of length 1.

    Args:
        features: Features of S images for each of C captions, (C, S, D). The extractor defines the distance.

    Returns:
        Mean over the captions, and its standard error.

    Raises:
        ValueError: Not (C, S, D), fewer than two captions or samples, or a feature is not finite or is zero.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import diversity
        >>> orthogonal = torch.eye(3).expand(2, 3, 3)  # 2 captions, 3 images each
        >>> round(diversity(orthogonal).mean, 4)
        1.0
        >>> identical = torch.ones(2, 3, 5)
        >>> round(diversity(identical).mean, 4)
        0.0
    """
    check_measurable("diversity", "features", features, "(C, S, D)", (2, 2))
    check_directions("diversity", "features", features)
    # The mean of half the squared distances over all pairs is the variance, which needs no loop over pairs.
    per_caption = directions(features).var(dim=1, correction=1).sum(dim=1)
    return Diversity(float(per_caption.mean()), float(per_caption.std(correction=1)) / len(per_caption) ** 0.5)
