"""R-precision of each image, expected over all draws of its mismatched captions."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules.metrics._features import check_pairs, directions
from mirror_modules.metrics.r_precision import LARGEST_BLOCK


@torch.no_grad()
def expected_hits(images: Tensor, sentences: Tensor, *, candidates: int = 100) -> Tensor:
    """The probability that an image ranks its own caption first, over all ways to draw the mismatched ones.

    `r_precision` draws `candidates - 1` of the other n = N - 1 captions. If b of them score better than the own one,
    and t equally well, which are ordered at random, then

        p = sum_k C(t, k) C(n - b - t, m - k) / C(n, m) / (1 + k),    m = candidates - 1

    The mean over the images is the expected top-1 precision. There is nothing to draw, so two models that are compared
    on the same captions differ by what they made of them alone.

    Args:
        images: Global image features, (N, D).
        sentences: Sentence features of the images' own captions, (N, D).
        candidates: Captions that each image would rank, its own included.

    Returns:
        Probabilities (N,) in float64, on the CPU.

    Raises:
        ValueError: Shapes disagree, a feature is not finite, or there are too few captions.
    """
    owner = "expected_hits"
    check_pairs(owner, images, sentences)
    check_positive(owner, candidates=candidates)
    others, drawn = len(images) - 1, candidates - 1
    if not 1 <= drawn <= others:
        raise ValueError(
            f"{owner}: candidates must be from 2 to the number of captions, {len(images)}, but it is {candidates}."
        )
    counts = []
    image_directions, sentence_directions = directions(images), directions(sentences)
    for rows in torch.arange(len(images), device=images.device).split(max(1, LARGEST_BLOCK // len(images))):
        similarity = image_directions[rows] @ sentence_directions.mT
        own = similarity.gather(1, rows.unsqueeze(1))
        # Equal captions have equal features, yet a matrix product may round their scores apart.
        tied = torch.isclose(similarity, own, rtol=0.0, atol=1e-9)
        counts.append(torch.stack((((similarity > own) & ~tied).sum(1), tied.sum(1) - 1)).cpu())
    better, ties = torch.cat(counts, dim=1)
    chances = torch.zeros(len(images), dtype=torch.float64)
    for k in range(int(ties.max()) + 1):
        within = (k <= ties) & (k <= drawn) & (drawn - k <= others - better - ties)
        log_ways = _log_choose(ties, k) + _log_choose(others - better - ties, drawn - k)
        term = (log_ways - _log_choose(torch.tensor(others), drawn)).exp() / (1 + k)
        chances += term.where(within, 0.0)
    return chances


def _log_choose(of: Tensor, count: int) -> Tensor:
    """The logarithm of C(of, count)."""
    of, few = of.double(), torch.tensor(float(count), dtype=torch.float64)
    return torch.lgamma(of + 1) - torch.lgamma(few + 1) - torch.lgamma((of - few).clamp(min=0) + 1)
