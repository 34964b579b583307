"""The two attentions of a stage: each position mixes the words, each channel weighs the sentence (Sec. 3.2).

Shape suffixes: B batch, C channels of the stage, D word features, E condition features, L words, H x W positions,
N = H * W.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mirror_modules._checks import (
    at_least_float32,
    check_batch,
    check_choice,
    check_features,
    check_positive,
    check_word_mask,
    shape_of,
)
from mirror_modules.kernels import choose_implementation

SentenceAxis = Literal["channels", "positions"]


class GlobalLocalContext(NamedTuple):
    """What the words and the sentence say to each image position."""

    word_context: Tensor
    """Mixture of the words at each position. (B, C, H, W)"""
    sentence_context: Tensor
    """The sentence, weighted anew at each position. (B, C, H, W)"""
    word_weights: Tensor | None
    """Share of each word at each position; sums to 1 over L. (B, L, H, W), or None if not asked for."""
    sentence_weights: Tensor | None
    """Share of each channel at each position; sums to 1 over C. (B, C, H, W), or None if not asked for."""


def word_attention(features: Tensor, words: Tensor, word_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give every image position a mixture of the words, weighted by similarity (MirrorGAN, Sec. 3.2).

        context[n] = sum_l weights[n, l] * words[l],    weights[n] = softmax_l(features[n] . words[l])

    The scores are not scaled by 1/sqrt(C), as in the paper.

    Args:
        features: Image features, (B, C, H, W).
        words: Word features already projected to the image channels, (B, L, C).
        word_mask: True for a real word, (B, L); None if all are. Padding gets no weight.

    Returns:
        The context (B, C, H, W) and the weights (B, L, H, W), which sum to 1 over L.

    Raises:
        ValueError: A caption has no real word, or sizes disagree.
    """
    _check_projected("word_attention", features, "words", words, "(B, L, C)")
    check_word_mask("word_attention", words, word_mask)
    height = features.shape[2]
    scores_BLN = words @ rearrange(features, "b c h w -> b c (h w)")
    weights_BLN = _softmax_over_words(scores_BLN, word_mask).to(scores_BLN.dtype)
    context_BCN = words.mT @ weights_BLN
    return (
        rearrange(context_BCN, "b c (h w) -> b c h w", h=height),
        rearrange(weights_BLN, "b l (h w) -> b l h w", h=height),
    )


def sentence_attention(
    features: Tensor, sentence: Tensor, *, score_matrix: Tensor | None = None, axis: SentenceAxis = "channels"
) -> tuple[Tensor, Tensor]:
    """Weigh the sentence anew at every image position (MirrorGAN, Sec. 3.2).

        context[n] = sentence o weights[n],    weights[n] = softmax_c(features[n] o sentence)

    `o` multiplies elementwise. The paper names no axis for the softmax: over channels is what its published code does;
    over positions, the result would vanish as 1/N and is therefore multiplied by N.

    Args:
        features: Image features, (B, C, H, W).
        sentence: Sentence feature already projected to the image channels, (B, C).
        score_matrix: Mixes the scores over channels before the softmax, (C, C), as the published code does; None as in
            the paper.
        axis: "channels" or "positions": over which axis the weights sum to 1.

    Returns:
        The context (B, C, H, W) and the weights (B, C, H, W).

    Raises:
        ValueError: Sizes disagree, or `axis` is unknown.
    """
    _check_projected("sentence_attention", features, "sentence", sentence, "(B, C)")
    check_choice("sentence_attention", "axis", axis, ("channels", "positions"))
    channels = features.shape[1]
    if score_matrix is not None and score_matrix.shape != (channels, channels):
        raise ValueError(
            f"sentence_attention: score_matrix is {shape_of(score_matrix)}, expected {(channels, channels)} (C, C)."
        )
    sentence_BC11 = rearrange(sentence, "b c -> b c 1 1")
    scores_BCHW = features * sentence_BC11
    if score_matrix is not None:
        scores_BCHW = torch.einsum("dc,bchw->bdhw", score_matrix, scores_BCHW)
    if axis == "channels":
        weights_BCHW = torch.softmax(at_least_float32(scores_BCHW), dim=1).to(scores_BCHW.dtype)
        return sentence_BC11 * weights_BCHW, weights_BCHW
    weights_BCN = torch.softmax(at_least_float32(scores_BCHW.flatten(2)), dim=2).to(scores_BCHW.dtype)
    weights_BCHW = weights_BCN.unflatten(2, features.shape[2:])
    return sentence_BC11 * weights_BCHW * weights_BCN.shape[2], weights_BCHW


