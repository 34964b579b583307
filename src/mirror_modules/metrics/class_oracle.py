"""R-precision of an oracle that knows the class of each image and caption, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import check_positive, check_tensors, shape_of
from mirror_modules.metrics._candidates import check_ids, count_drawable
from mirror_modules.metrics.expected_hits import log_choose


@torch.no_grad()
def class_oracle(class_ids: Tensor, image_ids: Tensor | None = None, *, candidates: int = 100) -> Tensor:
    """Compute the probability that an image's own caption is first if those of its class come first, in random order.

    Candidates are drawn as in `r_precision` without `class_ids`. Of the n captions that can be drawn for an image, t
    have its class; m = candidates - 1 are drawn. The number of drawn captions of the class is hypergeometric, and the
    mean of 1 / (1 + number) over it is

        p = ( (n + 1) / (m + 1) - C(n - t, m + 1) / C(n, m) ) / (t + 1)

    The mean over the images is the top-1 precision of a model that knows the class alone. An evaluator whose real
    images are not above it has not shown that it sees more than the class. With few classes it is near the ceiling of
    any evaluator, and with candidates of other classes only it is 1.

    Args:
        class_ids: Class of each image, (N,).
        image_ids: (N,); rows of the same photograph share an id, and its other captions are never candidates. None if
            every row is a different photograph.
        candidates: Number of captions that each image ranks, including its own.

    Returns:
        Probabilities (N,) in float64, on the CPU.

    Raises:
        ValueError: The ids are not (N,), or there are too few captions.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import class_oracle
        >>> ten_classes = torch.arange(1000) % 10
        >>> round(class_oracle(ten_classes).mean().item(), 3)  # a tenth of 99 candidates ties with the own caption
        0.1
        >>> round(class_oracle(torch.zeros(1000)).mean().item(), 3)  # one class: chance
        0.01
    """
    owner = "class_oracle"
    check_tensors(owner, class_ids=class_ids)
    if class_ids.ndim != 1:
        raise ValueError(f"{owner}: class_ids must be (N,), one per image, but are {shape_of(class_ids)}.")
    count = len(class_ids)
    check_ids(owner, count, image_ids=image_ids)
    check_positive(owner, candidates=candidates)
    others = count_drawable(count, None, image_ids).double()
    same = others - count_drawable(count, class_ids, image_ids)
    drawn = candidates - 1
    if drawn < 1 or count == 0 or drawn > int(others.min()):
        most = int(others.min()) + 1 if count else 0
        raise ValueError(
            f"{owner}: candidates must be from 2 to the number of captions that every image can rank, {most}, but "
            f"it is {candidates}."
        )
    different = others - same
    ratio = (log_choose(different, drawn + 1) - log_choose(others, drawn)).exp()
    without_class = ratio.where(different > drawn, 0.0)
    return ((others + 1) / candidates - without_class) / (same + 1)
