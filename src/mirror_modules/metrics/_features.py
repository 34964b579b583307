"""What every measure requires of the features it is given."""

from __future__ import annotations

from torch import Tensor

from mirror_modules._checks import shape_of


def check_measurable(owner: str, name: str, features: Tensor, layout: str, fewest: tuple[int, ...]) -> None:
    """Require finite floating point features of the axes in `layout`, the first of them with at least `fewest` entries.

    Raises:
        ValueError: Another number of axes, whole numbers, too few entries, NaN or infinity.
    """
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
        ValueError: Shapes disagree, or a feature is NaN or infinite.
    """
    if images.ndim != 2 or images.shape != sentences.shape:
        raise ValueError(
            f"{owner}: images and sentences must both be (N, D), but they are {shape_of(images)} and "
            f"{shape_of(sentences)}."
        )
    # NaN is never smaller than anything: a diverged generator would rank first everywhere.
    if not bool(images.isfinite().all() and sentences.isfinite().all()):
        raise ValueError(f"{owner}: images or sentences hold NaN or infinite features; look at what made them.")
