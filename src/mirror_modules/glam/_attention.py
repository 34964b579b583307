"""The attentions of a refinement stage in torch: their equations, and both of them computed in tiles.

The arguments are checked, cast as autocast would, and words are zero at padding. Shape suffixes as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mirror_modules._checks import at_least_float32, is_unchecked
from mirror_modules._tiles import ELEMENTS_ON_A_GPU, EVERYTHING, TileIndices, recomputed_in_tiles

SentenceAxis = Literal["channels", "positions"]

ELEMENTS_ON_A_CPU = 2**18
"""Feature elements in one tile on a CPU: about what its caches hold."""
FEW_ELEMENTS = 2**22
"""Up to this many elements the CPU path does not tile: recomputation would cost more time than the memory is worth."""


def attend_to_words(features: Tensor, words: Tensor, word_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`functional.word_attention`. Words are zero at padding, or its scores could outweigh the mask, or be NaN."""
    height = features.shape[2]
    # In float32, because scores beyond 65504 would overflow float16.
    features_BCN = at_least_float32(rearrange(features, "b c h w -> b c (h w)"))
    weights_BLN = _word_weights(features_BCN, at_least_float32(words), word_mask).to(words.dtype)
    context_BCN = words.mT @ weights_BLN
    return (
        rearrange(context_BCN, "b c (h w) -> b c h w", h=height),
        rearrange(weights_BLN, "b l (h w) -> b l h w", h=height),
    )


def _word_weights(features_BCN: Tensor, words: Tensor, word_mask: Tensor | None) -> Tensor:
    if word_mask is None:
        return torch.softmax(words @ features_BCN, dim=1)
    # The lowest finite number rather than -inf: a caption of padding alone gives no NaN. baddbmm adds it within the
    # matrix product, which saves a pass over the scores.
    lowest = torch.finfo(words.dtype).min
    padding_BL = torch.zeros_like(word_mask, dtype=words.dtype).masked_fill(~word_mask, lowest)
    weights_BLN = torch.softmax(torch.baddbmm(padding_BL.unsqueeze(2), words, features_BCN), dim=1)
    if is_unchecked(word_mask):
        # The check did not read the mask here; the weights of a caption without a real word become zero.
        weights_BLN = weights_BLN * word_mask.unsqueeze(2)
    return weights_BLN


def attend_to_sentence(
    features: Tensor, sentence: Tensor, score_matrix: Tensor | None, axis: SentenceAxis
) -> tuple[Tensor, Tensor]:
    """`functional.sentence_attention`."""
    dtype = torch.promote_types(features.dtype, sentence.dtype)
    # In float32, because scores beyond 65504 would overflow float16, and over many positions each weight underflows.
    sentence_BC11 = at_least_float32(sentence).unsqueeze(2).unsqueeze(3)
    scores_BCHW = at_least_float32(features) * sentence_BC11
    if score_matrix is not None:
        scores_BCHW = torch.einsum("dc,bchw->bdhw", score_matrix.to(scores_BCHW.dtype), scores_BCHW)
    if axis == "channels":
        weights_BCHW = torch.softmax(scores_BCHW, dim=1)
        context_BCHW = sentence_BC11 * weights_BCHW
    else:
        weights_BCN = torch.softmax(scores_BCHW.flatten(2), dim=2)
        weights_BCHW = weights_BCN.unflatten(2, features.shape[2:])
        context_BCHW = sentence_BC11 * weights_BCHW * weights_BCN.shape[2]
    return context_BCHW.to(dtype), weights_BCHW.to(dtype)


def attend_in_tiles(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None,
    score_matrix: Tensor | None,
    axis: SentenceAxis,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """Both contexts, and with `need_weights` both attention maps; each tile is recomputed in the backward pass."""

    def attend(
        features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor | None, score_matrix: Tensor | None
    ) -> tuple[Tensor, ...]:
        word_context, word_weights = attend_to_words(features, words, word_mask)
        sentence_context, sentence_weights = attend_to_sentence(features, sentence, score_matrix, axis)
        maps = (word_weights, sentence_weights) if need_weights else ()
        return word_context, sentence_context, *maps

    def divide() -> list[TileIndices]:
        return _tiles(features, may_divide=axis == "channels")

    inputs = features, words, sentence, word_mask, score_matrix
    whole = features.shape[0], None, features.shape[2]
    is_plain = not need_weights and score_matrix is None and axis == "channels"
    return recomputed_in_tiles(attend, inputs, divide, whole, attention_derivative if is_plain else None)


def _tiles(features: Tensor, *, may_divide: bool) -> list[TileIndices]:
    """Tiles of several samples or, where samples are large and may be divided, of several rows of one sample."""
    batch, channels, height, width = features.shape
    if features.device.type == "cpu" and features.numel() <= FEW_ELEMENTS:
        return []
    elements = ELEMENTS_ON_A_CPU if features.device.type == "cpu" else ELEMENTS_ON_A_GPU
    rows = max(1, elements // max(1, channels * width))
    if rows < height and may_divide:
        places = [(slice(b, b + 1), slice(y, y + rows)) for b in range(batch) for y in range(0, height, rows)]
        return [TileIndices((b, EVERYTHING, y), ((b, EVERYTHING, y), b, b, b, EVERYTHING)) for b, y in places]
    samples = max(1, rows // max(1, height))
    starts = (slice(b, b + samples) for b in range(0, batch, samples))
    return [TileIndices(b, (b, b, b, b, EVERYTHING)) for b in starts]


def attention_derivative(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None,
    _: None,
    *,
    gradients: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Compute the gradients of features f, words w and sentence s from those of the two contexts, G and K.

        df = w^T dS + s o dT                with the weights P of the words and Q of the channels,
        dw = P G^T + dS f^T                 dS = softmax'(P, w G),  dT = softmax'(Q, s o K),
        ds = sum_n ( K o Q + f o dT )       softmax'(p, g) = p o ( g - sum p o g )

    This is the case without attention maps, without a score matrix and with the softmax over channels.
    """
    dtype = at_least_float32(features).dtype
    f, w, s = features.flatten(2).to(dtype), words.to(dtype), sentence.unsqueeze(2).to(dtype)
    G, K = (None if gradient is None else gradient.flatten(2).to(dtype) for gradient in gradients)
    df, dw, ds = torch.zeros_like(f), torch.zeros_like(w), torch.zeros_like(s)
    if G is not None:
        P = _word_weights(f, w, word_mask)
        dS = torch._softmax_backward_data(w @ G, P, 1, dtype)
        df.baddbmm_(w.mT, dS)
        dw.baddbmm_(P, G.mT).baddbmm_(dS, f.mT)
    if K is not None:
        Q = torch.softmax(f * s, dim=1)
        dT = torch._softmax_backward_data(s * K, Q, 1, dtype)
        df.addcmul_(dT, s)
        ds = torch.linalg.vecdot(K, Q).add_(torch.linalg.vecdot(f, dT))
    return df.view_as(features), dw, ds.view_as(sentence), None, None
