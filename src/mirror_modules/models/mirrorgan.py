"""MirrorGAN: text in, image out, text back (Qiao et al., CVPR 2019, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from mirror_modules.glam import CascadedGenerator, GeneratedImages, GlobalLocalAttention
from mirror_modules.models.config import ModelConfig
from mirror_modules.models.registry import register_system
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition, ConditioningAugmentation


@dataclass(frozen=True)
class MirrorGANConfig(ModelConfig):
    """Sizes and options of a `MirrorGAN`; the default sizes are the paper's.

    `paper` and `release` are presets; the documentation page "Differences" lists the options of each.

    Raises:
        ValueError: `resolutions` are no image sizes, or `max_words` is below 1.

    Examples:
        >>> from mirror_modules import MirrorGANConfig
        >>> config = MirrorGANConfig.release(channels=16)
        >>> config.channels, config.resolutions, config.score_projection
        (16, (64, 128, 256), True)
        >>> MirrorGANConfig.from_dict(config.to_dict()) == config
        True
    """

    system = "mirrorgan"

    residual_blocks: int = 2
    """Residual blocks of each refinement stage."""
    finest_upsampling: Literal["nearest", "bilinear"] = "nearest"
    """How the finest stage enlarges feature maps; "bilinear" is not published, and avoids a woven texture."""
    attention: Literal["global-local", "word", "none"] = "global-local"
    """Attention of each refinement stage: MirrorGAN's, AttnGAN's (words alone) or none."""
    sentence_bias: bool = False
    """Bias of the sentence projection V: in the published code, not in the paper. "global-local" only."""
    score_projection: bool = False
    """1x1 convolution before the softmax of the sentence attention: in the published code, not in the paper.
    "global-local" only."""
    sentence_axis: Literal["channels", "positions"] = "channels"
    """Softmax axis of the sentence attention. "global-local" only."""
    sentence_noise: bool = True
    """Whether the sentence attention reads the augmented condition with its noise, as published, or its mean.
    "global-local" only."""

    def without_effect(self) -> list[tuple[str, str]]:
        """Fields that are not read."""
        if self.attention == "global-local":
            return []
        # The preset `release` sets the other two fields of sentence attention for every kind of attention.
        return [(name, f"attention={self.attention!r}") for name in ("sentence_axis", "sentence_noise")]

    @classmethod
    def paper(cls, **changes: Any) -> MirrorGANConfig:
        """Preset: the model of the paper's equations. `changes` override single fields."""
        return cls(**changes)

    @classmethod
    def release(cls, **changes: Any) -> MirrorGANConfig:
        """Preset: the model of the published code, compatible with its weights. `changes` override single fields."""
        return cls(**{"sentence_bias": True, "score_projection": True, **changes})


@register_system
class MirrorGAN(TextToImage):
    """Words and sentence attended at every stage, and a captioner that the generator is trained against.

        s = N(mu(sentence), sigma(sentence)^2),    I_0, I_1, I_2 = G(noise, s, words)

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together, or an unknown option; or the weights of the
            captioner's backbone do not fit it.
        FileNotFoundError: The file of these weights does not exist.
        ImportError: The package of the backbone or of its weights is not installed.

    Examples:
        >>> from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
        >>> config = MirrorGANConfig(channels=4, resolutions=(8, 16), captioner_backbone="conv")
        >>> model = MirrorGAN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> images = model.generate("a red flower", images_per_caption=2, seed=0)
        >>> images.shape, len(model.describe(images))
        (torch.Size([2, 3, 16, 16]), 2)
        >>> model.generate("a red flower", output="pil")[0].size
        (16, 16)
    """

    config_type = MirrorGANConfig
    config: MirrorGANConfig

    def build(self, config: MirrorGANConfig) -> None:
        """Build conditioning augmentation and generator."""
        self.conditioning = ConditioningAugmentation(config.word_dim, config.condition_dim)
        # The options of the sentence attention apply to "global-local" only.
        global_local = partial(
            GlobalLocalAttention,
            fused_output=True,
            sentence_bias=config.sentence_bias,
            score_projection=config.score_projection,
            sentence_axis=config.sentence_axis,
        )
        self.generator = CascadedGenerator(
            config.noise_dim,
            config.condition_dim,
            config.word_dim,
            channels=config.channels,
            resolutions=config.resolutions,
            residual_blocks=config.residual_blocks,
            finest_upsampling=config.finest_upsampling,
            attention=global_local if config.attention == "global-local" else config.attention,
        )

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """The augmented condition, and its mean if the attention reads that; see `TextToImage.conditions`."""
        condition = self.conditioning(sentence, noise=noise)
        return [condition] if self.config.sentence_noise else [condition, condition.mean]

    def images(
        self,
        noise: Tensor,
        samples: Sequence[Tensor],
        words: Tensor,
        word_mask: Tensor | None = None,
        location: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Images of all stages; see `TextToImage.images`."""
        condition, *mean = samples
        return self.generator(
            noise, condition, words, word_mask, attended_condition=mean[0] if mean else None, need_weights=need_weights
        )
