"""Computation tile by tile: intermediate results are discarded and recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_positive, shape_of

Function = Callable[..., tuple[Tensor, ...]]
Inputs = tuple[Any, ...]
"""Tensors, or None for an optional input that is absent."""
Derivative = Callable[..., tuple[Any, ...]]
"""Takes the inputs and, as `gradients`, those of the results or None; returns the gradients of the inputs."""
EVERYTHING = slice(None)
ELEMENTS_ON_A_GPU = 2**25
"""Default size of a tile on a GPU, where kernel launches cost more than memory."""
Rows = TypeVar("Rows", Tensor, list[Any], dict[str, Any])
"""Results with one row per input row: a tensor, a list, or a dictionary of these."""


class TileIndices(NamedTuple):
    """Where a part of the results is, and the part of each input from which it is computed."""

    result: Any
    """Index into every result."""
    inputs: tuple[Any, ...]
    """One index per input; unused where the input is None."""


def in_chunks(function: Callable[..., Rows], *tensors: Tensor, size: int) -> Rows:
    """Apply a function to consecutive chunks of rows and concatenate the results along the first axis.

    Args:
        function: Takes as many tensors as are given and returns a tensor, a list, or a dictionary of these, nested or
            not, with a row for each of theirs; rows must not depend on each other.
        *tensors: At least one; equally long along the first axis.
        size: Rows per chunk; the last chunk may be shorter.

    Returns:
        `function(*tensors)`, computed with the intermediate results of one chunk at a time.

    Raises:
        ValueError: No tensor is given, the lengths differ, or `size` is less than 1.

    Examples:
        >>> in_chunks(lambda a, b: a + b, torch.arange(5), torch.arange(5), size=2)
        tensor([0, 2, 4, 6, 8])
        >>> in_chunks(lambda a: {"square": a * a, "text": [str(i) for i in a.tolist()]}, torch.arange(3), size=2)
        {'square': tensor([0, 1, 4]), 'text': ['0', '1', '2']}
    """
    check_positive("in_chunks", size=size)
    if len({len(tensor) for tensor in tensors}) != 1:
        listed = ", ".join(map(shape_of, tensors)) or "none"
        raise ValueError(f"in_chunks: give one or more tensors of equal length; they are {listed}.")
    return _concatenated([function(*rows) for rows in zip(*(tensor.split(size) for tensor in tensors))])


def _concatenated(parts: Sequence[Rows]) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {key: _concatenated([part[key] for part in parts]) for key in first}
    return torch.cat(parts) if isinstance(first, Tensor) else [row for part in parts for row in part]  # type: ignore


def recomputed_in_tiles(
    function: Function,
    inputs: Inputs,
    divide: Callable[[], list[TileIndices]],
    whole: tuple[int | None, ...],
    derivative: Derivative | None = None,
) -> tuple[Tensor, ...]:
    """Compute `function(*inputs)` one tile at a time, with the intermediate results of a single tile in memory.

    Equivalent to a loop over `torch.utils.checkpoint`, except that each tile is written into the preallocated result,
    forward and backward. Concatenating the tiles instead took about a quarter of the time of a function that makes few
    passes over its inputs.

    A compiled graph computes everything at once, because the compiler itself decides which results to keep. A second
    derivative (`create_graph=True`) and the transforms of `torch.func` also compute everything at once.

    Args:
        function: Returns a tuple of results.
        inputs: Its arguments.
        divide: Returns the tiles.
        whole: Leading sizes shared by all results; None for an axis that is not divided.
        derivative: Computes the first derivative of a tile in place of autograd, or None. Second derivatives are those
            of `function`.
    """
    if torch.compiler.is_compiling() or is_transformed() or len(tiles := divide()) <= 1:
        return without_autocast(function, inputs)
    return _Recomputed.apply(function, derivative, tiles, whole, *inputs)


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active; neither supports custom operators."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Function,
        derivative: Derivative | None,
        tiles: list[TileIndices],
        whole: tuple[int | None, ...],
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.derivative, ctx.tiles = function, derivative, tiles
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        results: tuple[Tensor, ...] = ()
        for tile in tiles:
            parts = without_autocast(function, _select(inputs, tile))
            if not results:
                results = tuple(part.new_empty(_whole_shape(part, whole)) for part in parts)
            for result, part in zip(results, parts):
                result[tile.result] = part
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs: Inputs = ctx.saved_tensors
        needed = [index for index, is_needed in enumerate(ctx.needs_input_grad[4:]) if is_needed]
        results: list[Any] = [None] * len(inputs)
        if torch.is_grad_enabled():
            # Differentiate with respect to views: if one input was computed from another, the graph between them must
            # not contribute here.
            views = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in inputs)
            for index, result in zip(needed, _differentiate(ctx.function, views, needed, gradients, create_graph=True)):
                results[index] = result
            return None, None, None, None, *results

        # Tiles with distinct parts of an input write its gradient; tiles that share a part accumulate.
        is_partitioned = {}
        for index in needed:
            tensor = inputs[index]
            is_partitioned[index] = len({str(tile.inputs[index]) for tile in ctx.tiles}) == len(ctx.tiles)
            if is_partitioned[index]:
                results[index] = torch.empty_like(tensor)
            else:
                results[index] = torch.zeros_like(at_least_float32(tensor))
        for tile in ctx.tiles:
            tile_inputs = _select(inputs, tile)
            tile_gradients = [None if gradient is None else gradient[tile.result] for gradient in gradients]
            if ctx.derivative is not None:
                of_inputs = without_autocast(partial(ctx.derivative, gradients=tile_gradients), tile_inputs)
                parts = tuple(of_inputs[index] for index in needed)
            else:
                leaves = tuple(
                    None if tensor is None else tensor.detach().requires_grad_(index in needed)
                    for index, tensor in enumerate(tile_inputs)
                )
                parts = _differentiate(ctx.function, leaves, needed, tile_gradients)
            for index, part in zip(needed, parts):
                if is_partitioned[index]:
                    results[index][tile.inputs[index]] = part
                else:
                    results[index][tile.inputs[index]] += part
        for index in needed:
            results[index] = results[index].to(inputs[index].dtype)
        return None, None, None, None, *results


def _select(inputs: Inputs, tile: TileIndices) -> Inputs:
    return tuple(None if tensor is None else tensor[index] for tensor, index in zip(inputs, tile.inputs))


def _whole_shape(part: Tensor, whole: tuple[int | None, ...]) -> list[int]:
    sizes = list(part.shape)
    for axis, size in enumerate(whole):
        sizes[axis] = sizes[axis] if size is None else size
    return sizes


def _differentiate(
    function: Function, inputs: Inputs, needed: list[int], gradients: Any, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Recompute and backpropagate; an input without influence on the results gets a gradient of zeros."""

    def differentiate(*inputs: Any) -> tuple[Tensor, ...]:
        leaves = [inputs[index] for index in needed]
        with torch.enable_grad():
            results = function(*inputs)
            pairs = [(r, g) for r, g in zip(results, gradients) if g is not None and r.requires_grad]
            if not pairs:
                return tuple(map(torch.zeros_like, leaves))
            return torch.autograd.grad(
                [result for result, _ in pairs],
                leaves,
                [gradient for _, gradient in pairs],
                create_graph=create_graph,
                materialize_grads=True,
            )

    return without_autocast(differentiate, inputs)


def without_autocast(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """Call with autocast off: the caller has cast the inputs, and the backward pass must use the same precision."""
    device = inputs[0].device.type
    if not torch.amp.is_autocast_available(device):
        return function(*inputs)
    with torch.autocast(device, enabled=False):
        return function(*inputs)
