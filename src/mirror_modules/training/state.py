"""What the generator's training carries from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.models import MirrorGAN
from mirror_modules.stream import RedescriptionLoss
from mirror_modules.training.recipes import AdversarialRecipe


class Painter(nn.Module):
    """The part of a MirrorGAN that the adversarial phase trains: conditioning and generator."""

    def __init__(self, model: MirrorGAN) -> None:
        super().__init__()
        self.conditioning, self.generator = model.conditioning, model.generator


@dataclass
class AdversarialState:
    """Networks, optimizers and random source of phase `glam`."""

    model: MirrorGAN
    painter: Painter
    average: AveragedModel
    discriminators: list[PairedDiscriminator]
    redescription: RedescriptionLoss | None
    painter_optimizer: torch.optim.Optimizer
    discriminator_optimizers: list[torch.optim.Optimizer]
    random: torch.Generator


def start(model: MirrorGAN, recipe: AdversarialRecipe, random: torch.Generator) -> AdversarialState:
    """Set up the adversarial phase around a model whose text encoder and captioner are trained."""
    config, device = model.config, model.device
    # Channels last: about a tenth faster on CPUs, more on GPUs with tensor cores.
    painter = Painter(model).to(memory_format=torch.channels_last)
    discriminators = [
        PairedDiscriminator(resolution, config.word_dim, channels=config.discriminator_channels)
        .to(device)
        .to(memory_format=torch.channels_last)
        for resolution in config.resolutions
    ]
    model.text_encoder.requires_grad_(False).eval()
    redescription = None
    if recipe.redescription_weight > 0:
        redescription = RedescriptionLoss(model.captioner, reduction=recipe.redescription_reduction)
    return AdversarialState(
        model=model,
        painter=painter,
        average=AveragedModel(painter, avg_fn=moving_average(recipe.average_decay), use_buffers=True),
        discriminators=discriminators,
        redescription=redescription,
        painter_optimizer=_adam(painter, recipe.generator_learning_rate),
        discriminator_optimizers=[_adam(net, recipe.discriminator_learning_rate) for net in discriminators],
        random=random,
    )


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An averaging function for `AveragedModel` that starts quickly: the decay of update n is min(decay, (1+n)/(10+n)).

    Batch-norm statistics are averaged with the parameters; the published code pairs averaged parameters with the live
    network's statistics.
    """

    def update(average: Tensor, value: Tensor, updates: Tensor | int) -> Tensor:
        if not average.is_floating_point():
            return value
        count = float(updates)
        return average.lerp(value, 1 - min(decay, (1 + count) / (10 + count)))

    return update


def _adam(module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=learning_rate, betas=(0.5, 0.999))
