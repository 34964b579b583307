"""GLAM as a residual block of any network: both attentions, and a fusion that is zero at the start.

Shape suffixes as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mirror_modules import kernels
from mirror_modules._checks import (
    autocast_dtype,
    check_batch,
    check_features,
    check_positive,
    check_precision,
    check_tensors,
    shape_of,
)
from mirror_modules._typing import TypedCall
from mirror_modules.glam.attention import GlobalLocalAttention, WordAttention


class GlamBlock(TypedCall, nn.Module):
    """Add what each position attends to, in words and sentence, to the features of any network (MirrorGAN, Sec. 3.2).

        output = f + W [n, word_context(n, w), sentence_context(n, s)] + b,    n = LayerNorm(f)

    `f` are the features of the host, a U-Net or a transformer for instance, `w` the words and `s` the sentence. The
    contexts are those of `GlobalLocalAttention`; without `sentence_dim`, there is no sentence context, as in
    `WordAttention`. The 1x1 convolution `W`, `b` is zero at the start, as in ControlNet: a pretrained host computes
    exactly what it computed before, and the first step of an optimizer changes `W` and `b` alone. Insert the block
    after the host has initialized its own weights.

    The norm runs over the channels of each position. The scores of the attention are not scaled, as in the paper, whose
    features come out of batch norms; the features of a host may be of any magnitude.

    Args:
        channels: Channels C of the host's features.
        word_dim: Features D of a word.
        sentence_dim: Features E of the sentence; None for a block that attends to the words alone.
        impl: "auto", "torch" or "triton"; a named implementation runs or raises. Attention to the words alone has no
            Triton kernel.

    Raises:
        ValueError: A size is not positive, or `impl` is unknown.
        NotImplementedError: `impl` is "triton" without `sentence_dim`.

    Examples:
        >>> import torch
        >>> from mirror_modules import GlamBlock
        >>> block = GlamBlock(channels=8, word_dim=16, sentence_dim=10)
        >>> features, words, sentence = torch.randn(2, 8, 5, 7), torch.randn(2, 4, 16), torch.randn(2, 10)
        >>> attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # as tokenizers return it
        >>> torch.equal(block(features, words, sentence, attention_mask), features)  # before the first step
        True
        >>> tokens = features.flatten(2).mT  # (B, N, C), as in a transformer
        >>> block(tokens, words, sentence, attention_mask, size=(5, 7)).shape
        torch.Size([2, 35, 8])
        >>> GlamBlock(channels=8, word_dim=16)(features, words, word_mask=attention_mask).shape  # words alone
        torch.Size([2, 8, 5, 7])
    """

    def __init__(self, channels: int, word_dim: int, sentence_dim: int | None = None, *, impl: str = "auto") -> None:
        super().__init__()
        owner = "GlamBlock"
        check_positive(owner, channels=channels, word_dim=word_dim)
        kernels.check_impl(owner, impl)
        self.channels, self.word_dim, self.sentence_dim = channels, word_dim, sentence_dim
        self.norm = nn.LayerNorm(channels)
        self.attention: GlobalLocalAttention | WordAttention
        if sentence_dim is None:
            if impl == "triton":
                raise NotImplementedError(
                    f"{owner}: impl='triton' cannot run: attention to the words alone has no Triton kernel; use "
                    "impl='auto', or give sentence_dim."
                )
            self.attention = WordAttention(channels, word_dim)
        else:
            check_positive(owner, sentence_dim=sentence_dim)
            self.attention = GlobalLocalAttention(channels, word_dim, sentence_dim, impl=impl, fused_output=True)
        self.fusion = nn.Conv2d(channels + self.attention.context_dim, channels, 1)
        nn.init.zeros_(self.fusion.weight)
        nn.init.zeros_(cast(Tensor, self.fusion.bias))

    def forward(
        self,
        features: Tensor,
        words: Tensor,
        sentence: Tensor | None = None,
        word_mask: Tensor | None = None,
        *,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend to the text and add the result to the features.

        Args:
            features: Features of the host: maps (B, C, H, W), or tokens (B, N, C) in row-major order, with `size`.
            words: Word features, (B, L, D).
            sentence: Sentence feature, (B, E); required with `sentence_dim`, and not allowed without.
            word_mask: True or 1 for a real word, as the attention mask of a tokenizer, (B, L); None if all are real.
            size: Height and width of the map that the tokens form, H * W = N; None for maps.

        Returns:
            Features in the layout and dtype of the input.

        Raises:
            ValueError: The features have another layout, `size` does not fit them, the sentence is missing or not
                expected, a caption has no real word, or sizes or precisions disagree.
        """
        owner = "GlamBlock"
        features_BHWC = self._with_channels_last(features, size)
        check_features(owner, "words", words, "(B, L, D)", self.word_dim, "word_dim")
        self._check_sentence(sentence)
        check_batch(owner, features=features, words=words, **({} if sentence is None else {"sentence": sentence}))
        check_precision(owner, self.norm, features=features)

        normed = self.norm(features_BHWC).permute(0, 3, 1, 2)
        # As the fusion casts it; a concatenation does not take float16 and bfloat16 together.
        normed = normed.to(autocast_dtype(normed))
        attended: Any = cast(Any, self.attention)(normed, words, sentence, word_mask)
        fused = torch.cat((normed, *attended.contexts), dim=1) if self.sentence_dim is None else attended.fused_output
        change = self.fusion(fused)
        if size is not None:
            change = change.flatten(2).mT
        # Under autocast, the change may be wider or narrower than the features.
        return features + change.to(features.dtype)

    def _with_channels_last(self, features: Tensor, size: Sequence[int] | None) -> Tensor:
        """View maps or tokens as (B, H, W, C)."""
        owner = "GlamBlock"
        check_tensors(owner, features=features)
        if features.ndim == 4:
            if size is not None:
                raise ValueError(
                    f"{owner}: size={size!r} is for tokens (B, N, C), but features are {shape_of(features)}, which is "
                    "(B, C, H, W); leave size out."
                )
            check_features(owner, "features", features, "(B, C, H, W)", self.channels, "channels")
            return features.permute(0, 2, 3, 1)
        if features.ndim != 3:
            raise ValueError(
                f"{owner}: features must be maps (B, C, H, W), or tokens (B, N, C) with size=(H, W), but they are "
                f"{shape_of(features)}."
            )
        if size is None:
            raise ValueError(
                f"{owner}: features are {shape_of(features)}, which is tokens (B, N, C); give the height and width of "
                "their map as size=(H, W)."
            )
        # In a graph that is being exported, a size may be symbolic.
        if not isinstance(size, Sequence) or len(size) != 2 or not all(_is_size(side) for side in size):
            raise ValueError(f"{owner}: size must be a height and a width of at least 1, but it is {size!r}.")
        check_features(owner, "features", features, "(B, N, C)", self.channels, "channels")
        height, width = size
        if features.shape[1] != height * width:
            raise ValueError(
                f"{owner}: features have {features.shape[1]} tokens but size={tuple(size)} has {height * width} "
                f"positions (features: {shape_of(features)}, expected (B, N, C)); remove class and register tokens."
            )
        return features.unflatten(1, (height, width))

    def _check_sentence(self, sentence: Tensor | None) -> None:
        owner = "GlamBlock"
        if self.sentence_dim is None:
            if sentence is not None:
                found = shape_of(sentence) if isinstance(sentence, Tensor) else f"a {type(sentence).__name__}"
                raise ValueError(
                    f"{owner}: sentence is {found}, but the block attends to the words alone; build it with "
                    "sentence_dim, or leave the sentence out. A mask is given as word_mask=."
                )
        elif sentence is None:
            raise ValueError(
                f"{owner}: sentence is missing, but the block was built with sentence_dim={self.sentence_dim}; give "
                "it, or build the block without sentence_dim to attend to the words alone."
            )
        else:
            check_features(owner, "sentence", sentence, "(B, D)", self.sentence_dim, "sentence_dim")

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"channels={self.channels}, word_dim={self.word_dim}, sentence_dim={self.sentence_dim}"


def _is_size(side: object) -> bool:
    return isinstance(side, int | torch.SymInt) and not isinstance(side, bool) and bool(side >= 1)
