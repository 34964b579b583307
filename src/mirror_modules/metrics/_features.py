"""Checks and normalization of features, shared by the metrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import check_tensors, shape_of


def check_generator(owner: str, generator: object) -> None:
    """Require a random generator of torch, or None.

    Raises:
        ValueError: It is something else, such as a seed.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"{owner}: generator must be a torch.Generator or None, but it is a {type(generator).__name__}; "
            "torch.Generator().manual_seed(seed) makes one."
        )


def check_measurable(owner: str, name: str, features: Tensor, layout: str, fewest: tuple[int, ...]) -> None:
    """Require finite floating-point features with the axes of `layout`, the first of at least the sizes `fewest`.

    Raises:
        ValueError: Not a tensor, another number of axes, not dense, not floating point of at least 16 bits, too few
            entries, NaN or infinity.
    """
    check_tensors(owner, **{name: features})
    axes = layout.strip("()").split(", ")
    if features.ndim != len(axes):
        raise ValueError(f"{owner}: {name} must be {layout}, but they are {shape_of(features)}.")
    if features.layout != torch.strided or features.is_meta:
        kind = "on the meta device" if features.is_meta else str(features.layout)
        raise ValueError(f"{owner}: {name} must be a dense tensor with values, but they are {kind}.")
    # Few operations support 8 bits.
    if not features.is_floating_point() or features.element_size() == 1:
        raise ValueError(f"{owner}: {name} must be floating point, but they are {features.dtype}; convert them.")
    # The last axis needs only one feature.
    for axis, size, least in zip(axes, features.shape, (*fewest, 1)):
        if size < least:
            raise ValueError(
                f"{owner}: {name} must be {layout} with {axis} at least {least}, but they are {shape_of(features)}; "
                "pass more of them."
            )
    if not bool(features.isfinite().all()):
        raise ValueError(f"{owner}: {name} contain NaN or infinite values; check how they were computed.")


def check_pairs(owner: str, images: Tensor, sentences: Tensor) -> None:
    """Require finite features (N, D) of images and of their own captions.

    Raises:
        ValueError: Not a floating-point tensor, shapes disagree, or a feature is NaN or infinite.
    """
    check_tensors(owner, images=images, sentences=sentences)
    if images.ndim != 2 or images.shape != sentences.shape:
        raise ValueError(
            f"{owner}: images and sentences must both be (N, D), but they are {shape_of(images)} and "
            f"{shape_of(sentences)}."
        )
    # No comparison with NaN is true: without this check, a diverged generator would rank first everywhere.
    check_measurable(owner, "images", images, "(N, D)", (1,))
    check_measurable(owner, "sentences", sentences, "(N, D)", (1,))


def directions(features: Tensor) -> Tensor:
    """Normalize features (..., D) to length 1, in float64; zero features stay zero."""
    features = features.double()
    largest = features.abs().amax(dim=-1, keepdim=True)
    # Scaled first: squares of the raw features may overflow float64, or vanish next to the epsilon of F.normalize.
    return F.normalize(features / largest.masked_fill(largest == 0, 1.0), dim=-1)
