"""`word_region_similarity` as a custom operator of torch.library: a fused kernel, or matrix products by torch.

Where `fused_configuration` has an entry, one kernel computes the whole forward pass and writes the similarity alone.
Otherwise, and in the backward pass, torch multiplies matrices, and Triton computes the steps between. Images are
processed in chunks: the maps of scores, shares and their gradients exist for one chunk at a time, and only the
similarity exists for all pairs; the backward pass recomputes the rest from the inputs.

    scores     = W V^T                                   W all words (J * L, D), V the regions of the chunk (E * R, D)
    shares     = exp(gamma_attention * softmax_l(scores))    up to a factor that makes the largest possible share 1
    contexts   = shares V / R                            not divided by the sum of shares, which cancels in a cosine
    similarity = log sum_l exp(gamma_word * cos(contexts, W))

The gradient of the similarity gives a, the gradient of the products contexts . W, and b and n, those of half the
squared norms of the contexts and of the words. Then:

    grad_contexts = a W + b contexts
    grad_scores   = gradient through both exponentials, given grad_contexts V^T for the shares
    grad_V        = (grad_scores^T W + shares^T grad_contexts) / R
    grad_W        = grad_scores V / R + sum over images (a contexts + n W)

The two terms of grad_contexts partly cancel, because the cosine does not depend on the norm of a context, and are
rounded after their sum. Division by R keeps the contexts at the scale of the regions, and the gradients above float16's
smallest numbers. Scores are float32; shares, contexts and their gradients have the precision of the inputs, except for
the contexts of the fused kernel, which are float32.

A fused backward pass would take 9 products instead of 6: scores and shares are needed for the contexts, then for the
gradient of the regions, and then for that of the words, which are sums over different axes. It would also pad each
caption to a power of two, which products of whole matrices do not. docs/implementations.md has the figures.

Autograd, `torch.compile`, checkpointing and DDP treat it as any operator. Triton is imported on its first run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32
from mirror_modules.kernels._launch import (
    accumulator,
    float32_precision,
    next_power_of_2,
    on_device_of,
    refuse_second_derivative,
)

ELEMENTS_PER_MAP = 2**25
"""Maximum number of scores in a chunk, unless a single pair has more."""
MOST_IMAGES = 2**16 - 1
"""Maximum number of images in a chunk: the CUDA limit of the second axis of a grid."""
ELEMENTS_PER_BLOCK = 2**12
"""Elements of a map or of contexts that a program processes at a time."""
IMAGES_PER_SUM = 16
"""Images over which a program sums the gradients of its words; a sum by torch over the programs follows."""
ALIGNMENT = 16
"""Regions are padded to a multiple of this, which enables vectorized loads and stores in Triton and fast matrix
products in torch."""
HAS_WIDE_PRODUCTS = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()
"""Whether torch multiplies half-precision matrices on a GPU into a float32 result, which torch 2.8 introduced for CUDA;
otherwise float32 copies of the matrices are multiplied."""


class Tile(NamedTuple):
    """What a program of the fused forward pass keeps on chip at a time, and the number of its warps."""

    rows: int
    """Words, of as many captions as fit when each is padded to a power of two."""
    regions: int
    warps: int


FUSED_TILES = dict.fromkeys((16, 32, 64, 128), Tile(64, 32, 4))
"""Tiles of the fused forward pass in half precision, by padded features.

