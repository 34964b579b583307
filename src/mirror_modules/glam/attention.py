"""The attentions of a refinement stage: words mixed at each position, the sentence reweighted per channel (Sec. 3.2).

Shape suffixes: B batch, C channels of the stage, D word features, E condition features, L words, H x W positions,
N = H * W.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mirror_modules import kernels
from mirror_modules._checks import (
    at_least_float32,
    autocast_dtype,
    check_alike,
    check_batch,
    check_choice,
    check_features,
    check_positive,
    check_precision,
    check_tensors,
    check_word_mask,
    is_unchecked,
    shape_of,
    zero_padding,
)
from mirror_modules._tiles import (
    ELEMENTS_ON_A_GPU,
    EVERYTHING,
    Tile,
    is_transformed,
    recomputed_in_tiles,
    without_autocast,
)
from mirror_modules._typing import TypedCall

SentenceAxis = Literal["channels", "positions"]

OPERATION = "global_local_attention"
ELEMENTS_ON_A_CPU = 2**18
"""Feature elements in one tile on a CPU: about what its caches hold."""
FEW_ELEMENTS = 2**22
"""Up to this many elements the CPU path does not tile: recomputation would cost more time than the memory is worth."""


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
    context, weights = without_autocast(_word_attention, (features, zero_padding(words, word_mask), word_mask))
    return context, weights


def _word_attention(features: Tensor, words: Tensor, word_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Evaluate the equations. Words are zero at padding, or its scores could outweigh the mask, or be NaN."""
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
        ValueError: Sizes disagree, or `axis` is unknown.

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
    _check_score_matrix("sentence_attention", features, score_matrix)
    context, weights = without_autocast(partial(_sentence_attention, axis=axis), (features, sentence, score_matrix))
    return context, weights


def _sentence_attention(
    features: Tensor, sentence: Tensor, score_matrix: Tensor | None, axis: SentenceAxis
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, sentence.dtype)
    # In float32, because scores beyond 65504 would overflow float16, and over many positions each weight underflows.
    sentence_BC11 = at_least_float32(sentence).unsqueeze(2).unsqueeze(3)
    scores_BCHW = at_least_float32(features) * sentence_BC11
    if score_matrix is not None:
        scores_BCHW = torch.einsum("dc,bchw->bdhw", at_least_float32(score_matrix), scores_BCHW)
    if axis == "channels":
        weights_BCHW = torch.softmax(scores_BCHW, dim=1)
        context_BCHW = sentence_BC11 * weights_BCHW
    else:
        weights_BCN = torch.softmax(scores_BCHW.flatten(2), dim=2)
        weights_BCHW = weights_BCN.unflatten(2, features.shape[2:])
        context_BCHW = sentence_BC11 * weights_BCHW * weights_BCN.shape[2]
    return context_BCHW.to(dtype), weights_BCHW.to(dtype)


def _attention_derivative(
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
    fused = None
    features, words, sentence = (tensor.to(autocast_dtype(tensor)) for tensor in (features, words, sentence))
    words = zero_padding(words, word_mask)
    if score_matrix is not None:
        score_matrix = score_matrix.to(autocast_dtype(score_matrix))
    if choice.implementation == "triton":
        fused, *results = kernels.global_local_attention(
            features, words, sentence, word_mask, need_weights, fused_output
        )
        if fused_output:
            results[:2] = fused.split(features.shape[1], dim=1)[1:]
    else:

        def attend(
            features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor | None, score_matrix: Tensor | None
        ) -> tuple[Tensor, ...]:
            word_context, word_weights = _word_attention(features, words, word_mask)
            sentence_context, sentence_weights = _sentence_attention(features, sentence, score_matrix, sentence_axis)
            maps = (word_weights, sentence_weights) if need_weights else ()
            return word_context, sentence_context, *maps

        def divide() -> list[Tile]:
            return _tiles(features, may_divide=sentence_axis == "channels")

        inputs = features, words, sentence, word_mask, score_matrix
        whole = features.shape[0], None, features.shape[2]
        is_plain = not need_weights and score_matrix is None and sentence_axis == "channels"
        results = recomputed_in_tiles(attend, inputs, divide, whole, _attention_derivative if is_plain else None)
        if fused_output:
            fused = torch.cat((features, *results[:2]), dim=1)
    word_weights, sentence_weights = results[2:] if need_weights else (None, None)
    return GlobalLocalContext(results[0], results[1], word_weights, sentence_weights, fused if fused_output else None)


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


def _tiles(features: Tensor, *, may_divide: bool) -> list[Tile]:
    """Tiles of several samples or, where samples are large and may be divided, of several rows of one sample."""
    batch, channels, height, width = features.shape
    if features.device.type == "cpu" and features.numel() <= FEW_ELEMENTS:
        return []
    elements = ELEMENTS_ON_A_CPU if features.device.type == "cpu" else ELEMENTS_ON_A_GPU
    rows = max(1, elements // max(1, channels * width))
    if rows < height and may_divide:
        places = [(slice(b, b + 1), slice(y, y + rows)) for b in range(batch) for y in range(0, height, rows)]
        return [Tile((b, EVERYTHING, y), ((b, EVERYTHING, y), b, b, b, EVERYTHING)) for b, y in places]
    samples = max(1, rows // max(1, height))
    starts = (slice(b, b + samples) for b in range(0, batch, samples))
    return [Tile(b, (b, b, b, b, EVERYTHING)) for b in starts]


def _check_score_matrix(owner: str, features: Tensor, score_matrix: Tensor | None) -> None:
    expected = (features.shape[1], features.shape[1])
    if score_matrix is not None and score_matrix.shape != expected:
        raise ValueError(f"{owner}: score_matrix is {shape_of(score_matrix)}, expected {expected} (C, C).")


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
