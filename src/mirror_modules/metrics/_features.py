"""Checks and normalization of features, shared by the metrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import check_number, check_tensors, shape_of

LARGEST_BLOCK = 2**22
"""Elements of an intermediate result in memory at a time: all scores of 30,000 images and captions would take 7 GB."""


def check_above_zero(owner: str, **values: object) -> None:
    """Require finite numbers above 0.

    Raises:
        ValueError: Another type, infinite, zero or negative.
    """
    check_number(owner, **values)
    for name, value in values.items():
        if not value > 0:  # type: ignore[operator]
            raise ValueError(f"{owner}: {name} must be above 0, but it is {value!r}.")


def check_measurable(
    owner: str, name: str, features: Tensor, layout: str, fewest: tuple[int, ...], *, read_values: bool = True
) -> None:
    """Require finite floating-point features with the axes of `layout`, the first of at least the sizes `fewest`.

    With `read_values=False`, NaN and infinity are not looked for.

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
    # NaN propagates to both extremes. `features.isfinite()` would make copies.
    if read_values and not all(bool(extreme.isfinite()) for extreme in features.detach().aminmax()):
        raise ValueError(f"{owner}: {name} contain NaN or infinite values; check how they were computed.")


def check_pairs(owner: str, *, read_values: bool = True, **features: Tensor) -> None:
    """Require two tensors of finite features (N, D): of images, and of their own captions.

    With `read_values=False`, NaN and infinity are not looked for.

    Raises:
        ValueError: Not a floating-point tensor, shapes disagree, or a feature is NaN or infinite.
    """
    check_tensors(owner, **features)
    (name, images), (other_name, captions) = features.items()
    if images.ndim != 2 or images.shape != captions.shape:
        raise ValueError(
            f"{owner}: {name} and {other_name} must both be (N, D), but they are {shape_of(images)} and "
            f"{shape_of(captions)}."
        )
    # No comparison with NaN is true: without this check, a diverged generator would rank first everywhere.
    check_measurable(owner, name, images, "(N, D)", (1,), read_values=read_values)
    check_measurable(owner, other_name, captions, "(N, D)", (1,), read_values=read_values)


def check_directions(owner: str, name: str, features: Tensor) -> None:
    """Require features (..., D) that are not zero, as only these have a direction.

    Raises:
        ValueError: All D features of an image or a caption are zero.
    """
    is_zero = (features == 0).all(dim=-1)
    if bool(is_zero.any()):
        place = ", ".join(map(str, is_zero.nonzero()[0].tolist()))
        raise ValueError(f"{owner}: {name}[{place}] is zero and has no direction; check how it was computed.")


def directions(features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalize features (..., D) to length 1, in `dtype`; zero features stay zero."""
    features = features.to(dtype)
    largest = features.detach().abs().amax(dim=-1, keepdim=True)
    # Scaled first: squares of the raw features may overflow `dtype`, or vanish next to the epsilon of F.normalize.
    return F.normalize(features / largest.masked_fill(largest == 0, 1.0), dim=-1)


def all_directions(features: Tensor) -> Tensor:
    """Normalize features (N, D) to length 1 in float64 as `directions`, in blocks instead of with several copies."""
    unit = torch.empty_like(features, dtype=torch.float64)
    size = max(1, LARGEST_BLOCK // features.shape[1])
    for block, result in zip(features.split(size), unit.split(size)):
        result.copy_(directions(block))
    return unit
