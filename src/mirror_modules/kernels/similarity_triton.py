"""The whole forward pass of `word_region_similarity`, and the steps between the matrix products of torch.

`fused_kernel` computes the similarity in one pass over the regions, without maps in memory. The other kernels are the
steps between matrix products of whole matrices, which torch computes at full speed without padding each caption to a
power of two: two softmaxes, a cosine, and their gradients, with one pass over the maps each.

Shape suffixes as in `stem/matching.py`; E images of a chunk, C captions of a program, K = C * L their words. Maps are
(J * L, E, R), contiguous, with R padded so that rows are aligned: `region < R` selects real regions, `region <
stride_e` all in memory. Contexts are (E, J * L, D), contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirror_modules.kernels.attention_triton import MASKED

SHORTEST = tl.constexpr(1e-8)
"""Lower bound of the norms in a cosine, as in `stem/matching.py`."""


@triton.jit
def _real_words(word_mask, j, word, L):
    return (word < L) & (tl.load(word_mask + j * L + word, mask=word < L, other=0) != 0)


@triton.jit
def _shares_of_words(scores_LR, real_L):
    """softmax_l(scores), 0 for padding, (L, R) or (C, L, R)."""
    real_L1 = tl.expand_dims(real_L, -1)
    scores_LR = tl.where(real_L1, scores_LR, MASKED)
    shares_LR = tl.exp(scores_LR - tl.max(scores_LR, axis=-2, keep_dims=True))
    shares_LR = tl.where(real_L1, shares_LR, 0.0)
    total_1R = tl.sum(shares_LR, axis=-2, keep_dims=True)
    return shares_LR / tl.where(total_1R > 0, total_1R, 1.0)


@triton.jit
def _shares_of_regions(words_LR, gamma_attention):
    """exp(gamma * words), scaled such that the largest possible share is 1: the context then fits in float16.

    The cosine of a context does not depend on its norm, so that the scale has no influence, and the softmax over the
    regions needs no sum.
    """
    return tl.exp(gamma_attention * (words_LR - tl.where(gamma_attention > 0, 1.0, 0.0)))


@triton.jit
def _map_offsets(j, e, word, region, L, stride_row, stride_e):
    offsets_LR = (j * L + word[:, None]).to(tl.int64) * stride_row + e * stride_e + region[None, :]
    return offsets_LR, (word[:, None] < L) & (region[None, :] < stride_e)


@triton.jit
def attend_kernel(
    scores, result, word_mask, R, L, stride_row, stride_e, gamma_attention,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute the shares of the regions from the scores, up to a factor; `result` may be `scores`.

    share[l, r] ~ exp(gamma * softmax_l(scores)[l, r])
    """
    j, e = tl.program_id(0), tl.program_id(1)
    word, region = tl.arange(0, BLOCK_L), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_L = _real_words(word_mask, j, word, L)
    offsets_LR, inside = _map_offsets(j, e, word, region, L, stride_row, stride_e)
    scores_LR = tl.load(scores + offsets_LR, mask=inside, other=0.0).to(ACCUMULATE)
    shares_LR = _shares_of_regions(_shares_of_words(scores_LR, real_L), gamma_attention)
    shares_LR = tl.where(real_L[:, None] & (region[None, :] < R), shares_LR, 0.0)
    tl.store(result + offsets_LR, shares_LR.to(result.dtype.element_ty), mask=inside)


