"""Both attentions of a stage in one pass over the features, forward and backward (MirrorGAN, Sec. 3.2).

A program processes a tile of positions with all of their channels, so that the softmax over channels (sentence) and the
softmax over words need no data from other tiles. The words are small and stay on chip; the features are read once and
each context is written once, which is the minimum of memory traffic. On request, the features are written next to the
contexts: a concatenation would read and write all three again.

Captions that do not fit on chip are processed in chunks of words, with a running maximum and sum (online softmax). The
backward pass recomputes the weights from the inputs, the only tensors saved.

Shape suffixes as in `glam/attention.py`; N positions of a tile, L words of a chunk. Sizes are padded to powers of two;
the masks `channel < C` and `word < L` exclude the padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-3.0e38)
"""Score of padding: finite, so that a caption of padding alone has weights of 0 instead of NaN."""


@triton.jit
def _load_tile(pointer, position, channel, stride_c, stride_n, N, C):
    """Load positions by channels of one sample, (N, C); channels or positions may be the contiguous axis."""
    offsets = position[:, None].to(tl.int64) * stride_n + channel[None, :].to(tl.int64) * stride_c
    inside = (position[:, None] < N) & (channel[None, :] < C)
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _store_tile(pointer, value_NC, position, channel, stride_c, stride_n, N, C):
    offsets = position[:, None].to(tl.int64) * stride_n + channel[None, :].to(tl.int64) * stride_c
    inside = (position[:, None] < N) & (channel[None, :] < C)
    tl.store(pointer + offsets, value_NC.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_words(words, word_mask, b, word, channel, L, C, HAS_MASK: tl.constexpr):
    """Load the words of a chunk (L, C) and the mask of real words (L,).

    Words are zero at padding already. Masking this load by `real_L` instead would take 112 KiB of shared memory in the
    backward pass of 256 channels in float16, in place of 64 KiB: more than smaller GPUs have.
    """
    real_L = word < L
    if HAS_MASK:
        real_L = real_L & (tl.load(word_mask + b * L + word, mask=real_L, other=0) != 0)
    offsets = (b * L + word[:, None]) * C + channel[None, :]
    inside = (word[:, None] < L) & (channel[None, :] < C)
    return tl.load(words + offsets, mask=inside, other=0.0), real_L


@triton.jit
def _word_scores(features_NC, words_LC, real_L, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr):
    scores_NL = tl.dot(features_NC, tl.trans(words_LC), input_precision=PRECISION, out_dtype=ACCUMULATE)
    return tl.where(real_L[None, :], scores_NL, MASKED)


@triton.jit
def _sentence_weights(features_NC, sentence_C, channel, C):
    scores_NC = tl.where(channel[None, :] < C, features_NC * sentence_C[None, :], MASKED)
    shares_NC = tl.exp(scores_NC - tl.max(scores_NC, axis=1)[:, None])
    return shares_NC / tl.sum(shares_NC, axis=1)[:, None]


@triton.jit
def _online_softmax(largest_N, scores_NL, real_L):
    """Step of the online softmax: new running maximum, factor for the previous sums, exponentials of this chunk."""
    new_largest_N = tl.maximum(largest_N, tl.max(scores_NL, axis=1))
    shares_NL = tl.where(real_L[None, :], tl.exp(scores_NL - new_largest_N[:, None]), 0.0)
    return new_largest_N, tl.exp(largest_N - new_largest_N), shares_NL


@triton.jit
def _normalize(shares, total_N):
    """Divide by the sum; a caption without a real word, which passes unchecked on a GPU, gets zeros."""
    return shares / tl.where(total_N > 0, total_N, 1.0)[:, None]


@triton.jit
def _scores_and_share_gradients(
    features_NC, gradient_NC, words_LC, real_L, word_weights_gradient, position, word, N, L,
    HAS_MAPS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a chunk of words, and the gradient of its shares through the contexts and the maps, both (N, L)."""
    scores_NL = _word_scores(features_NC, words_LC, real_L, ACCUMULATE, PRECISION)
    grad_shares_NL = tl.dot(gradient_NC, tl.trans(words_LC), input_precision=PRECISION, out_dtype=ACCUMULATE)
    if HAS_MAPS:
        grad_shares_NL += _load_tile(word_weights_gradient, position, word, N, 1, N, L)
    return scores_NL, grad_shares_NL


