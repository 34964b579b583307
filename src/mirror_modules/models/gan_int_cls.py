"""GAN-INT-CLS: images from a sentence by transposed convolutions (Reed et al., ICML 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.glam import DeconvolutionGenerator, GeneratedImages
from mirror_modules.models.config import ModelConfig, Weighting
from mirror_modules.models.registry import register_system
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition, SentenceProjection


@dataclass(frozen=True)
class GANIntCLSConfig(ModelConfig):
    """Sizes of a `GANIntCLS`; the default sizes are those published for birds and flowers.

    Raises:
        ValueError: `resolutions` has not exactly one size.

    Examples:
        >>> from mirror_modules.models import GANIntCLSConfig
        >>> GANIntCLSConfig().resolutions
        (64,)
    """

    system = "gan-int-cls"
    attends = False

    word_dim: int = 1024
    """Features D of a word and of the sentence."""
    condition_dim: int = 128
    """Features E to which generator and discriminator each project the sentence."""
    channels: int = 128
    """Channels C of the last map of the generator before the image; the first has 2**(number of doublings) as many."""
    resolutions: tuple[int, ...] = (64,)
    """The size of the images in pixels."""
    bottlenecks: int = 2
    """Maps of the generator, from 4 x 4 on, that pass a residual block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.resolutions) != 1:
            raise ValueError(
                f"GANIntCLSConfig: resolutions must be one image size, such as (64,), but they are {self.resolutions}."
            )

    @property
    def condition_noise_dim(self) -> int:
        """The condition is not drawn."""
        return 0

    def weighting(self, phase: str) -> Weighting:
        """Consistency alone, with real pairs against the mean of generated and mismatched ones."""
        return "gan-int-cls"


@register_system
class GANIntCLS(TextToImage):
    """A generator of transposed convolutions, whose discriminator scores pairs of image and sentence alone.

        s = LeakyReLU(W sentence + b),    I = G(noise, s)

    The sentences of generated images are also mixed in pairs ("INT") with the recipe's `interpolation_weight`, and the
    discriminator learns from mismatched pairs ("CLS"), whose images are of other classes.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together.

    Examples:
        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.models import GANIntCLS, GANIntCLSConfig
        >>> config = GANIntCLSConfig(channels=4, resolutions=(16,), captioner_backbone="conv")
        >>> model = GANIntCLS(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> model.generate("a red flower", seed=0).shape
        torch.Size([1, 3, 16, 16])
    """

    config_type = GANIntCLSConfig
    config: GANIntCLSConfig

    def build(self, config: GANIntCLSConfig) -> None:
        """Build sentence projection and generator."""
        self.conditioning = SentenceProjection(config.word_dim, config.condition_dim)
        self.generator = DeconvolutionGenerator(
            config.noise_dim,
            config.condition_dim,
            channels=config.channels,
            resolution=config.resolutions[0],
            bottlenecks=config.bottlenecks,
        )

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """One projected sentence; see `TextToImage.conditions`."""
        return [self.conditioning(sentence)]

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
        """Images of one size; see `TextToImage.images`."""
        return self.generator(noise, samples[0])

    def discriminators(self, phase: str = "glam") -> list[nn.Module]:
        """One discriminator without realism, which projects the sentence itself; see `TextToImage.discriminators`."""
        config = self.config
        discriminator = PairedDiscriminator(
            config.resolutions[0],
            config.word_dim,
            channels=config.discriminator_channels,
            normalization=config.discriminator_normalization,
            realism=False,
            text_projection=config.condition_dim,
            joint_kernel=1,
            residual_block=True,
        )
        return [discriminator]
