"""The process group of a training run: one process, or several started by torchrun on one or more machines.

Each rank takes its rows of a common batch, and each random draw is made for the whole batch, so that several processes
compute what one process would with the same batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mirror_modules._checks import check_choice
from mirror_modules.training.errors import TrainingError

# Longer than rank 0 takes for a checkpoint or a validation while the other ranks wait.
TIMEOUT = timedelta(minutes=20)
CPU = torch.device("cpu")
# Fragments of the errors that backends raise when another process has ended.
LOST = ("Connection closed by peer", "Connection reset by peer", "Socket", "Broken pipe", "NCCL", "gloo")


@dataclass(frozen=True)
class ProcessGroup:
    """This process and its collective operations; with one process they cost nothing.

    Args:
        rank: Number of this process, from 0. Only rank 0 writes files.
        world_size: Number of processes.
        device: Device of this process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def local_rows(self, whole: Tensor) -> Tensor:
        """The rows of the whole batch that belong to this rank."""
        return whole.chunk(self.world_size)[self.rank]

    def all_gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order, with gradients.

        Every rank's loss contributes to the gradient of the gathered rows, and DistributedDataParallel averages over
        ranks: if all ranks compute the same loss, the result is the gradient of that loss.
        """
        if self.world_size == 1:
            return rows
        if rows.dtype == torch.bool:
            # Not every backend supports bool.
            return self.all_gather(rows.to(torch.uint8)).bool()
        return cast(Tensor, _AllGather.apply(rows, self.rank, self.world_size))

    def mean_weights(self, counts: Tensor, total: Tensor | None = None) -> Tensor:
        """Weights that turn the means over parts of a batch into the mean over the whole batch.

        Args:
            counts: Number of values in each of this rank's P parts, (P,).
            total: Number of values in all parts of all ranks, a scalar; None adds it up over the ranks.

        Returns:
            Weights (P,) on this rank's device, 1 if all parts of all ranks are equally large: the average of
            weight * mean over all parts and ranks is the mean over all values.
        """
        counts = counts.to(self.device, torch.float32, non_blocking=True)
        if total is not None:
            total = total.to(counts, non_blocking=True)
        else:
            total = counts.sum()
            if self.world_size > 1:
                dist.all_reduce(total)
        return counts * (len(counts) * self.world_size) / total.clamp(min=1)

    def all(self, flag: Tensor) -> Tensor:
        """Whether a flag is set on every rank, reduced on the device without synchronizing with the host."""
        if self.world_size == 1:
            return flag
        lowest = flag.float()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return lowest > 0

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on some rank, reduced on the CPU so that no GPU is synchronized."""
        if self.world_size == 1:
            return flag
        highest = torch.tensor(int(flag))
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(highest)

    def all_gather_states(self, state: Tensor) -> list[Tensor]:
        """One tensor of bytes per rank, all of equal length."""
        if self.world_size == 1:
            return [state]
        states = [torch.empty_like(state) for _ in range(self.world_size)]
        dist.all_gather(states, state)
        return states

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's value to all ranks: other machines may see changes of a shared folder only after a while."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Block until all ranks have arrived."""
        self.any(False)

    def fork_rng(self) -> AbstractContextManager[None]:
        """Restore the global random states of CPU and device on exit."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def wrap(self, module: nn.Module, *, unused: bool = False) -> nn.Module:
        """The module in DistributedDataParallel if there are several ranks; `unused` if steps leave out parameters."""
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        # DDP broadcasts the buffers of rank 0: without synchronized batch norm its statistics are everyone's, and a
        # checkpoint of rank 0 is the state of all ranks.
        return DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=unused)


SINGLE_PROCESS = ProcessGroup()
"""One process on the CPU."""


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rank, ctx.world_size = rank, world_size
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(ctx.world_size)[ctx.rank], None, None


def is_main_process() -> bool:
    """Whether torchrun's environment names this process rank 0, or there is no torchrun; needs no process group."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def resolve_device(name: str) -> str:
    """Check the name of a device; "auto" becomes "cuda" if there is a GPU, and "cpu" otherwise.

    Raises:
        ValueError: The name is unknown, or torch sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    check_choice("device", "the device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not has_gpu:
        raise ValueError("device: it is 'cuda', but torch sees no GPU; use 'cpu' or 'auto'.")
    return name


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads, unless it is None, and restore it on exit."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def count_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def process_group(device: str = "cpu") -> Iterator[ProcessGroup]:
    """Join the process group that torchrun's environment describes; a single process without torchrun.

    Args:
        device: "cpu", "cuda" or "auto". With several GPUs, each process of a machine takes its own.

    Raises:
        ValueError: There are more processes on this machine than GPUs, or torch was built without the backend: NCCL for
            GPUs, gloo for CPUs.
        TrainingError: Another process has ended.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world_size == 1:
        yield ProcessGroup(device=torch.device(resolve_device(device)))
        return
    own_device = torch.device(resolve_device(device))
    backend = "nccl" if own_device.type == "cuda" else "gloo"
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise ValueError(
            f"torchrun started {world_size} processes, but this build of torch has no backend {backend!r} to connect "
            f"them on {device!r}; train with a single process, or on another device or system."
        )
    if own_device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs; "
                "set --nproc-per-node to their number."
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    # Flags, objects and barriers use the CPU backend; training tensors use NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), own_device)
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not any(fragment in str(error) for fragment in LOST):
            raise
        raise TrainingError(
            f"process {dist.get_rank()} of {world_size} lost the connection to another process; see the output of that "
            "process for the cause. The newest checkpoint, if any, is intact: --resume continues from it."
        ) from error
    finally:
        dist.destroy_process_group()
