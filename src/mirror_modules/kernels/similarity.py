"""`word_region_similarity` as a custom operator of torch.library: matrix products by torch, fused steps by Triton.

Images are processed in chunks. The maps of scores, shares and their gradients exist for one chunk at a time, and only
the similarity exists for all pairs: the backward pass recomputes the rest from the inputs.

    scores     = W V^T                                   W all words (J * L, D), V the regions of the chunk (E * R, D)
    shares     = exp(gamma_attention * softmax_l(scores))    up to a factor that makes the largest possible share 1
    contexts   = shares V / R                            not divided by the sum of shares, which cancels in a cosine
    similarity = log sum_l exp(gamma_word * cos(contexts, W))

The gradient of the similarity gives a, the gradient of the products contexts . W; b, that of half the squared norms of
the contexts; and c = b * contexts. Then:

    grad_scores = (gradient through the softmax, given a * scores + c V^T for the shares) + a * shares
    grad_V      = (grad_scores^T W + shares^T c) / R
    grad_W      = grad_scores V / R + (gradient of half the squared norm of w) * W

The term `a * shares` in `grad_scores` carries the gradient of the products directly to V and W, which saves a matrix
product. Division by R keeps the contexts at the scale of the regions, and the gradients above float16's smallest
numbers. Scores are float32; shares, contexts and their gradients have the precision of the inputs.

Autograd, `torch.compile`, checkpointing and DDP treat it as any operator. Triton is imported on its first run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32
from mirror_modules.kernels._launch import accumulator, next_power_of_2, on_device_of, refuse_second_derivative

ELEMENTS_PER_MAP = 2**25
"""Maximum number of scores in a chunk, unless a single pair has more."""
MOST_IMAGES = 2**16 - 1
"""Maximum number of images in a chunk: the CUDA limit of the second axis of a grid."""
ELEMENTS_PER_BLOCK = 2**12
"""Elements of a map or of contexts that a program processes at a time."""
ALIGNMENT = 16
"""Regions are padded to a multiple of this, which enables vectorized loads and stores in Triton and fast matrix
products in torch."""
HAS_WIDE_PRODUCTS = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()
"""Whether torch multiplies half-precision matrices on a GPU into a float32 result, which torch 2.8 introduced for CUDA;
otherwise float32 copies of the matrices are multiplied."""
OPERATOR = "mirror_modules::word_region_similarity"


@torch.library.custom_op(
    OPERATOR,
    mutates_args=(),
    schema="(Tensor regions, Tensor words, Tensor word_mask, float gamma_attention, float gamma_word) -> Tensor",
)
def word_region_similarity(
    regions: Tensor, words: Tensor, word_mask: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    """`functional.word_region_similarity` without its checks; words must be finite at padding."""
    from mirror_modules.kernels import similarity_triton

    similarity = _empty_similarity(regions, words, word_mask, gamma_attention, gamma_word)
    words, mask, count = words.contiguous(), word_mask.contiguous().view(torch.uint8), regions.shape[1]
    with on_device_of(regions):
        for images, captions in _chunks(regions, words):
            chunk, some_words, some_mask = _padded(regions[images]), words[captions], mask[captions]
            scores = _scores(some_words, chunk)
            # In place where the precisions agree: the forward pass does not need the scores again.
            shares = scores if scores.dtype == chunk.dtype else torch.empty_like(scores, dtype=chunk.dtype)
            _launch_on_maps(
                similarity_triton.attend_kernel, (scores, shares, some_mask), len(some_words), count, gamma_attention
            )
            contexts = _contexts(shares, chunk, count)
            result = similarity.new_empty((len(chunk), len(some_words)))
            _launch_on_pairs(similarity_triton.similarity_kernel, (contexts, some_words, some_mask, result), gamma_word)
            similarity[images, captions] = result
    return similarity


@word_region_similarity.register_fake
def _empty_similarity(
    regions: Tensor, words: Tensor, word_mask: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    accumulator_dtype = torch.float64 if regions.dtype == torch.float64 else torch.float32
    return regions.new_empty((regions.shape[0], words.shape[0]), dtype=accumulator_dtype)


@torch.library.custom_op(
    f"{OPERATOR}_backward",
    mutates_args=(),
    schema="(Tensor regions, Tensor words, Tensor word_mask, Tensor similarity, Tensor gradient, float gamma_attention,"
    " float gamma_word) -> (Tensor, Tensor)",
)
def word_region_similarity_backward(
    regions: Tensor,
    words: Tensor,
    word_mask: Tensor,
    similarity: Tensor,
    gradient: Tensor,
    gamma_attention: float,
    gamma_word: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of regions and words, given that of the similarity."""
    from mirror_modules.kernels import similarity_triton

    words, mask, count = words.contiguous(), word_mask.contiguous().view(torch.uint8), regions.shape[1]
    grad_regions = similarity.new_zeros(regions.shape)
    grad_words = similarity.new_zeros(words.shape)
    with on_device_of(regions):
        for images, captions in _chunks(regions, words):
            chunk, some_words, some_mask = _padded(regions[images]), words[captions], mask[captions]
            rows = some_words.flatten(0, 1)
            scores = _scores(some_words, chunk)
            shares = torch.empty_like(scores, dtype=chunk.dtype)
            _launch_on_maps(
                similarity_triton.attend_kernel, (scores, shares, some_mask), len(some_words), count, gamma_attention
            )
            contexts = _contexts(shares, chunk, count)
            grad_products, grad_word_norms = similarity.new_empty((2, len(chunk), len(rows)))
            given = similarity[images, captions].contiguous(), gradient[images, captions].contiguous()
            _launch_on_pairs(
                similarity_triton.similarity_backward_kernel,
                (contexts, some_words, some_mask, *given, grad_products, grad_word_norms),
                gamma_word,
            )
            # The kernel has replaced `contexts` by c.
            grad_scores = torch.empty_like(shares)
            torch.bmm(contexts, chunk.mT, out=grad_scores.transpose(0, 1))
            maps = (scores, grad_scores, grad_products, some_mask)
            _launch_on_maps(similarity_triton.attend_backward_kernel, maps, len(some_words), count, gamma_attention)
            grad_chunk = _scaled_product(grad_scores.flatten(1).mT, rows, 1 / count).view_as(chunk)
            grad_chunk = torch.baddbmm(grad_chunk, shares.permute(1, 2, 0), contexts, alpha=1 / count)
            grad_regions[images] += grad_chunk[:, :count]
            grad_rows = _scaled_product(grad_scores.flatten(1), chunk.flatten(0, 1), 1 / count)
            grad_words[captions] += (grad_rows + grad_word_norms.sum(dim=0).unsqueeze(1) * rows).view_as(some_words)
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


