"""A network in training: how it is laid out and wrapped, how it descends, and what is kept of it.

A step whose loss or gradient is not finite must change nothing. Whether it is so is known to the device alone, for
which nobody should wait: optimizers and averages are told on the device, and the count of skipped steps is read where
losses are logged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mirror_modules.training.recipes import EngineRecipe
from mirror_modules.training.synchronized_norm import synchronize_batch_norm
from mirror_modules.training.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Outcome(NamedTuple):
    """What a step of a phase gives back."""

    losses: dict[str, Tensor]
    """Figures of the step by name, detached scalars on their device."""
    finite: Tensor
    """Whether all losses and gradients were, a bool on the device. A network with one that was not has not moved, nor
    has any that came after it in the step, nor any statistics."""


@dataclass
class Trainee:
    """A network with its optimizer."""

    module: nn.Module
    """The network; its weights are what is kept."""
    parallel: nn.Module
    """What is called in training: the network, its gradients averaged over the ranks where there are several."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    """The step size over time; None leaves it as it is."""
    scaler: torch.amp.GradScaler
    """Scales losses in float16, whose gradients would vanish; does nothing in other precisions."""
    largest_gradient_norm: float | None
    world: World
    learning_rate: float = 0.0
    """The step size of the last step."""

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient."""
        self.scaler.scale(loss).backward()

    def descend(self, loss: Tensor, so_far: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Take one step along the gradient, unless it or the loss is not finite.

        Args:
            loss: What the gradient is of.
            so_far: Whether all was finite in networks before this one; if not, this one does not move either.

        Returns:
            The gradient's norm, before it is shortened, and whether all was finite.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.largest_gradient_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.largest_gradient_norm, norm)
        finite = self.world.all(torch.stack([torch.isfinite(norm), torch.isfinite(loss.detach()), *so_far]).all())
        # Fused optimizers look at this on the device, where `GradScaler.step` would wait for it.
        self.optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        if self.schedule is not None:
            self.schedule.step()
        return norm.detach(), finite

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of a batch: the ranks put their gradients together with the last."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else {},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def enroll(
    module: nn.Module,
    world: World,
    engine: EngineRecipe,
    *,
    learning_rate: float,
    largest_gradient_norm: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    cycle: int | None = None,
    compiled: bool = False,
) -> Trainee:
    """Make a network ready for training, in place.

    Args:
        module: The network; parameters that need no gradient stay as they are.
        world: Where it is trained.
        engine: How.
        learning_rate: Adam's step size, the peak where it cycles.
        largest_gradient_norm: See `Trainee`.
        betas: Adam's decays.
        cycle: Steps over which the step size rises and falls once; None keeps it.
        compiled: Whether to compile its forward pass.
    """
    module.to(world.device)
    if engine.channels_last:
        module.to(memory_format=torch.channels_last)
    if engine.synchronize_batch_norm and world.size > 1:
        module = synchronize_batch_norm(module, world.device)
    if compiled:
        module.compile()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=betas, fused=True)
    schedule = None
    if cycle is not None:
        # One cycle: short runs gain most from a large step size that ends small. It rises for a fifth of the steps, and
        # for one at least: a rise of no steps would divide by zero.
        total = cycle + 1
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=total, pct_start=max(0.2, 2 / total)
        )
    scaler = torch.amp.GradScaler(world.device.type, enabled=engine.precision == "float16")
    return Trainee(module, world.wrap(module), optimizer, schedule, scaler, largest_gradient_norm, world)


def autocast(engine: EngineRecipe, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of a forward pass."""
    if engine.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[engine.precision])


@contextmanager
def untouched_unless(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Give the buffers of modules their old values back if a flag put into the list is False in the end.

    Weights stand still in a step that is skipped, but the statistics of batch norms are taken on the way forward.
    """
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    flags: list[Tensor] = []
    yield flags
    finite = torch.stack(flags).all()
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(finite, buffer, old))


class MovingAverage:
    """A copy of a network whose weights and statistics follow those of the network in training.

        average <- d * average + (1 - d) * value,    d = min(decay, (1 + n) / (10 + n))    in update n = 0, 1, ...

    It starts quickly, because what it begins with is random. A step that was skipped moves nothing, and counts in n.
    Batch-norm statistics are averaged with the weights; the published code pairs averaged weights with the live
    network's statistics. (torch's `AveragedModel` waits for the device in each update.)
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module, finite: Tensor) -> None:
        """Follow the network, unless its step was skipped."""
        rate = (1 - min(self.decay, (1 + self.updates) / (10 + self.updates))) * finite.float()
        pairs = list(zip(self.module.state_dict().values(), module.state_dict().values()))
        moving = [(average, value) for average, value in pairs if average.is_floating_point()]
        torch._foreach_lerp_([average for average, _ in moving], [value for _, value in moving], [rate] * len(moving))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Weights, statistics and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
