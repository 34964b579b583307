"""What the operators share when they launch a kernel. Triton is imported when a kernel first runs, never before."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def next_power_of_2(size: int) -> int:
    """The padded size of a block: Triton's are powers of two."""
    return 1 << (size - 1).bit_length()


def accumulator(dtype: torch.dtype) -> Any:
    """Sums are float32, but float64 where the interpreter is given that."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def float32_precision() -> str:
    """How float32 matrices are multiplied: as torch does it, which takes tf32 only if it is told to."""
    matmul = torch.backends.cuda.matmul
    # Reading the old switch raises once somebody has set the new one, which torch 2.9 brought.
    use_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if use_tf32 else "ieee"


def refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    """The backward pass of an operator that is itself a backward pass."""
    raise NotImplementedError("The Triton kernels have no second derivative; use impl='torch' where you need one.")


def on_device_of(tensor: Tensor) -> ExitStack:
    """Launch on the tensor's device, whichever is the current one, and multiply in the tensor's own precision.

    The inputs are cast before an operator is called. What it multiplies itself, autocast would cast again.
    """
    stack = ExitStack()
    if tensor.device.type == "cuda":
        stack.enter_context(torch.cuda.device(tensor.device))
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    return stack
