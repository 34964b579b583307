"""The other captions of an image as a query for its caption: how much R-precision its captions allow."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import check_tensors, shape_of
from mirror_modules.metrics._features import check_directions, check_measurable, directions


@torch.no_grad()
def other_captions(sentences: Tensor, image_ids: Tensor) -> Tensor:
    """Compute, for each caption, the mean direction of the other captions of its image.

        query[m] = mean over m' != m with image_ids[m'] = image_ids[m] of  sentences[m'] / |sentences[m']|

    In the place of image features, in `r_precision`, these queries show how well people who described the same image
    retrieve each other's captions, by the same text encoder: the text ceiling. Where it is low, captions would fit many
    images, and no evaluator can be expected to retrieve them. It is no bound: captions that leave out what others
    mention may be retrieved better from the image itself.

    Args:
        sentences: Sentence features of all captions, (M, D).
        image_ids: The image of each caption, (M,).

    Returns:
        Queries (M, D) in float64, on the device of the features.

    Raises:
        ValueError: Shapes disagree, a feature is not finite or is zero, or an image has a single caption.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import other_captions, r_precision
        >>> sentences = torch.randn(7, 1, 5) + 0.1 * torch.randn(7, 3, 5)  # three captions of each of 7 images
        >>> queries = other_captions(sentences.flatten(0, 1), torch.arange(7).repeat_interleave(3))
        >>> ceiling = r_precision(queries[::3], sentences[:, 0].double(), candidates=5)
        >>> ceiling.top1 > 0.5
        True
    """
    owner = "other_captions"
    check_measurable(owner, "sentences", sentences, "(M, D)", (2,))
    check_tensors(owner, image_ids=image_ids)
    if image_ids.shape != (len(sentences),):
        raise ValueError(
            f"{owner}: image_ids must be ({len(sentences)},), one per caption, but are {shape_of(image_ids)}."
        )
    check_directions(owner, "sentences", sentences)
    ids, image_of, counts = image_ids.to(sentences.device).unique(return_inverse=True, return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError(
            f"{owner}: the image with the id {ids[counts.argmin()].item()} has a single caption; leave it out, because "
            "no other caption can rank it."
        )
    unit = directions(sentences)
    sums = torch.zeros(len(ids), unit.shape[1], dtype=unit.dtype, device=unit.device).index_add_(0, image_of, unit)
    return (sums[image_of] - unit) / (counts[image_of] - 1).unsqueeze(1)
