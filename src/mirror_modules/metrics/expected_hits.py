"""Expected R-precision of each image over all draws of its mismatched captions."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules.metrics._candidates import TIED, check_ids, count_drawable, excluded_captions
from mirror_modules.metrics._features import LARGEST_BLOCK, all_directions, check_pairs, directions


@torch.no_grad()
def expected_hits(
    images: Tensor,
    sentences: Tensor,
    class_ids: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    candidates: int = 100,
) -> Tensor:
    """Compute the probability that each image ranks its own caption first, over all draws of mismatched captions.

    `r_precision` draws `candidates - 1` of the n other captions, which are N - 1, or fewer with `class_ids` or
    `image_ids`. If b of these n score higher than the image's own caption, and t are tied with it and ranked in random
    order, then

        p = sum_k C(t, k) C(n - b - t, m - k) / C(n, m) / (1 + k),    m = candidates - 1

    The mean over the images is the expected top-1 precision. Without random draws, two models that are compared on the
    same captions differ only by the images they generate.

    Args:
        images: Global image features, (N, D).
        sentences: Sentence features of the images' own captions, (N, D).
        class_ids: (N,); candidates are drawn from other classes only. None allows every other caption.
        image_ids: (N,); rows of the same photograph share an id, and its other captions are never candidates. None if
            every row is a different photograph.
        candidates: Number of captions that each image ranks, including its own.

    Returns:
        Probabilities (N,) in float64, on the CPU.

    Raises:
        ValueError: Shapes disagree, a feature is not finite, or there are too few captions.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import expected_hits
        >>> constant = torch.ones(5, 3)  # all captions are tied: chance
        >>> round(expected_hits(constant, constant, candidates=4).mean().item(), 4)
        0.25
        >>> distinct = torch.eye(5)
        >>> round(expected_hits(distinct, distinct, candidates=4).mean().item(), 4)
        1.0
    """
    owner = "expected_hits"
    check_pairs(owner, images=images, sentences=sentences)
    check_ids(owner, len(images), class_ids=class_ids, image_ids=image_ids)
    check_positive(owner, candidates=candidates)
    counts = []
    sentence_directions = all_directions(sentences)
    every_row = torch.arange(len(images), device=images.device)
    for rows in every_row.split(max(1, LARGEST_BLOCK // len(images))):
        margins = directions(images[rows]) @ sentence_directions.mT
        margins -= margins.gather(1, rows.unsqueeze(1))
        margins.masked_fill_(excluded_captions(rows, every_row, class_ids, image_ids), float("-inf"))
        counts.append(torch.stack([(margins > TIED).sum(dim=1), (margins >= -TIED).sum(dim=1)]).cpu())
    better, at_least = torch.cat(counts, dim=1)
    ties, others = at_least - better, count_drawable(len(images), class_ids, image_ids)
    drawn, fewest = candidates - 1, int(others.min())
    if not 1 <= drawn <= fewest:
        raise ValueError(
            f"{owner}: candidates must be from 2 to the number of captions that every image can rank, {fewest + 1}, "
            f"but it is {candidates}."
        )
    probabilities = torch.zeros(len(images), dtype=torch.float64)
    for k in range(min(int(ties.max()), drawn) + 1):
        is_possible = (k <= ties) & (drawn - k <= others - better - ties)
        log_ways = log_choose(ties, k) + log_choose(others - better - ties, drawn - k)
        term = (log_ways - log_choose(others, drawn)).exp() / (1 + k)
        probabilities += term.where(is_possible, 0.0)
    return probabilities


def log_choose(n: Tensor, k: int) -> Tensor:
    """Compute the logarithm of the binomial coefficient C(n, k); without meaning where k > n."""
    n, chosen = n.double(), torch.tensor(float(k), dtype=torch.float64)
    return torch.lgamma(n + 1) - torch.lgamma(chosen + 1) - torch.lgamma((n - chosen).clamp(min=0) + 1)
