"""The state of the adversarial phase: generator, discriminators, their optimizers, moving average, random generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mirror_modules.adversarial import PairedDiscriminator, PairedLogits, r1_penalty
from mirror_modules.models import MirrorGAN
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.stream import RedescriptionLoss
from mirror_modules.training.distributed import SINGLE_PROCESS, ProcessGroup
from mirror_modules.training.features import FrozenFeatures, frozen_text
from mirror_modules.training.network import MovingAverage, TrainedNetwork, prepare
from mirror_modules.training.pretrain import GeneratedMatching
from mirror_modules.training.recipes import EngineRecipe, Recipe


class GeneratedBatch(NamedTuple):
    """Generated images with the distribution of their conditions."""

    images: list[Tensor]
    """Coarse to fine, in [-1, 1]. Each (B, 3, resolution, resolution)."""
    mean: Tensor
    """(B, E)"""
    log_variance: Tensor
    """(B, E)"""


class ConditionedGenerator(nn.Module):
    """Conditioning augmentation and generator of a MirrorGAN, trained as one network."""

    def __init__(self, model: MirrorGAN) -> None:
        super().__init__()
        self.conditioning, self.generator = model.conditioning, model.generator

    def forward(
        self, noise: Tensor, condition_noise: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor
    ) -> GeneratedBatch:
        """Generate images, coarse to fine."""
        condition = self.conditioning(sentence, noise=condition_noise)
        images = self.generator(noise, condition.sample, words, word_mask).images
        return GeneratedBatch(images, condition.mean, condition.log_variance)


class DiscriminatorOutputs(NamedTuple):
    """Logits of real, generated and mismatched pairs, and the R1 penalty."""

    real: PairedLogits
    fake: PairedLogits
    mismatched: Tensor
    """Consistency logits of the mismatched pairs, (number of pairs,)."""
    penalty: Tensor
    """0 in steps without R1."""


class DiscriminatorPass(nn.Module):
    """All logits that a discriminator's loss needs in a single forward, as DistributedDataParallel requires."""

    def __init__(self, discriminator: PairedDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(
        self,
        real: Tensor,
        fake: Tensor,
        sentence: Tensor,
        mismatched_rows: Tensor | None,
        mismatched_sentence: Tensor,
        r1: bool,
    ) -> DiscriminatorOutputs:
        """Compute the logits of real and generated images with their sentences, and of mismatched pairs.

        Mismatched pairs are the real images in `mismatched_rows` with `mismatched_sentence`. The features of the real
        images are computed once for matching and mismatched pairs.
        """
        if r1:
            real = real.detach().requires_grad_(True)
        real_features, fake_features = self.discriminator.features(real), self.discriminator.features(fake)
        real_logits = self.discriminator.logits(real_features, sentence)
        fake_logits = self.discriminator.logits(fake_features, sentence)
        mismatched = real_logits.consistency[:0]
        if mismatched_rows is not None:
            mismatched = self.discriminator.logits(real_features[mismatched_rows], mismatched_sentence).consistency
        penalty = r1_penalty(real, real_logits) if r1 else real.new_zeros(())
        return DiscriminatorOutputs(real_logits, fake_logits, mismatched, penalty)


@dataclass
class AdversarialState:
    """Networks, optimizers and random generator of phase `glam`."""

    model: MirrorGAN
    text: FrozenFeatures
    """Word and sentence features of a batch's captions."""
    generator: TrainedNetwork
    """A `ConditionedGenerator`."""
    average: MovingAverage
    """Moving average of the generator."""
    discriminators: list[TrainedNetwork]
    """Each a `DiscriminatorPass`, coarse to fine."""
    redescription: RedescriptionLoss | None
    matching: GeneratedMatching | None
    random: torch.Generator
    """Equal on all ranks: each draw is made for the whole batch."""
    group: ProcessGroup
    engine: EngineRecipe
    steps_done: int = 0

    def networks(self) -> dict[str, TrainedNetwork]:
        """All trained networks by name."""
        names = [f"discriminator_{resolution}" for resolution in self.model.config.resolutions]
        return {"generator": self.generator, **dict(zip(names, self.discriminators))}

    @property
    def paired_discriminators(self) -> list[PairedDiscriminator]:
        """The discriminators alone, coarse to fine."""
        return [cast(DiscriminatorPass, network.module).discriminator for network in self.discriminators]

    def draw(self, rows: int, features: int) -> Tensor:
        """Standard normal noise (rows, features) for this rank's rows of the batch."""
        whole = torch.randn(rows * self.group.world_size, features, generator=self.random)
        return self.group.local_rows(whole).to(self.group.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on except frozen networks."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks().items()},
            "average": self.average.state_dict(),
            "random": self.random.get_state(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        for name, network in self.networks().items():
            network.load_state_dict(state["networks"][name])
        self.average.load_state_dict(state["average"])
        self.random.set_state(state["random"])
        self.steps_done = state["steps_done"]


def start(
    model: MirrorGAN,
    recipe: Recipe,
    random: torch.Generator,
    group: ProcessGroup = SINGLE_PROCESS,
    text: FrozenFeatures | None = None,
    pair: EncoderPair | None = None,
) -> AdversarialState:
    """Set up the adversarial phase for a model whose text encoder and captioner are trained.

    Args:
        model: The model; it is trained in place.
        recipe: Losses, optimizers and precision.
        random: Generator of noise and mismatched pairs, equally seeded on all ranks.
        group: The process group.
        text: Cached features of the training captions; None encodes captions in each step.
        pair: The encoders of phase `stem`, for the matching loss only.

    Raises:
        ValueError: The recipe has a matching loss, but there is no pair.
    """
    config, glam, engine = model.config, recipe.glam, recipe.engine
    model.to(group.device)
    for frozen in (model.text_encoder, model.captioner):
        frozen.requires_grad_(False).eval()
    redescription = None
    # The weight is None if a ratio is given instead.
    if glam.redescription_weight != 0:
        redescription = RedescriptionLoss(model.captioner, reduction=glam.redescription_reduction)
        if engine.channels_last:
            redescription.to(memory_format=torch.channels_last)
    matching = None
    if glam.has_matching:
        if pair is None:
            raise ValueError("start: the matching loss needs the encoders of phase `stem`; pass pair=EncoderPair(...).")
        matching = GeneratedMatching(pair.image_encoder, recipe.stem, group).to(group.device)
        if engine.channels_last:
            matching.to(memory_format=torch.channels_last)
    generator = ConditionedGenerator(model)
    average = MovingAverage(generator, glam.average_decay)
    if engine.channels_last:
        average.module.to(memory_format=torch.channels_last)
    discriminators = [
        DiscriminatorPass(
            PairedDiscriminator(
                resolution,
                config.word_dim,
                channels=config.discriminator_channels,
                normalization=config.discriminator_normalization,
            )
        )
        for resolution in config.resolutions
    ]
    if engine.compile:
        for module in discriminators:
            # The generator update calls the discriminator itself, without the wrapper.
            module.discriminator.compile()
    common: dict[str, Any] = {
        "max_grad_norm": glam.max_grad_norm,
        "betas": (0.5, 0.999),
        "compiled": engine.compile,
    }
    return AdversarialState(
        model=model,
        text=text or frozen_text(model.text_encoder),
        generator=prepare(generator, group, engine, learning_rate=glam.generator_learning_rate, **common),
        average=average,
        discriminators=[
            prepare(module, group, engine, learning_rate=glam.discriminator_learning_rate, **common)
            for module in discriminators
        ],
        redescription=redescription,
        matching=matching,
        random=random,
        group=group,
        engine=engine,
    )
