"""R-precision: does an image retrieve its own caption? (MirrorGAN, Sec. 4.1; AttnGAN, Sec. 4)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_generator, check_positive
from mirror_modules.metrics._candidates import TIED, check_ids, count_drawable, draw_captions, excluded_captions
from mirror_modules.metrics._features import LARGEST_BLOCK, all_directions, check_pairs, directions

CACHED = 2**20
"""Elements of gathered features at a time: about what a cache holds."""


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
    drawn, fewest = candidates - 1, int(count_drawable(count, class_ids, image_ids).min())
    if fewest < drawn:
        raise ValueError(
            f"{owner}: candidates={candidates} needs {drawn} mismatched captions for each image, but one "
            f"of the {count} images has {fewest}; evaluate more captions, or lower candidates."
        )
    # Few of many captions: only their scores are computed. Otherwise one matrix product for all captions is faster, and
    # too many draws would be rejected.
    score = _score_few if 8 * drawn <= fewest - count // 2 else _score_many
    hits = []
    for scores in score(images, sentences, class_ids, image_ids, drawn, generator):
        margins = scores[:, 1:] - scores[:, :1]
        better = (margins > TIED).sum(dim=1)
        ties = (margins >= -TIED).sum(dim=1) - better
        hits.append(torch.stack([((k - better).double() / (1 + ties)).clamp(0.0, 1.0) for k in (1, 2, 3)], dim=1))
    return torch.cat(hits)


def _score_few(
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None,
    image_ids: Tensor | None,
    drawn: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Cosines of each image with its own caption, then with `drawn` others, in blocks of images: (R, 1 + drawn)."""
    rows = torch.arange(len(images), device=images.device if generator is None else generator.device)
    captions = draw_captions(drawn, rows, class_ids, image_ids, generator)
    ranked = torch.cat((rows.int().unsqueeze(1), captions), dim=1).to(images.device)
    sentence_directions = all_directions(sentences)
    size = max(1, CACHED // (ranked.shape[1] * images.shape[1]))
    for image_block, ranked_block in zip(images.split(size), ranked.split(size)):
        # Faster than indexing with two axes.
        gathered = sentence_directions.index_select(0, ranked_block.flatten()).unflatten(0, ranked_block.shape)
        yield (gathered @ directions(image_block).unsqueeze(2)).squeeze(2)


def _score_many(
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None,
    image_ids: Tensor | None,
    drawn: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The same from the cosines with all captions."""
    count = len(images)
    device = images.device if generator is None else generator.device
    every_row = torch.arange(count, device=images.device)
    sentence_directions = all_directions(sentences)
    for rows in every_row.split(max(1, LARGEST_BLOCK // count)):
        # The largest of independent uniform keys are a draw without replacement.
        keys = torch.rand(len(rows), count, generator=generator, device=device).to(images.device)
        keys.masked_fill_(excluded_captions(rows, every_row, class_ids, image_ids), float("-inf"))
        ranked = torch.cat((rows.unsqueeze(1), keys.topk(drawn, dim=1).indices), dim=1)
        yield (directions(images[rows]) @ sentence_directions.mT).gather(1, ranked)
