"""R-precision: does an image retrieve its own caption? (MirrorGAN, Sec. 4.1; AttnGAN, Sec. 4)"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive, check_tensors, shape_of
from mirror_modules.metrics._features import check_generator, check_pairs, directions

# Scores in memory at a time: those of 30,000 images with 30,000 captions would need 7 GB at once.
LARGEST_BLOCK = 2**24


class RPrecision(NamedTuple):
    """Fraction of images that rank their own caption among the first k, in [0, 1]."""

    top1: float
    top2: float
    top3: float
    standard_error: float
    """Standard error of `top1` over the images."""


class RPrecisionFolds(NamedTuple):
    """Mean over folds of the fraction of images that rank their own caption among the first k, in [0, 1]."""

    top1: float
    top2: float
    top3: float
    standard_errors: tuple[float, float, float]
    """Standard error of each of the three means: the sample standard deviation of the folds over sqrt(folds)."""
    standard_deviations: tuple[float, float, float]
    """Root mean square deviation of the folds from each mean; published tables print it after ±."""


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

        top-k = fraction of images whose own caption is among the first k of `candidates`

    Each image ranks its own caption and `candidates - 1` others, drawn without replacement. If candidates tie with its
    own caption, the expectation over their random order counts: constant features score exactly at chance,
    1 / candidates.

    Args:
        images: Global image features, (N, D).
        sentences: Sentence features of the images' own captions, (N, D).
        class_ids: (N,); candidates are drawn from other classes only. None allows every other caption.
        image_ids: (N,); rows of the same photograph share an id, and its other captions are never candidates. None if
            every row is a different photograph.
        candidates: Number of captions that each image ranks, including its own.
        generator: Source of the draws; None uses torch's global generator.

    Returns:
        Top-1, top-2 and top-3 precision, and the standard error of the first.

    Raises:
        ValueError: Shapes disagree, a feature is not finite, there are too few mismatched captions, or an argument has
            another type.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import r_precision
        >>> distinct = torch.eye(5)
        >>> r_precision(distinct, distinct, candidates=4).top1
        1.0
        >>> constant = torch.ones(5, 3)  # all captions are tied: chance
        >>> round(r_precision(constant, constant, candidates=4).top1, 4)
        0.25
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
    """Compute R-precision as tables report it: the mean over ten folds (AttnGAN, Sec. 4; MirrorGAN, Sec. 4.1).

        top-k = mean_f p_f,    p_f = fraction of images in fold f whose own caption is among the first k

    Every image ranks its own caption among candidates drawn from the captions of all images, as in `r_precision`. The
    images are then shuffled and split into disjoint folds, which differ in size by at most one image.

    Args:
        images: Global image features, (N, D); the papers use N = 30,000.
        sentences: Sentence features of the images' own captions, (N, D).
        class_ids: (N,); candidates are drawn from other classes only. None allows every other caption.
        image_ids: (N,); rows of the same photograph share an id, and its other captions are never candidates. None if
            every row is a different photograph.
        candidates: Number of captions that each image ranks, including its own.
        folds: Number of disjoint parts, at least 2.
        generator: Source of the draws and of the order; None uses torch's global generator.

    Returns:
        Means of top-1, top-2 and top-3 precision over the folds, their standard errors and their deviations.

    Raises:
        ValueError: As `r_precision`; or there are fewer than 2 folds, or fewer images than folds.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import r_precision_folds
        >>> distinct = torch.eye(6)
        >>> result = r_precision_folds(distinct, distinct, candidates=4, folds=3)
        >>> result.top1, result.standard_errors
        (1.0, (0.0, 0.0, 0.0))
    """
    check_positive("r_precision_folds", folds=folds)
    if folds < 2:
        raise ValueError("r_precision_folds: folds must be at least 2, but it is 1; r_precision has no folds.")
    hits = _hits("r_precision_folds", images, sentences, class_ids, image_ids, candidates, generator)
    if len(hits) < folds:
        raise ValueError(
            f"r_precision_folds: folds={folds} needs at least {folds} images, but there are {len(hits)}; lower folds."
        )
    order = torch.randperm(len(hits), generator=generator, device=None if generator is None else generator.device)
    precisions = torch.stack([fold.mean(dim=0) for fold in hits[order.to(hits.device)].tensor_split(folds)])
    top1, top2, top3 = precisions.mean(dim=0).tolist()
    error1, error2, error3 = (precisions.std(dim=0, correction=1) / folds**0.5).tolist()
    deviation1, deviation2, deviation3 = precisions.std(dim=0, correction=0).tolist()
    return RPrecisionFolds(top1, top2, top3, (error1, error2, error3), (deviation1, deviation2, deviation3))


def _hits(
    owner: str,
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None,
    image_ids: Tensor | None,
    candidates: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Compute the probability that each image's caption is in its top k, k = 1, 2, 3: (N, 3). 0 or 1 without ties."""
    check_pairs(owner, images=images, sentences=sentences)
    check_generator(owner, generator)
    count = images.shape[0]
    check_ids(owner, count, class_ids=class_ids, image_ids=image_ids)
    check_positive(owner, candidates=candidates)
    if candidates < 2:
        raise ValueError(f"{owner}: candidates must be at least 2, but it is {candidates}.")
    blocks = torch.arange(count, device=images.device).split(max(1, LARGEST_BLOCK // count))
    most_excluded = max(int(excluded_captions(rows, count, class_ids, image_ids).sum(dim=1).max()) for rows in blocks)
    fewest = count - most_excluded
    if fewest < candidates - 1:
        raise ValueError(
            f"{owner}: candidates={candidates} needs {candidates - 1} mismatched captions for each image, but one "
            f"of the {count} images has {fewest}; evaluate more captions, or lower candidates."
        )
    device = images.device if generator is None else generator.device
    image_directions, sentence_directions = directions(images), directions(sentences)
    hits = []
    for rows in blocks:
        # The largest of independent uniform keys are a draw without replacement.
        keys = torch.rand(len(rows), count, generator=generator, device=device).to(images.device)
        keys.masked_fill_(excluded_captions(rows, count, class_ids, image_ids), float("-inf"))
        drawn = keys.topk(candidates - 1, dim=1).indices
        similarity = image_directions[rows] @ sentence_directions.mT
        own_score = similarity.gather(1, rows.unsqueeze(1))
        others = similarity.gather(1, drawn)
        # Equal captions have equal features, but a matrix product may round their scores differently.
        tied = torch.isclose(others, own_score, rtol=0.0, atol=1e-9)
        better = ((others > own_score) & ~tied).sum(dim=1)
        ties = tied.sum(dim=1)
        hits.append(torch.stack([((k - better).double() / (1 + ties)).clamp(0.0, 1.0) for k in (1, 2, 3)], dim=1))
    return torch.cat(hits)


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


def excluded_captions(rows: Tensor, count: int, class_ids: Tensor | None, image_ids: Tensor | None) -> Tensor:
    """Mark the captions that may not be candidates of the images in `rows`: (R, N)."""
    excluded = rows.unsqueeze(1) == torch.arange(count, device=rows.device)
    for ids in (class_ids, image_ids):
        if ids is not None:
            ids = ids.to(rows.device)
            excluded = excluded | (ids[rows].unsqueeze(1) == ids)
    return excluded
