"""A convolution over a feature map and a sentence, shared by generators and discriminators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SentenceConv2d(nn.Conv2d):
    """A convolution over features and a sentence repeated at every position, which is never materialized.

        conv2d(cat(features, sentence at each position), weight, padding=kernel // 2)

    The sentence is the same everywhere, so each of the kernel's taps multiplies it only once. A binary matrix then
    sums, for each position, the taps that lie within the map.

    Args:
        channels: Channels C of the features.
        text_dim: Features D of the sentence, or of the condition.
        kernel: Kernel size, odd.
        out_channels: Channels of the result; None keeps those of the features.
        bias: Whether to add a bias.
    """

    def __init__(
        self, channels: int, text_dim: int, kernel: int = 3, *, out_channels: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(channels + text_dim, out_channels or channels, kernel, padding=kernel // 2, bias=bias)

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W), (B, D) -> (B, out, H, W)."""
        feature_weight, sentence_weight = self.weight.split([features.shape[1], sentence.shape[1]], dim=1)
        # Not those of the weight: spectral norm estimates a singular value each time that it is read.
        kernel, padding = self.kernel_size[0], int(self.padding[0])
        taps = F.linear(sentence, sentence_weight.permute(0, 2, 3, 1).flatten(0, 2)).unflatten(1, (-1, kernel**2))
        is_within = F.unfold(taps.new_ones(1, 1, *features.shape[2:]), kernel, padding=padding)
        sentence_term = (taps @ is_within).unflatten(2, features.shape[2:])
        return F.conv2d(features, feature_weight, self.bias, padding=padding) + sentence_term
