"""The steps between the matrix products of `word_region_similarity`, forward and backward.

All large products (words with regions, shares with regions, and their gradients) are whole matrices, which torch's own
product runs at full rate without padding each caption to a power of two. What is left between them is done here, in one
pass over the maps for each step: two softmaxes and a cosine, and their gradients.

Shape suffixes as in `stem/matching.py`; E images of a chunk. Maps are (J * L, E, R), contiguous, with R padded so that
rows are aligned: `region < R` is real, `region < stride_e` exists. Contexts are (E, J * L, D), contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirror_modules.kernels.attention_triton import MASKED

SHORTEST = tl.constexpr(1e-8)
"""Features shorter than this have no direction."""


@triton.jit
def _real_words(word_mask, j, word, L):
    return (word < L) & (tl.load(word_mask + j * L + word, mask=word < L, other=0) != 0)


@triton.jit
def _shares_of_words(scores_LR, real_L):
    """softmax_l(scores), 0 for padding."""
    scores_LR = tl.where(real_L[:, None], scores_LR, MASKED)
    shares_LR = tl.exp(scores_LR - tl.max(scores_LR, axis=0)[None, :])
    shares_LR = tl.where(real_L[:, None], shares_LR, 0.0)
    total_R = tl.sum(shares_LR, axis=0)
    return shares_LR / tl.where(total_R > 0, total_R, 1.0)[None, :]


@triton.jit
def _map_offsets(j, e, word, region, L, stride_row, stride_e):
    offsets_LR = (j * L + word[:, None]).to(tl.int64) * stride_row + e * stride_e + region[None, :]
    return offsets_LR, (word[:, None] < L) & (region[None, :] < stride_e)


@triton.jit
def attend_kernel(
    scores, result, word_mask, R, L, stride_row, stride_e, gamma_attention,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Scores -> shares of the regions, without their denominator; `result` may be `scores`.

        share[l, r] = exp(gamma * (softmax_l(scores)[l, r] - 1))

    The cosine of a context does not depend on the context's length, so the softmax over the regions needs no sum.
    """
    j, e = tl.program_id(0), tl.program_id(1)
    word, region = tl.arange(0, BLOCK_L), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_L = _real_words(word_mask, j, word, L)
    offsets_LR, inside = _map_offsets(j, e, word, region, L, stride_row, stride_e)
    scores_LR = tl.load(scores + offsets_LR, mask=inside, other=0.0).to(ACCUMULATE)
    shares_LR = tl.exp(gamma_attention * (_shares_of_words(scores_LR, real_L) - 1))
    shares_LR = tl.where(real_L[:, None] & (region[None, :] < R), shares_LR, 0.0)
    tl.store(result + offsets_LR, shares_LR.to(result.dtype.element_ty), mask=inside)


