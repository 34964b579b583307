"""Mismatched pairs: each image with the sentence of an image of another class that has another caption."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_generator, check_tensors, shape_of


class Mismatch(NamedTuple):
    """A partner for each row of a batch."""

    partner: Tensor
    """Row whose sentence each row takes; a permutation. (B,)"""
    valid: Tensor
    """True where the partner is of another class and has another caption. (B,)"""


def mismatch(
    class_ids: Tensor, caption_ids: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Mismatch:
    """Pair each row with a row of another class: a random derangement of the batch.

    Rows are sorted by class, in random order, and rolled by the size of the largest class. No row then meets its own
    class, provided that no class fills more than half of the batch; otherwise as many rows as possible are valid.
    Images of two classes may have the same caption, which names what they have in common: such partners are not valid.

    Args:
        class_ids: One class per row, (B,). Images of one class, or one image with several captions, share an id.
        caption_ids: One number per row, (B,), shared by equal captions; None if all captions differ.
        generator: Source of the random order; None uses torch's global generator.

    Returns:
        Partners and their validity.

    Raises:
        ValueError: `class_ids` or `caption_ids` is not (B,), `class_ids` is empty, or `generator` is a seed.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import mismatch
        >>> class_ids = torch.tensor([7, 7, 3, 5])
        >>> pairs = mismatch(class_ids)
        >>> (class_ids[pairs.partner] != class_ids).tolist()
        [True, True, True, True]
        >>> mismatch(torch.tensor([7, 7])).valid.tolist()  # nothing to pair with
        [False, False]
        >>> mismatch(torch.tensor([7, 3]), caption_ids=torch.tensor([4, 4])).valid.tolist()  # the same caption
        [False, False]
    """
    check_tensors("mismatch", class_ids=class_ids)
    if class_ids.ndim != 1 or class_ids.shape[0] == 0:
        raise ValueError(f"mismatch: class_ids must be (B,), one per row, but they are {shape_of(class_ids)}.")
    if caption_ids is not None:
        check_tensors("mismatch", caption_ids=caption_ids)
        if caption_ids.shape != class_ids.shape:
            raise ValueError(
                f"mismatch: caption_ids must be {shape_of(class_ids)} (B,), as class_ids, but they are "
                f"{shape_of(caption_ids)}."
            )
    check_generator("mismatch", generator)
    device = generator.device if generator is not None else class_ids.device
    shuffled = torch.randperm(class_ids.shape[0], generator=generator, device=device).to(class_ids.device)
    _, classes, counts = class_ids[shuffled].unique(return_inverse=True, return_counts=True)
    order_of_classes = torch.randperm(counts.shape[0], generator=generator, device=device).to(class_ids.device)
    rows = shuffled[order_of_classes[classes].argsort(stable=True)]
    partner = torch.empty_like(rows)
    partner[rows] = rows.roll(-int(counts.max()))
    valid = class_ids[partner] != class_ids
    if caption_ids is not None:
        valid = valid & (caption_ids[partner] != caption_ids)
    return Mismatch(partner, valid)
