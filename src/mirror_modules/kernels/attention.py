"""`global_local_attention` as an operator of torch.library, run by Triton kernels.

Autograd, `torch.compile`, checkpointing and DDP see an ordinary operator. Triton is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirror_modules.kernels._launch import (
    accumulator,
    float32_precision,
    next_power_of_2,
    on_device_of,
    refuse_second_derivative,
)
from mirror_modules.kernels.choice import AMPLE_SHARED_MEMORY, machine_of

LARGEST_WORDS = 2**15
"""Bytes of the words that a program holds at a time, padding included; half of it where shared memory is not ample."""
PROGRAMS = 1024
"""Programs that a backward pass is divided into where the positions suffice: several per processor of a large GPU."""
SMALLEST_SPAN = 256
"""Least positions of a program of the backward pass: a multiple of each tile."""
LARGEST_IEEE = 64
"""Padded channels up to which float32 is multiplied without tensor cores. Beyond, such a product holds whole rows in
registers and spills them; three products of tf32 parts keep float32's accuracy and do not."""
OPERATOR = "mirror_modules::global_local_attention"


@torch.library.custom_op(
    OPERATOR,
    mutates_args=(),
    schema="(Tensor features, Tensor words, Tensor sentence, Tensor? word_mask, bool need_weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def global_local_attention(
    features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both contexts and both maps of `functional.global_local_attention`; maps that are not asked for are empty."""
    from mirror_modules.kernels import attention_triton as kernels

    results = _empty_results(features, words, sentence, word_mask, need_weights)
    if features.numel() == 0:
        return results
    batch, channels, height, width = features.shape
    positions, length = height * width, words.shape[1]
    features, *strides = _by_position(features)
    for context in results[:2]:
        strides += _by_position(context)[1:]
    text = words.contiguous(), sentence.contiguous(), _as_bytes(word_mask)
    with on_device_of(features):
        kernels.launch(
            kernels.forward_kernel,
            kernels.tuned_forward_kernel,
            lambda meta: (-(-positions // meta["BLOCK_N"]) * batch,),
            (features, *text, *results, positions, channels, length, *strides),
            {"HAS_MASK": word_mask is not None, "NEED_WEIGHTS": need_weights, **_constants(features, length)},
        )
    return results


@global_local_attention.register_fake
def _empty_results(
    features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    maps = [
        features.new_empty((batch, count, height, width) if need_weights else (0,))
        for count in (words.shape[1], channels)
    ]
    return _empty_like(features), _empty_like(features), maps[0], maps[1]


@torch.library.custom_op(
    f"{OPERATOR}_backward",
    mutates_args=(),
    schema="(Tensor features, Tensor words, Tensor sentence, Tensor? word_mask, Tensor word_gradient,"
    " Tensor sentence_gradient, Tensor? word_weights_gradient, Tensor? sentence_weights_gradient)"
    " -> (Tensor, Tensor, Tensor)",
)
def global_local_attention_backward(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None,
    word_gradient: Tensor,
    sentence_gradient: Tensor,
    word_weights_gradient: Tensor | None,
    sentence_weights_gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, words and sentence from those of the contexts and, if there are any, of the maps."""
    from mirror_modules.kernels import attention_triton as kernels

    batch, channels, height, width = features.shape
    positions, length = height * width, words.shape[1]
    result = _empty_like(features)
    if features.numel() == 0:
        return result, torch.zeros_like(words), torch.zeros_like(sentence)
    span = max(SMALLEST_SPAN, -(-positions * batch // (PROGRAMS * SMALLEST_SPAN)) * SMALLEST_SPAN)
    spans = -(-positions // span)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    words_result = words.new_empty((spans, batch, length, channels), dtype=wide)
    sentence_result = words.new_empty((spans, batch, channels), dtype=wide)
    of_weights = word_weights_gradient, sentence_weights_gradient
    maps = [_by_position(tensor) for tensor in (features, word_gradient, sentence_gradient, result)]
    with on_device_of(features):
        kernels.launch(
            kernels.backward_kernel,
            kernels.tuned_backward_kernel,
            (spans * batch,),
            (
                *(maps[0][0], words.contiguous(), sentence.contiguous(), _as_bytes(word_mask)),
                *(maps[1][0], maps[2][0]),
                *(None if tensor is None else tensor.contiguous() for tensor in of_weights),
                *(result, words_result, sentence_result),
                *(batch, positions, channels, length, span),
                *(stride for _, *strides in maps for stride in strides),
            ),
            {
                "HAS_MASK": word_mask is not None,
                "HAS_WORD_MAPS": word_weights_gradient is not None,
                "HAS_SENTENCE_MAPS": sentence_weights_gradient is not None,
                **_constants(features, length),
            },
        )
    return result, words_result.sum(dim=0).to(words.dtype), sentence_result.sum(dim=0).to(sentence.dtype)


@global_local_attention_backward.register_fake
def _empty_gradients(
    features: Tensor, words: Tensor, sentence: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(features), words.new_empty(words.shape), sentence.new_empty(sentence.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    features, words, sentence, word_mask = ctx.saved_tensors
    of_contexts = [torch.zeros_like(features) if gradient is None else gradient for gradient in gradients[:2]]
    of_maps = [None if gradient is None or gradient.numel() == 0 else gradient for gradient in gradients[2:]]
    return *global_local_attention_backward(features, words, sentence, word_mask, *of_contexts, *of_maps), None, None


global_local_attention.register_autograd(_differentiate, setup_context=_keep_inputs)
global_local_attention_backward.register_autograd(refuse_second_derivative)


def _empty_like(maps: Tensor) -> Tensor:
    """Empty maps, channels-last if these are."""
    is_channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.empty_like(maps, memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)


def _by_position(maps: Tensor) -> tuple[Tensor, int, int, int]:
    """Maps (B, C, H, W) and their strides over samples, channels and positions.

    Channels-first and channels-last maps are taken as they are; maps in which a row does not follow on the one before
    are copied.
    """
    height, width = maps.shape[2:]
    if height > 1 and width > 1 and maps.stride(2) != width * maps.stride(3):
        maps = maps.contiguous()
    return maps, maps.stride(0), maps.stride(1), maps.stride(3) if width > 1 else maps.stride(2)


def _as_bytes(word_mask: Tensor | None) -> Tensor | None:
    return None if word_mask is None else word_mask.contiguous().view(torch.uint8)


def _constants(features: Tensor, length: int) -> dict[str, Any]:
    """Padded sizes, at least 16 by 16 for the tensor cores, and the precision of products."""
    block_c = max(16, next_power_of_2(features.shape[1]))
    shared_memory = machine_of(features.device).shared_memory
    is_small = shared_memory is not None and shared_memory < AMPLE_SHARED_MEMORY
    largest_words = LARGEST_WORDS // 2 if is_small else LARGEST_WORDS
    block_l = max(16, min(next_power_of_2(length), 128, largest_words // (block_c * features.element_size())))
    precision = float32_precision()
    if precision == "ieee" and block_c > LARGEST_IEEE:
        precision = "tf32x3"
    return {
        "ACCUMULATE": accumulator(features.dtype),
        "PRECISION": precision,
        "BLOCK_C": block_c,
        "BLOCK_L": block_l,
        "CHUNKS": -(-length // block_l),
    }
