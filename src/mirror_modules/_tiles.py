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
"""Where the results of a tile lie, and then what it takes of each input, as indices."""
EVERYTHING = slice(None)
ELEMENTS_ON_A_GPU = 2**25
"""A sensible size of a tile where a launch costs more than memory."""


def recomputed_in_tiles(
    function: Function, inputs: Inputs, divide: Callable[[], list[Tile]], whole: tuple[int | None, ...]
) -> tuple[Tensor, ...]:
    """`function(*inputs)`, computed for a tile at a time, so that intermediate results stay as small as one tile's.

    A loop over `torch.utils.checkpoint` would do the same. Here each tile is written to its place, forward and
    backward; joining tiles took about a quarter of the time of a function that makes few passes over its inputs.

    A compiled graph computes everything at once, since its compiler has a plan of its own of what to keep. So do
    a second derivative (`create_graph=True`) and the transforms of `torch.func`.

    Args:
        function: Returns several results.
        inputs: Its arguments.
        divide: Returns the tiles.
        whole: The first sizes of all results; None where a tile has the whole of an axis.
    """
    if torch.compiler.is_compiling() or is_transformed() or len(tiles := divide()) <= 1:
        return _without_autocast(function, inputs)
    return _Recomputed.apply(function, tiles, whole, *inputs)


def is_transformed() -> bool:
    """Does `torch.func` or forward-mode differentiation look on? Neither sees into an operator of one's own."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Function, tiles: list[Tile], whole: tuple[int | None, ...], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.tiles = function, tiles
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        results: tuple[Tensor, ...] = ()
        for place, *taken in tiles:
            parts = _without_autocast(function, _take(inputs, taken))
            if not results:
                results = tuple(part.new_empty(_whole_shape(part, whole)) for part in parts)
            for result, part in zip(results, parts):
                result[place] = part
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs: Inputs = ctx.saved_tensors
        needed = [index for index, is_needed in enumerate(ctx.needs_input_grad[3:]) if is_needed]
        results: list[Any] = [None] * len(inputs)
        if torch.is_grad_enabled():
            # Seen through views, an input does not lead on to another one that it was made from.
            views = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in inputs)
            for index, result in zip(needed, _differentiate(ctx.function, views, needed, gradients, twice=True)):
                results[index] = result
            return None, None, None, *results

        has_own_place = {}
        for index in needed:
            tensor = inputs[index]
            has_own_place[index] = len({str(taken[index]) for _, *taken in ctx.tiles}) == len(ctx.tiles)
            if has_own_place[index]:
                results[index] = torch.empty_like(tensor)
            else:
                results[index] = torch.zeros_like(at_least_float32(tensor))
        for place, *taken in ctx.tiles:
            leaves = tuple(
                None if tensor is None else tensor.detach().requires_grad_(index in needed)
                for index, tensor in enumerate(_take(inputs, taken))
            )
            of_tile = [None if gradient is None else gradient[place] for gradient in gradients]
            for index, part in zip(needed, _differentiate(ctx.function, leaves, needed, of_tile)):
                if has_own_place[index]:
                    results[index][taken[index]] = part
                else:
                    results[index][taken[index]] += part
        for index in needed:
            results[index] = results[index].to(inputs[index].dtype)
        return None, None, None, *results


def _take(inputs: Inputs, taken: list[Any]) -> Inputs:
    return tuple(None if tensor is None else tensor[index] for tensor, index in zip(inputs, taken))


def _whole_shape(part: Tensor, whole: tuple[int | None, ...]) -> list[int]:
    sizes = list(part.shape)
    for axis, size in enumerate(whole):
        sizes[axis] = sizes[axis] if size is None else size
    return sizes


def _differentiate(
    function: Function, inputs: Inputs, needed: list[int], gradients: Any, *, twice: bool = False
) -> tuple[Tensor, ...]:
    """Compute again, and descend; zeros for an input that has no influence on what is asked for."""
    leaves = [inputs[index] for index in needed]
    with torch.enable_grad():
        results = _without_autocast(function, inputs)
        asked = [(r, g) for r, g in zip(results, gradients) if g is not None and r.requires_grad]
        if not asked:
            return tuple(map(torch.zeros_like, leaves))
        return torch.autograd.grad(
            [result for result, _ in asked],
            leaves,
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
