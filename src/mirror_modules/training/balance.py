"""How strongly the redescription loss pulls at the images, beside the discriminator, and a weight that keeps it so."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules.training.world import World

# A tenth of the way in each step: batches differ, and a weight that jumps with them would make noise of its own.
RATE = 0.1


class GradientBalance:
    """The weight of a loss whose gradient at the generated images is compared with the adversarial one.

        r = |weight * dL / dI| / |dL_adv / dI|,    weight <- weight * (ratio / r) ** 0.1    after each step

    The norms are those of the whole batch, at its finest images. They are taken from the backward pass that trains the
    generator, so that they cost nothing.

    Args:
        weight: The first weight.
        ratio: What r shall be; None keeps the weight as it is.
        world: Whose images they are.
    """

    def __init__(self, weight: float, ratio: float | None, world: World) -> None:
        self.weight = torch.tensor(weight, device=world.device)
        self.ratio, self.world = ratio, world
        self._watched: list[tuple[Tensor, Tensor]] = []

    def watch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same images twice: for the discriminator, and for the loss with the weight."""
        judged, read = images.view_as(images), images.view_as(images)
        judged.retain_grad()
        read.retain_grad()
        self._watched.append((judged, read))
        return judged, read

    @torch.no_grad()
    def follow(self, finite: Tensor) -> Tensor:
        """Move the weight, unless the step was skipped; returns r of this step."""
        gradients = [[images.grad for images in pair if images.grad is not None] for pair in self._watched]
        self._watched.clear()
        squares = torch.stack([torch.stack([each.float().square().sum() for each in pair]) for pair in gradients])
        judged, read = self.world.sum(squares.sum(dim=0))
        found = (read / judged).sqrt()
        if self.ratio is not None:
            moved = self.weight * (self.ratio / found) ** RATE
            # Where one of the two is silent, there is nothing to follow.
            self.weight = torch.where(finite & moved.isfinite() & (moved > 0), moved, self.weight)
        return found
