"""The attentions of a refinement stage: words mixed at each position, the sentence reweighted per channel (Sec. 3.2).

Shape suffixes: B batch, C channels of the stage, D word features, E condition features, L words, H x W positions,
N = H * W.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirror_modules import kernels
from mirror_modules._checks import (
    autocast_dtype,
    check_alike,
    check_batch,
    check_choice,
    check_features,
    check_positive,
    check_precision,
    check_tensors,
    check_word_mask,
    shape_of,
    zero_padding,
)
from mirror_modules._tiles import is_transformed, without_autocast
from mirror_modules._typing import TypedCall
from mirror_modules.glam._attention import SentenceAxis, attend_in_tiles, attend_to_sentence, attend_to_words

OPERATION = "global_local_attention"


class GlobalLocalContext(NamedTuple):
    """Word and sentence context of each image position, with the attention maps."""

    word_context: Tensor
    """Mixture of the words at each position. (B, C, H, W)"""
    sentence_context: Tensor
    """The sentence feature, reweighted at each position. (B, C, H, W)"""
    word_weights: Tensor | None
    """Weight of each word at each position; sums to 1 over L. (B, L, H, W), or None if not requested."""
    sentence_weights: Tensor | None
    """Weight of each channel at each position; sums to 1 over the softmax axis. (B, C, H, W), or None if not
    requested."""
    fused_output: Tensor | None = None
    """Features, word context and sentence context in one tensor, of which the contexts may be views. (B, 3C, H, W), or
    None if not requested."""

    @property
    def contexts(self) -> tuple[Tensor, Tensor]:
        """Both contexts, in the order in which a refinement stage appends them to the features."""
        return self.word_context, self.sentence_context


class WordContext(NamedTuple):
    """Word context of each image position, with the attention map."""

    word_context: Tensor
    """Mixture of the words at each position. (B, C, H, W)"""
    word_weights: Tensor | None
    """Weight of each word at each position; sums to 1 over L. (B, L, H, W), or None if not requested."""

    @property
    def contexts(self) -> tuple[Tensor]:
        """The word context alone."""
        return (self.word_context,)

    @property
    def sentence_weights(self) -> None:
        """None: this attention does not use the sentence."""
        return None


def word_attention(features: Tensor, words: Tensor, word_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give every image position a mixture of the words, weighted by similarity (MirrorGAN, Sec. 3.2).

        context[n] = sum_l weights[n, l] * words[l],    weights[n] = softmax_l(features[n] . words[l])

    The scores are not scaled by 1/sqrt(C), as in the paper. They are computed in float32 or wider. Under autocast,
    features and words are cast as for a matrix product.

    Args:
        features: Image features, (B, C, H, W).
        words: Word features already projected to the image channels, (B, L, C).
        word_mask: True for a real word, (B, L); None if all are. Padding gets no weight, whatever it holds.

    Returns:
        The context (B, C, H, W) and the weights (B, L, H, W), which sum to 1 over L.

    Raises:
        ValueError: A caption has no real word; sizes, precisions or devices disagree.

    Examples:
        >>> import torch
        >>> from mirror_modules import functional
        >>> features, words = torch.randn(2, 3, 5, 7), torch.randn(2, 4, 3)
        >>> word_mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
        >>> context, weights = functional.word_attention(features, words, word_mask)
        >>> tuple(context.shape), tuple(weights.shape)
        ((2, 3, 5, 7), (2, 4, 5, 7))
        >>> weights[1, 2:].sum().item()  # padding gets no weight
        0.0
    """
    _check_projected("word_attention", features, "words", words, "(B, L, C)")
    word_mask = check_word_mask("word_attention", words, word_mask, may_stall=False)
    check_alike("word_attention", word_mask, features=features, words=words)
    features, words = (tensor.to(autocast_dtype(tensor)) for tensor in (features, words))
    context, weights = without_autocast(attend_to_words, (features, zero_padding(words, word_mask), word_mask))
    return context, weights


