"""The captions among which an image ranks its own: which may be candidates, and a draw without replacement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirror_modules._checks import check_tensors, shape_of

TIED = 1e-9
"""Cosines at most this far apart are tied: equal captions have equal features, but a product may round them apart."""


def check_ids(owner: str, count: int, **ids: Tensor | None) -> None:
    """Require one id per image, (N,), where ids are given.

    Raises:
        ValueError: Not a tensor, or another shape.
    """
    for name, values in ids.items():
        if values is None:
            continue
        check_tensors(owner, **{name: values})
        if values.shape != (count,):
            raise ValueError(f"{owner}: {name} must be ({count},), one per image, but are {shape_of(values)}.")


def excluded_captions(rows: Tensor, captions: Tensor, class_ids: Tensor | None, image_ids: Tensor | None) -> Tensor:
    """Mark the captions, (R, M) or (M,), that may not be candidates of the images in `rows`, (R,): (R, M)."""
    rows = rows.unsqueeze(1)
    excluded = rows == captions
    for ids in (class_ids, image_ids):
        if ids is not None:
            ids = ids.to(rows.device)
            excluded |= ids[rows] == ids[captions]
    return excluded


def count_drawable(count: int, class_ids: Tensor | None, image_ids: Tensor | None) -> Tensor:
    """Count the captions that may be candidates of each image: (N,), on the CPU."""
    if image_ids is None:
        image_ids = torch.arange(count)
    excluded = group_sizes(image_ids)
    if class_ids is not None:
        excluded = excluded + group_sizes(class_ids) - group_sizes(image_ids, class_ids)
    return count - excluded


def group_sizes(*ids: Tensor) -> Tensor:
    """Count the images that agree with each image in all of the given ids, itself included: (N,), on the CPU."""
    groups = torch.stack([each.cpu().unique(return_inverse=True)[1] for each in ids])
    _, group_of, sizes = groups.unique(dim=1, return_inverse=True, return_counts=True)
    return sizes[group_of]


def draw_captions(
    drawn: int,
    rows: Tensor,
    class_ids: Tensor | None,
    image_ids: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw `drawn` captions for each image, uniformly without replacement, by rejection: (N, drawn), int32.

    Excluded captions and repetitions are drawn again until there are none. No step distinguishes between the captions
    that may be drawn, so every set of them is equally probable. Fast if at least half of them remain undrawn.

    Args:
        drawn: Captions per image.
        rows: All images, `arange(N)`, on the device of the generator.
        class_ids: As in `r_precision`.
        image_ids: As in `r_precision`.
        generator: As in `r_precision`.
    """
    count = len(rows)
    options: Any = {"generator": generator, "device": rows.device, "dtype": torch.int32}
    captions = torch.randint(count, (count, drawn), **options)
    while len(rows) > 0:
        of_rows = captions[rows].sort(dim=1).values
        rejected = excluded_captions(rows, of_rows, class_ids, image_ids)
        rejected[:, 1:] |= of_rows[:, 1:] == of_rows[:, :-1]
        again = torch.randint(count, (int(rejected.sum()),), **options)
        captions[rows] = of_rows.masked_scatter_(rejected, again)
        rows = rows[rejected.any(dim=1)]
    return captions
