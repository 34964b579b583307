"""`word_region_similarity` as an operator of torch.library: matrix products by torch, what is between them by Triton.

Images are taken in chunks. Of each, the maps of scores, shares and their gradients exist, and nothing of all pairs but
the similarity itself: the backward pass recomputes the rest from the inputs.

    scores     = W V^T                                   W all words (J * L, D), V the regions of the chunk (E * R, D)
    shares     = exp(gamma_attention * softmax_l(scores))
    contexts   = shares V / R                            not divided by the sum of shares: a cosine does not see lengths
    similarity = log sum_l exp(gamma_word * cos(contexts, W))

With the gradients a of contexts . W and c = contexts * b, b of half the squared lengths, that come from the similarity:

    of_scores  = (gradient of the scores, given a * scores + c V^T of the shares) + a * shares
    of_V       = (of_scores^T W + shares^T c) / R
    of_W       = of_scores V / R + (gradient of half the squared length of w) * W

`a * shares` in `of_scores` stands for the way from the products straight to V and W, so that it costs no product of
its own. Dividing by R keeps the contexts at the size of the regions, and the gradients away from float16's smallest
numbers.

Autograd, `torch.compile`, checkpointing and DDP see an ordinary operator. Triton is imported when it first runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules.kernels._launch import accumulator, next_power_of_2, on_device_of, refuse_second_derivative

ELEMENTS_PER_MAP = 2**25
"""Scores that exist at a time, unless those of a single pair are more."""
MOST_IMAGES = 2**16 - 1
"""Of a chunk: as many as a grid of programs may have on its second axis."""
ELEMENTS_PER_BLOCK = 2**12
"""Elements of a map or of contexts that a program holds at a time."""
ALIGNMENT = 16
"""Regions are padded to a multiple, by which Triton knows that whole vectors can be read and written, and torch that
its fast matrix products apply."""
OPERATOR = "mirror_modules::word_region_similarity"


@torch.library.custom_op(
    OPERATOR,
    mutates_args=(),
    schema="(Tensor regions, Tensor words, Tensor word_mask, float gamma_attention, float gamma_word) -> Tensor",
)
def word_region_similarity(
    regions: Tensor, words: Tensor, word_mask: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    """`functional.word_region_similarity` without its checks."""
    from mirror_modules.kernels import similarity_triton as kernels

    similarity = _empty_similarity(regions, words, word_mask, gamma_attention, gamma_word)
    words, mask, count = words.contiguous(), word_mask.contiguous().view(torch.uint8), regions.shape[1]
    with on_device_of(regions):
        for images, captions in _chunks(regions, words):
            chunk, some_words, some_mask = _padded(regions[images]), words[captions], mask[captions]
            scores = _scores(some_words, chunk)
            shares = scores  # in place: without a backward pass, the scores are not needed again
            _on_maps(kernels.attend_kernel, (scores, shares, some_mask), len(some_words), count, gamma_attention)
            contexts = _contexts(shares, chunk, count)
            result = similarity.new_empty((len(chunk), len(some_words)))
            _on_pairs(kernels.similarity_kernel, (contexts, some_words, some_mask, result), gamma_word)
            similarity[images, captions] = result
    return similarity


@word_region_similarity.register_fake
def _empty_similarity(
    regions: Tensor, words: Tensor, word_mask: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    wide = torch.float64 if regions.dtype == torch.float64 else torch.float32
    return regions.new_empty((regions.shape[0], words.shape[0]), dtype=wide)


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
    """Gradients of regions and words from that of the similarity."""
    from mirror_modules.kernels import similarity_triton as kernels

    words, mask, count = words.contiguous(), word_mask.contiguous().view(torch.uint8), regions.shape[1]
    of_regions = similarity.new_zeros(regions.shape)
    of_words = similarity.new_zeros(words.shape)
    with on_device_of(regions):
        for images, captions in _chunks(regions, words):
            chunk, some_words, some_mask = _padded(regions[images]), words[captions], mask[captions]
            rows = some_words.flatten(0, 1)
            scores = _scores(some_words, chunk)
            shares = torch.empty_like(scores)
            _on_maps(kernels.attend_kernel, (scores, shares, some_mask), len(some_words), count, gamma_attention)
            contexts = _contexts(shares, chunk, count)
            along_words, of_lengths = similarity.new_empty((2, len(chunk), len(rows)))
            given = similarity[images, captions].contiguous(), gradient[images, captions].contiguous()
            _on_pairs(
                kernels.similarity_backward_kernel,
                (contexts, some_words, some_mask, *given, along_words, of_lengths),
                gamma_word,
            )
            of_scores = torch.empty_like(scores)
            torch.bmm(contexts, chunk.mT, out=of_scores.transpose(0, 1))
            maps = (scores, of_scores, along_words, some_mask)
            _on_maps(kernels.attend_backward_kernel, maps, len(some_words), count, gamma_attention)
            of_chunk = _product(of_scores.flatten(1).mT, rows, 1 / count).view_as(chunk)
            of_chunk = torch.baddbmm(of_chunk, shares.permute(1, 2, 0), contexts, alpha=1 / count)
            of_regions[images] += of_chunk[:, :count]
            of_rows = _product(of_scores.flatten(1), chunk.flatten(0, 1), 1 / count)
            of_words[captions] += (of_rows + of_lengths.sum(dim=0).unsqueeze(1) * rows).view_as(some_words)
    return of_regions.to(regions.dtype), of_words.to(words.dtype)


@word_region_similarity_backward.register_fake
def _empty_gradients(regions: Tensor, words: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return regions.new_empty(regions.shape), words.new_empty(words.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    regions, words, word_mask, ctx.gamma_attention, ctx.gamma_word = inputs
    ctx.save_for_backward(regions, words, word_mask, output)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_regions, of_words = word_region_similarity_backward(
        *ctx.saved_tensors, gradient, ctx.gamma_attention, ctx.gamma_word
    )
    return of_regions, of_words, None, None, None


word_region_similarity.register_autograd(_differentiate, setup_context=_keep_inputs)
word_region_similarity_backward.register_autograd(refuse_second_derivative)


def _chunks(regions: Tensor, words: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some images with some captions at a time: all captions, unless those are too many for a single image."""
    per_pair = (regions.shape[1] + ALIGNMENT) * words.shape[1]
    captions = max(1, ELEMENTS_PER_MAP // max(1, per_pair))
    images = max(1, min(captions // max(1, len(words)), MOST_IMAGES))
    for i in range(0, len(regions), images):
        for j in range(0, len(words), captions):
            yield slice(i, i + images), slice(j, j + captions)


def _padded(regions: Tensor) -> Tensor:
    """With regions of zeros at the end, contiguous."""
    return F.pad(regions, (0, 0, 0, -regions.shape[1] % ALIGNMENT)).contiguous()


def _scores(words: Tensor, chunk: Tensor) -> Tensor:
    """(J * L, E, R) in one product."""
    return (words.flatten(0, 1) @ chunk.flatten(0, 1).mT).view(-1, *chunk.shape[:2])


def _contexts(shares: Tensor, chunk: Tensor, count: int) -> Tensor:
    """(E, J * L, D): sums of regions, divided by their number."""
    return torch.baddbmm(shares.new_empty((1, 1, 1)), shares.transpose(0, 1), chunk, beta=0, alpha=1 / count)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The product of a and b, scaled before it is rounded: float16 would not hold the sum."""
    return torch.addmm(a.new_empty((1, 1)), a, b, beta=0, alpha=scale)


def _on_maps(kernel: Any, tensors: tuple[Tensor, ...], captions: int, count: int, gamma_attention: float) -> None:
    """Run a kernel that goes over maps (J * L, E, R), the first of `tensors` being one."""
    scores = tensors[0]
    rows, images, padded = scores.shape
    blocks = _blocks(scores.dtype, rows // captions, padded, "BLOCK_R")
    kernel[(captions, images, -(-padded // blocks["BLOCK_R"]))](
        *tensors, count, rows // captions, images * padded, padded, gamma_attention, **blocks
    )


def _on_pairs(kernel: Any, tensors: tuple[Tensor, ...], gamma_word: float) -> None:
    """Run a kernel that goes over pairs of images and captions; the first of `tensors` are contexts and words."""
    contexts, words = tensors[:2]
    captions, length, features = words.shape
    blocks = _blocks(words.dtype, length, features, "BLOCK_D")
    kernel[(captions, len(contexts))](*tensors, captions, length, features, gamma_word, **blocks)


def _blocks(dtype: torch.dtype, length: int, size: int, name: str) -> dict[str, Any]:
    """A whole caption and as much of the other axis as fits."""
    block_l = next_power_of_2(length)
    block = max(16, min(next_power_of_2(size), ELEMENTS_PER_BLOCK // block_l))
    return {"ACCUMULATE": accumulator(dtype), "BLOCK_L": block_l, name: block}