@triton.jit
def attend_backward_kernel(
    scores, grad_shares, word_mask, R, L, stride_row, stride_e, gamma_attention,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Backpropagate from the shares to the scores; the result replaces `grad_shares`."""
    j, e = tl.program_id(0), tl.program_id(1)
    word, region = tl.arange(0, BLOCK_L), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_L = _real_words(word_mask, j, word, L)
    offsets_LR, inside = _map_offsets(j, e, word, region, L, stride_row, stride_e)
    scores_LR = tl.load(scores + offsets_LR, mask=inside, other=0.0).to(ACCUMULATE)
    grad_shares_LR = tl.load(grad_shares + offsets_LR, mask=inside, other=0.0).to(ACCUMULATE)

    words_LR = _shares_of_words(scores_LR, real_L)
    shares_LR = _shares_of_regions(words_LR, gamma_attention)
    grad_words_LR = gamma_attention * shares_LR * grad_shares_LR
    grad_scores_LR = words_LR * (grad_words_LR - tl.sum(words_LR * grad_words_LR, axis=0)[None, :])
    grad_scores_LR = tl.where(real_L[:, None] & (region[None, :] < R), grad_scores_LR, 0.0)
    tl.store(grad_shares + offsets_LR, grad_scores_LR.to(grad_shares.dtype.element_ty), mask=inside)


@triton.jit
def _at_least(value, least):
    """Clamp from below; unlike `tl.maximum`, this propagates NaN."""
    return tl.where(value < least, least, value)


@triton.jit
def _norm(square):
    return _at_least(tl.sqrt(square), SHORTEST)


@triton.jit
def _products(
    contexts, words, j, e, J, L, D, word,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each word of a caption, its product with its context and the norms of both, each (L,)."""
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
    return product_L, _norm(context_L), _norm(word_L)


@triton.jit
def _cosine(product_L, context_L, word_L):
    cosine_L = _at_least(product_L / (context_L * word_L), -1.0)
    return tl.where(cosine_L > 1.0, 1.0, cosine_L)


@triton.jit
def _log_sum_exp(logit_L):
    """Compute log sum_l exp(logit), a scalar; of (C, L) logits, (C,)."""
    largest = tl.max(logit_L, axis=-1)
    return largest + tl.log(tl.sum(tl.exp(logit_L - tl.expand_dims(largest, -1)), axis=-1))


@triton.jit
def similarity_kernel(
    contexts, words, word_mask, result, J, L, D, gamma_word,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute log sum_l exp(gamma_word * cos(context_l, word_l)) from contexts and words, (E, J)."""
    j, e = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, BLOCK_L)
    real_L = _real_words(word_mask, j, word, L)
    product_L, context_L, word_L = _products(contexts, words, j, e, J, L, D, word, ACCUMULATE, BLOCK_L, BLOCK_D)
    logit_L = tl.where(real_L, gamma_word * _cosine(product_L, context_L, word_L), MASKED)
    tl.store(result + e.to(tl.int64) * J + j, _log_sum_exp(logit_L))


@triton.jit
def similarity_backward_kernel(
    contexts, words, word_mask, gradient, grad_products, grad_context_norms, grad_word_norms, J, L, D, gamma_word,
    ACCUMULATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backpropagate from the similarity (E, J) to the products and norms in the cosines, (E, J * L) each.

    - `grad_products`: gradient of the products context . word.
    - `grad_context_norms`: gradient of half the squared norms of the contexts.
    - `grad_word_norms`: gradient of half the squared norms of the words.
    """
    j, e = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, BLOCK_L)
    real_L = _real_words(word_mask, j, word, L)
    product_L, context_L, word_L = _products(contexts, words, j, e, J, L, D, word, ACCUMULATE, BLOCK_L, BLOCK_D)
    cosine_L = _cosine(product_L, context_L, word_L)
    pair = e.to(tl.int64) * J + j
    # The similarity of the forward pass would not do: its contexts may be rounded otherwise.
    logit_L = tl.where(real_L, gamma_word * cosine_L, MASKED)
    share_L = tl.exp(logit_L - _log_sum_exp(logit_L))
    grad_cosine_L = tl.where(real_L, tl.load(gradient + pair) * gamma_word * share_L, 0.0)

    row = pair * L + word
    tl.store(grad_products + row, grad_cosine_L / (context_L * word_L), mask=word < L)
    tl.store(grad_word_norms + row, -grad_cosine_L * cosine_L / (word_L * word_L), mask=word < L)
    grad_norm_L = tl.where(context_L > SHORTEST, -grad_cosine_L * cosine_L / (context_L * context_L), 0.0)
    tl.store(grad_context_norms + row, grad_norm_L, mask=word < L)


@triton.jit
def context_backward_kernel(
    contexts, words, grad_products, grad_context_norms, grad_word_norms, grad_words, E, K, D,
    IMAGES: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replace the contexts by their gradients, and sum the gradients of the words over `IMAGES` images.

    - `contexts`, in place: grad_products * words + grad_context_norms * contexts, rounded after the sum.
    - `grad_words` (ceil(E / IMAGES), K, D): sums of grad_products * contexts + grad_word_norms * words.
    """
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(2).to(tl.int64)
    inside = (row[:, None] < K) & (feature[None, :] < D)
    offsets_KD = row[:, None].to(tl.int64) * D + feature[None, :]
    words_KD = tl.load(words + offsets_KD, mask=inside, other=0.0).to(ACCUMULATE)
    sum_KD = tl.zeros((BLOCK_K, BLOCK_D), ACCUMULATE)
    for i in range(IMAGES):
        is_image = part * IMAGES + i < E
        pair_K = (part * IMAGES + i) * K + row
        here_K = is_image & (row < K)
        grad_product_K = tl.load(grad_products + pair_K, mask=here_K, other=0.0)
        grad_norm_K = tl.load(grad_context_norms + pair_K, mask=here_K, other=0.0)
        grad_word_norm_K = tl.load(grad_word_norms + pair_K, mask=here_K, other=0.0)
        context_at = contexts + pair_K[:, None] * D + feature[None, :]
        context_KD = tl.load(context_at, mask=inside & is_image, other=0.0).to(ACCUMULATE)
        sum_KD += grad_product_K[:, None] * context_KD + grad_word_norm_K[:, None] * words_KD
        grad_context_KD = grad_product_K[:, None] * words_KD + grad_norm_K[:, None] * context_KD
        tl.store(context_at, grad_context_KD.to(contexts.dtype.element_ty), mask=inside & is_image)
    tl.store(grad_words + part * K * D + offsets_KD, sum_KD, mask=inside)


@triton.jit
def fused_kernel(
    regions, words, word_mask, similarity, J, R, L, D, gamma_attention, gamma_word,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    CAPTIONS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the similarity of one image with a few captions in one pass over the regions.

    The words of the captions are the rows of one matrix, `BLOCK_L` rows for each caption. The softmax over words needs
    one region at a time, and that over regions no sum (`_shares_of_regions`): a tile of regions contributes to the
    contexts whatever the other tiles are, without the running maximum of an online softmax.
    """
    programs_per_image = tl.cdiv(J, CAPTIONS)
    e = (tl.program_id(0) // programs_per_image).to(tl.int64)
    first = tl.program_id(0) % programs_per_image * CAPTIONS
    row = tl.arange(0, CAPTIONS * BLOCK_L)
    j_K = first + row // BLOCK_L
    # Beyond the last caption, every row is padding.
    word_K = tl.where(j_K < J, row % BLOCK_L, L)
    feature = tl.arange(0, BLOCK_D)
    real_K = _real_words(word_mask, j_K, word_K, L)
    offsets_KD = (j_K * L + word_K).to(tl.int64)[:, None] * D + feature[None, :]
    words_KD = tl.load(words + offsets_KD, mask=(word_K[:, None] < L) & (feature[None, :] < D), other=0.0)

    real_CL = tl.reshape(real_K, (CAPTIONS, BLOCK_L))
    contexts_KD = tl.zeros((CAPTIONS * BLOCK_L, BLOCK_D), ACCUMULATE)
    for start in range(0, R, BLOCK_R):
        region = start + tl.arange(0, BLOCK_R)
        # Beyond the last region, zeros: whatever their shares, they add nothing.
        inside_RD = (region[:, None] < R) & (feature[None, :] < D)
        regions_RD = tl.load(regions + (e * R + region[:, None]) * D + feature[None, :], mask=inside_RD, other=0.0)
        scores_KR = tl.dot(words_KD, tl.trans(regions_RD), input_precision=PRECISION, out_dtype=ACCUMULATE)
        words_CLR = _shares_of_words(tl.reshape(scores_KR, (CAPTIONS, BLOCK_L, BLOCK_R)), real_CL)
        shares_KR = tl.reshape(_shares_of_regions(words_CLR, gamma_attention), (CAPTIONS * BLOCK_L, BLOCK_R))
        contexts_KD = tl.dot(
            shares_KR.to(regions_RD.dtype), regions_RD, contexts_KD, input_precision=PRECISION, out_dtype=ACCUMULATE
        )
    contexts_KD /= R

    words_KD = words_KD.to(ACCUMULATE)
    product_K, context_K = tl.sum(contexts_KD * words_KD, axis=1), _norm(tl.sum(contexts_KD * contexts_KD, axis=1))
    cosine_K = _cosine(product_K, context_K, _norm(tl.sum(words_KD * words_KD, axis=1)))
    logit_K = tl.where(real_K, gamma_word * cosine_K, MASKED)
    similarity_C = _log_sum_exp(tl.reshape(logit_K, (CAPTIONS, BLOCK_L)))
    j_C = first + tl.arange(0, CAPTIONS)
    tl.store(similarity + e * J + j_C, similarity_C, mask=j_C < J)
