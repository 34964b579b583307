"""CLIPScore: does each image agree with its caption? (Hessel et al., 2021)"""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import check_tensors, is_readable
from mirror_modules.metrics._features import check_above_zero, check_directions, check_pairs, directions


def clip_score(images: Tensor, captions: Tensor, *, scale: float = 100.0) -> Tensor:
    """Score every image with its own caption by the cosine of their features (Hessel et al., Sec. 3).

        score[b] = scale * max( cos(images[b], captions[b]), 0 )

    The default scale gives percent, as torchmetrics does; that of the paper is `scale=2.5`. Tables report the mean over
    all pairs. torchmetrics takes the maximum with 0 after the mean, which differs if a pair has a negative cosine.

    The score is differentiable, and its gradient is zero for pairs with a negative cosine.

    Args:
        images: Features of images by the image tower of a model such as CLIP, after its projection, (B, D).
        captions: Features of their captions by the text tower, (B, D). The model and the prompt around the caption
            define the score.
        scale: Score of features of the same direction, above 0.

    Returns:
        Scores (B,), in [0, scale] and at least float32; `.mean()` is the value that tables report.

    Raises:
        ValueError: Shapes disagree, a feature is not finite, all features of an image or a caption are zero, or `scale`
            is not above 0. The values of features are not checked in a compiled graph.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import clip_score
        >>> images = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
        >>> captions = torch.tensor([[6.0, 8.0], [1.0, 0.0], [-1.0, 0.0]])  # cosines 1, 0.6, -0.6
        >>> clip_score(images, captions).round()
        tensor([100.,  60.,   0.])
        >>> clip_score(images, captions, scale=2.5)
        tensor([2.5000, 1.5000, 0.0000])
    """
    owner = "clip_score"
    check_above_zero(owner, scale=scale)
    check_tensors(owner, images=images, captions=captions)
    read_values = is_readable(images) and is_readable(captions)
    check_pairs(owner, read_values=read_values, images=images, captions=captions)
    if read_values:
        check_directions(owner, "images", images)
        check_directions(owner, "captions", captions)
    dtype = torch.promote_types(torch.promote_types(images.dtype, captions.dtype), torch.float32)
    cosine = (directions(images, dtype) * directions(captions, dtype)).sum(dim=1)
    # Rounding may exceed 1.
    return scale * cosine.clamp(0.0, 1.0)
