"""Batch normalization: on a batch of one, and synchronized across processes on any backend."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class FeatureBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over (B, D) that also trains on a batch of one.

    A single vector has no batch statistics: its variance is zero, and torch raises an error. It is normalized with the
    running statistics instead, which are not updated.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and _is_single(input):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class MapBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over (B, C, H, W) that also trains on a single position, as `FeatureBatchNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and _is_single(input):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def _is_single(input: Tensor) -> bool:
    """Whether there is a single value per channel."""
    return input.numel() == input.shape[1]


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace each batch norm in a module by one with statistics over all processes; parameters are kept."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm):
        return SynchronizedBatchNorm.like(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, device))
    return module


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm with statistics over all processes, on any backend; torch's `SyncBatchNorm` does not run on CPUs.

    y = (x - mean) / sqrt(variance + eps) * weight + bias,    mean and variance over all positions of all processes
    """

    @classmethod
    def like(cls, norm: _BatchNorm) -> SynchronizedBatchNorm:
        """Create a layer that shares the parameters and buffers of another batch norm."""
        result = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for target, source in ((result._parameters, norm._parameters), (result._buffers, norm._buffers)):
            target.update(cast(Any, source))
        return result.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, D) or (B, D, H, W); the shape is kept."""
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = values.new_tensor(values.numel() / values.shape[1])
        dist.all_reduce(count)
        if count == 1:
            # A single value has no variance: use the running statistics, as `FeatureBatchNorm`.
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
        """Accept any number of axes from 2 up."""


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is passed to each term."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # `all_reduce` alone is not differentiable, and R1 penalties need a second derivative.
        return cast(Tensor, _Sum.apply(gradients[0]))