No entry has been measured on a GPU. Each is predicted to take less time than the matrix products of torch and the
memory traffic between them, even at half of the matrix rate. The other sizes are not: 256 features on an A100
(`Tile(64, 64, 8)` would not spill), and float32, where padding costs more than the traffic without tensor cores.
tests/kernels/test_compilation.py compiles every entry and fails if registers spill to memory.
"""
HOPPER_TILES = {**FUSED_TILES, 256: Tile(128, 32, 8)}
"""The same for compute capability 9, where 4 warps together multiply at least 64 rows."""
LONGEST_FUSED = 64
"""Maximum number of words of a caption in the fused forward pass: the rows of the smallest tile."""
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
    similarity = _empty_similarity(regions, words, word_mask, gamma_attention, gamma_word)
    words, mask = words.contiguous(), word_mask.contiguous().view(torch.uint8)
    capability = torch.cuda.get_device_capability(words.device) if words.is_cuda else None
    configured = fused_configuration(words.shape[1], words.shape[2], words.dtype, capability)
    with on_device_of(regions):
        if configured is None:
            _similarity_by_products(regions, words, mask, similarity, gamma_attention, gamma_word)
        elif similarity.numel() > 0:
            _fused_similarity(regions.contiguous(), words, mask, similarity, gamma_attention, gamma_word, configured)
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
    schema="(Tensor regions, Tensor words, Tensor word_mask, Tensor gradient, float gamma_attention, float gamma_word)"
    " -> (Tensor, Tensor)",
)
def word_region_similarity_backward(
    regions: Tensor, words: Tensor, word_mask: Tensor, gradient: Tensor, gamma_attention: float, gamma_word: float
) -> tuple[Tensor, Tensor]:
    """Gradients of regions and words, given that of the similarity."""
    from mirror_modules.kernels import similarity_triton

    words, mask, count = words.contiguous(), word_mask.contiguous().view(torch.uint8), regions.shape[1]
    grad_regions = gradient.new_zeros(regions.shape)
    grad_words = gradient.new_zeros(words.shape)
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
            given = gradient[images, captions].contiguous()
            coefficients = gradient.new_empty((3, len(chunk), len(rows)))
            _launch_on_pairs(
                similarity_triton.similarity_backward_kernel,
                (contexts, some_words, some_mask, given, *coefficients),
                gamma_word,
            )
            grad_of_rows = _contexts_to_gradients(contexts, rows, coefficients)
            grad_scores = torch.empty_like(shares)
            torch.bmm(contexts, chunk.mT, out=grad_scores.transpose(0, 1))
            _launch_on_maps(
                similarity_triton.attend_backward_kernel,
                (scores, grad_scores, some_mask),
                len(some_words),
                count,
                gamma_attention,
            )
            grad_chunk = _scaled_product(grad_scores.flatten(1).mT, rows, 1 / count).view_as(chunk)
            grad_chunk = torch.baddbmm(grad_chunk, shares.permute(1, 2, 0), contexts, alpha=1 / count)
            grad_regions[images] += grad_chunk[:, :count]
            grad_rows = _scaled_product(grad_scores.flatten(1), chunk.flatten(0, 1), 1 / count)
            grad_words[captions] += (grad_rows + grad_of_rows).view_as(some_words)
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


@word_region_similarity_backward.register_fake
def _empty_gradients(regions: Tensor, words: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return regions.new_empty(regions.shape), words.new_empty(words.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    regions, words, word_mask, ctx.gamma_attention, ctx.gamma_word = inputs
    ctx.save_for_backward(regions, words, word_mask)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    grad_regions, grad_words = word_region_similarity_backward(
        *ctx.saved_tensors, gradient, ctx.gamma_attention, ctx.gamma_word
    )
    return grad_regions, grad_words, None, None, None


word_region_similarity.register_autograd(_backward, setup_context=_save_inputs)
word_region_similarity_backward.register_autograd(refuse_second_derivative)


def fused_configuration(
    length: int, features: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> dict[str, int] | None:
    """Block sizes and number of warps of the fused forward pass; None where the products of torch run instead.

    They depend on the arguments alone: all ranks of a training choose the same, and a second run sums in the same
    order.

    Args:
        length: Words of a caption, padding included.
        features: Features of a word, which the kernel loads 16 at a time.
        dtype: Dtype of regions and words.
        capability: CUDA compute capability; None in the interpreter.

    Examples:
        >>> import torch
        >>> from mirror_modules.kernels.similarity import fused_configuration
        >>> fused_configuration(length=18, features=256, dtype=torch.bfloat16, capability=(9, 0))
        {'CAPTIONS': 4, 'BLOCK_L': 32, 'BLOCK_R': 32, 'BLOCK_D': 256, 'num_warps': 8, 'num_stages': 2}
        >>> fused_configuration(length=18, features=256, dtype=torch.bfloat16, capability=(8, 0)) is None
        True
    """
    block_l, block_d = next_power_of_2(length), next_power_of_2(features)
    is_hopper = capability is not None and capability[0] == 9
    tile = (HOPPER_TILES if is_hopper else FUSED_TILES).get(block_d)
    if tile is None or dtype.itemsize != 2 or features % ALIGNMENT != 0 or length > LONGEST_FUSED:
        return None
    return {
        "CAPTIONS": tile.rows // block_l,
        "BLOCK_L": block_l,
        "BLOCK_R": tile.regions,
        "BLOCK_D": block_d,
        "num_warps": tile.warps,
        "num_stages": 2,
    }


def _fused_similarity(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    similarity: Tensor,
    gamma_attention: float,
    gamma_word: float,
    configured: dict[str, int],
) -> None:
    """Write the similarity in one launch."""
    from mirror_modules.kernels import similarity_triton

    images, count, features = regions.shape
    captions, length = mask.shape
    # Programs of the same image are neighbors and find its regions in the cache.
    similarity_triton.fused_kernel[(images * -(-captions // configured["CAPTIONS"]),)](
        *(regions, words, mask, similarity, captions, count, length, features, gamma_attention, gamma_word),
        ACCUMULATE=accumulator(words.dtype),
        PRECISION=float32_precision(),
        **configured,
    )


def _similarity_by_products(
    regions: Tensor, words: Tensor, mask: Tensor, similarity: Tensor, gamma_attention: float, gamma_word: float
) -> None:
    """Write the similarity chunk by chunk, with matrix products by torch."""
    from mirror_modules.kernels import similarity_triton

    count = regions.shape[1]
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


def _contexts_to_gradients(contexts: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
    """Replace contexts (E, J * L, D) by their gradients; return that of the words in the cosines, (J * L, D)."""
    from mirror_modules.kernels import similarity_triton

    images, count, features = contexts.shape
    blocks = _blocks_of_sum(contexts.dtype, features)
    parts = -(-images // IMAGES_PER_SUM)
    sums = coefficients.new_empty((parts, count, features))
    similarity_triton.context_backward_kernel[
        (-(-count // blocks["BLOCK_K"]), -(-features // blocks["BLOCK_D"]), parts)
    ](*(contexts, rows, *coefficients, sums, images, count, features), **blocks)
    return sums.sum(dim=0)


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


def _blocks_of_sum(dtype: torch.dtype, features: int) -> dict[str, Any]:
    """Block sizes of the kernel that sums over images."""
    block_d = max(16, min(next_power_of_2(features), 128))
    return {"IMAGES": IMAGES_PER_SUM, "ACCUMULATE": accumulator(dtype), "BLOCK_K": 16, "BLOCK_D": block_d}
