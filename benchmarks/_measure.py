"""Time and memory of calls."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]

LOOK = 2.0
"""Seconds for which the machine is looked at before a measurement."""
PATIENCE = 1200.0
"""Seconds after which waiting for a quiet machine is given up."""


class BusyError(RuntimeError):
    """Other programs left no quiet time to measure in."""


def undisturbed(call: Callable[[], T], quiet: float = math.inf) -> tuple[T, float | None]:
    """Wait until the machine is quiet, call, and do so again if it did not stay quiet meanwhile.

    Args:
        call: What to measure.
        quiet: Largest share of the processors that other programs may use.

    Returns:
        What the call returned, and the share that other programs used meanwhile; None where the system does not tell.

    Raises:
        BusyError: There was no quiet time for `PATIENCE` seconds.
    """
    started = time.monotonic()
    while True:
        _, share = _with_share_of_others(lambda: time.sleep(LOOK))
        if share is None or share <= quiet:
            result, share = _with_share_of_others(call)
            if share is None or share <= quiet:
                return result, share
        if time.monotonic() - started > PATIENCE:
            raise BusyError(f"other programs use {share:.0%} of the processors, more than {quiet:.0%}")


def time_in_turns(
    calls: dict[str, Call], rounds: int, quiet: float = math.inf
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds of each call in each round, after one round that does not count, and the share that others used.

    The calls take turns, and each round begins with another one: what happens beside them meets all of them.
    """
    names = list(calls)
    for name in names:
        calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shares = []
    for turn in range(rounds):
        first = turn % len(names)
        order = names[first:] + names[:first]
        times, share = undisturbed(lambda order=order: {name: _seconds(calls[name]) for name in order}, quiet)  # type: ignore[misc]
        shares.append(share)
        for name in names:
            seconds[name].append(times[name])
    known = [share for share in shares if share is not None]
    return seconds, max(known) if known else None


def _seconds(call: Call) -> float:
    gc.collect()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _with_share_of_others(call: Callable[[], T]) -> tuple[T, float | None]:
    all_before, own_before, started = _processor_seconds(), time.process_time(), time.perf_counter()
    result = call()
    seconds, own, all_after = time.perf_counter() - started, time.process_time() - own_before, _processor_seconds()
    if all_before is None or all_after is None:
        return result, None
    return result, max(0.0, round((all_after - all_before - own) / (seconds * (os.cpu_count() or 1)), 4))


def _processor_seconds() -> float | None:
    """Seconds that all processors together have worked, for whomever."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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
