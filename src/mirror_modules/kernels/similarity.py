"""`word_region_similarity` as an operator of torch.library: matrix products by torch, what is between them by Triton.

Images are taken in chunks. Of each, the map of scores and the map of their gradient exist at the same time, and nothing
of all pairs but the similarity itself: the backward pass recomputes the rest from the inputs.

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

from mirror_modules.kernels._launch import accumulator, next_power_of_2, on_device_of

ELEMENTS_PER_MAP = 2**25
"""Scores that exist at a time, unless those of a single image are more."""
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
    words, mask = words.contiguous(), word_mask.contiguous().view(torch.uint8)
    captions, length, features = words.shape
    with on_device_of(regions):
        for images, chunk in _image_chunks(regions, captions * length):
            scores = _scores(words, chunk)
            shares, count = scores, regions.shape[1]
            _on_maps(kernels.attend_kernel, (scores, shares, mask), captions, count, gamma_attention)
            contexts = _contexts(shares, chunk, count)
            kernels.similarity_kernel[(captions, len(chunk))](
                contexts, words, mask, similarity[images], captions, length, features, gamma_word,
                **_blocks(words.dtype, length, features, "BLOCK_D"),
            )  # fmt: skip
    return similarity


@word_region_similarity.register_fake
def _empty_similarity(
    regions: Tensor, words: Tensor, word_mask: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    wide = torch.float64 if regions.dtype == torch.float64 else torch.float32
    return regions.new_empty((len(regions), len(words)), dtype=wide)


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

    words, mask, gradient = words.contiguous(), word_mask.contiguous().view(torch.uint8), gradient.contiguous()
    captions, length, features = words.shape
    count, rows = regions.shape[1], words.flatten(0, 1)
    of_regions = torch.zeros_like(regions, memory_format=torch.contiguous_format)
    of_words = torch.zeros_like(rows, dtype=similarity.dtype)
    with on_device_of(regions):
        for images, chunk in _image_chunks(regions, len(rows)):
            scores = _scores(words, chunk)
            shares = torch.empty_like(scores)
            _on_maps(kernels.attend_kernel, (scores, shares, mask), captions, count, gamma_attention)
            contexts = _contexts(shares, chunk, count)
            along_words, of_lengths = similarity.new_empty((2, len(chunk), len(rows)))
            kernels.similarity_backward_kernel[(captions, len(chunk))](
                contexts, words, mask, similarity[images], gradient[images], along_words, of_lengths,
                captions, length, features, gamma_word, **_blocks(words.dtype, length, features, "BLOCK_D"),
            )  # fmt: skip
            of_scores = torch.empty_like(scores)
            torch.bmm(contexts, chunk.mT, out=of_scores.transpose(0, 1))
            _on_maps(
                kernels.attend_backward_kernel, (scores, of_scores, along_words, mask), captions, count, gamma_attention
            )
            of_chunk = _product(of_scores.flatten(1).mT, rows, 1 / count).view_as(chunk)
            of_chunk = torch.baddbmm(of_chunk, shares.permute(1, 2, 0), contexts, alpha=1 / count)
            of_regions[images] = of_chunk[:, :count]
            of_words += _product(of_scores.flatten(1), chunk.flatten(0, 1), 1 / count)
            of_words += of_lengths.sum(dim=0).unsqueeze(1) * rows
    return of_regions, of_words.to(words.dtype).view_as(words)


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


def _image_chunks(regions: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Some images at a time, with their regions padded by zeros, (E, R, D) contiguous."""
    count = regions.shape[1]
    padding = -count % ALIGNMENT
    images = max(1, ELEMENTS_PER_MAP // max(1, rows * (count + padding)))
    for start in range(0, len(regions) if rows else 0, images):
        chunk = slice(start, start + images)
        yield chunk, F.pad(regions[chunk], (0, 0, 0, padding)).contiguous()


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


def _blocks(dtype: torch.dtype, length: int, size: int, name: str) -> dict[str, Any]:
    """A whole caption and as much of the other axis as fits."""
    block_l = next_power_of_2(length)
    block = max(16, min(next_power_of_2(size), ELEMENTS_PER_BLOCK // block_l))
    return {"ACCUMULATE": accumulator(dtype), "BLOCK_L": block_l, name: block}
