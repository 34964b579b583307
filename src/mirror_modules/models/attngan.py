"""AttnGAN: words attended at every stage, and a matching loss (Xu et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mirror_modules.glam import CascadedGenerator, GeneratedImages
from mirror_modules.models.config import ModelConfig, Weighting
from mirror_modules.models.registry import register_system
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition, ConditioningAugmentation


@dataclass(frozen=True)
class AttnGANConfig(ModelConfig):
    """Sizes of an `AttnGAN`; the default sizes are those published for birds.

    Raises:
        ValueError: `resolutions` are no image sizes, or `max_words` is below 1.

    Examples:
        >>> from mirror_modules.models import AttnGANConfig
        >>> AttnGANConfig().channels, AttnGANConfig.coco().channels
        (32, 48)
    """

    system = "attngan"

    residual_blocks: int = 2
    """Residual blocks of each refinement stage."""
    finest_upsampling: Literal["nearest", "bilinear"] = "nearest"
    """How the finest stage enlarges feature maps; "bilinear" is not published, and avoids a woven texture."""

    def weighting(self, phase: str) -> Weighting:
        """Means over realism and consistency, as in the published code."""
        return "release"

    @classmethod
    def coco(cls, **changes: Any) -> AttnGANConfig:
        """Preset: the published sizes for COCO. `changes` override single fields."""
        return cls(**{"channels": 48, "residual_blocks": 3, "discriminator_channels": 96, **changes})


@register_system
class AttnGAN(TextToImage):
    """A cascade whose stages attend to the words, trained with the matching loss of its encoders.

        s = N(mu(sentence), sigma(sentence)^2),    I_0, I_1, I_2 = G(noise, s, words)

    The matching loss of the finest images is the recipe's `matching_weight`. Padding is masked in the attention; in the
    published code, the mask of one caption reaches the images of another.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together.

    Examples:
        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.models import AttnGAN, AttnGANConfig
        >>> config = AttnGANConfig(channels=4, resolutions=(8, 16), captioner_backbone="conv")
        >>> model = AttnGAN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> model.generate("a red flower", seed=0).shape
        torch.Size([1, 3, 16, 16])
    """

    config_type = AttnGANConfig
    config: AttnGANConfig

    def build(self, config: AttnGANConfig) -> None:
        """Build conditioning augmentation and generator."""
        self.conditioning = ConditioningAugmentation(config.word_dim, config.condition_dim)
        self.generator = CascadedGenerator(
            config.noise_dim,
            config.condition_dim,
            config.word_dim,
            channels=config.channels,
            resolutions=config.resolutions,
            residual_blocks=config.residual_blocks,
            finest_upsampling=config.finest_upsampling,
            attention="word",
        )

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """One augmented condition; see `TextToImage.conditions`."""
        return [self.conditioning(sentence, noise=noise)]

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
        return self.generator(noise, samples[0], words, word_mask, need_weights=need_weights)
