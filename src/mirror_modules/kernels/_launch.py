"""Helpers of the operators for launching kernels. Triton is not imported before a kernel first runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def next_power_of_2(size: int) -> int:
    """Round up to a power of two, as Triton requires for the sizes of blocks."""
    return 1 << (size - 1).bit_length()


def accumulator(dtype: torch.dtype) -> Any:
    """The dtype of sums: float32, or float64 for the float64 inputs that only the interpreter accepts."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def float32_precision() -> str:
    """The precision of float32 matrix products: that of torch, which uses tf32 only if it is enabled."""
    matmul = torch.backends.cuda.matmul
    # Reading the old setting raises once the new one, introduced in torch 2.9, has been set.
    use_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if use_tf32 else "ieee"


def refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    """Raise an error for a second derivative; registered as the backward pass of the backward operators."""
    raise NotImplementedError("The Triton kernels have no second derivative; use impl='torch' if you need one.")


def on_device_of(tensor: Tensor) -> ExitStack:
    """Enter a context for launches on the tensor's device, even if it is not the current one, with autocast off.

    The inputs are cast before an operator is called; autocast would cast the operands of its matrix products again.
    """
    stack = ExitStack()
    if tensor.device.type == "cuda":
        stack.enter_context(torch.cuda.device(tensor.device))
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    return stack
