"""Colors that agree from stage to stage (StackGAN++, Zhang et al., TPAMI 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_batch, check_images, check_number


def color_consistency_loss(
    images: Tensor, coarser: Tensor, *, mean_weight: float = 1.0, covariance_weight: float = 5.0
) -> Tensor:
    """Compare the colors of the images of one stage with those of the stage before (StackGAN++).

        mu   = mean_n x_n,    S = mean_n (x_n - mu) (x_n - mu)^T        over the pixels n of an image
        loss = mean_weight * MSE(mu, mu') + covariance_weight * MSE(S, S')

    A dash marks the coarser images, which receive no gradient. MSE is the mean over the batch and the 3 or 9 entries,
    as in the published code, whose weight of the whole loss is 50 without text and 0 with text.

    Args:
        images: In [-1, 1], (B, 3, H, W).
        coarser: The images of the stage before, of any size, (B, 3, h, w).
        mean_weight: Weight of the difference of the mean colors.
        covariance_weight: Weight of the difference of the covariances.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: Images are not (B, 3, H, W), batch sizes disagree, or a weight is not a finite number.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import color_consistency_loss
        >>> images = torch.rand(2, 3, 8, 8) * 2 - 1
        >>> color_consistency_loss(images.repeat_interleave(2, dim=2), images).item() < 1e-10  # the same colors
        True
        >>> round(color_consistency_loss(images + 0.1, images).item(), 4)  # 0.1^2
        0.01
    """
    owner = "color_consistency_loss"
    check_number(owner, mean_weight=mean_weight, covariance_weight=covariance_weight)
    check_images(owner, images)
    check_images(f"{owner}, coarser", coarser)
    check_batch(owner, images=images, coarser=coarser)
    mean, covariance = _color_statistics(images)
    coarser_mean, coarser_covariance = _color_statistics(coarser.detach())
    mean_term = (mean - coarser_mean).square().mean()
    return mean_weight * mean_term + covariance_weight * (covariance - coarser_covariance).square().mean()


def _color_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean color (B, 3) and covariance (B, 3, 3), in at least float32."""
    pixels_B3N = at_least_float32(images).flatten(2)
    mean = pixels_B3N.mean(dim=2)
    centered = pixels_B3N - mean.unsqueeze(2)
    # A matrix product under autocast would round to half precision.
    with torch.autocast(images.device.type, enabled=False):
        return mean, centered @ centered.mT / pixels_B3N.shape[2]
