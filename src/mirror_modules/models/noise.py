"""Standard normal noise that a seed determines for each image, and its truncation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirror_modules._checks import check_number
from mirror_modules.data.seeding import seeded


def sample_noise(
    owner: str, count: int, features: int, seed: int | Sequence[int] | None, truncation: float | None
) -> Tensor:
    """Noise of a number of images, (count, features), on the CPU; see `TextToImage.generate` for the other arguments.

    Raises:
        ValueError: The seed or the truncation is out of range.
    """
    if seed is None:
        fresh = torch.Generator()
        fresh.seed()
        rows = torch.randn(count, features, generator=fresh)
    else:
        seeds = seeds_of(owner, count, seed)
        rows = torch.stack([torch.randn(features, generator=seeded(each)) for each in seeds])
    return rows if truncation is None else _truncated(owner, rows, truncation)


def seeds_of(owner: str, count: int, seed: int | Sequence[int], step: int = 1) -> list[int]:
    """The seed of each image: those of a sequence, or the whole numbers from one on, `step` apart."""
    if _index(seed) is not None:
        first = _check_seed(owner, seed)
        return [first + i * step for i in range(count)]
    listed: Any = seed
    is_list = hasattr(listed, "__len__") and not isinstance(listed, str) and getattr(listed, "ndim", 1) == 1
    if not is_list or len(listed) != count:
        raise ValueError(
            f"{owner}: seed must be a whole number from 0 to 2**63 - 1, or one for each of the {count} images, but it "
            f"is {seed!r}."
        )
    return [_check_seed(owner, each) for each in listed]


def _check_seed(owner: str, seed: Any) -> int:
    """The seed as an int, from a whole number of any type."""
    index = _index(seed)
    if index is None or not 0 <= index < 2**63:
        raise ValueError(f"{owner}: seed must be a whole number from 0 to 2**63 - 1, but it is {seed!r}.")
    return index


def _index(value: Any) -> int | None:
    """A whole number of any type as an int; None for anything else, such as arrays, which have `__index__` too."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _truncated(owner: str, normal: Tensor, bound: float) -> Tensor:
    """Map standard normal values to a standard normal truncated to [-bound, bound], by their quantiles.

    The map is monotonic and tends to the identity for large bounds, so that a seed keeps its image.
    """
    check_number(owner, truncation=bound)
    if bound <= 0:
        raise ValueError(f"{owner}: truncation must be above 0, but it is {bound!r}.")
    low = torch.special.ndtr(torch.tensor(-float(bound), dtype=torch.float64))
    quantiles = low + torch.special.ndtr(normal.double()) * (1 - 2 * low)
    return torch.special.ndtri(quantiles).clamp(-bound, bound).to(normal.dtype)
