"""Diversity: how much do images of one caption differ?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules.metrics._features import check_measurable, directions


class Diversity(NamedTuple):
    """Mean distance of two images of one caption, in [0, 2]; 0 if all images of a caption are the same."""

    mean: float
    standard_error: float
    """Standard error of `mean` over the captions."""


@torch.no_grad()
def diversity(features: Tensor) -> Diversity:
    """Mean pairwise distance of the images that were drawn from one caption with different noise.

        diversity = mean_c mean_{i < j} ( 1 - cos(features[c, i], features[c, j]) )

    The distance is that of directions: it has the same bounds for each extractor, and does not grow with the length of
    the features, as a Euclidean one does. It is half the squared Euclidean distance of features of length 1.

    Args:
        features: Features of S images for each of C captions, (C, S, D). The extractor defines the distance.

    Returns:
        Mean over the captions, and its standard error.

    Raises:
        ValueError: Not (C, S, D), fewer than two captions or samples, or a feature is not finite or zero.
    """
    check_measurable("diversity", "features", features, "(C, S, D)", (2, 2))
    is_zero = (features == 0).all(dim=2)
    if bool(is_zero.any()):
        caption, sample = is_zero.nonzero()[0].tolist()
        raise ValueError(
            f"diversity: features[{caption}, {sample}] is zero, which has no direction; look at what made it."
        )
    # The mean of half the squared distances of all pairs is the variance, which takes no pairs.
    per_caption = directions(features).var(dim=1, correction=1).sum(dim=1)
    return Diversity(float(per_caption.mean()), float(per_caption.std(correction=1)) / len(per_caption) ** 0.5)
