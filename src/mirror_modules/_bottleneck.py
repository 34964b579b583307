"""A residual block with a bottleneck, shared by generators and discriminators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# A bottleneck has this fraction of the channels of its input.
BOTTLENECK = 4


class Bottleneck(nn.Module):
    """A residual block whose 3x3 convolutions act on a quarter of the channels (Reed et al., ICML 2016).

        a(f + norm(conv3(a(norm(conv3(a(norm(conv1(f)))))))))    a = ReLU, or leaky ReLU

    Args:
        channels: Channels C, a multiple of 4.
        negative_slope: Slope of the activation below zero.
        has_norm: Whether there are batch norms; without them, convolutions have a bias.
    """

    def __init__(self, channels: int, *, negative_slope: float = 0.0, has_norm: bool = True) -> None:
        super().__init__()
        narrow = channels // BOTTLENECK
        self.negative_slope = negative_slope
        self.conv1 = nn.Conv2d(channels, narrow, 1, bias=not has_norm)
        self.norm1 = nn.BatchNorm2d(narrow) if has_norm else nn.Identity()
        self.conv2 = nn.Conv2d(narrow, narrow, 3, padding=1, bias=not has_norm)
        self.norm2 = nn.BatchNorm2d(narrow) if has_norm else nn.Identity()
        self.conv3 = nn.Conv2d(narrow, channels, 3, padding=1, bias=not has_norm)
        self.norm3 = nn.BatchNorm2d(channels) if has_norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inner = self._activation(self.norm1(self.conv1(features)))
        inner = self._activation(self.norm2(self.conv2(inner)))
        return self._activation(features + self.norm3(self.conv3(inner)))

    def _activation(self, features: Tensor) -> Tensor:
        return F.leaky_relu(features, self.negative_slope) if self.negative_slope else F.relu(features)