def global_local_attention(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None = None,
    *,
    need_weights: bool = False,
    impl: str = "auto",
    score_matrix: Tensor | None = None,
    sentence_axis: SentenceAxis = "channels",
) -> GlobalLocalContext:
    """Word attention and sentence attention of one stage (MirrorGAN, Sec. 3.2).

    Args:
        features: Image features, (B, C, H, W).
        words: Word features already projected to the image channels, (B, L, C).
        sentence: Sentence feature already projected to the image channels, (B, C).
        word_mask: True for a real word, (B, L); None if all are.
        need_weights: Also return the attention maps.
        impl: "auto", "torch" or "triton"; a named implementation runs or raises.
        score_matrix: See `sentence_attention`.
        sentence_axis: See `sentence_attention`.

    Returns:
        Both contexts (B, C, H, W), and the attention maps if asked for.

    Raises:
        ValueError: A caption has no real word, or sizes disagree.
        NotImplementedError: `impl` names an implementation that cannot run.
    """
    choose_implementation("global_local_attention", impl)
    word_context, word_weights = word_attention(features, words, word_mask)
    sentence_context, sentence_weights = sentence_attention(
        features, sentence, score_matrix=score_matrix, axis=sentence_axis
    )
    if not need_weights:
        return GlobalLocalContext(word_context, sentence_context, None, None)
    return GlobalLocalContext(word_context, sentence_context, word_weights, sentence_weights)


class GlobalLocalAttention(nn.Module):
    """Attend to the words at each position and to the sentence as a whole (MirrorGAN, Sec. 3.2).

        word_context     = sum_l (U w_l) * softmax_l(f^T U w_l)
        sentence_context = (V s) o softmax_c(f o (V s))

    `f` are the features of a stage, `w_l` the words, `s` the augmented condition; `U` and `V` are learned.

    Args:
        feature_dim: Channels C of the image features.
        word_dim: Features D of a word.
        condition_dim: Features E of the condition.
        impl: "auto", "torch" or "triton"; a named implementation runs or raises.
        sentence_bias: Give `V` a bias, as the published code does.
        score_projection: Mix the scores over channels before the softmax, as the published code does.
        sentence_axis: "channels" or "positions"; see `sentence_attention`.
    """

    def __init__(
        self,
        feature_dim: int,
        word_dim: int,
        condition_dim: int,
        *,
        impl: str = "auto",
        sentence_bias: bool = False,
        score_projection: bool = False,
        sentence_axis: SentenceAxis = "channels",
    ) -> None:
        super().__init__()
        check_positive("GlobalLocalAttention", feature_dim=feature_dim, word_dim=word_dim, condition_dim=condition_dim)
        check_choice("GlobalLocalAttention", "sentence_axis", sentence_axis, ("channels", "positions"))
        choose_implementation("GlobalLocalAttention", impl)
        self.feature_dim, self.word_dim, self.condition_dim = feature_dim, word_dim, condition_dim
        self.impl = impl
        self.sentence_axis: SentenceAxis = sentence_axis
        self.word_projection = nn.Linear(word_dim, feature_dim, bias=False)
        self.sentence_projection = nn.Linear(condition_dim, feature_dim, bias=sentence_bias)
        self.score_projection = nn.Linear(feature_dim, feature_dim, bias=False) if score_projection else None

    def forward(
        self,
        features: Tensor,
        words: Tensor,
        condition: Tensor,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> GlobalLocalContext:
        """Attend.

        Args:
            features: Image features, (B, C, H, W).
            words: Word features, (B, L, D).
            condition: Augmented condition, (B, E).
            word_mask: True for a real word, (B, L); None if all are.
            need_weights: Also return the attention maps.

        Returns:
            Both contexts (B, C, H, W), and the attention maps if asked for.

        Raises:
            ValueError: A caption has no real word, or sizes disagree.
        """
        owner = "GlobalLocalAttention"
        check_features(owner, "features", features, "(B, C, H, W)", self.feature_dim, "feature_dim")
        check_features(owner, "words", words, "(B, L, D)", self.word_dim, "word_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_batch(owner, features=features, words=words, condition=condition)
        return global_local_attention(
            features,
            self.word_projection(words),
            self.sentence_projection(condition),
            word_mask,
            need_weights=need_weights,
            impl=self.impl,
            score_matrix=None if self.score_projection is None else self.score_projection.weight,
            sentence_axis=self.sentence_axis,
        )

    def extra_repr(self) -> str:
        """The sizes, as `print` shows them."""
        return f"feature_dim={self.feature_dim}, word_dim={self.word_dim}, condition_dim={self.condition_dim}"


def _softmax_over_words(scores_BLN: Tensor, word_mask: Tensor | None) -> Tensor:
    scores_BLN = at_least_float32(scores_BLN)
    if word_mask is None:
        return torch.softmax(scores_BLN, dim=1)
    mask_BL1 = word_mask.unsqueeze(2)
    # The least finite number and not -inf: a compiled graph cannot refuse a caption without words, and it gets zeros
    # there, never NaN.
    scores_BLN = scores_BLN.masked_fill(~mask_BL1, torch.finfo(scores_BLN.dtype).min)
    return torch.softmax(scores_BLN, dim=1) * mask_BL1


def _check_projected(owner: str, features: Tensor, name: str, text: Tensor, layout: str) -> None:
    if features.ndim != 4:
        raise ValueError(f"{owner}: features must be (B, C, H, W), but they are {shape_of(features)}.")
    if text.ndim != layout.count(",") + 1 or text.shape[-1] != features.shape[1]:
        raise ValueError(
            f"{owner}: {name} must be {layout} with the {features.shape[1]} channels of the features "
            f"({name}: {shape_of(text)}, features: {shape_of(features)}); project them first."
        )
    check_batch(owner, features=features, **{name: text})
