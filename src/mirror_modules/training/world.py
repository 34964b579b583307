"""The processes that train together: one, or several that torchrun has started, on one machine or many.

Each rank takes its rows of one common batch, and each random draw is made for the whole batch: several processes
compute what one would with the same batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mirror_modules.training.errors import TrainingError

# How long a rank waits for the others: longer than a checkpoint or a validation of the first one takes.
PATIENCE = timedelta(minutes=20)
CPU = torch.device("cpu")
# What backends say when another process has ended.
LOST = ("Connection closed by peer", "Connection reset by peer", "Socket", "Broken pipe", "NCCL", "gloo")


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Args:
        rank: Its number, from 0. Rank 0 alone writes.
        size: How many there are.
        device: Where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Is this the rank that writes?"""
        return self.rank == 0

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's part of what was drawn for the whole batch."""
        return whole.chunk(self.size)[self.rank]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks; gradients find their way back.

        Each rank's loss of the gathered rows has its part in the gradient, and DistributedDataParallel takes their
        mean: if all ranks compute the same loss, the result is that loss's gradient.
        """
        if self.size == 1:
            return rows
        if rows.dtype == torch.bool:
            # Not every backend knows them.
            return self.gather(rows.to(torch.uint8)).bool()
        return cast(Tensor, _Gather.apply(rows, self.rank, self.size))

    def shares(self, counts: Tensor) -> Tensor:
        """How much the means over parts of a batch weigh in the mean over the whole.

        Args:
            counts: How many values each of this rank's P parts has, (P,).

        Returns:
            Weights (P,) on this rank's device, 1 where all parts of all ranks have equally many: the mean of weight
            times mean, over all parts and ranks, is the mean over all values.
        """
        counts = counts.to(self.device, torch.float32, non_blocking=True)
        total = counts.sum()
        if self.size > 1:
            dist.all_reduce(total)
        return counts * (len(counts) * self.size) / total.clamp(min=1)

    def all(self, flag: Tensor) -> Tensor:
        """Is a flag set on every rank? A device is not waited for."""
        if self.size == 1:
            return flag
        lowest = flag.float()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return lowest > 0

    def any(self, flag: bool) -> bool:
        """Is a flag set on some rank? All get the same answer, over their CPUs, so that no GPU is waited for."""
        if self.size == 1:
            return flag
        highest = torch.tensor(int(flag))
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(highest)

    def gather_states(self, state: Tensor) -> list[Tensor]:
        """Bytes of equal length from each rank."""
        if self.size == 1:
            return [state]
        states = [torch.empty_like(state) for _ in range(self.size)]
        dist.all_gather(states, state)
        return states

    def agree(self, value: Any) -> Any:
        """What rank 0 says: folders on shared disks may look different elsewhere for a while."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over the ranks where there are several."""
        if self.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        # Statistics that are not synchronized are those of rank 0, which it hands to all: one network is trained, and
        # a checkpoint of rank 0 is the state of all ranks.
        return DistributedDataParallel(module, gradient_as_bucket_view=True)


ALONE = World()
"""One process on the CPU."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(ctx.size)[ctx.rank], None, None


@contextmanager
def connected(device: str = "cpu") -> Iterator[World]:
    """The world of this process: connected with the others if torchrun started it, alone otherwise.

    Args:
        device: "cpu" or "cuda". Of several GPUs, each process of a machine takes its own.

    Raises:
        ValueError: There are more processes on this machine than GPUs.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield World(device=torch.device(device))
        return
    place = torch.device(device)
    if place.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs; "
                "set --nproc-per-node to their number."
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    # What concerns processes, and not tensors of the training, goes over the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not any(sign in str(error) for sign in LOST):
            raise
        raise TrainingError(
            f"process {dist.get_rank()} of {size} lost another one; what that one printed says why, and whether to go "
            "on with --resume: the newest checkpoint is whole."
        ) from error
    finally:
        dist.destroy_process_group()
