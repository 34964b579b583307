"""Time and memory of calls."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]


def time_in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that does not count.

    The calls take turns, and each round begins with another one: what the machine does beside them meets all of them.
    """
    names = list(calls)
    for name in names:
        calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


class PeakMemory(NamedTuple):
    """Most memory in use at a time, in MiB; None where the system does not tell."""

    call: float | None
    """Beyond what was there before the call: gradients, optimizer state, activations."""
    process: float | None
    """Of the whole process, libraries and weights included."""


def peak_memory(build: Callable[..., Call], *arguments: Any, threads: int) -> PeakMemory:
    """Memory of the call that `build(*arguments)` sets up, in a process of its own.

    The call runs twice: from the second time on, the optimizers' moments are there beside the activations.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_memory_here, build, arguments, threads).result()


def peak_memory_here(build: Callable[..., Call], arguments: tuple[Any, ...], threads: int) -> PeakMemory:
    """The same in this process, where leftovers of earlier work can hide some of it."""
    torch.set_num_threads(threads)
    call = build(*arguments)
    gc.collect()
    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return PeakMemory(None, None)
    # 5 sets the high-water mark back to what is in use now.
    clear_refs.write_text("5")
    before = _mib(status, "VmHWM")
    call()
    call()
    peak = _mib(status, "VmHWM")
    return PeakMemory(round(peak - before, 1), round(peak, 1))


def _mib(status: Path, name: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
