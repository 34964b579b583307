"""The normalization layers that torch does not have ready."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeatureBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over (B, D) that also trains on a batch of one.

    A single vector has no batch statistics (its variance is zero, and torch refuses it). It is normalized with the
    running statistics instead, which stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and _is_single(input):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class MapBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over (B, C, H, W) that likewise trains on a single position."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and _is_single(input):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def _is_single(input: Tensor) -> bool:
    """Is there one value per channel?"""
    return input.numel() == input.shape[1]
