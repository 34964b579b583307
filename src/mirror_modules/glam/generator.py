"""The cascade: noise, condition and words become images, coarse to fine (MirrorGAN, Sec. 3.2)."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

from mirror_modules._checks import (
    check_batch,
    check_choice,
    check_features,
    check_positive,
    check_sizes,
    check_word_mask,
)
from mirror_modules._pretrained import FromModelFolder
from mirror_modules._typing import TypedCall
from mirror_modules.glam.attention import GlobalLocalAttention, WordAttention
from mirror_modules.glam.stages import (
    ACTIVATIONS,
    SMALLEST_RESOLUTION,
    UPSAMPLINGS,
    Activation,
    ConditionStage,
    ImageHead,
    InitialStage,
    RefinementStage,
    Upsampling,
)

AttentionFactory = Callable[[int, int, int], nn.Module]
"""(feature_dim, word_dim, condition_dim) -> a module that fulfills `StageAttention`."""


class GeneratedImages(NamedTuple):
    """Images of a batch of captions, with the attention maps of the generator."""

    images: list[Tensor]
    """One batch per stage, coarse to fine, in [-1, 1]. Each (B, 3, resolution, resolution)."""
    word_weights: list[Tensor]
    """Word attention map of each refinement stage; empty if not requested. Each (B, L, H, W), where H x W is the
    resolution of the stage before."""
    sentence_weights: list[Tensor]
    """Sentence attention map of each refinement stage; empty if not requested. Each (B, C, H, W)."""


class CascadedGenerator(FromModelFolder, TypedCall, nn.Module):
    """Noise, condition and words -> images of increasing resolution (MirrorGAN, Sec. 3.2).

        f_0 = F_0(z, s_ca),    f_i = F_i(f_{i-1}, Att_i(f_{i-1}, w, s_ca)),    I_i = G_i(f_i)

    Other published generators are options of it:

        AttnGAN                  attention="word"
        StackGAN++               attention="condition", channels=(64, 32, 16), condition_dim=128
        StackGAN++ without text  the same with condition_dim=None
        StackGAN, first stage    activation="relu", channels=64, resolutions=(64,), condition_dim=128

    Stages can be trained one after the other (progressive growing): with the attribute `active_stages` set to a number
    k, which needs the images of all stages, only the first k stages run.

    Args:
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition; None for a generator without one, whose first stage has the noise
            alone and whose refinement stages have the noise in place of the condition.
        word_dim: Features D of a word.
        channels: Channels C of the features of each stage: a number, or one per stage.
        resolutions: Image sizes, coarse to fine: increasing powers of two from 4 up, one per stage.
        residual_blocks: Residual blocks in each refinement stage.
        attention: "global-local" (MirrorGAN), "word" (AttnGAN), "condition" (StackGAN++), "none", or a factory.
            "condition" attends to nothing: a convolution joins the features with the condition at every position, and
            residual blocks have C channels instead of 2C. The factory is called as
            `attention(feature_dim, word_dim, condition_dim)` once per refinement stage, coarse to fine, and returns a
            module that fulfills `mirror_modules.glam.StageAttention`. It may be a class or, for options,
            `functools.partial(GlobalLocalAttention, sentence_bias=True)`.
        intermediate_images: Generate an image at each stage; otherwise only at the finest.
        activation: "glu", the gated linear unit, or "relu" (StackGAN), which halves the weights before it.
        finest_upsampling: How the finest stage enlarges feature maps before their convolution: "nearest" as published
            and as in the other stages, or "bilinear", whose images have no woven texture at a distance of two pixels.

    Raises:
        ValueError: A size is not positive, `channels` or the resolutions do not fit, `attention` is neither a known
            name nor a factory, its modules have no `context_dim`, or `activation` or `finest_upsampling` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import CascadedGenerator
        >>> generator = CascadedGenerator(noise_dim=5, condition_dim=7, word_dim=13, channels=4, resolutions=(8, 16))
        >>> noise, condition, words = torch.randn(2, 5), torch.randn(2, 7), torch.randn(2, 11, 13)
        >>> generated = generator(noise, condition, words, need_weights=True)
        >>> [tuple(images.shape) for images in generated.images]
        [(2, 3, 8, 8), (2, 3, 16, 16)]
        >>> [tuple(weights.shape) for weights in generated.word_weights]
        [(2, 11, 8, 8)]
    """

    def __init__(
        self,
        noise_dim: int = 100,
        condition_dim: int | None = 100,
        word_dim: int = 256,
        *,
        channels: int | Sequence[int] = 32,
        resolutions: Sequence[int] = (64, 128, 256),
        residual_blocks: int = 2,
        attention: Literal["global-local", "word", "condition", "none"] | AttentionFactory = "global-local",
        intermediate_images: bool = True,
        activation: Activation = "glu",
        finest_upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        owner = "CascadedGenerator"
        check_positive(owner, noise_dim=noise_dim, word_dim=word_dim)
        if condition_dim is not None:
            check_positive(owner, condition_dim=condition_dim)
        check_choice(owner, "activation", activation, ACTIVATIONS)
        check_choice(owner, "finest_upsampling", finest_upsampling, UPSAMPLINGS)
        is_joined = isinstance(attention, str) and attention == "condition"
        factory = None if is_joined else _attention_factory(attention)
        if not isinstance(residual_blocks, int) or residual_blocks < 0:
            raise ValueError(f"{owner}: residual_blocks must be 0 or more, but it is {residual_blocks!r}.")
        self.resolutions = _check_resolutions(resolutions)
        widths = _check_channels(channels, len(self.resolutions))
        self.noise_dim, self.condition_dim, self.word_dim = noise_dim, condition_dim, word_dim
        coarser: list[Upsampling] = ["nearest"] * (len(widths) - 1)
        upsamplings = [*coarser, finest_upsampling]
        first = widths[0], self.resolutions[0]
        self.initial = InitialStage(noise_dim, condition_dim or 0, *first, activation, upsamplings[0])
        text_dim = condition_dim or noise_dim

        def build(before: int, after: int, doublings: int, upsampling: Upsampling) -> nn.Module:
            if is_joined:
                return ConditionStage(before, text_dim, [after] * doublings, residual_blocks, activation, upsampling)
            module = _build_attention(factory, before, word_dim, text_dim)
            return RefinementStage(
                before,
                doublings,
                residual_blocks,
                module,
                out_channels=after,
                activation=activation,
                upsampling=upsampling,
            )

        steps = zip(widths, widths[1:], self.resolutions, self.resolutions[1:], upsamplings[1:])
        self.refinements = nn.ModuleList(
            build(before, after, (fine // coarse).bit_length() - 1, upsampling)
            for before, after, coarse, fine, upsampling in steps
        )
        modules = [getattr(stage, "attention", None) for stage in self.refinements]
        attentions = [id(module) for module in modules if module is not None]
        self.attends = len(attentions) > 0
        if len(set(attentions)) < len(attentions):
            raise ValueError(
                f"{owner}: the attention factory returned one module for several stages, which would share its "
                "weights; make a new module in each call."
            )
        self.heads = nn.ModuleList(ImageHead(width) for width in (widths if intermediate_images else widths[-1:]))
        self.active_stages: int | None = None

    def forward(
        self,
        noise: Tensor,
        condition: Tensor | None = None,
        words: Tensor | None = None,
        word_mask: Tensor | None = None,
        *,
        attended_condition: Tensor | None = None,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate a batch of images.

        Args:
            noise: Standard normal, (B, Z).
            condition: Augmented condition, (B, E); None if built with `condition_dim=None`.
            words: Word features, (B, L, D); None is possible where no stage attends, as with "condition" and "none".
            word_mask: True for a real word, (B, L); None if all are.
            attended_condition: What the stages after the first read in place of the condition, (B, E), such as its mean
                without the noise.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.

        Raises:
            ValueError: A caption has no real word, sizes disagree, an input is missing, or `active_stages` is out of
                range.
        """
        word_mask = self._check_inputs(noise, condition, words, word_mask, attended_condition)
        stage_features = [self.initial(noise, condition)]
        generated = GeneratedImages([], [], [])
        text = next(each for each in (attended_condition, condition, noise) if each is not None)
        for refinement in self.refinements[: self._active() - 1]:
            stage = refinement(stage_features[-1], text, words, word_mask, need_weights=need_weights)
            stage_features.append(stage.features)
            # An attention module of the user's own may return its maps unconditionally.
            if need_weights and stage.word_weights is not None:
                generated.word_weights.append(stage.word_weights)
            if need_weights and stage.sentence_weights is not None:
                generated.sentence_weights.append(stage.sentence_weights)
        for head, features in zip(self.heads, stage_features[-len(self.heads) :]):
            generated.images.append(head(features))
        return generated

    def _active(self) -> int:
        """The number of stages that run."""
        stages, active = len(self.resolutions), self.active_stages
        if active is None:
            return stages
        if not isinstance(active, int) or not 1 <= active <= stages or (active < stages and len(self.heads) < stages):
            raise ValueError(
                f"CascadedGenerator: active_stages must be None or from 1 to {stages}, with intermediate_images=True "
                f"unless all stages run, but it is {active!r}."
            )
        return active

    def _check_inputs(
        self,
        noise: Tensor,
        condition: Tensor | None,
        words: Tensor | None,
        word_mask: Tensor | None,
        attended_condition: Tensor | None,
    ) -> Tensor | None:
        """Check all inputs, and return the mask as bool."""
        owner = "CascadedGenerator"
        check_features(owner, "noise", noise, "(B, D)", self.noise_dim, "noise_dim")
        if (condition is None) != (self.condition_dim is None):
            problem = "is missing" if condition is None else "was given"
            raise ValueError(
                f"{owner}: the condition {problem}, but the generator was built with "
                f"condition_dim={self.condition_dim}; None builds one without a condition."
            )
        given = {"noise": noise}
        if condition is not None and self.condition_dim is not None:
            check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
            given["condition"] = condition
        if attended_condition is not None:
            if self.condition_dim is None:
                raise ValueError(
                    f"{owner}: attended_condition was given, but the generator was built with condition_dim=None, so "
                    "that all stages read the noise; leave it out."
                )
            check_features(
                owner, "attended_condition", attended_condition, "(B, D)", self.condition_dim, "condition_dim"
            )
            given["attended_condition"] = attended_condition
        if words is None and self.attends:
            raise ValueError(
                f"{owner}: words are missing, but the stages attend to them; pass words (B, L, {self.word_dim}), or "
                "build a generator with attention='condition' or 'none'."
            )
        if words is None and word_mask is not None:
            raise ValueError(f"{owner}: word_mask needs the words that it marks; pass both or neither.")
        if words is not None:
            check_features(owner, "words", words, "(B, L, D)", self.word_dim, "word_dim")
            given["words"] = words
        check_batch(owner, **given)
        return None if words is None else check_word_mask(owner, words, word_mask, may_stall=False)


