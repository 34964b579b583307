"""R-precision: does an image find its own caption among mismatched ones? (MirrorGAN, Sec. 4.1; AttnGAN, Sec. 4)"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive, shape_of
from mirror_modules.metrics._features import check_pairs, check_tensors, directions

# Scores that are held at once: 30,000 images with as many captions would need 7 GB in one piece.
LARGEST_BLOCK = 2**24


class RPrecision(NamedTuple):
    """Share of images that rank their own caption among the first k, in [0, 1]."""

    top1: float
    top2: float
    top3: float
    standard_error: float
    """Standard error of `top1` over the images."""


class RPrecisionFolds(NamedTuple):
    """Means over folds of the share of images that rank their own caption among the first k, in [0, 1]."""

    top1: float
    top2: float
    top3: float
    standard_errors: tuple[float, float, float]
    """Standard error of each of the three means: the deviation of a sample of folds, divided by sqrt(folds)."""
    standard_deviations: tuple[float, float, float]
    """Root mean square deviation of the folds from each mean: what published tables print after the sign ±."""


@torch.no_grad()
def r_precision(
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    candidates: int = 100,
    generator: torch.Generator | None = None,
) -> RPrecision:
    """Rank the caption of each image among mismatched captions by cosine similarity (R = 1).

        top-k = share of images whose own caption is among the first k of `candidates`

    Each image sees its own caption and `candidates - 1` others, drawn without replacement. Where candidates have
    exactly the score of the own caption, its expected rank under random order counts, so that constant features give
    chance, 1 / candidates.

    Args:
        images: Global image features, (N, D).
        sentences: Sentence features of the images' own captions, (N, D).
        class_ids: (N,); candidates are drawn from other classes only. None admits every other caption.
        image_ids: (N,); rows of one photograph share a number, and its other captions are never candidates. None if
            each row is a photograph of its own.
        candidates: Captions that each image ranks, its own included.
        generator: Source of the draws; None takes torch's global one.

    Returns:
        Top-1, top-2 and top-3 precision and the standard error of the first.

    Raises:
        ValueError: Shapes disagree, a feature is not finite, or there are too few mismatched captions.
    """
    hits = _hits("r_precision", images, sentences, class_ids, image_ids, candidates, generator)
    top1, top2, top3 = hits.mean(dim=0).tolist()
    return RPrecision(top1, top2, top3, float(hits[:, 0].std(correction=1)) / len(hits) ** 0.5)


@torch.no_grad()
def r_precision_folds(
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    candidates: int = 100,
    folds: int = 10,
    generator: torch.Generator | None = None,
) -> RPrecisionFolds:
    """R-precision as tables report it: the mean over ten folds (AttnGAN, Sec. 4; MirrorGAN, Sec. 4.1).

        top-k = mean_f p_f,    p_f = share of the images in fold f whose own caption is among the first k

    Every image ranks its own caption among candidates drawn from the captions of all images, as in `r_precision`.
    The images are then shuffled and cut into folds, which share no image and differ in size by one image at most.

    Args:
        images: Global image features, (N, D); the papers take N = 30,000.
        sentences: Sentence features of the images' own captions, (N, D).
        class_ids: (N,); candidates are drawn from other classes only. None admits every other caption.
        image_ids: (N,); rows of one photograph share a number, and its other captions are never candidates. None if
            each row is a photograph of its own.
        candidates: Captions that each image ranks, its own included.
        folds: Number of disjoint parts, at least 2.
        generator: Source of the draws and of the order; None takes torch's global one.

    Returns:
        Means of top-1, top-2 and top-3 precision over the folds, their standard errors and their deviations.

    Raises:
        ValueError: As `r_precision`; or there are fewer than 2 folds, or fewer images than folds.
    """
    check_positive("r_precision_folds", folds=folds)
    if folds < 2:
        raise ValueError("r_precision_folds: folds must be at least 2, but it is 1; r_precision has no folds.")
    hits = _hits("r_precision_folds", images, sentences, class_ids, image_ids, candidates, generator)
    if len(hits) < folds:
        raise ValueError(
            f"r_precision_folds: folds={folds} needs as many images, but there are {len(hits)}; lower folds."
        )
    order = torch.randperm(len(hits), generator=generator, device=None if generator is None else generator.device)
    shares = torch.stack([fold.mean(dim=0) for fold in hits[order.to(hits.device)].tensor_split(folds)])
    top1, top2, top3 = shares.mean(dim=0).tolist()
    errors1, errors2, errors3 = (shares.std(dim=0, correction=1) / folds**0.5).tolist()
    spread1, spread2, spread3 = shares.std(dim=0, correction=0).tolist()
    return RPrecisionFolds(top1, top2, top3, (errors1, errors2, errors3), (spread1, spread2, spread3))


def _hits(
    owner: str,
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None,
    image_ids: Tensor | None,
    candidates: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Probability that each image has its own caption among its first k, k = 1, 2, 3: (N, 3). 0 or 1 without ties."""
    check_pairs(owner, images, sentences)
    count = images.shape[0]
    for name, ids in (("class_ids", class_ids), ("image_ids", image_ids)):
        if ids is None:
            continue
        check_tensors(owner, **{name: ids})
        if ids.shape != (count,):
            raise ValueError(f"{owner}: {name} must be ({count},), one per image, but are {shape_of(ids)}.")
    check_positive(owner, candidates=candidates)
    if candidates < 2:
        raise ValueError(f"{owner}: candidates must be at least 2, but it is {candidates}.")
    blocks = torch.arange(count, device=images.device).split(max(1, LARGEST_BLOCK // count))
    most = max(int(_excluded(rows, count, class_ids, image_ids).sum(dim=1).max()) for rows in blocks)
    fewest = count - most
    if fewest < candidates - 1:
        raise ValueError(
            f"{owner}: candidates={candidates} needs {candidates - 1} mismatched captions for each image, but one "
            f"of the {count} images has {fewest}; evaluate more captions, or lower candidates."
        )
    device = images.device if generator is None else generator.device
    image_directions, sentence_directions = directions(images), directions(sentences)
    hits = []
    for rows in blocks:
        lottery = torch.rand(len(rows), count, generator=generator, device=device).to(images.device)
        lottery.masked_fill_(_excluded(rows, count, class_ids, image_ids), float("-inf"))
        drawn = lottery.topk(candidates - 1, dim=1).indices
        similarity = image_directions[rows] @ sentence_directions.mT
        own_score = similarity.gather(1, rows.unsqueeze(1))
        others = similarity.gather(1, drawn)
        # Equal captions have equal features, yet a matrix product may round their scores apart.
        tied = torch.isclose(others, own_score, rtol=0.0, atol=1e-9)
        better = ((others > own_score) & ~tied).sum(dim=1)
        ties = tied.sum(dim=1)
        hits.append(torch.stack([((k - better).double() / (1 + ties)).clamp(0.0, 1.0) for k in (1, 2, 3)], dim=1))
    return torch.cat(hits)


def _excluded(rows: Tensor, count: int, class_ids: Tensor | None, image_ids: Tensor | None) -> Tensor:
    """True where a caption may not be a candidate of an image in `rows`: (R, N)."""
    excluded = rows.unsqueeze(1) == torch.arange(count, device=rows.device)
    for ids in (class_ids, image_ids):
        if ids is not None:
            ids = ids.to(rows.device)
            excluded = excluded | (ids[rows].unsqueeze(1) == ids)
    return excluded
