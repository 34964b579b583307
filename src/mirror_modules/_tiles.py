"""Computing tile by tile, with intermediate results that are forgotten and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mirror_modules._checks import at_least_float32

Function = Callable[..., tuple[Tensor, ...]]
Inputs = tuple[Any, ...]
"""Tensors, or None where one is left out."""
Tile = tuple[Any, ...]
"""What a tile takes of each input, as an index; the first input's index is also where its results lie."""
EVERYTHING = slice(None)


def recomputed_in_tiles(function: Function, inputs: Inputs, tiles: list[Tile]) -> tuple[Tensor, ...]:
    """`function(*inputs)`, computed for a tile at a time, so that intermediate results stay small.

    A loop over `torch.utils.checkpoint` would do the same. Here each tile is written to its place, forward and
    backward; joining tiles took a third of the time of a function that makes few passes over its inputs.

    A compiled graph computes everything at once, since its compiler has a plan of its own of what to keep. So does a
    second derivative (`create_graph=True`).
    """
    if len(tiles) <= 1 or torch.compiler.is_compiling():
        return _without_autocast(function, inputs)
    return _Recomputed.apply(function, tiles, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, tiles: list[Tile], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.function, ctx.tiles = function, tiles
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        results: tuple[Tensor, ...] = ()
        for tile in tiles:
            parts = _without_autocast(function, _take(inputs, tile))
            if not results:
                results = tuple(part.new_empty(_whole_shape(part, inputs[0], tile[0])) for part in parts)
            for result, part in zip(results, parts):
                result[tile[0]] = part
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs: Inputs = ctx.saved_tensors
        needed = [index for index, is_needed in enumerate(ctx.needs_input_grad[2:]) if is_needed]
        results: list[Any] = [None] * len(inputs)
        if torch.is_grad_enabled():
            for index, result in zip(needed, _differentiate(ctx.function, inputs, needed, gradients, twice=True)):
                results[index] = result
            return None, None, *results

        has_own_place = {index: len({str(tile[index]) for tile in ctx.tiles}) == len(ctx.tiles) for index in needed}
        for index in needed:
            tensor = inputs[index]
            is_sum = not has_own_place[index]
            results[index] = torch.zeros_like(at_least_float32(tensor)) if is_sum else torch.empty_like(tensor)
        for tile in ctx.tiles:
            leaves = tuple(
                None if tensor is None else tensor.detach().requires_grad_(index in needed)
                for index, tensor in enumerate(_take(inputs, tile))
            )
            of_tile = [None if gradient is None else gradient[tile[0]] for gradient in gradients]
            for index, part in zip(needed, _differentiate(ctx.function, leaves, needed, of_tile)):
                if has_own_place[index]:
                    results[index][tile[index]] = part
                else:
                    results[index][tile[index]] += part
        for index in needed:
            results[index] = results[index].to(inputs[index].dtype)
        return None, None, *results


def _take(inputs: Inputs, tile: Tile) -> Inputs:
    return tuple(None if tensor is None else tensor[index] for tensor, index in zip(inputs, tile))


def _whole_shape(part: Tensor, first_input: Any, index: Any) -> list[int]:
    """The shape of a result of all tiles: along the axes that are divided, as long as the first input."""
    divided = index if isinstance(index, tuple) else (index,)
    return [
        first_input.shape[axis] if axis < len(divided) and divided[axis] != EVERYTHING else size
        for axis, size in enumerate(part.shape)
    ]


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