def _attention_factory(attention: object) -> AttentionFactory | None:
    """Resolve the argument `attention` to a factory; None for "none"."""
    if isinstance(attention, nn.Module):
        name = type(attention).__name__
        raise ValueError(
            f"CascadedGenerator: attention is one {name} module, which all stages would share; give a factory that "
            f"makes one per stage, such as the class {name} or functools.partial({name}, ...)."
        )
    factories: dict[str, AttentionFactory | None]
    factories = {"global-local": partial(GlobalLocalAttention, fused_output=True), "word": WordAttention, "none": None}
    if isinstance(attention, str) and attention in factories:
        return factories[attention]
    if not callable(attention):
        raise ValueError(
            f"CascadedGenerator: attention must be 'global-local', 'word', 'condition', 'none' or a factory "
            f"(feature_dim, word_dim, condition_dim) -> nn.Module, but it is {attention!r}."
        )
    return attention


def _build_attention(factory: AttentionFactory | None, *sizes: int) -> nn.Module | None:
    if factory is None:
        return None
    try:
        inspect.signature(factory).bind(*sizes)
    except TypeError as error:
        raise ValueError(
            "CascadedGenerator: the attention factory is called as attention(feature_dim, word_dim, condition_dim), "
            f"which {factory!r} does not accept ({error}); bind further arguments with functools.partial."
        ) from error
    except ValueError:
        # Some built-in callables have no signature.
        pass
    attention = factory(*sizes)
    if attention is None:
        raise ValueError(
            "CascadedGenerator: the attention factory returned None, expected an nn.Module (see "
            "mirror_modules.glam.StageAttention); attention='none' builds a generator without attention."
        )
    return attention


def _check_resolutions(resolutions: Sequence[int]) -> tuple[int, ...]:
    is_sequence = isinstance(resolutions, Sequence) and not isinstance(resolutions, str)
    powers = is_sequence and all(
        isinstance(size, int) and size >= SMALLEST_RESOLUTION and size & (size - 1) == 0 for size in resolutions
    )
    increasing = is_sequence and all(coarse < fine for coarse, fine in itertools.pairwise(resolutions))
    if not (powers and increasing) or len(resolutions) == 0:
        raise ValueError(
            f"CascadedGenerator: resolutions must be increasing powers of two from {SMALLEST_RESOLUTION} up, "
            f"such as (64, 128, 256), but they are {resolutions!r}."
        )
    return tuple(resolutions)


def _check_channels(channels: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """Channels of each stage."""
    if isinstance(channels, int):
        check_positive("CascadedGenerator", channels=channels)
        return (channels,) * stages
    if not isinstance(channels, Sequence) or isinstance(channels, str) or len(channels) != stages:
        raise ValueError(
            f"CascadedGenerator: channels must be a number or one per stage, {stages} in all, but they are "
            f"{channels!r}."
        )
    check_sizes("CascadedGenerator", channels=channels)
    return tuple(channels)
