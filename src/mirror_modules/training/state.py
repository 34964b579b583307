"""The state of an adversarial phase: generator, discriminators, their optimizers, moving average, random generator."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mirror_modules.adversarial import PairedLogits, generator_loss, r1_penalty
from mirror_modules.glam import CascadedGenerator
from mirror_modules.interop.adapters import FAILURES
from mirror_modules.models import EncoderPair, TextToImage
from mirror_modules.models.system import samples_of
from mirror_modules.stem import Condition
from mirror_modules.stream import RedescriptionLoss
from mirror_modules.training.distributed import SINGLE_PROCESS, ProcessGroup
from mirror_modules.training.features import FrozenFeatures, frozen_text
from mirror_modules.training.network import MovingAverage, TrainedNetwork, prepare
from mirror_modules.training.pretrain import GeneratedMatching
from mirror_modules.training.recipes import AdversarialRecipe, EngineRecipe, Recipe


class GeneratedBatch(NamedTuple):
    """Generated images with what else the losses need of the generator."""

    images: list[Tensor]
    """Coarse to fine, in [-1, 1], one per discriminator. Each (B, 3, resolution, resolution)."""
    text: Tensor
    """What the discriminators read of the captions, (B, T)."""
    conditions: list[Condition]
    """The conditions that were drawn."""


class ConditionedGenerator(nn.Module):
    """The generating parts of a system, trained as one network: all but its text encoder and captioner.

    Args:
        model: The system as this phase trains it.
        stages: Number of its finest images that the losses need; None for all.
    """

    def __init__(self, model: TextToImage, stages: int | None = None) -> None:
        super().__init__()
        self._modules.update(model.generator_parts())
        # The same system with these parts alone. Sharing the dictionary keeps both the same in copies, and the tuple
        # keeps the parts from being registered twice.
        view = copy.copy(model)
        view._modules = self._modules
        self.system, self.stages = (view,), stages

    def forward(
        self,
        noise: Tensor,
        condition_noise: Tensor,
        words: Tensor,
        sentence: Tensor,
        word_mask: Tensor,
        location: Tensor | None = None,
    ) -> GeneratedBatch:
        """Generate images, coarse to fine."""
        (system,) = self.system
        conditions = system.conditions(sentence, condition_noise)
        images = system.images(noise, samples_of(conditions), words, word_mask, location).images
        drawn = [each for each in conditions if isinstance(each, Condition)]
        needed = images if self.stages is None else images[-self.stages :]
        return GeneratedBatch(needed, system.discriminator_text(sentence, conditions), drawn)


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

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator: Any = discriminator

    def forward(
        self,
        real: Tensor,
        fake: Tensor,
        text: Tensor,
        mismatched_rows: Tensor | None,
        mismatched_text: Tensor,
        r1: bool,
        location: Tensor | None = None,
    ) -> DiscriminatorOutputs:
        """Compute the logits of real and generated images with their captions, and of mismatched pairs.

        Mismatched pairs are the real images in `mismatched_rows`, in their places, with `mismatched_text`. The features
        of the real images are computed once for matching and mismatched pairs.
        """
        if r1:
            real = real.detach().requires_grad_(True)
        place = () if location is None else (location,)
        real_features, fake_features = self.discriminator.features(real), self.discriminator.features(fake)
        real_logits = self.discriminator.logits(real_features, text, *place)
        fake_logits = self.discriminator.logits(fake_features, text, *place)
        mismatched = real_logits.consistency[:0]
        if mismatched_rows is not None:
            place = () if location is None else (location[mismatched_rows],)
            mismatched = self.discriminator.logits(real_features[mismatched_rows], mismatched_text, *place).consistency
        penalty = r1_penalty(real, real_logits) if r1 else real.new_zeros(())
        return DiscriminatorOutputs(real_logits, fake_logits, mismatched, penalty)


@dataclass
class AdversarialState:
    """Networks, optimizers and random generator of an adversarial phase."""

    model: TextToImage
    """The system as this phase trains it."""
    phase: str
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
        names = [f"discriminator_{resolution}" for resolution in self.resolutions]
        return {"generator": self.generator, **dict(zip(names, self.discriminators))}

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Image sizes of the discriminators, coarse to fine."""
        return self.model.config.trained_resolutions(self.phase)

    @property
    def paired_discriminators(self) -> list[Any]:
        """The discriminators alone, coarse to fine."""
        return [cast(DiscriminatorPass, network.module).discriminator for network in self.discriminators]

    @property
    def stages(self) -> int:
        """Number of stages that the generator runs in training."""
        active = [cascade.active_stages for cascade in self._cascades() if cascade.active_stages is not None]
        return min([len(self.resolutions), *active])

    def set_stages(self, recipe: AdversarialRecipe) -> None:
        """Leave out the finest stage in the first `coarse_steps` steps of the recipe."""
        is_coarse = self.steps_done < recipe.effective_coarse_steps
        for cascade in self._cascades():
            cascade.active_stages = len(cascade.resolutions) - 1 if is_coarse else None

    def _cascades(self) -> list[CascadedGenerator]:
        return [part for part in self.generator.module.modules() if isinstance(part, CascadedGenerator)]

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


