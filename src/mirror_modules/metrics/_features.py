"""What every measure requires of the features it is given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import shape_of


def check_tensors(owner: str, **values: object) -> None:
    """Require tensors, and not arrays or lists of numbers.

    Raises:
        ValueError: Something else came.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{owner}: {name} must be a tensor, but it is a {type(value).__name__}; torch.as_tensor makes one."
            )


def check_measurable(owner: str, name: str, features: Tensor, layout: str, fewest: tuple[int, ...]) -> None:
    """Require finite floating point features of the axes in `layout`, the first of them with at least `fewest` entries.

    Raises:
        ValueError: No tensor, another number of axes, whole numbers, too few entries, NaN or infinity.
    """
    check_tensors(owner, **{name: features})
    axes = layout.strip("()").split(", ")
    if features.ndim != len(axes):
        raise ValueError(f"{owner}: {name} must be {layout}, but they are {shape_of(features)}.")
    if not features.is_floating_point():
        raise ValueError(f"{owner}: {name} must be floating point, but they are {features.dtype}; convert them.")
    # Of the last axis, one feature is enough.
    for axis, size, least in zip(axes, features.shape, (*fewest, 1)):
        if size < least:
            raise ValueError(
                f"{owner}: {name} must be {layout} with {axis} at least {least}, but they are {shape_of(features)}; "
                "give more of them."
            )
    if not bool(features.isfinite().all()):
        raise ValueError(f"{owner}: {name} hold NaN or infinite values; look at what made them.")


def check_pairs(owner: str, images: Tensor, sentences: Tensor) -> None:
    """Require finite features (N, D) of images and of their own captions.

    Raises:
        ValueError: Something is no tensor of floating point numbers, shapes disagree, or a feature is NaN or infinite.
    """
    check_tensors(owner, images=images, sentences=sentences)
    if images.ndim != 2 or images.shape != sentences.shape:
        raise ValueError(
            f"{owner}: images and sentences must both be (N, D), but they are {shape_of(images)} and "
            f"{shape_of(sentences)}."
        )
    # NaN is never smaller than anything: a diverged generator would rank first everywhere.
    check_measurable(owner, "images", images, "(N, D)", (1,))
    check_measurable(owner, "sentences", sentences, "(N, D)", (1,))


def directions(features: Tensor) -> Tensor:
    """Features (..., D) of length 1, in float64; those that are all zero stay so."""
    features = features.double()
    largest = features.abs().amax(dim=-1, keepdim=True)
    # The squares of features as they are may leave the range of float64, or be lost beside what keeps 0 from dividing.
    return F.normalize(features / largest.masked_fill(largest == 0, 1.0), dim=-1)
