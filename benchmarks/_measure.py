"""Time and memory of calls, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]
CUDA = torch.device("cuda")

LOOK = 2.0
"""Seconds for which the machine is looked at before a measurement."""
PATIENCE = 1200.0
"""Seconds after which waiting for a quiet machine is given up."""
FLUSHED = 256 * 2**20
"""Bytes that are written before a call on a GPU, so that none finds its data in the cache."""
FEWEST_ROUNDS, MOST_ROUNDS = 5, 50


class Work(NamedTuple):
    """A call, and what is made anew before each call without being measured."""

    run: Callable[..., object]
    """What is measured; it gets what `prepare` returned as arguments."""
    prepare: Callable[[], tuple[Any, ...]] = tuple

    def once(self) -> None:
        """Prepare and run."""
        self.run(*self.prepare())


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
    if math.isinf(quiet):
        return _with_share_of_others(call)
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
    calls: dict[str, Call] | dict[str, Work], rounds: int, quiet: float = math.inf, repeats: int = 1
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds of each call in each round, after one round that does not count, and the share that others used.

    The calls take turns, and each round begins with another one: what happens beside them meets all of them. In a
    round, each is called `repeats` times and the seconds are added up.
    """
    names = list(calls)
    works = {name: call if isinstance(call, Work) else Work(call) for name, call in calls.items()}
    for name in names:
        works[name].once()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shares = []
    for turn in range(rounds):
        first = turn % len(names)
        order = names[first:] + names[:first]
        times, share = undisturbed(lambda order=order: {n: seconds_of(works[n], repeats) for n in order}, quiet)
        shares.append(share)
        for name in names:
            seconds[name].append(times[name])
    known = [share for share in shares if share is not None]
    return seconds, max(known) if known else None


def seconds_of(work: Work, repeats: int = 1) -> float:
    """Seconds of so many calls, without their preparation."""
    gc.collect()
    seconds = 0.0
    for _ in range(repeats):
        arguments = work.prepare()
        started = time.perf_counter()
        work.run(*arguments)
        seconds += time.perf_counter() - started
    return seconds


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
    return in_a_fresh_process(peak_memory_here, build, arguments, threads)


def in_a_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns in a process of its own, where no leftovers of earlier work hide anything."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_memory_here(build: Callable[..., Call], arguments: tuple[Any, ...], threads: int) -> PeakMemory:
    """The same in this process, where leftovers of earlier work can hide some of it."""
    torch.set_num_threads(threads)
    call = build(*arguments)

    def twice() -> None:
        call()
        call()

    return high_water(twice)


def high_water(call: Call) -> PeakMemory:
    """Memory of a call in this process."""
    gc.collect()
    _return_free_memory()
    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return PeakMemory(None, None)
    # 5 sets the high-water mark back to what is in use now.
    clear_refs.write_text("5")
    before = _mib(status, "VmHWM")
    call()
    peak = _mib(status, "VmHWM")
    return PeakMemory(round(peak - before, 1), round(peak, 1))


def _return_free_memory() -> None:
    """What the allocator has kept of earlier calls would hide as much of the next one (glibc alone)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _mib(status: Path, name: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def milliseconds_in_turns(works: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call on the GPU in each round, after one round that does not count.

    The calls take turns, and each round begins with another one. Before each call the cache is flushed. What is timed
    lies between two events on the GPU: launching counts where the GPU has to wait for it, as it does in use.

    Args:
        works: What to time, by name.
        seconds: About so long may it take, with at least `FEWEST_ROUNDS` rounds.
    """
    names = list(works)
    cache = _as_large_as_a_cache()

    def one_round(order: list[str]) -> dict[str, float]:
        events = {}
        for name in order:
            arguments = works[name].prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            start.record()
            works[name].run(*arguments)
            end.record()
            events[name] = (start, end)
            del arguments
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in events.items()}

    gc.collect()
    torch.cuda.synchronize()
    started = time.perf_counter()
    one_round(names)
    rounds = int(seconds / max(time.perf_counter() - started, 1e-6))
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)):
        first = turn % len(names)
        for name, time_of_call in one_round(names[first:] + names[:first]).items():
            milliseconds[name].append(time_of_call)
    return milliseconds


@functools.cache
def _as_large_as_a_cache() -> torch.Tensor:
    # Kept, so that a call which fits beside it once always does.
    return torch.empty(FLUSHED, dtype=torch.int8, device=CUDA)


def peak_memory_on_gpu(work: Work) -> PeakMemory:
    """Memory that a call allocates on the GPU: what it returns included, what was prepared for it not."""
    arguments = work.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.run(*arguments)
    torch.cuda.synchronize()
    return PeakMemory(round((torch.cuda.max_memory_allocated() - before) / 2**20, 1), None)


def copy_gb_per_s(size: int = 2**30) -> float:
    """Gigabytes per second that a copy of so many bytes reads and writes on the GPU."""
    source = torch.zeros(size, dtype=torch.int8, device=CUDA)
    target = torch.empty_like(source)
    times = milliseconds_in_turns({"copy": Work(lambda: target.copy_(source))}, seconds=0.5)
    return round(2 * size / statistics.median(times["copy"]) / 1e6, 1)


def matrix_tflops(dtype: torch.dtype, size: int = 8192) -> float:
    """10^12 operations per second of a square matrix product on the GPU, with torch's settings for precision."""
    left, right = (torch.randn(size, size, device=CUDA, dtype=dtype) for _ in range(2))
    times = milliseconds_in_turns({"product": Work(lambda: left @ right)}, seconds=0.5)
    return round(2 * size**3 / statistics.median(times["product"]) / 1e9, 3)
