"""The cascade: noise, condition and words become images, coarse to fine (MirrorGAN, Sec. 3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_choice, check_features, check_positive, check_word_mask
from mirror_modules.glam.attention import SentenceAxis
from mirror_modules.glam.stages import SMALLEST_RESOLUTION, ImageHead, InitialStage, RefinementStage

Attention = Literal["global-local", "word", "none"]


class GeneratedImages(NamedTuple):
    """What a generator made of a batch of captions."""

    images: list[Tensor]
    """One batch per stage, coarse to fine, in [-1, 1]. Each (B, 3, resolution, resolution)."""
    word_weights: list[Tensor]
    """Word attention of each refinement stage, if asked for, else empty. Each (B, L, H, W), of the stage before."""
    sentence_weights: list[Tensor]
    """Sentence attention of each refinement stage, if asked for, else empty. Each (B, C, H, W)."""


class CascadedGenerator(nn.Module):
    """Noise, condition and words -> images of growing resolution (MirrorGAN, Sec. 3.2).

        f_0 = F_0(z, s_ca),    f_i = F_i(f_{i-1}, Att_i(f_{i-1}, w, s_ca)),    I_i = G_i(f_i)

    Args:
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition.
        word_dim: Features D of a word.
        channels: Channels C of the features of each stage.
        resolutions: Image sizes, coarse to fine: powers of two from 4 up, each larger than the one before. Their number
            is the number of stages.
        residual_blocks: Residual blocks in each refinement stage.
        attention: "global-local" (MirrorGAN), "word" (AttnGAN) or "none".
        intermediate_images: Draw an image at each stage; otherwise at the finest alone.
        impl: Implementation of the attention: "auto", "torch" or "triton".
        sentence_bias: See `GlobalLocalAttention`.
        score_projection: See `GlobalLocalAttention`.
        sentence_axis: See `GlobalLocalAttention`.

    Raises:
        ValueError: A size is not positive, the resolutions do not fit, or `attention` is unknown.
    """

    def __init__(
        self,
        noise_dim: int = 100,
        condition_dim: int = 100,
        word_dim: int = 256,
        *,
        channels: int = 32,
        resolutions: Sequence[int] = (64, 128, 256),
        residual_blocks: int = 2,
        attention: Attention = "global-local",
        intermediate_images: bool = True,
        impl: str = "auto",
        sentence_bias: bool = False,
        score_projection: bool = False,
        sentence_axis: SentenceAxis = "channels",
    ) -> None:
        super().__init__()
        owner = "CascadedGenerator"
        check_positive(owner, noise_dim=noise_dim, condition_dim=condition_dim, word_dim=word_dim, channels=channels)
        check_choice(owner, "attention", attention, ("global-local", "word", "none"))
        if not isinstance(residual_blocks, int) or residual_blocks < 0:
            raise ValueError(f"{owner}: residual_blocks must be 0 or more, but it is {residual_blocks!r}.")
        self.resolutions = _check_resolutions(resolutions)
        self.noise_dim, self.condition_dim, self.word_dim = noise_dim, condition_dim, word_dim
        self.initial = InitialStage(noise_dim, condition_dim, channels, self.resolutions[0])
        self.refinements = nn.ModuleList(
            RefinementStage(
                word_dim,
                condition_dim,
                channels,
                (fine // coarse).bit_length() - 1,
                residual_blocks,
                attention,
                impl=impl,
                sentence_bias=sentence_bias,
                score_projection=score_projection,
                sentence_axis=sentence_axis,
            )
            for coarse, fine in zip(self.resolutions, self.resolutions[1:])
        )
        heads = len(self.resolutions) if intermediate_images else 1
        self.heads = nn.ModuleList(ImageHead(channels) for _ in range(heads))

    def forward(
        self,
        noise: Tensor,
        condition: Tensor,
        words: Tensor,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate.

        Args:
            noise: Standard normal, (B, Z).
            condition: Augmented condition, (B, E).
            words: Word features, (B, L, D).
            word_mask: True for a real word, (B, L); None if all are.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if asked for.

        Raises:
            ValueError: A caption has no real word, or sizes disagree.
        """
        owner = "CascadedGenerator"
        check_features(owner, "noise", noise, "(B, D)", self.noise_dim, "noise_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_features(owner, "words", words, "(B, L, D)", self.word_dim, "word_dim")
        check_batch(owner, noise=noise, condition=condition, words=words)
        check_word_mask(owner, words, word_mask, may_stall=False)

        stage_features = [self.initial(noise, condition)]
        generated = GeneratedImages([], [], [])
        for refinement in self.refinements:
            features, word_weights, sentence_weights = refinement(stage_features[-1], condition, words, word_mask)
            stage_features.append(features)
            if need_weights and word_weights is not None:
                generated.word_weights.append(word_weights)
            if need_weights and sentence_weights is not None:
                generated.sentence_weights.append(sentence_weights)
        for head, features in zip(self.heads, stage_features[-len(self.heads) :]):
            generated.images.append(head(features))
        return generated


def _check_resolutions(resolutions: Sequence[int]) -> tuple[int, ...]:
    powers = all(
        isinstance(size, int) and size >= SMALLEST_RESOLUTION and size & (size - 1) == 0 for size in resolutions
    )
    growing = all(coarse < fine for coarse, fine in itertools.pairwise(resolutions))
    if len(resolutions) == 0 or not powers or not growing:
        raise ValueError(
            f"CascadedGenerator: resolutions must be growing powers of two from {SMALLEST_RESOLUTION} up, "
            f"such as (64, 128, 256), but they are {resolutions!r}."
        )
    return tuple(resolutions)
