"""PPGN: an unconditional generator whose latents are optimized to fit a caption (Nguyen et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirror_modules._checks import check_batch, check_number, check_positive, check_tensors
from mirror_modules._freezing import evaluating
from mirror_modules.adversarial import AdversarialWeights
from mirror_modules.glam import CascadedGenerator, GeneratedImages
from mirror_modules.models.config import NarrowingConfig, Weighting
from mirror_modules.models.registry import register_system
from mirror_modules.models.system import samples_of
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition
from mirror_modules.stream import LatentSampler, LatentSamples, RedescriptionScore, append_end


@dataclass(frozen=True)
class PPGNConfig(NarrowingConfig):
    """Sizes and options of a `PPGN`; the default sizes are those of StackGAN++ without text.

    Raises:
        ValueError: `resolutions` are no sizes, `channels` cannot be halved from stage to stage, or an option of
            sampling is out of range.

    Examples:
        >>> from mirror_modules.models import PPGNConfig
        >>> PPGNConfig(channels=32).stage_channels
        (32, 16, 8)
    """

    system = "ppgn"
    attends = False
    samples_with_captioner = True

    sampling_steps: int = 50
    """Updates of the latents for each image."""
    sampling_step_size: float = 0.2
    """Mean absolute change of a latent in the first update; it decreases linearly to 0."""
    prior_weight: float = 0.1
    """Weight of the pull to standard normal latents, where the gradient of the log likelihood of the caption has 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "PPGNConfig"
        check_positive(owner, sampling_steps=self.sampling_steps)
        for name in ("sampling_step_size", "prior_weight"):
            value = getattr(self, name)
            check_number(owner, **{name: value})
            if value < 0:
                raise ValueError(f"{owner}: {name} must be 0 or more, but it is {value!r}.")

    @property
    def condition_noise_dim(self) -> int:
        """There is no condition."""
        return 0

    def weighting(self, phase: str) -> Weighting:
        """Realism alone: neither generator nor discriminators see captions."""
        return AdversarialWeights(0, 0, 0, 1, 1, 0)


def sample_latents(
    model: TextToImage,
    tokens: Tensor,
    word_mask: Tensor,
    noise: Tensor,
    condition_noise: Tensor,
    *,
    steps: int = 50,
    step_size: float = 0.2,
    prior_weight: float = 0.1,
    location: Tensor | None = None,
) -> LatentSamples:
    """Move the noise of any system to where its captioner finds the captions more likely (PPGN, Sec. 3.3).

    The images are generated in evaluation mode; no weight changes.

    Args:
        model: The system, with or without a text encoder that its generator reads.
        tokens: Token ids, (B, L), as `Vocabulary.encode` returns them.
        word_mask: True for a real word, (B, L).
        noise: Standard normal, the start, (B, config.noise_dim).
        condition_noise: The same for the conditions, (B, config.condition_noise_dim).
        steps: Number of updates.
        step_size: Mean absolute change of a latent in the first update; it decreases linearly to 0.
        prior_weight: Weight of the pull to standard normal latents.
        location: Where to place the subject, (B, ...), in systems that take it.

    Returns:
        Noise and condition noise side by side, and the log likelihoods of the captions, end token included, in nats per
        token.

    Raises:
        ValueError: A weight or a size is not positive, sizes disagree, or the model was loaded without its captioner.

    Examples:
        >>> import torch
        >>> from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
        >>> from mirror_modules.models import sample_latents
        >>> config = MirrorGANConfig(channels=4, resolutions=(16,), captioner_backbone="conv")
        >>> model = MirrorGAN(config, Vocabulary.build(["a small red flower"]))
        >>> captions = model.vocabulary.encode(["a red flower"])
        >>> samples = sample_latents(model, *captions, torch.randn(1, 100), torch.randn(1, 100), steps=3)
        >>> samples.latents.shape, samples.log_likelihood.shape
        (torch.Size([1, 200]), torch.Size([4, 1]))
    """
    owner = "sample_latents"
    if not isinstance(model, TextToImage) or not {"text_encoder", "captioner"} <= dict(model.named_children()).keys():
        raise ValueError(
            f"{owner}: model must be a text-to-image system with its captioner, but it is a {type(model).__name__} "
            "without one; load it without `only`."
        )
    check_tensors(owner, tokens=tokens, noise=noise, condition_noise=condition_noise)
    check_batch(owner, tokens=tokens, noise=noise, condition_noise=condition_noise)
    model.check_location(owner, location, len(tokens))
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.captioner.parameters()]
    try:
        with evaluating(model):
            # The score freezes the captioner, with recurrent layers in the training mode that cuDNN's backward needs.
            score = RedescriptionScore(model.captioner, check=False)
            with torch.no_grad():
                words, sentence = model.text_encoder(tokens, word_mask)

            def make(latents: Tensor) -> Tensor:
                drawn, drawn_condition = latents.split((noise.shape[1], condition_noise.shape[1]), dim=1)
                samples = samples_of(model.conditions(sentence, drawn_condition))
                places = model.complete_location(location, sentence, drawn_condition)
                return model.images(drawn, samples, words, word_mask, places).images[-1]

            sampler = LatentSampler(
                make,
                lambda images: score(images, *append_end(tokens, word_mask)),
                prior_weight=prior_weight,
                steps=steps,
                step_sizes=(step_size, 0.0),
            )
            return sampler(torch.cat((noise, condition_noise), dim=1))
    finally:
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)


@register_system
class PPGN(TextToImage):
    """A generator that reads no text; its captioner alone makes its images fit a caption, while they are generated.

        I = G(h),    h <- h + a (R(h) - h) + d log p(caption | G(h)) / dh    from noise h on, step by step

    R(h) = h / 2 is the optimal denoiser of standard normal latents. Phase `glam` trains the generator against
    discriminators of realism. `sample_latents` does the same with the generator of any other system.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together.

    Examples:
        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.models import PPGN, PPGNConfig
        >>> config = PPGNConfig(channels=4, resolutions=(8, 16), sampling_steps=3, captioner_backbone="conv")
        >>> model = PPGN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> model.generate("a red flower", seed=0).shape
        torch.Size([1, 3, 16, 16])
    """

    config_type = PPGNConfig
    config: PPGNConfig

    def build(self, config: PPGNConfig) -> None:
        """Build the generator."""
        self.generator = CascadedGenerator(
            config.noise_dim,
            None,
            channels=config.stage_channels,
            resolutions=config.resolutions,
            residual_blocks=config.residual_blocks,
            attention="condition",
        )

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """None; see `TextToImage.conditions`."""
        return []

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
        """Images of latents, without any caption; see `TextToImage.images`."""
        return self.generator(noise)

    def forward(
        self,
        tokens: Tensor,
        word_mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        condition_noise: Tensor | None = None,
        location: Tensor | None = None,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Sample latents for captions and generate their images; see `TextToImage.forward`."""
        self._require("PPGN", "images")
        if noise is None:
            noise = torch.randn(len(tokens), self.config.noise_dim).to(self.text_encoder.embedding.weight)
        config = self.config
        samples = sample_latents(
            self,
            tokens,
            torch.ones_like(tokens, dtype=torch.bool) if word_mask is None else word_mask,
            noise,
            noise[:, :0],
            steps=config.sampling_steps,
            step_size=config.sampling_step_size,
            prior_weight=config.prior_weight,
            location=location,
        )
        with evaluating(self):
            return self.generator(samples.latents)
