"""A network in training: its layout, precision and parallel wrapper, its optimizer step, its moving average.

A step whose loss or gradient is not finite must change nothing. The finiteness flag stays on the device to avoid a
synchronization: optimizers and averages read it there, and the count of skipped steps is fetched where losses are
logged.
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

from mirror_modules._norms import synchronize_batch_norm
from mirror_modules.training.distributed import ProcessGroup
from mirror_modules.training.recipes import EngineRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StepResult(NamedTuple):
    """Losses of one training step."""

    losses: dict[str, Tensor]
    """Losses and other scalars by name, detached, on their device."""
    finite: Tensor
    """Whether all losses and gradients were finite, a bool on the device. If not, the network concerned, the generator
    of phase `glam`, and the buffers of all networks, such as batch-norm statistics, are as before the step."""


@dataclass
class TrainedNetwork:
    """A network with its optimizer."""

    module: nn.Module
    """The network whose weights are saved."""
    parallel: nn.Module
    """The network as called in training: in DistributedDataParallel if there are several ranks."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    """Learning rate schedule; None keeps the learning rate constant."""
    scaler: torch.amp.GradScaler
    """Scales losses in float16, whose gradients would underflow; disabled in other precisions."""
    max_grad_norm: float | None
    """Gradients are clipped to this norm; None does not clip."""
    group: ProcessGroup
    learning_rate: float = 0.0
    """Learning rate of the last step."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss."""
        self.scaler.scale(loss).backward()

    def optimizer_step(self, loss: Tensor, finite_before: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Update the weights, unless the loss or its gradient is not finite.

        Args:
            loss: The loss whose gradient was accumulated, a scalar.
            finite_before: Finiteness flags of the networks updated earlier in this step; if one is False, this network
                is not updated either.

        Returns:
            The gradient norm before clipping, and whether everything was finite.
        """
        norm, is_finite = self.clip_gradients(loss)
        finite = self.group.all(torch.stack([is_finite, *finite_before]).all())
        self.update_weights(finite)
        return norm, finite

    def clip_gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient of a loss; returns its norm before, and whether loss and norm are finite on this rank."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return norm.detach(), torch.isfinite(norm) & torch.isfinite(loss.detach())

    def update_weights(self, finite: Tensor) -> None:
        """Update the weights by clipped gradients, unless a loss or gradient was not finite on some rank."""
        # Fused optimizers read this flag on the device, where `GradScaler.step` would synchronize.
        self.optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        if self.schedule is not None:
            self.schedule.step()

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        """Context for forward and backward of one part of a batch; ranks average gradients with the last part only."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Weights, and the states of optimizer, schedule and scaler."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else {},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def prepare(
    module: nn.Module,
    group: ProcessGroup,
    engine: EngineRecipe,
    *,
    learning_rate: float,
    max_grad_norm: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    cycle: int | None = None,
    compiled: bool = False,
    unused: bool = False,
) -> TrainedNetwork:
    """Prepare a network for training, in place.

    Args:
        module: The network; parameters that require no gradient stay frozen.
        group: The process group.
        engine: Precision and layout.
        learning_rate: Adam's learning rate; the peak if it cycles.
        max_grad_norm: See `TrainedNetwork`.
        betas: Adam's decay rates.
        cycle: Steps of a one-cycle schedule; None keeps the learning rate constant.
        compiled: Compile the forward pass.
        unused: Whether some steps do not use all parameters.
    """
    module.to(group.device)
    if engine.channels_last:
        module.to(memory_format=torch.channels_last)
    if engine.synchronize_batch_norm and group.world_size > 1:
        module = synchronize_batch_norm(module, group.device)
    if compiled:
        module.compile()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=betas, fused=True)
    schedule = None
    if cycle is not None:
        # Short runs benefit most from a large peak learning rate that decays to a small one. Warmup takes a fifth of
        # the steps and at least one: zero warmup steps would divide by zero.
        total = cycle + 1
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=total, pct_start=max(0.2, 2 / total)
        )
    scaler = torch.amp.GradScaler(group.device.type, enabled=engine.precision == "float16")
    return TrainedNetwork(module, group.wrap(module, unused=unused), optimizer, schedule, scaler, max_grad_norm, group)


def autocast(engine: EngineRecipe, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast in the recipe's precision; no context for float32."""
    if engine.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[engine.precision])


@contextmanager
def frozen(networks: Sequence[TrainedNetwork]) -> Iterator[None]:
    """Disable gradients of the weights of these networks; gradients still flow through them to the images."""
    # A network of a user's own may have weights that are frozen for good, such as a pretrained trunk.
    trained = [weight for network in networks for weight in network.module.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextmanager
def restoring_buffers(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Restore the buffers of modules on exit if one of the flags appended to the yielded list is False.

    The optimizer leaves the weights of a skipped step alone, but batch norms update their statistics in the forward
    pass.
    """
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    flags: list[Tensor] = []
    yield flags
    finite = torch.stack(flags).all()
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(finite, buffer, old))


class MovingAverage:
    """An exponential moving average of a network's weights and statistics.

        average <- d * average + (1 - d) * value,    d = min(decay, (1 + n) / (10 + n))    in update n = 0, 1, ...

    The decay grows from 0.1 because the initial weights are random. Skipped steps change nothing, but count in n.
    Batch-norm statistics are averaged with the weights; the published code pairs averaged weights with the live
    network's statistics. (torch's `AveragedModel` synchronizes with the device in each update.)
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module, finite: Tensor) -> None:
        """Average in the current weights, unless the step was skipped (`finite` is False)."""
        rate = (1 - min(self.decay, (1 + self.updates) / (10 + self.updates))) * finite.float()
        pairs = list(zip(self.module.state_dict().values(), module.state_dict().values()))
        floats = [(average, value) for average, value in pairs if average.is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floats], [value for _, value in floats], [rate] * len(floats))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and statistics, and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
