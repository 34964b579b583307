"""Computing in chunks whose intermediate results are forgotten, and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mirror_modules._checks import at_least_float32

Inputs = tuple[Any, ...]
"""Tensors, or None where one is left out."""
Function = Callable[..., tuple[Tensor, ...]]


def recomputed_in_chunks(function: Function, chunked: Inputs, shared: Inputs, size: int) -> tuple[Tensor, ...]:
    """`function(*chunked, *shared)`, computed for `size` rows at a time, so that its intermediate results stay small.

    Row i of each result may depend on row i of the chunked inputs and on all of the shared ones. A loop over
    `torch.utils.checkpoint` would do the same. Here each chunk is written to its place, forward and backward; joining
    them took a third of the time of a function that makes few passes over its inputs.

    A compiled graph computes all rows at once, since its compiler has a plan of its own of what to keep. So does a
    second derivative (`create_graph=True`).
    """
    if len(chunked[0]) <= size or torch.compiler.is_compiling():
        return _without_autocast(function, (*chunked, *shared))
    return _Recomputed.apply(function, len(chunked), size, *chunked, *shared)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, chunked: int, size: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.function, ctx.chunked, ctx.size = function, chunked, size
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        results: tuple[Tensor, ...] = ()
        rows_of: Any = inputs[0]
        for rows, chunk in _chunks(inputs, chunked, size):
            parts = _without_autocast(function, chunk)
            if not results:
                results = tuple(part.new_empty((len(rows_of), *part.shape[1:])) for part in parts)
            for result, part in zip(results, parts):
                result[rows] = part
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs: Inputs = ctx.saved_tensors
        needed = [index for index, is_needed in enumerate(ctx.needs_input_grad[3:]) if is_needed]
        results: list[Any] = [None] * len(inputs)
        if torch.is_grad_enabled():
            for index, result in zip(needed, _differentiate(ctx.function, inputs, needed, gradients, twice=True)):
                results[index] = result
            return None, None, None, *results

        for index in needed:
            tensor = inputs[index]
            is_chunked = index < ctx.chunked
            results[index] = torch.empty_like(tensor) if is_chunked else torch.zeros_like(at_least_float32(tensor))
        for rows, chunk in _chunks(inputs, ctx.chunked, ctx.size):
            leaves = tuple(
                None if tensor is None else tensor.detach().requires_grad_(index in needed)
                for index, tensor in enumerate(chunk)
            )
            of_rows = [None if gradient is None else gradient[rows] for gradient in gradients]
            for index, part in zip(needed, _differentiate(ctx.function, leaves, needed, of_rows)):
                if index < ctx.chunked:
                    results[index][rows] = part
                else:
                    results[index] += part
        for index in needed:
            results[index] = results[index].to(inputs[index].dtype)
        return None, None, None, *results


def _chunks(inputs: Inputs, chunked: int, size: int) -> Iterator[tuple[slice, Inputs]]:
    for start in range(0, len(inputs[0]), size):
        rows = slice(start, start + size)
        own = (None if tensor is None else tensor[rows] for tensor in inputs[:chunked])
        yield rows, (*own, *inputs[chunked:])


def _differentiate(
    function: Function, inputs: Inputs, needed: list[int], gradients: Any, *, twice: bool = False
) -> tuple[Tensor, ...]:
    """Compute again, and descend; zeros for an input that has no influence on what is asked for."""
    with torch.enable_grad():
        asked = [pair for pair in zip(_without_autocast(function, inputs), gradients) if pair[1] is not None]
        return torch.autograd.grad(
            [result for result, _ in asked],
            [inputs[index] for index in needed],
            [gradient for _, gradient in asked],
            create_graph=twice,
            materialize_grads=True,
        )


def _without_autocast(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """Whoever calls has cast the inputs. The backward pass, wherever it runs, must compute in the same precision."""
    device = inputs[0].device.type
    if not torch.amp.is_autocast_available(device):
        return function(*inputs)
    with torch.autocast(device, enabled=False):
        return function(*inputs)