def sentence_attention(
    features: Tensor, sentence: Tensor, *, score_matrix: Tensor | None = None, axis: SentenceAxis = "channels"
) -> tuple[Tensor, Tensor]:
    """Reweight the sentence at every image position (MirrorGAN, Sec. 3.2).

        context[n] = sentence o weights[n],    weights[n] = softmax_c(features[n] o sentence)

    `o` multiplies elementwise. The paper does not name the softmax axis; its published code normalizes over channels.
    Normalized over positions, the context would vanish as 1/N and is therefore multiplied by N. Scores and weights are
    computed in float32 or wider, also under autocast.

    Args:
        features: Image features, (B, C, H, W).
        sentence: Sentence feature already projected to the image channels, (B, C).
        score_matrix: Mixes the scores across channels before the softmax, (C, C), as the published code does; None as
            in the paper.
        axis: "channels" or "positions", the axis over which the weights sum to 1.

    Returns:
        The context (B, C, H, W) and the weights (B, C, H, W).

    Raises:
        ValueError: Sizes disagree, a tensor is not floating point, or `axis` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import functional
        >>> context, weights = functional.sentence_attention(torch.zeros(1, 4, 5, 7), torch.full((1, 4), 2.0))
        >>> tuple(context.shape), tuple(weights.shape)
        ((1, 4, 5, 7), (1, 4, 5, 7))
        >>> weights[0, 0, 0, 0].item(), context[0, 0, 0, 0].item()  # equal scores: weights of 1/C
        (0.25, 0.5)
    """
    _check_projected("sentence_attention", features, "sentence", sentence, "(B, C)")
    check_choice("sentence_attention", "axis", axis, ("channels", "positions"))
    for name, tensor in (("features", features), ("sentence", sentence)):
        if not tensor.is_floating_point():
            raise ValueError(f"sentence_attention: {name} must be floating point, but it is {tensor.dtype}.")
    _check_score_matrix("sentence_attention", features, score_matrix)
    context, weights = without_autocast(partial(attend_to_sentence, axis=axis), (features, sentence, score_matrix))
    return context, weights


def global_local_attention(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None = None,
    *,
    need_weights: bool = False,
    fused_output: bool = False,
    impl: str = "auto",
    score_matrix: Tensor | None = None,
    sentence_axis: SentenceAxis = "channels",
) -> GlobalLocalContext:
    """Compute word attention and sentence attention of one stage (MirrorGAN, Sec. 3.2).

    "torch" works in tiles, a few samples or a few rows of a large sample at a time, and recomputes each tile in the
    backward pass; "triton" makes one pass over the features, forward and backward. Under autocast, all inputs are cast
    as for a matrix product. On a GPU and in a compiled graph, where reading the mask would force a synchronization, a
    caption without a real word raises no error: its word context is zero.

    Args:
        features: Image features, (B, C, H, W).
        words: Word features already projected to the image channels, (B, L, C).
        sentence: Sentence feature already projected to the image channels, (B, C).
        word_mask: True for a real word, (B, L); None if all are.
        need_weights: Also return the attention maps.
        fused_output: Also return features and contexts in one tensor. "triton" writes this tensor directly, "torch"
            concatenates.
        impl: "auto", "torch" or "triton"; a named implementation runs or raises. `functional.explain` returns the
            choice of "auto" and the reason for it.
        score_matrix: See `sentence_attention`.
        sentence_axis: See `sentence_attention`.

    Returns:
        Both contexts (B, C, H, W), and the attention maps and the fused output (B, 3C, H, W) if requested.

    Raises:
        ValueError: A caption has no real word; sizes, precisions or devices disagree; an option is unknown.
        NotImplementedError: `impl` names an implementation that cannot run.

    Examples:
        >>> import torch
        >>> from mirror_modules import functional
        >>> features, words, sentence = torch.randn(2, 3, 5, 7), torch.randn(2, 4, 3), torch.randn(2, 3)
        >>> result = functional.global_local_attention(features, words, sentence, need_weights=True)
        >>> tuple(result.word_context.shape), tuple(result.sentence_context.shape)
        ((2, 3, 5, 7), (2, 3, 5, 7))
        >>> tuple(result.word_weights.shape), tuple(result.sentence_weights.shape)
        ((2, 4, 5, 7), (2, 3, 5, 7))
    """
    _check_projected(OPERATION, features, "words", words, "(B, L, C)")
    _check_projected(OPERATION, features, "sentence", sentence, "(B, C)")
    word_mask = check_word_mask(OPERATION, words, word_mask, may_stall=False)
    check_alike(OPERATION, word_mask, features=features, words=words, sentence=sentence)
    check_choice(OPERATION, "sentence_axis", sentence_axis, ("channels", "positions"))
    _check_score_matrix(OPERATION, features, score_matrix)
    choice = choose_attention(
        features, words, sentence, impl=impl, score_matrix=score_matrix, sentence_axis=sentence_axis
    )
    features, words, sentence = (tensor.to(autocast_dtype(tensor)) for tensor in (features, words, sentence))
    words = zero_padding(words, word_mask)
    fused: Tensor | None = None
    if choice.implementation == "triton":
        written, *results = kernels.global_local_attention(
            features, words, sentence, word_mask, need_weights, fused_output
        )
        if fused_output:
            fused = written
            results[:2] = fused.split(features.shape[1], dim=1)[1:]
    else:
        if score_matrix is not None:
            score_matrix = score_matrix.to(autocast_dtype(score_matrix))
        results = attend_in_tiles(features, words, sentence, word_mask, score_matrix, sentence_axis, need_weights)
        if fused_output:
            fused = torch.cat((features, *results[:2]), dim=1)
    word_weights, sentence_weights = results[2:] if need_weights else (None, None)
    return GlobalLocalContext(results[0], results[1], word_weights, sentence_weights, fused)