@triton.jit
def _add_gradients(
    shares_NL, grad_shares_NL, mean_N, features_NC, gradient_NC, words_LC, words_sum_LC, result_NC,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contributions of a chunk of words to the gradients of the words (L, C) and of the features (N, C)."""
    grad_scores_NL = (shares_NL * (grad_shares_NL - mean_N[:, None])).to(words_LC.dtype)
    shares_NL = shares_NL.to(words_LC.dtype)
    words_sum_LC = tl.dot(
        tl.trans(shares_NL), gradient_NC, words_sum_LC, input_precision=PRECISION, out_dtype=ACCUMULATE
    )
    words_sum_LC = tl.dot(
        tl.trans(grad_scores_NL), features_NC, words_sum_LC, input_precision=PRECISION, out_dtype=ACCUMULATE
    )
    result_NC = tl.dot(grad_scores_NL, words_LC, result_NC, input_precision=PRECISION, out_dtype=ACCUMULATE)
    return words_sum_LC, result_NC


@triton.jit
def forward_kernel(
    features, words, sentence, word_mask,
    features_copy, word_context, sentence_context, word_weights, sentence_weights,
    N, C, L,
    feature_b, feature_c, feature_n,
    context_b, context_c, context_n,
    HAS_MASK: tl.constexpr, COPY_FEATURES: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Process one tile of positions of one sample; both contexts and the copy of the features have the same strides."""
    tiles = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    features_NC = _load_tile(features + b * feature_b, position, channel, feature_c, feature_n, N, C)
    if COPY_FEATURES:
        _store_tile(features_copy + b * context_b, features_NC, position, channel, context_c, context_n, N, C)

    largest_N = tl.full((BLOCK_N,), MASKED, ACCUMULATE)
    total_N = tl.zeros((BLOCK_N,), ACCUMULATE)
    context_NC = tl.zeros((BLOCK_N, BLOCK_C), ACCUMULATE)
    for chunk in range(CHUNKS):
        word = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        words_LC, real_L = _load_words(words, word_mask, b, word, channel, L, C, HAS_MASK)
        scores_NL = _word_scores(features_NC, words_LC, real_L, ACCUMULATE, PRECISION)
        largest_N, rescale_N, shares_NL = _online_softmax(largest_N, scores_NL, real_L)
        total_N = total_N * rescale_N + tl.sum(shares_NL, axis=1)
        context_NC = context_NC * rescale_N[:, None]
        context_NC = tl.dot(
            shares_NL.to(words_LC.dtype), words_LC, context_NC, input_precision=PRECISION, out_dtype=ACCUMULATE
        )
    context_NC = _normalize(context_NC, total_N)
    _store_tile(word_context + b * context_b, context_NC, position, channel, context_c, context_n, N, C)
    if NEED_WEIGHTS:
        for chunk in range(CHUNKS):
            word = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
            words_LC, real_L = _load_words(words, word_mask, b, word, channel, L, C, HAS_MASK)
            scores_NL = _word_scores(features_NC, words_LC, real_L, ACCUMULATE, PRECISION)
            shares_NL = tl.where(real_L[None, :], tl.exp(scores_NL - largest_N[:, None]), 0.0)
            _store_tile(word_weights + b * L * N, _normalize(shares_NL, total_N), position, word, N, 1, N, L)

    sentence_C = tl.load(sentence + b * C + channel, mask=channel < C, other=0.0).to(ACCUMULATE)
    weights_NC = _sentence_weights(features_NC.to(ACCUMULATE), sentence_C, channel, C)
    context_NC = weights_NC * sentence_C[None, :]
    _store_tile(sentence_context + b * context_b, context_NC, position, channel, context_c, context_n, N, C)
    if NEED_WEIGHTS:
        _store_tile(sentence_weights + b * C * N, weights_NC, position, channel, N, 1, N, C)


@triton.jit
def backward_kernel(
    features, words, sentence, word_mask,
    copy_gradient, word_gradient, sentence_gradient, word_weights_gradient, sentence_weights_gradient,
    features_result, words_result, sentence_result,
    B, N, C, L, span,
    feature_b, feature_c, feature_n,
    copy_gradient_b, copy_gradient_c, copy_gradient_n,
    word_gradient_b, word_gradient_c, word_gradient_n,
    sentence_gradient_b, sentence_gradient_c, sentence_gradient_n,
    result_b, result_c, result_n,
    HAS_MASK: tl.constexpr, HAS_COPY: tl.constexpr, HAS_WORD_MAPS: tl.constexpr, HAS_SENTENCE_MAPS: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Process `span` positions of one sample, tile by tile.

    The gradients of words and sentence are sums over all positions. Each program writes its partial sum into its own
    row of (spans, B, L, C) and (spans, B, C), and the caller adds the rows: without atomics, equal inputs give bitwise
    equal gradients.
    """
    spans = tl.cdiv(N, span)
    part = tl.program_id(0) % spans
    b = (tl.program_id(0) // spans).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    sentence_C = tl.load(sentence + b * C + channel, mask=channel < C, other=0.0).to(ACCUMULATE)
    sentence_sum_C = tl.zeros((BLOCK_C,), ACCUMULATE)
    words_result += (part * B + b) * L * C
    if HAS_WORD_MAPS:
        word_weights_gradient += b * L * N
    if CHUNKS == 1:
        word = tl.arange(0, BLOCK_L)
        words_LC, real_L = _load_words(words, word_mask, b, word, channel, L, C, HAS_MASK)
        words_sum_LC = tl.zeros((BLOCK_L, BLOCK_C), ACCUMULATE)

    first = part * span
    for start in range(first, tl.minimum(first + span, N), BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        features_NC = _load_tile(features + b * feature_b, position, channel, feature_c, feature_n, N, C)

        # Sentence: context = s o a, a = softmax_c(f o s)
        gradient_NC = _load_tile(
            sentence_gradient + b * sentence_gradient_b, position, channel,
            sentence_gradient_c, sentence_gradient_n, N, C,
        ).to(ACCUMULATE)  # fmt: skip
        weights_NC = _sentence_weights(features_NC.to(ACCUMULATE), sentence_C, channel, C)
        grad_weights_NC = gradient_NC * sentence_C[None, :]
        if HAS_SENTENCE_MAPS:
            grad_weights_NC += _load_tile(sentence_weights_gradient + b * C * N, position, channel, N, 1, N, C)
        grad_scores_NC = weights_NC * (grad_weights_NC - tl.sum(weights_NC * grad_weights_NC, axis=1)[:, None])
        sentence_sum_C += tl.sum(gradient_NC * weights_NC + grad_scores_NC * features_NC.to(ACCUMULATE), axis=0)
        result_NC = grad_scores_NC * sentence_C[None, :]
        if HAS_COPY:
            result_NC += _load_tile(
                copy_gradient + b * copy_gradient_b, position, channel, copy_gradient_c, copy_gradient_n, N, C
            )

        # Words: context = p w, p = softmax_l(f w^T); the softmax subtracts mean = sum_l p_l dp_l from each dp_l
        gradient_NC = _load_tile(
            word_gradient + b * word_gradient_b, position, channel, word_gradient_c, word_gradient_n, N, C
        )
        if CHUNKS == 1:
            scores_NL, grad_shares_NL = _scores_and_share_gradients(
                features_NC, gradient_NC, words_LC, real_L, word_weights_gradient, position, word, N, L,
                HAS_WORD_MAPS, ACCUMULATE, PRECISION,
            )  # fmt: skip
            shares_NL = tl.where(real_L[None, :], tl.exp(scores_NL - tl.max(scores_NL, axis=1)[:, None]), 0.0)
            shares_NL = _normalize(shares_NL, tl.sum(shares_NL, axis=1))
            mean_N = tl.sum(shares_NL * grad_shares_NL, axis=1)
            words_sum_LC, result_NC = _add_gradients(
                shares_NL, grad_shares_NL, mean_N, features_NC, gradient_NC, words_LC, words_sum_LC, result_NC,
                ACCUMULATE, PRECISION,
            )  # fmt: skip
        else:
            largest_N = tl.full((BLOCK_N,), MASKED, ACCUMULATE)
            total_N = tl.zeros((BLOCK_N,), ACCUMULATE)
            mean_N = tl.zeros((BLOCK_N,), ACCUMULATE)
            for chunk in range(CHUNKS):
                word = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
                words_LC, real_L = _load_words(words, word_mask, b, word, channel, L, C, HAS_MASK)
                scores_NL, grad_shares_NL = _scores_and_share_gradients(
                    features_NC, gradient_NC, words_LC, real_L, word_weights_gradient, position, word, N, L,
                    HAS_WORD_MAPS, ACCUMULATE, PRECISION,
                )  # fmt: skip
                largest_N, rescale_N, shares_NL = _online_softmax(largest_N, scores_NL, real_L)
                total_N = total_N * rescale_N + tl.sum(shares_NL, axis=1)
                mean_N = mean_N * rescale_N + tl.sum(shares_NL * grad_shares_NL, axis=1)
            mean_N = mean_N / tl.where(total_N > 0, total_N, 1.0)
            for chunk in range(CHUNKS):
                word = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
                words_LC, real_L = _load_words(words, word_mask, b, word, channel, L, C, HAS_MASK)
                scores_NL, grad_shares_NL = _scores_and_share_gradients(
                    features_NC, gradient_NC, words_LC, real_L, word_weights_gradient, position, word, N, L,
                    HAS_WORD_MAPS, ACCUMULATE, PRECISION,
                )  # fmt: skip
                shares_NL = tl.where(real_L[None, :], tl.exp(scores_NL - largest_N[:, None]), 0.0)
                words_sum_LC, result_NC = _add_gradients(
                    _normalize(shares_NL, total_N), grad_shares_NL, mean_N, features_NC, gradient_NC, words_LC,
                    tl.zeros((BLOCK_L, BLOCK_C), ACCUMULATE), result_NC, ACCUMULATE, PRECISION,
                )  # fmt: skip
                # The sums of all chunks do not fit on chip: each tile adds to the values this program wrote before.
                row = words_result + word[:, None] * C + channel[None, :]
                inside = (word[:, None] < L) & (channel[None, :] < C)
                if start > first:
                    tl.debug_barrier()
                    words_sum_LC += tl.load(row, mask=inside, other=0.0)
                tl.store(row, words_sum_LC, mask=inside)
        _store_tile(features_result + b * result_b, result_NC, position, channel, result_c, result_n, N, C)

    if CHUNKS == 1:
        inside = (word[:, None] < L) & (channel[None, :] < C)
        tl.store(words_result + word[:, None] * C + channel[None, :], words_sum_LC, mask=inside)
    tl.store(sentence_result + (part * B + b) * C + channel, sentence_sum_C, mask=channel < C)
