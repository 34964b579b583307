"""Diversity of the images of a caption: generators tend to ignore their noise where a caption determines much."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_number, check_tensors, shape_of


def mode_seeking_loss(images: Tensor, others: Tensor, *, target: float = 0.25) -> Tensor:
    """Penalize pairs of images of the same caption that differ too little, relative to images of different captions.

        L = mean_i max(0, target - |x_i - y_i| / m),    m = mean_{i != j} |x_i - x_j|

    where |.| is the mean absolute difference of the pixels, and m has no gradient. The mode-seeking loss (Mao et al.,
    2019) seeks the largest distance; this one is satisfied with a share of what images differ by anyway.

    Args:
        images: Generated images of different captions, (B, ...), at least two.
        others: Images of the first N captions, generated from other noise, (N, ...), where N is from 1 to B.
        target: Distance from which on a pair is not penalized, as a share of m, at least 0.

    Returns:
        A scalar, from 0 to `target`.

    Raises:
        ValueError: Shapes or numbers of the images do not fit, or `target` is negative.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import mode_seeking_loss
        >>> images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
        >>> mode_seeking_loss(images, images).item()  # the noise has no effect
        0.25
        >>> mode_seeking_loss(images, images + 0.5).item()
        0.0
    """
    owner = "mode_seeking_loss"
    check_tensors(owner, images=images, others=others)
    check_number(owner, target=target)
    if target < 0:
        raise ValueError(f"{owner}: target must be 0 or more, but it is {target!r}.")
    for name, tensor in (("images", images), ("others", others)):
        if tensor.ndim < 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{owner}: {name} must be floats (B, ...), but they are {tensor.dtype} {shape_of(tensor)}."
            )
    if len(images) < 2:
        raise ValueError(f"{owner}: images must be two or more, of different captions, but there are {len(images)}.")
    if images.shape[1:] != others.shape[1:] or not 1 <= len(others) <= len(images):
        raise ValueError(
            f"{owner}: others must be images of the first captions, at least 1 and at most {len(images)} of the shape "
            f"{shape_of(images[0])}, but they are {shape_of(others)}."
        )
    pixels, other_pixels = at_least_float32(images).flatten(1), at_least_float32(others).flatten(1)
    with torch.no_grad():
        count = len(images) * (len(images) - 1)
        mean = torch.cdist(pixels, pixels, p=1).sum() / (count * pixels.shape[1])
    distance = (pixels[: len(others)] - other_pixels).abs().mean(dim=1)
    # Images that are all equal have no distance to compare with.
    return F.relu(target - distance / mean.clamp(min=1e-6)).mean()
