"""R-precision: does an image find its own caption among mismatched ones? (MirrorGAN, Sec. 4.1; AttnGAN, Sec. 4)"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import shape_of


class RPrecision(NamedTuple):
    """Share of images that rank their own caption among the first k, in [0, 1]."""

    top1: float
    top2: float
    top3: float
    standard_error: float
    """Standard error of `top1` over the images."""


def r_precision(
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None = None,
    *,
    candidates: int = 100,
    generator: torch.Generator | None = None,
) -> RPrecision:
    """Rank the caption of each image among mismatched captions by cosine similarity (R = 1).

    Each image sees its own caption and `candidates - 1` others, drawn without replacement. Where candidates have
    exactly the score of the own caption, its expected rank under random order counts, so that constant features give
    chance, 1 / candidates.

    Args:
        images: Global image features, (N, D).
        sentences: Sentence features of the images' own captions, (N, D).
        class_ids: (N,); candidates are drawn from other classes only. None admits every other caption.
        candidates: Captions that each image ranks, its own included.
        generator: Source of the draws.

    Returns:
        Top-1, top-2 and top-3 precision and the standard error of the first.

    Raises:
        ValueError: Shapes disagree, a feature is not finite, or there are too few mismatched captions.
    """
    if images.ndim != 2 or images.shape != sentences.shape:
        raise ValueError(
            f"r_precision: images and sentences must both be (N, D), but they are {shape_of(images)} and "
            f"{shape_of(sentences)}."
        )
    # NaN is never smaller than anything: a diverged generator would rank first everywhere.
    if not bool(images.isfinite().all() and sentences.isfinite().all()):
        raise ValueError("r_precision: images or sentences hold NaN or infinite features; look at what made them.")
    count = images.shape[0]
    if class_ids is not None and class_ids.shape != (count,):
        raise ValueError(f"r_precision: class_ids must be ({count},), one per image, but are {shape_of(class_ids)}.")
    if candidates < 2:
        raise ValueError(f"r_precision: candidates must be at least 2, but it is {candidates}.")
    own = torch.eye(count, dtype=torch.bool, device=images.device)
    excluded = own if class_ids is None else class_ids.unsqueeze(1) == class_ids.unsqueeze(0)
    fewest = count - int(excluded.sum(dim=1).max()) if count else 0
    if fewest < candidates - 1:
        raise ValueError(
            f"r_precision: candidates={candidates} needs {candidates - 1} mismatched captions for each image, but one "
            f"of the {count} images has {fewest}; evaluate more captions, or lower candidates."
        )
    device = images.device if generator is None else generator.device
    lottery = torch.rand(count, count, generator=generator, device=device).to(images.device)
    drawn = lottery.masked_fill(excluded, float("-inf")).topk(candidates - 1, dim=1).indices
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(sentences.double(), dim=1).mT
    own_score = similarity.diagonal().unsqueeze(1)
    others = similarity.gather(1, drawn)
    # Equal captions have equal features, yet a matrix product may round their scores apart.
    tied = torch.isclose(others, own_score, rtol=0.0, atol=1e-9)
    better = ((others > own_score) & ~tied).sum(dim=1)
    ties = tied.sum(dim=1)
    hits = [((k - better).double() / (1 + ties)).clamp(0.0, 1.0) for k in (1, 2, 3)]
    top1, top2, top3 = (float(hit.mean()) for hit in hits)
    return RPrecision(top1, top2, top3, float(hits[0].std(correction=1)) / count**0.5)