@word_region_similarity_backward.register_fake
def _empty_gradients(regions: Tensor, words: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return regions.new_empty(regions.shape), words.new_empty(words.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    regions, words, word_mask, ctx.gamma_attention, ctx.gamma_word = inputs
    ctx.save_for_backward(regions, words, word_mask, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    grad_regions, grad_words = word_region_similarity_backward(
        *ctx.saved_tensors, gradient, ctx.gamma_attention, ctx.gamma_word
    )
    return grad_regions, grad_words, None, None, None


word_region_similarity.register_autograd(_backward, setup_context=_save_inputs)
word_region_similarity_backward.register_autograd(refuse_second_derivative)


def _chunks(regions: Tensor, words: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of images and captions: all captions, unless they are too many even for a single image."""
    per_pair = (regions.shape[1] + ALIGNMENT) * words.shape[1]
    captions = max(1, ELEMENTS_PER_MAP // max(1, per_pair))
    images = max(1, min(captions // max(1, len(words)), MOST_IMAGES))
    for i in range(0, len(regions), images):
        for j in range(0, len(words), captions):
            yield slice(i, i + images), slice(j, j + captions)


def _padded(regions: Tensor) -> Tensor:
    """Append regions of zeros up to a multiple of `ALIGNMENT`; contiguous."""
    return F.pad(regions, (0, 0, 0, -regions.shape[1] % ALIGNMENT)).contiguous()


def _scores(words: Tensor, chunk: Tensor) -> Tensor:
    """Products of all words with all regions, (J * L, E, R), in one matrix product.

    In float32 or wider: in half precision they would be rounded, and overflow float16 beyond 65504.
    """
    rows, columns = words.flatten(0, 1), chunk.flatten(0, 1).mT
    if words.is_cuda and words.dtype != torch.float32 and HAS_WIDE_PRODUCTS:
        scores = torch.mm(rows, columns, out_dtype=torch.float32)
    else:
        scores = at_least_float32(rows) @ at_least_float32(columns)
    return scores.view(-1, *chunk.shape[:2])


def _contexts(shares: Tensor, chunk: Tensor, count: int) -> Tensor:
    """Sums of regions weighted by shares, divided by their number, (E, J * L, D)."""
    return torch.baddbmm(shares.new_empty((1, 1, 1)), shares.transpose(0, 1), chunk, beta=0, alpha=1 / count)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The matrix product of a and b, scaled before it is rounded: the unscaled sum would overflow float16."""
    return torch.addmm(a.new_empty((1, 1)), a, b, beta=0, alpha=scale)


def _launch_on_maps(
    kernel: Any, tensors: tuple[Tensor, ...], captions: int, count: int, gamma_attention: float
) -> None:
    """Launch a kernel over maps (J * L, E, R); the first of `tensors` is such a map."""
    scores = tensors[0]
    rows, images, padded = scores.shape
    blocks = _blocks(scores.dtype, rows // captions, padded, "BLOCK_R")
    kernel[(captions, images, -(-padded // blocks["BLOCK_R"]))](
        *tensors, count, rows // captions, images * padded, padded, gamma_attention, **blocks
    )


def _launch_on_pairs(kernel: Any, tensors: tuple[Tensor, ...], gamma_word: float) -> None:
    """Launch a kernel over pairs of images and captions; the first two of `tensors` are contexts and words."""
    contexts, words = tensors[:2]
    captions, length, features = words.shape
    blocks = _blocks(words.dtype, length, features, "BLOCK_D")
    kernel[(captions, len(contexts))](*tensors, captions, length, features, gamma_word, **blocks)


def _blocks(dtype: torch.dtype, length: int, size: int, name: str) -> dict[str, Any]:
    """Block sizes: a whole caption, and as much of the other axis as fits."""
    block_l = next_power_of_2(length)
    block = max(16, min(next_power_of_2(size), ELEMENTS_PER_BLOCK // block_l))
    return {"ACCUMULATE": accumulator(dtype), "BLOCK_L": block_l, name: block}
