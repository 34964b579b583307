"""`global_local_attention` as a custom operator of torch.library, implemented by Triton kernels.

Autograd, `torch.compile`, checkpointing and DDP treat it as any operator. Triton is imported on its first run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules.kernels._launch import (
    accumulator,
    float32_precision,
    next_power_of_2,
    on_device_of,
    refuse_second_derivative,
)

PROGRAMS = 2048
"""Target number of programs of a backward pass, given enough positions: several per multiprocessor of a large GPU."""
SMALLEST_SPAN = 256
"""Minimum number of positions per program of the backward pass: a multiple of every tile size."""


class Tile(NamedTuple):
    """What a program keeps on chip at a time, and the number of its warps."""

    positions: int
    words: int
    """Longer captions are processed in chunks of this many words."""
    warps: int
    registers: int | None = None
    """Maximum registers per thread; None leaves it to the compiler, which now and then spills to fit more programs."""


TILES = {
    ("forward", 2): {
        16: Tile(128, 128, 4),
        32: Tile(64, 128, 4),
        64: Tile(32, 128, 4),
        128: Tile(32, 128, 8),
        256: Tile(16, 64, 8),
    },
    ("forward", 4): {
        16: Tile(32, 32, 4),
        32: Tile(16, 32, 4),
        64: Tile(16, 32, 4),
        128: Tile(16, 16, 8, registers=255),
    },
    ("backward", 2): {
        16: Tile(16, 64, 4, registers=255),
        32: Tile(16, 64, 4),
        64: Tile(16, 64, 8),
        128: Tile(16, 64, 8),
        256: Tile(16, 32, 8),
    },
    ("backward", 4): {
        16: Tile(16, 32, 4),
        32: Tile(16, 32, 8),
        64: Tile(16, 32, 8),
        128: Tile(16, 16, 16, registers=128),
    },
}
"""Tiles by direction, bytes per element and padded channels.

The configurations that tests/kernels/test_compilation.py compiles, for compute capability 8.0 and 9.0, spill no
registers to memory.

16 positions are the rows of one tensor core instruction. With 32, the backward pass of 32 channels in bfloat16 compiles
to 40 of them instead of 10, because warps repeat each other's products, and takes 163 registers instead of 80.
"""
TF32_TILES = {
    "forward": TILES["forward", 4] | {16: Tile(64, 32, 4)},
    "backward": {
        16: Tile(16, 32, 4, registers=255),
        32: Tile(16, 32, 4, registers=255),
        64: Tile(16, 32, 4, registers=255),
        128: Tile(16, 32, 8, registers=255),
    },
}
"""The same for float32 in tf32, by direction and padded channels.

