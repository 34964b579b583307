"""Batch norm over the images of all processes."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace each batch norm in a module by one whose statistics are those of all processes; weights are kept."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm):
        return SynchronizedBatchNorm.like(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, device))
    return module


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all processes, on any backend; torch's `SyncBatchNorm` has none for CPUs.

    y = (x - mean) / sqrt(variance + eps) * weight + bias,    mean and variance over all positions of all processes
    """

    @classmethod
    def like(cls, norm: _BatchNorm) -> SynchronizedBatchNorm:
        """One with the parameters and buffers of another batch norm."""
        result = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for store, other in ((result._parameters, norm._parameters), (result._buffers, norm._buffers)):
            store.update(cast(Any, other))
        return result.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) or (B, D, H, W), as it came."""
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = values.new_tensor(values.numel() / values.shape[1])
        dist.all_reduce(count)
        if count == 1:
            # A single value has no variance: as in `FeatureBatchNorm`.
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        mean = cast(Tensor, _Sum.apply(values.sum(axes))) / count
        centered = values - mean.view(shape)
        variance = cast(Tensor, _Sum.apply(centered.square().sum(axes))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), rate)
        normalized = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes from 2 up."""


class _Sum(torch.autograd.Function):
    """The sum over all processes; a gradient of the sum belongs to each of its terms."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Not `all_reduce` alone: it has no derivative, and R1 penalties need a second one.
        return cast(Tensor, _Sum.apply(gradients[0]))