def check_system(model: TextToImage, phase: str, location: Tensor | None = None) -> None:
    """Try a system on the meta device, before anything is trained, as one of its adversarial phases uses it.

    A system of a user's own that does not run on this device is not checked further.

    Args:
        model: The system, on the meta device.
        phase: One of `config.adversarial_phases`.
        location: Where the subjects of two images are, in systems that read it.

    Raises:
        ValueError: A method fails, or what it returns does not fit the configuration.
    """
    config, view = model.config, model.trained_in(phase)
    owner, resolutions = f"the system {config.system!r} in phase {phase!r}", config.trained_resolutions(phase)
    generator, discriminators = ConditionedGenerator(view, len(resolutions)), view.discriminators(phase)
    if next(generator.parameters(), None) is None:
        raise ValueError(f"{owner}: the generator has no weights; define its parts as attributes in build.")
    if len(discriminators) != len(resolutions):
        raise ValueError(
            f"{owner}: discriminators must return one for each of config.trained_resolutions, {resolutions}, but there "
            f"are {len(discriminators)}."
        )
    with torch.device("meta"):
        noise, condition_noise = torch.zeros(2, config.noise_dim), torch.zeros(2, config.condition_noise_dim)
        words, sentence = torch.zeros(2, 1, config.word_dim), torch.zeros(2, config.word_dim)
        word_mask = torch.ones(2, 1, dtype=torch.bool)
        place = None if location is None else location.to("meta")
        try:
            fake = generator(noise, condition_noise, words, sentence, word_mask, place)
            shapes = [tuple(images.shape) for images in fake.images]
            if shapes == [(2, 3, size, size) for size in resolutions]:
                for discriminator, images in zip(discriminators, fake.images):
                    outputs = DiscriminatorPass(discriminator)(images, images, fake.text, None, fake.text, False, place)
                    generator_loss(outputs.fake, weighting=config.weighting(phase))
        except FAILURES as error:
            if "meta" in str(error):
                return
            raise ValueError(f"{owner} fails on a batch of 2 captions ({type(error).__name__}: {error}).") from error
    if shapes != [(2, 3, size, size) for size in resolutions]:
        raise ValueError(
            f"{owner}: images must return images (B, 3, size, size) of the sizes {resolutions}, coarse to fine, but "
            f"those of 2 captions are {shapes}."
        )


def start(
    model: TextToImage,
    recipe: Recipe,
    random: torch.Generator,
    group: ProcessGroup = SINGLE_PROCESS,
    text: FrozenFeatures | None = None,
    pair: EncoderPair | None = None,
    *,
    phase: str = "glam",
) -> AdversarialState:
    """Set up an adversarial phase for a model whose text encoder and captioner are trained.

    Args:
        model: The model; it is trained in place.
        recipe: Losses, optimizers and precision.
        random: Generator of noise and mismatched pairs, equally seeded on all ranks.
        group: The process group.
        text: Cached features of the training captions; None encodes captions in each step.
        pair: The encoders of phase `stem`, for the matching loss only.
        phase: The phase; parts of the generator that earlier phases have trained are frozen.

    Raises:
        ValueError: The recipe has a matching loss, but there is no pair.
    """
    glam, engine, phases = recipe.adversarial(phase), recipe.engine, model.config.adversarial_phases
    model.to(group.device)
    frozen: list[nn.Module] = [model.text_encoder, model.captioner]
    for earlier in phases[: phases.index(phase)]:
        frozen += model.trained_in(earlier).generator_parts().values()
    for part in frozen:
        part.requires_grad_(False).eval()
    model = model.trained_in(phase)
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
    generator = ConditionedGenerator(model, len(model.config.trained_resolutions(phase)))
    average = MovingAverage(generator, glam.average_decay)
    if engine.channels_last:
        average.module.to(memory_format=torch.channels_last)
    discriminators = [DiscriminatorPass(discriminator) for discriminator in model.discriminators(phase)]
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
        phase=phase,
        text=text or frozen_text(model.text_encoder),
        generator=prepare(
            generator,
            group,
            engine,
            learning_rate=glam.generator_learning_rate,
            unused=glam.coarse_steps > 0,
            **common,
        ),
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
