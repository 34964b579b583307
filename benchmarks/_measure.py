"""Time and peak memory of calls, on CPUs and GPUs."""

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

OBSERVATION = 2.0
"""Seconds of observing the load of the machine before a measurement."""
TIMEOUT = 1200.0
"""Maximum seconds to wait for a quiet machine."""
FLUSHED = 256 * 2**20
"""Bytes to write before each call on a GPU, to evict its inputs from the cache."""
MIN_ROUNDS, MAX_ROUNDS = 5, 50


class Work(NamedTuple):
    """A measured call, and the unmeasured preparation before each call."""

    run: Callable[..., object]
    """The measured call; its arguments are the result of `prepare`."""
    prepare: Callable[[], tuple[Any, ...]] = tuple
    """Called before each run; not measured."""

    def once(self) -> None:
        """Prepare and run once."""
        self.run(*self.prepare())


class BusyError(RuntimeError):
    """The load of other programs stayed too high to measure."""


def undisturbed(call: Callable[[], T], quiet: float = math.inf) -> tuple[T, float | None]:
    """Wait until the machine is quiet, then call; repeat the call if the machine did not stay quiet.

    Args:
        call: The call to measure.
        quiet: Maximum share of the processors that other programs may use.

    Returns:
        The result of the call, and the share of the processors that other programs used during it; None if the system
        does not report it.

    Raises:
        BusyError: The machine was not quiet within `TIMEOUT` seconds.
    """
    if math.isinf(quiet):
        return _with_load_of_others(call)
    started = time.monotonic()
    while True:
        _, share = _with_load_of_others(lambda: time.sleep(OBSERVATION))
        if share is None or share <= quiet:
            result, share = _with_load_of_others(call)
            if share is None or share <= quiet:
                return result, share
        if time.monotonic() - started > TIMEOUT:
            raise BusyError(f"other programs use {share:.0%} of the processors, more than {quiet:.0%}")


def time_interleaved(
    calls: dict[str, Call] | dict[str, Work], rounds: int, quiet: float = math.inf, repeats: int = 1
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds of each call in each round after a warm-up round, and the largest load of other programs.

    The calls alternate, and each round starts with a different one, so that disturbances affect all of them equally. In
    each round, a call is repeated `repeats` times and its seconds are summed.
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
    """Total seconds of `repeats` calls, without their preparation."""
    gc.collect()
    seconds = 0.0
    for _ in range(repeats):
        arguments = work.prepare()
        started = time.perf_counter()
        work.run(*arguments)
        seconds += time.perf_counter() - started
    return seconds


def _with_load_of_others(call: Callable[[], T]) -> tuple[T, float | None]:
    all_before, own_before, started = _processor_seconds(), time.process_time(), time.perf_counter()
    result = call()
    seconds, own, all_after = time.perf_counter() - started, time.process_time() - own_before, _processor_seconds()
    if all_before is None or all_after is None:
        return result, None
    return result, max(0.0, round((all_after - all_before - own) / (seconds * (os.cpu_count() or 1)), 4))


def _processor_seconds() -> float | None:
    """Busy seconds of all processors, summed over all programs."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class PeakMemory(NamedTuple):
    """Peak memory in MiB; None if the system does not report it."""

    call: float | None
    """Peak of the call beyond the memory in use before it: gradients, optimizer state, activations."""
    process: float | None
    """Peak of the whole process, libraries and weights included."""


def peak_memory(build: Callable[..., Call], *arguments: Any, threads: int) -> PeakMemory:
    """Peak memory of the call that `build(*arguments)` returns, in a fresh process.

    The call runs twice, because the optimizer state only coexists with the activations from the second step on.
    """
    return in_a_fresh_process(peak_memory_here, build, arguments, threads)


def in_a_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call the function in a fresh process, whose allocator holds no memory from earlier work."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_memory_here(build: Callable[..., Call], arguments: tuple[Any, ...], threads: int) -> PeakMemory:
    """`peak_memory` in this process, where memory retained from earlier work can hide part of the peak."""
    torch.set_num_threads(threads)
    call = build(*arguments)

    def twice() -> None:
        call()
        call()

    return high_water(twice)


def high_water(call: Call) -> PeakMemory:
    """Peak memory of a call in this process."""
    gc.collect()
    _return_free_memory()
    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return PeakMemory(None, None)
    # Writing 5 resets the high-water mark to the current usage.
    clear_refs.write_text("5")
    before = _mib(status, "VmHWM")
    call()
    peak = _mib(status, "VmHWM")
    return PeakMemory(round(peak - before, 1), round(peak, 1))


def _return_free_memory() -> None:
    """Return retained memory to the system (glibc only): it would hide part of the next peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _mib(status: Path, name: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def time_interleaved_on_gpu(works: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call on the GPU in each round, after a warm-up round.

    The calls alternate, and each round starts with a different one. The cache is flushed before each call. The time is
    that between two events on the GPU: launch overhead counts if the GPU has to wait for it, as in practice.

    Args:
        works: The calls to time, by name.
        seconds: Approximate time budget; at least `MIN_ROUNDS` rounds are measured.
    """
    names = list(works)
    buffer = _flush_buffer()

    def one_round(order: list[str]) -> dict[str, float]:
        events = {}
        for name in order:
            arguments = works[name].prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            buffer.zero_()
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
    for turn in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        first = turn % len(names)
        for name, time_of_call in one_round(names[first:] + names[:first]).items():
            milliseconds[name].append(time_of_call)
    return milliseconds


@functools.cache
def _flush_buffer() -> torch.Tensor:
    # Cached, so that the memory available to the measured calls is always the same.
    return torch.empty(FLUSHED, dtype=torch.int8, device=CUDA)


def peak_memory_on_gpu(work: Work) -> PeakMemory:
    """Peak memory that a call allocates on the GPU, including its results but not its prepared arguments."""
    arguments = work.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.run(*arguments)
    torch.cuda.synchronize()
    return PeakMemory(round((torch.cuda.max_memory_allocated() - before) / 2**20, 1), None)


def copy_gb_per_s(size: int = 2**30) -> float:
    """Bandwidth of copying `size` bytes on the GPU, counted as read and written, in gigabytes per second."""
    source = torch.zeros(size, dtype=torch.int8, device=CUDA)
    target = torch.empty_like(source)
    times = time_interleaved_on_gpu({"copy": Work(lambda: target.copy_(source))}, seconds=0.5)
    return round(2 * size / statistics.median(times["copy"]) / 1e6, 1)


def matrix_tflops(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of a square matrix product on the GPU, with torch's default precision settings."""
    left, right = (torch.randn(size, size, device=CUDA, dtype=dtype) for _ in range(2))
    times = time_interleaved_on_gpu({"product": Work(lambda: left @ right)}, seconds=0.5)
    return round(2 * size**3 / statistics.median(times["product"]) / 1e9, 3)
