"""What the generator's training carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mirror_modules.adversarial import PairedDiscriminator, PairedLogits, r1_penalty
from mirror_modules.models import MirrorGAN
from mirror_modules.stream import RedescriptionLoss
from mirror_modules.training.features import FrozenFeatures, frozen_text
from mirror_modules.training.recipes import EngineRecipe, Recipe
from mirror_modules.training.trainee import MovingAverage, Trainee, enroll
from mirror_modules.training.world import ALONE, World


class Painting(NamedTuple):
    """Generated images with the distribution of their conditions."""

    images: list[Tensor]
    """Coarse to fine, in [-1, 1]."""
    mean: Tensor
    log_variance: Tensor


class Painter(nn.Module):
    """The part of a MirrorGAN that the adversarial phase trains: conditioning and generator."""

    def __init__(self, model: MirrorGAN) -> None:
        super().__init__()
        self.conditioning, self.generator = model.conditioning, model.generator

    def forward(
        self, noise: Tensor, condition_noise: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor
    ) -> Painting:
        """Generate images, coarse to fine."""
        condition = self.conditioning(sentence, noise=condition_noise)
        images = self.generator(noise, condition.sample, words, word_mask).images
        return Painting(images, condition.mean, condition.log_variance)


class Verdicts(NamedTuple):
    """What a discriminator says of real, generated and mismatched pairs."""

    real: PairedLogits
    fake: PairedLogits
    mismatched: Tensor
    """Consistency of real images with another image's sentence, any number of them."""
    penalty: Tensor
    """The R1 penalty, 0 where it was not asked for."""


class Judge(nn.Module):
    """All that a discriminator judges in one step, in one forward pass; real images are looked at once."""

    def __init__(self, discriminator: PairedDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(
        self, real: Tensor, fake: Tensor, sentence: Tensor, wrong: Tensor | None, wrong_sentence: Tensor, r1: bool
    ) -> Verdicts:
        """Judge real and generated images with their sentences, and the real ones of rows `wrong` with wrong ones."""
        if r1:
            real = real.detach().requires_grad_(True)
        real_features, fake_features = self.discriminator.features(real), self.discriminator.features(fake)
        real_verdict = self.discriminator.judge(real_features, sentence)
        fake_verdict = self.discriminator.judge(fake_features, sentence)
        mismatched = real_verdict.consistency[:0]
        if wrong is not None:
            mismatched = self.discriminator.judge(real_features[wrong], wrong_sentence).consistency
        penalty = r1_penalty(real, real_verdict) if r1 else real.new_zeros(())
        return Verdicts(real_verdict, fake_verdict, mismatched, penalty)


@dataclass
class AdversarialState:
    """Networks, optimizers and random source of phase `glam`."""

    model: MirrorGAN
    text: FrozenFeatures
    """Word and sentence features of a batch's captions."""
    painter: Trainee
    average: MovingAverage
    judges: list[Trainee]
    redescription: RedescriptionLoss | None
    random: torch.Generator
    """The same on all ranks: each draw is made for the whole batch."""
    world: World
    engine: EngineRecipe
    steps_done: int = 0

    def trainees(self) -> dict[str, Trainee]:
        """All networks in training by their names."""
        names = [f"discriminator_{resolution}" for resolution in self.model.config.resolutions]
        return {"painter": self.painter, **dict(zip(names, self.judges))}

    @property
    def discriminators(self) -> list[PairedDiscriminator]:
        """The judges' networks, coarse to fine."""
        return [cast(Judge, judge.module).discriminator for judge in self.judges]

    def draw(self, rows: int, features: int) -> Tensor:
        """Standard normal noise for this rank's rows of the batch."""
        whole = torch.randn(rows * self.world.size, features, generator=self.random)
        return self.world.rows(whole).to(self.world.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides the frozen networks."""
        return {
            "trainees": {name: trainee.state_dict() for name, trainee in self.trainees().items()},
            "average": self.average.state_dict(),
            "random": self.random.get_state(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, trainee in self.trainees().items():
            trainee.load_state_dict(state["trainees"][name])
        self.average.load_state_dict(state["average"])
        self.random.set_state(state["random"])
        self.steps_done = state["steps_done"]


def start(
    model: MirrorGAN, recipe: Recipe, random: torch.Generator, world: World = ALONE, text: FrozenFeatures | None = None
) -> AdversarialState:
    """Set up the adversarial phase around a model whose text encoder and captioner are trained.

    Args:
        model: The model; it is trained in place.
        recipe: What to train, and how.
        random: Source of noise and pairs, equally seeded on all ranks.
        world: Where it is trained.
        text: Features of the captions that will be asked for; None encodes them in each step.
    """
    config, glam, engine = model.config, recipe.glam, recipe.engine
    model.to(world.device)
    for frozen in (model.text_encoder, model.captioner):
        frozen.requires_grad_(False).eval()
    redescription = None
    # None goes with a ratio.
    if glam.redescription_weight != 0:
        redescription = RedescriptionLoss(model.captioner, reduction=glam.redescription_reduction)
        if engine.channels_last:
            redescription.to(memory_format=torch.channels_last)
    painter = Painter(model)
    average = MovingAverage(painter, glam.average_decay)
    if engine.channels_last:
        average.module.to(memory_format=torch.channels_last)
    judges = [
        Judge(
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
        for judge in judges:
            # The generator's half of a step asks it alone.
            judge.discriminator.compile()
    common: dict[str, Any] = {
        "largest_gradient_norm": glam.largest_gradient_norm,
        "betas": (0.5, 0.999),
        "compiled": engine.compile,
    }
    return AdversarialState(
        model=model,
        text=text or frozen_text(model.text_encoder),
        painter=enroll(painter, world, engine, learning_rate=glam.generator_learning_rate, **common),
        average=average,
        judges=[
            enroll(judge, world, engine, learning_rate=glam.discriminator_learning_rate, **common) for judge in judges
        ],
        redescription=redescription,
        random=random,
        world=world,
        engine=engine,
    )
