"""Images refined at a higher resolution: the second stage of StackGAN (Zhang et al., ICCV 2017, Sec. 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_features, check_images, check_positive, check_precision, shape_of
from mirror_modules._typing import TypedCall
from mirror_modules.glam.stages import ConditionStage, ImageHead


class ImageRefinementStage(TypedCall, nn.Module):
    """Coarse images and a condition -> finer images (StackGAN, Sec. 3.3).

        h = CNN(image),    refined = tanh(conv(up(residual(ReLU(norm(conv(h, condition)))))))

    The coarse images are encoded first: their generator is another network, trained before and not by this one, and
    this one corrects its mistakes. Each halving of the resolution doubles the channels, each doubling halves them.
    `detach` the coarse images where their generator shall receive no gradient, as published.

    Args:
        condition_dim: Features E of the condition, which has a draw of its own in the published code.
        channels: Channels of the encoder's first convolution.
        halvings: How many times the encoder halves the resolution.
        doublings: How many times it doubles after that: images of H x W pixels become 2**(doublings - halvings) times
            as large.
        residual_blocks: Number of residual blocks, at the lowest resolution.

    Raises:
        ValueError: A size is not a whole number of at least 1 (0 for `residual_blocks`), or `channels` cannot be halved
            as often.

    Examples:
        >>> import torch
        >>> from mirror_modules import ImageRefinementStage
        >>> refinement = ImageRefinementStage(condition_dim=7, channels=8, residual_blocks=1)
        >>> coarse = torch.rand(2, 3, 16, 16) * 2 - 1
        >>> refinement(coarse, torch.randn(2, 7)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        condition_dim: int = 128,
        *,
        channels: int = 128,
        halvings: int = 2,
        doublings: int = 4,
        residual_blocks: int = 4,
    ) -> None:
        super().__init__()
        owner = "ImageRefinementStage"
        check_positive(owner, condition_dim=condition_dim, channels=channels, halvings=halvings, doublings=doublings)
        if not isinstance(residual_blocks, int) or residual_blocks < 0:
            raise ValueError(f"{owner}: residual_blocks must be 0 or more, but it is {residual_blocks!r}.")
        lowest = channels * 2**halvings
        if lowest % 2**doublings != 0:
            raise ValueError(
                f"{owner}: channels={channels} become {lowest} by halvings={halvings}, which doublings={doublings} "
                f"halve to a fraction; channels must be a multiple of {2 ** max(doublings - halvings, 0)}."
            )
        self.condition_dim, self.halvings = condition_dim, halvings
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.ReLU()]
        for i in range(halvings):
            width = channels * 2**i
            halving = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False)
            layers += [halving, nn.BatchNorm2d(2 * width), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        widths = [lowest // 2**i for i in range(1, doublings + 1)]
        self.refinement = ConditionStage(lowest, condition_dim, widths, residual_blocks, "relu")
        self.head = ImageHead(widths[-1])

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Refine a batch of images.

        Args:
            images: Coarse images in [-1, 1], (B, 3, H, W); H and W are multiples of 2**halvings, and at least twice
                as large.
            condition: Augmented condition, (B, E).

        Returns:
            Images in [-1, 1], (B, 3, 2**(doublings - halvings) * H, 2**(doublings - halvings) * W).

        Raises:
            ValueError: Sizes disagree or are no multiples.
        """
        owner, multiple = "ImageRefinementStage", 2**self.halvings
        # A single image has no batch statistics on a map of one position.
        check_images(owner, images, smallest=2 * multiple)
        if images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"{owner}: images are {shape_of(images)}; height and width must be multiples of {multiple}, by which "
                "the encoder divides them."
            )
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_batch(owner, images=images, condition=condition)
        check_precision(owner, self.head, images=images, condition=condition)
        return self.head(self.refinement(self.encoder(images), condition).features)