On tensor cores, the backward pass spills up to 128 bytes per thread with the warps of `TILES`. With half of the warps
and more registers for each, as many positions are in flight on a multiprocessor, and nothing spills.
"""
OPERATOR = "mirror_modules::global_local_attention"


@torch.library.custom_op(
    OPERATOR,
    mutates_args=(),
    schema="(Tensor features, Tensor words, Tensor sentence, Tensor? word_mask, bool need_weights, bool fused_output)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def global_local_attention(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None,
    need_weights: bool,
    fused_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused output, both contexts and both maps of `functional.global_local_attention`.

    Without `need_weights` the maps are empty. With `fused_output` the contexts are, because results of an operator must
    not share memory; without it, the fused output is.

    Words must be finite at padding: a weight of zero would not remove infinity or NaN.
    """
    from mirror_modules.kernels import attention_triton

    results = _empty_results(features, words, sentence, word_mask, need_weights, fused_output)
    if features.numel() == 0:
        return results
    batch, channels, height, width = features.shape
    positions, length = height * width, words.shape[1]
    fused, *contexts = results[:3]
    copy = None
    if fused_output:
        copy, *contexts = fused.split(channels, dim=1)
    features, *strides = _by_position(features)
    strides += _by_position(contexts[0])[1:]
    text_inputs = words.contiguous(), sentence.contiguous(), _as_bytes(word_mask)
    with on_device_of(features):
        constants = _constants("forward", features, length)
        attention_triton.forward_kernel[(-(-positions // constants["BLOCK_N"]) * batch,)](
            *(features, *text_inputs, copy, *contexts, *results[3:], positions, channels, length, *strides),
            HAS_MASK=word_mask is not None,
            COPY_FEATURES=fused_output,
            NEED_WEIGHTS=need_weights,
            **constants,
        )
    return results


@global_local_attention.register_fake
def _empty_results(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None,
    need_weights: bool,
    fused_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    word_map, sentence_map = (
        features.new_empty((batch, count, height, width) if need_weights else (0,))
        for count in (words.shape[1], channels)
    )
    if fused_output:
        return _empty_like(features, 3), features.new_empty(0), features.new_empty(0), word_map, sentence_map
    return features.new_empty(0), _empty_like(features), _empty_like(features), word_map, sentence_map


@torch.library.custom_op(
    f"{OPERATOR}_backward",
    mutates_args=(),
    schema="(Tensor features, Tensor words, Tensor sentence, Tensor? word_mask, Tensor? copy_gradient,"
    " Tensor word_gradient, Tensor sentence_gradient, Tensor? word_weights_gradient, Tensor? sentence_weights_gradient)"
    " -> (Tensor, Tensor, Tensor)",
)
def global_local_attention_backward(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None,
    copy_gradient: Tensor | None,
    word_gradient: Tensor,
    sentence_gradient: Tensor,
    word_weights_gradient: Tensor | None,
    sentence_weights_gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, words and sentence, given those of the contexts and optionally of the others.

    `copy_gradient` is that of the features in the fused output.
    """
    from mirror_modules.kernels import attention_triton

    batch, channels, height, width = features.shape
    positions, length = height * width, words.shape[1]
    features_result = _empty_like(features)
    if features.numel() == 0:
        return features_result, torch.zeros_like(words), torch.zeros_like(sentence)
    span = max(SMALLEST_SPAN, -(-positions * batch // (PROGRAMS * SMALLEST_SPAN)) * SMALLEST_SPAN)
    spans = -(-positions // span)
    accumulator_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    words_result = words.new_empty((spans, batch, length, channels), dtype=accumulator_dtype)
    sentence_result = words.new_empty((spans, batch, channels), dtype=accumulator_dtype)
    weights_gradients = word_weights_gradient, sentence_weights_gradient
    # An absent gradient is not read; any strides will do.
    copies = features if copy_gradient is None else copy_gradient
    maps = [_by_position(tensor) for tensor in (features, copies, word_gradient, sentence_gradient, features_result)]
    with on_device_of(features):
        attention_triton.backward_kernel[(spans * batch,)](
            *(maps[0][0], words.contiguous(), sentence.contiguous(), _as_bytes(word_mask)),
            *(None if copy_gradient is None else maps[1][0], maps[2][0], maps[3][0]),
            *(None if gradient is None else gradient.contiguous() for gradient in weights_gradients),
            *(features_result, words_result, sentence_result),
            *(batch, positions, channels, length, span),
            *(stride for _, *strides in maps for stride in strides),
            HAS_MASK=word_mask is not None,
            HAS_COPY=copy_gradient is not None,
            HAS_WORD_MAPS=word_weights_gradient is not None,
            HAS_SENTENCE_MAPS=sentence_weights_gradient is not None,
            **_constants("backward", features, length),
        )
    return features_result, words_result.sum(dim=0).to(words.dtype), sentence_result.sum(dim=0).to(sentence.dtype)


@global_local_attention_backward.register_fake
def _empty_gradients(
    features: Tensor, words: Tensor, sentence: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(features), words.new_empty(words.shape), sentence.new_empty(sentence.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    features, words, sentence, word_mask = ctx.saved_tensors
    # Results that were not requested are empty, and so may be their gradients.
    fused, *contexts, word_map, sentence_map = (None if g is None or g.numel() == 0 else g for g in gradients)
    copy = None
    if fused is not None:
        copy, *contexts = fused.split(features.shape[1], dim=1)
    contexts = [torch.zeros_like(features) if gradient is None else gradient for gradient in contexts]
    results = global_local_attention_backward(
        features, words, sentence, word_mask, copy, *contexts, word_map, sentence_map
    )
    return *results, None, None, None


global_local_attention.register_autograd(_backward, setup_context=_save_inputs)
global_local_attention_backward.register_autograd(refuse_second_derivative)


def _empty_like(maps: Tensor, times: int = 1) -> Tensor:
    """Uninitialized maps of the same shape, or with `times` the channels; channels-last if the given maps are."""
    batch, channels, height, width = maps.shape
    is_channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    shape = batch, times * channels, height, width
    return torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=layout)


def _by_position(maps: Tensor) -> tuple[Tensor, int, int, int]:
    """Maps (B, C, H, W) and their strides over samples, channels and positions.

    Channels-first and channels-last maps are not copied; maps whose rows are not adjacent in memory are.
    """
    height, width = maps.shape[2:]
    if height > 1 and width > 1 and maps.stride(2) != width * maps.stride(3):
        maps = maps.contiguous()
    return maps, maps.stride(0), maps.stride(1), maps.stride(3) if width > 1 else maps.stride(2)


def _as_bytes(word_mask: Tensor | None) -> Tensor | None:
    return None if word_mask is None else word_mask.contiguous().view(torch.uint8)


def _constants(direction: str, features: Tensor, length: int) -> dict[str, Any]:
    precision = float32_precision()
    configured = configuration(direction, features.shape[1], length, features.dtype, precision)
    return {"ACCUMULATE": accumulator(features.dtype), "PRECISION": precision, **configured}


def configuration(
    direction: str, channels: int, length: int, dtype: torch.dtype, precision: str = "ieee"
) -> dict[str, int | None]:
    """Block sizes, at least 16 by 16 for the tensor cores, and the number of warps.

    They depend on the arguments alone: all ranks of a training choose the same, and a second run sums in the same
    order.

    Args:
        direction: "forward" or "backward".
        channels: Channels of the features, at most 256; at most 128 in float32.
        length: Words of a caption, padding included.
        dtype: Dtype of the features.
        precision: "ieee" or "tf32": that of matrix products in float32.

    Examples:
        >>> import torch
        >>> from mirror_modules.kernels.attention import configuration
        >>> sizes = configuration("backward", channels=24, length=18, dtype=torch.bfloat16)
        >>> [sizes[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_L", "CHUNKS", "num_warps")]
        [16, 32, 32, 1, 4]
    """
    block_c = max(16, next_power_of_2(channels))
    is_tf32 = dtype == torch.float32 and precision == "tf32"
    # Tiles of 8-byte numbers do not matter: only the interpreter accepts those.
    tile = (TF32_TILES[direction] if is_tf32 else TILES[direction, min(dtype.itemsize, 4)])[block_c]
    block_l = max(16, min(next_power_of_2(length), tile.words))
    return {
        "BLOCK_C": block_c,
        "BLOCK_L": block_l,
        "CHUNKS": -(-length // block_l),
        "BLOCK_N": tile.positions,
        "num_warps": tile.warps,
        "num_stages": 1,
        "maxnreg": tile.registers,
    }