@triton.jit
def attend_backward_kernel(
    scores, of_shares, along_words, word_mask, R, L, stride_row, stride_e, gamma_attention,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the regions have to do with the words: turns `of_shares` into the gradient of the scores, in place.

    `of_shares` is the gradient of the shares through the contexts' lengths; `along_words` (E, J * L) is the gradient of
    the products of contexts and words, which adds `along_words * scores` to it. Those products also lead straight to
    the regions and to the words, by `along_words * shares`, which is added to the result.
    """
    j, e = tl.program_id(0), tl.program_id(1)
    word, region = tl.arange(0, BLOCK_L), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_L = _real_words(word_mask, j, word, L)
    offsets_LR, inside = _map_offsets(j, e, word, region, L, stride_row, stride_e)
    scores_LR = tl.load(scores + offsets_LR, mask=inside, other=0.0).to(ACCUMULATE)
    of_shares_LR = tl.load(of_shares + offsets_LR, mask=inside, other=0.0).to(ACCUMULATE)
    row = e.to(tl.int64) * tl.num_programs(0) * L + j * L + word
    along_words_L = tl.load(along_words + row, mask=word < L, other=0.0)

    words_LR = _shares_of_words(scores_LR, real_L)
    shares_LR = tl.exp(gamma_attention * (words_LR - 1))
    of_words_LR = gamma_attention * shares_LR * (of_shares_LR + along_words_L[:, None] * scores_LR)
    of_scores_LR = words_LR * (of_words_LR - tl.sum(words_LR * of_words_LR, axis=0)[None, :])
    result_LR = of_scores_LR + along_words_L[:, None] * shares_LR
    result_LR = tl.where(real_L[:, None] & (region[None, :] < R), result_LR, 0.0)
    tl.store(of_shares + offsets_LR, result_LR.to(of_shares.dtype.element_ty), mask=inside)


@triton.jit
def _at_least(value, least):
    """NaN stays NaN, which `tl.maximum` would hide."""
    return tl.where(value < least, least, value)


@triton.jit
def _products(
    contexts, words, j, e, J, L, D, word,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each word of a caption (L,): its product with its context, and the lengths of both."""
    product_L = tl.zeros((BLOCK_L,), ACCUMULATE)
    context_L = tl.zeros((BLOCK_L,), ACCUMULATE)
    word_L = tl.zeros((BLOCK_L,), ACCUMULATE)
    row_L = (j * L + word).to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = (word[:, None] < L) & (feature[None, :] < D)
        offsets_LD = row_L[:, None] + feature[None, :]
        context_LD = tl.load(contexts + e.to(tl.int64) * J * L * D + offsets_LD, mask=inside, other=0.0).to(ACCUMULATE)
        word_LD = tl.load(words + offsets_LD, mask=inside, other=0.0).to(ACCUMULATE)
        product_L += tl.sum(context_LD * word_LD, axis=1)
        context_L += tl.sum(context_LD * context_LD, axis=1)
        word_L += tl.sum(word_LD * word_LD, axis=1)
    return product_L, _at_least(tl.sqrt(context_L), SHORTEST), _at_least(tl.sqrt(word_L), SHORTEST)


@triton.jit
def _cosine(product_L, context_L, word_L):
    cosine_L = _at_least(product_L / (context_L * word_L), -1.0)
    return tl.where(cosine_L > 1.0, 1.0, cosine_L)


@triton.jit
def similarity_kernel(
    contexts, words, word_mask, result, J, L, D, gamma_word,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Contexts and words -> log sum_l exp(gamma_word * cos(context_l, word_l)), (E, J)."""
    j, e = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, BLOCK_L)
    real_L = _real_words(word_mask, j, word, L)
    product_L, context_L, word_L = _products(contexts, words, j, e, J, L, D, word, ACCUMULATE, BLOCK_L, BLOCK_D)
    logit_L = tl.where(real_L, gamma_word * _cosine(product_L, context_L, word_L), MASKED)
    largest = tl.max(logit_L, axis=0)
    total = tl.sum(tl.exp(logit_L - largest), axis=0)
    tl.store(result + e.to(tl.int64) * J + j, largest + tl.log(total))


@triton.jit
def similarity_backward_kernel(
    contexts, words, word_mask, similarity, gradient, along_words, of_words, J, L, D, gamma_word,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the similarity (E, J) -> of the products and lengths that the cosines are made of.

    - `along_words` (E, J * L): of the products context . word.
    - `contexts`, in place: the contexts times the gradient of half their squared length.
    - `of_words` (E, J * L): of half the squared length of the word.
    """
    j, e = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, BLOCK_L)
    real_L = _real_words(word_mask, j, word, L)
    product_L, context_L, word_L = _products(contexts, words, j, e, J, L, D, word, ACCUMULATE, BLOCK_L, BLOCK_D)
    cosine_L = _cosine(product_L, context_L, word_L)
    pair = e.to(tl.int64) * J + j
    share_L = tl.exp(gamma_word * cosine_L - tl.load(similarity + pair))
    of_cosine_L = tl.where(real_L, tl.load(gradient + pair) * gamma_word * share_L, 0.0)

    row = pair * L + word
    tl.store(along_words + row, of_cosine_L / (context_L * word_L), mask=word < L)
    tl.store(of_words + row, -of_cosine_L * cosine_L / (word_L * word_L), mask=word < L)
    # Divided in two steps: the square of a short length would leave the range of float32.
    of_length_L = tl.where(context_L > SHORTEST, -of_cosine_L * cosine_L / context_L, 0.0)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = (word[:, None] < L) & (feature[None, :] < D)
        offsets_LD = row[:, None] * D + feature[None, :]
        context_LD = tl.load(contexts + offsets_LD, mask=inside, other=0.0).to(ACCUMULATE)
        context_LD = context_LD / context_L[:, None] * of_length_L[:, None]
        tl.store(contexts + offsets_LD, context_LD.to(contexts.dtype.element_ty), mask=inside)
