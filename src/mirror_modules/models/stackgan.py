"""StackGAN: two stages, trained one after the other (Zhang et al., ICCV 2017)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.glam import CascadedGenerator, GeneratedImages, ImageRefinementStage
from mirror_modules.models.config import ModelConfig, Weighting
from mirror_modules.models.registry import register_system
from mirror_modules.models.system import means_of
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition, ConditioningAugmentation


@dataclass(frozen=True)
class StackGANConfig(ModelConfig):
    """Sizes and options of a `StackGAN`; the default sizes are those of the published code in PyTorch.

    Raises:
        ValueError: `resolutions` are not two sizes, the second a multiple of the first by a power of two.

    Examples:
        >>> from mirror_modules.models import StackGANConfig
        >>> StackGANConfig().resolutions, StackGANConfig.coco().channels
        ((64, 256), 192)
    """

    system = "stackgan"
    attends = False
    adversarial_phases = ("first_stage", "glam")

    word_dim: int = 1024
    """Features D of a word and of the sentence."""
    condition_dim: int = 128
    """Features E of the condition of each stage."""
    channels: int = 128
    """Channels C of the first convolution of the second stage; the first stage ends with half of them."""
    resolutions: tuple[int, ...] = (64, 256)
    """Image sizes of the two stages in pixels."""
    residual_blocks: int = 4
    """Residual blocks of the second stage."""
    halvings: int = 2
    """How often the second stage halves the size of the coarse image before it doubles it again."""
    conditioning: Literal["leaky_relu", "relu", "glu"] = "leaky_relu"
    """Activation of the conditioning augmentation. "relu" is that of the published code in PyTorch, whose deviations
    are never below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio, rest = divmod(self.resolutions[-1], self.resolutions[0])
        if len(self.resolutions) != 2 or rest or ratio < 2 or ratio & (ratio - 1):
            raise ValueError(
                "StackGANConfig: resolutions must be two image sizes, the second 2, 4, 8 ... times the first, such as "
                f"(64, 256), but they are {self.resolutions}."
            )

    @property
    def condition_noise_dim(self) -> int:
        """Each stage draws its own condition."""
        return 2 * self.condition_dim

    def trained_resolutions(self, phase: str) -> tuple[int, ...]:
        """The size of the stage that a phase trains."""
        return self.resolutions[:1] if phase == "first_stage" else self.resolutions[1:]

    def weighting(self, phase: str) -> Weighting:
        """Consistency alone in the first stage; with realism in the second."""
        return "gan-int-cls" if phase == "first_stage" else "release"

    @classmethod
    def coco(cls, **changes: Any) -> StackGANConfig:
        """Preset: the published sizes for COCO. `changes` override single fields."""
        return cls(**{"channels": 192, "discriminator_channels": 96, "residual_blocks": 2, **changes})


@register_system
class StackGAN(TextToImage):
    """A first stage for coarse images, and a second one that refines them, each with a condition of its own.

        s, s' = N(mu(sentence), sigma(sentence)^2), N(mu'(sentence), sigma'(sentence)^2)
        I = G(noise, s),    I' = G'(I, s')

    Phase `first_stage` trains G, and phase `glam` G' with G frozen, in evaluation mode: in the published code, its
    batch statistics change in the second phase. The discriminators read the mean of the condition, without a gradient.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together.

    Examples:
        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.models import StackGAN, StackGANConfig
        >>> config = StackGANConfig(channels=4, resolutions=(16, 32), halvings=1, captioner_backbone="conv")
        >>> model = StackGAN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> [tuple(images.shape) for images in model.generate_stages("a red flower", seed=0).images]
        [(1, 3, 16, 16), (1, 3, 32, 32)]
    """

    config_type = StackGANConfig
    config: StackGANConfig
    # True in the view that phase `first_stage` trains.
    is_first_stage = False

    def build(self, config: StackGANConfig) -> None:
        """Build conditioning augmentation and generator of each stage."""
        coarse, fine = config.resolutions
        sizes = (config.word_dim, config.condition_dim)
        self.first_conditioning = ConditioningAugmentation(*sizes, activation=config.conditioning)
        self.first_stage = CascadedGenerator(
            config.noise_dim,
            config.condition_dim,
            channels=config.channels // 2,
            resolutions=(coarse,),
            attention="condition",
            activation="relu",
        )
        self.conditioning = ConditioningAugmentation(*sizes, activation=config.conditioning)
        self.second_stage = ImageRefinementStage(
            config.condition_dim,
            channels=config.channels,
            halvings=config.halvings,
            doublings=config.halvings + (fine // coarse).bit_length() - 1,
            residual_blocks=config.residual_blocks,
        )

    def trained_in(self, phase: str) -> Self:
        """The first stage alone for its phase; see `TextToImage.trained_in`."""
        view = copy.copy(self)
        view.is_first_stage = phase == "first_stage"
        return view

    def generator_parts(self) -> dict[str, nn.Module]:
        """The parts of both stages, or of the first; see `TextToImage.generator_parts`."""
        first: dict[str, nn.Module] = {"first_conditioning": self.first_conditioning, "first_stage": self.first_stage}
        return first if self.is_first_stage else super().generator_parts()

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """A condition for each stage, of which that of a frozen stage is just a sample."""
        of_first, of_second = noise.chunk(2, dim=1)
        first = self.first_conditioning(sentence, noise=of_first)
        return [first] if self.is_first_stage else [first.sample, self.conditioning(sentence, noise=of_second)]

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
        """Images of both stages, or of the first; see `TextToImage.images`."""
        generated = self.first_stage(noise, samples[0])
        if not self.is_first_stage:
            generated.images.append(self.second_stage(generated.images[0], samples[1]))
        return generated

    def discriminators(self, phase: str = "glam") -> list[nn.Module]:
        """A discriminator of the phase's stage, in the first one without realism; see `TextToImage.discriminators`."""
        config = self.config
        (resolution,) = config.trained_resolutions(phase)
        discriminator = PairedDiscriminator(
            resolution,
            config.condition_dim,
            channels=config.discriminator_channels,
            normalization=config.discriminator_normalization,
            realism=phase != "first_stage",
        )
        return [discriminator]

    def discriminator_text(self, sentence: Tensor, conditions: Sequence[Condition | Tensor]) -> Tensor:
        """The mean of the stage's condition, detached; see `TextToImage.discriminator_text`."""
        return means_of(conditions)[-1].detach()
