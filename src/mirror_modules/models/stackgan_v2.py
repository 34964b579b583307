"""StackGAN++: three stages trained jointly, each of which reads the condition (Zhang et al., TPAMI 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.glam import CascadedGenerator, GeneratedImages
from mirror_modules.models.config import NarrowingConfig, Weighting
from mirror_modules.models.registry import register_system
from mirror_modules.models.system import means_of
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition, ConditioningAugmentation


@dataclass(frozen=True)
class StackGANv2Config(NarrowingConfig):
    """Sizes of a `StackGANv2`; the default sizes are those published for birds.

    Raises:
        ValueError: `resolutions` are no image sizes, or `channels` cannot be halved from stage to stage.

    Examples:
        >>> from mirror_modules.models import StackGANv2Config
        >>> StackGANv2Config(channels=32).stage_channels
        (32, 16, 8)
    """

    system = "stackgan-v2"
    attends = False

    word_dim: int = 1024
    """Features D of a word and of the sentence."""
    condition_dim: int = 128
    """Features E of the condition."""

    def weighting(self, phase: str) -> Weighting:
        """All terms with weight 1, the realism of mismatched images among them."""
        return "stackgan++"


@register_system
class StackGANv2(TextToImage):
    """A cascade whose stages are all given the condition, at every position, and that reads no words.

        s = N(mu(sentence), sigma(sentence)^2),    I_0, I_1, I_2 = G(noise, s)

    The discriminators read the mean of the condition, which also receives a gradient from the generator's loss. The
    difference of colors between the stages is the recipe's `color_weight`, 0 in the published configuration with text.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together.

    Examples:
        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.models import StackGANv2, StackGANv2Config
        >>> config = StackGANv2Config(channels=4, resolutions=(8, 16), captioner_backbone="conv")
        >>> model = StackGANv2(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> model.generate("a red flower", seed=0).shape
        torch.Size([1, 3, 16, 16])
    """

    config_type = StackGANv2Config
    config: StackGANv2Config

    def build(self, config: StackGANv2Config) -> None:
        """Build conditioning augmentation and generator."""
        self.conditioning = ConditioningAugmentation(config.word_dim, config.condition_dim)
        self.generator = CascadedGenerator(
            config.noise_dim,
            config.condition_dim,
            channels=config.stage_channels,
            resolutions=config.resolutions,
            residual_blocks=config.residual_blocks,
            attention="condition",
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
        return self.generator(noise, samples[0])

    def discriminators(self, phase: str = "glam") -> list[nn.Module]:
        """Discriminators of the condition; see `TextToImage.discriminators`."""
        config = self.config
        return [
            PairedDiscriminator(
                resolution,
                config.condition_dim,
                channels=config.discriminator_channels,
                normalization=config.discriminator_normalization,
            )
            for resolution in config.resolutions
        ]

    def discriminator_text(self, sentence: Tensor, conditions: Sequence[Condition | Tensor]) -> Tensor:
        """The mean of the condition; see `TextToImage.discriminator_text`."""
        return means_of(conditions)[0]