def choose_attention(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    word_mask: Tensor | None = None,
    *,
    need_weights: bool = False,
    fused_output: bool = False,
    impl: str = "auto",
    score_matrix: Tensor | None = None,
    sentence_axis: SentenceAxis = "channels",
) -> kernels.Choice:
    """Choose the implementation that `global_local_attention` runs for the same arguments."""
    options = {
        "score_matrix": score_matrix is not None,
        "sentence_axis='positions'": sentence_axis == "positions",
        "transforms of torch.func and forward-mode derivatives": is_transformed(),
    }
    facts = kernels.Facts(
        kernels.machine_of(features.device),
        dtypes=tuple(map(autocast_dtype, (features, words, sentence))),
        sizes={"channels": features.shape[1], "words": words.shape[1]},
        options=tuple(name for name, is_used in options.items() if is_used),
    )
    return kernels.choose(OPERATION, impl, facts)


class GlobalLocalAttention(TypedCall, nn.Module):
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
        score_projection: Mix the scores across channels before the softmax, as the published code does.
        sentence_axis: "channels" or "positions"; see `sentence_attention`.
        fused_output: Also return features and contexts in one tensor, for a layer that takes them together. With the
            Triton kernel it costs less than a concatenation, which reads and writes everything once more.

    Raises:
        ValueError: A size is not positive, or an option is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import GlobalLocalAttention
        >>> attention = GlobalLocalAttention(feature_dim=8, word_dim=16, condition_dim=10)
        >>> features, words, condition = torch.randn(2, 8, 5, 7), torch.randn(2, 4, 16), torch.randn(2, 10)
        >>> result = attention(features, words, condition, need_weights=True)
        >>> [tuple(context.shape) for context in result.contexts]
        [(2, 8, 5, 7), (2, 8, 5, 7)]
        >>> tuple(result.word_weights.shape)
        (2, 4, 5, 7)
        >>> attention = GlobalLocalAttention(feature_dim=8, word_dim=16, condition_dim=10, fused_output=True)
        >>> tuple(attention(features, words, condition).fused_output.shape)
        (2, 24, 5, 7)
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
        fused_output: bool = False,
    ) -> None:
        super().__init__()
        check_positive("GlobalLocalAttention", feature_dim=feature_dim, word_dim=word_dim, condition_dim=condition_dim)
        check_choice("GlobalLocalAttention", "sentence_axis", sentence_axis, ("channels", "positions"))
        kernels.check_impl("GlobalLocalAttention", impl)
        self.feature_dim, self.word_dim, self.condition_dim = feature_dim, word_dim, condition_dim
        self.context_dim = 2 * feature_dim
        self.impl, self.fused_output = impl, fused_output
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
        """Project words and condition to the image channels and attend to both.

        Args:
            features: Image features, (B, C, H, W).
            words: Word features, (B, L, D).
            condition: Augmented condition, (B, E).
            word_mask: True for a real word, (B, L); None if all are.
            need_weights: Also return the attention maps.

        Returns:
            Both contexts (B, C, H, W), and the attention maps and the fused output (B, 3C, H, W) if requested.

        Raises:
            ValueError: A caption has no real word, or sizes disagree.
        """
        owner = "GlobalLocalAttention"
        check_features(owner, "features", features, "(B, C, H, W)", self.feature_dim, "feature_dim")
        check_features(owner, "words", words, "(B, L, D)", self.word_dim, "word_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_batch(owner, features=features, words=words, condition=condition)
        check_precision(owner, self.word_projection, words=words)
        check_precision(owner, self.sentence_projection, condition=condition)
        word_mask = check_word_mask(owner, words, word_mask, may_stall=False)
        return global_local_attention(
            features,
            # Zeroed before the projection, whose gradient would otherwise contain zero times infinity or NaN.
            self.word_projection(zero_padding(words, word_mask)),
            self.sentence_projection(condition),
            word_mask,
            need_weights=need_weights,
            fused_output=self.fused_output,
            impl=self.impl,
            score_matrix=self._score_matrix(features),
            sentence_axis=self.sentence_axis,
        )

    def _score_matrix(self, features: Tensor) -> Tensor | None:
        """The matrix of `score_projection`, (C, C), by calling the layer: hooks and wrappers do not see its weight."""
        if self.score_projection is None:
            return None
        identity = torch.eye(self.feature_dim, dtype=features.dtype, device=features.device)
        return self.score_projection(identity).mT.contiguous()

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"feature_dim={self.feature_dim}, word_dim={self.word_dim}, condition_dim={self.condition_dim}"


class WordAttention(TypedCall, nn.Module):
    """Attend to the words alone: the attention of AttnGAN, used in MirrorGAN as an ablation.

        word_context = sum_l (U w_l) * softmax_l(f^T U w_l)

    Args:
        feature_dim: Channels C of the image features.
        word_dim: Features D of a word.
        condition_dim: Not used; accepted so that the class has the signature of an attention factory.

    Raises:
        ValueError: A size is not positive.

    Examples:
        >>> import torch
        >>> from mirror_modules import WordAttention
        >>> attention = WordAttention(feature_dim=8, word_dim=16)
        >>> result = attention(torch.randn(2, 8, 5, 7), torch.randn(2, 4, 16), need_weights=True)
        >>> tuple(result.word_context.shape), tuple(result.word_weights.shape)
        ((2, 8, 5, 7), (2, 4, 5, 7))
    """

    def __init__(self, feature_dim: int, word_dim: int, condition_dim: int | None = None) -> None:
        super().__init__()
        check_positive("WordAttention", feature_dim=feature_dim, word_dim=word_dim)
        self.feature_dim, self.word_dim = feature_dim, word_dim
        self.context_dim = feature_dim
        self.word_projection = nn.Linear(word_dim, feature_dim, bias=False)

    def forward(
        self,
        features: Tensor,
        words: Tensor,
        condition: Tensor | None = None,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> WordContext:
        """Project the words to the image channels and attend to them.

        Args:
            features: Image features, (B, C, H, W).
            words: Word features, (B, L, D).
            condition: Not used.
            word_mask: True for a real word, (B, L); None if all are.
            need_weights: Also return the attention map.

        Returns:
            The context (B, C, H, W), and the attention map if requested.

        Raises:
            ValueError: A caption has no real word, or sizes disagree.
        """
        owner = "WordAttention"
        check_features(owner, "features", features, "(B, C, H, W)", self.feature_dim, "feature_dim")
        check_features(owner, "words", words, "(B, L, D)", self.word_dim, "word_dim")
        check_precision(owner, self.word_projection, words=words)
        word_mask = check_word_mask(owner, words, word_mask, may_stall=False)
        context, weights = word_attention(features, self.word_projection(zero_padding(words, word_mask)), word_mask)
        return WordContext(context, weights if need_weights else None)

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"feature_dim={self.feature_dim}, word_dim={self.word_dim}"


def _check_score_matrix(owner: str, features: Tensor, score_matrix: Tensor | None) -> None:
    if score_matrix is None:
        return
    check_tensors(owner, score_matrix=score_matrix)
    expected = (features.shape[1], features.shape[1])
    if score_matrix.shape != expected:
        raise ValueError(f"{owner}: score_matrix is {shape_of(score_matrix)}, expected {expected} (C, C).")
    if not score_matrix.is_floating_point():
        raise ValueError(f"{owner}: score_matrix must be floating point, but it is {score_matrix.dtype}.")


def _check_projected(owner: str, features: Tensor, name: str, text: Tensor, layout: str) -> None:
    check_tensors(owner, features=features, **{name: text})
    if features.ndim != 4:
        raise ValueError(f"{owner}: features must be (B, C, H, W), but they are {shape_of(features)}.")
    if min(features.shape[1:]) < 1:
        raise ValueError(f"{owner}: features have no positions: {shape_of(features)} (B, C, H, W).")
    if text.ndim != layout.count(",") + 1 or text.shape[-1] != features.shape[1]:
        raise ValueError(
            f"{owner}: {name} must be {layout} with the {features.shape[1]} channels of the features "
            f"({name}: {shape_of(text)}, features: {shape_of(features)}); project them first."
        )
    check_batch(owner, features=features, **{name: text})
