"""Records: each measurement is one line of JSON, appended to a file in `results/` and never edited."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mirror_modules

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """A measurement: the operation and its sizes, the machine, and the result."""

    op: str
    """The operation, such as "training_step"."""
    impl: str
    """Name of the implementation, such as "published"."""
    direction: str
    """The measured pass: "forward" (without a graph), "backward" (of an existing graph), "both", or a description."""
    shape: dict[str, Any]
    """All sizes, by name."""
    dtype: str
    """Precision of weights and activations."""
    quantity: str
    """The unit of median and spread: "time / time of NAME", "ms" (on a GPU only), or a rate such as "images/s"."""
    median: float
    """Median over the rounds."""
    spread: tuple[float, float]
    """The lowest and the highest round."""
    rounds: int
    """Number of measured rounds per implementation, without the warm-up."""
    peak_memory_mib: float | None
    """Peak memory of a call beyond weights and data; None if the system does not report it."""
    process_memory_mib: float | None
    """Peak memory of the whole process, libraries included; None if the system does not report it."""
    shares: dict[str, float]
    """Share of the time spent in each part, summing to 1; empty if parts were not measured."""
    device: str
    """ "cpu", or the name of the accelerator."""
    cpu: str
    """Model name of the processor."""
    threads: int
    """Number of torch threads."""
    versions: dict[str, str]
    """Versions of this package, torch and Python, and of triton if installed."""
    commit: str
    """The measured commit, with the suffix "+changes" if the working tree differed from it."""
    date: str
    """UTC, ISO 8601; identical for implementations that were timed interleaved."""
    others: float | None = None
    """Largest share of the processors that other programs used in a round; None if not measured."""
    least_bytes: int | None = None
    """Minimum bytes that any implementation must read and write."""
    least_operations: int | None = None
    """Minimum floating-point operations in matrix products (multiplications and additions) of any implementation."""
    bandwidth_share: float | None = None
    """`least_bytes` divided by the time of a call, relative to `copy_gb_per_s`."""
    matrix_share: float | None = None
    """`least_operations` divided by the time of a call, relative to `matrix_tflops`."""
    error: float | None = None
    """Maximum error relative to the largest value of the definition in float64, for the worst output or gradient."""
    error_allowed: float | None = None
    """The tolerance for that output or gradient."""
    copy_gb_per_s: float | None = None
    """Bandwidth of a large copy on the same device in the same run, read plus written, in 10^9 bytes per second."""
    matrix_tflops: float | None = None
    """TFLOP/s of a large matrix product in the same dtype, on the same device in the same run."""

    def __post_init__(self) -> None:
        # JSON turns tuples into lists.
        object.__setattr__(self, "spread", tuple(self.spread))
        low, high = self.spread
        if not 0 < low <= self.median <= high < math.inf:
            raise ValueError(f"Record: median {self.median} must lie within its spread {low} to {high}, all positive.")
        if self.rounds < 1:
            raise ValueError(f"Record: rounds must be at least 1, but it is {self.rounds}.")
        if self.shares and not math.isclose(sum(self.shares.values()), 1, abs_tol=0.01):
            raise ValueError(f"Record: shares must sum to 1, but they sum to {sum(self.shares.values()):.3f}.")
        if self.error is not None and self.error_allowed is not None and not self.error <= self.error_allowed:
            raise ValueError(f"Record: error {self.error} exceeds the tolerance of {self.error_allowed}.")


def environment(device: str = "cpu") -> dict[str, Any]:
    """The fields of a `Record` that describe the machine, the versions and the time of the measurement."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def append(record: Record, path: Path) -> None:
    """Append a record to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def read(path: Path) -> list[Record]:
    """Read a file of results.

    Raises:
        ValueError: A line is not a record.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, line {number}, is not a record: {error}") from error
    return records


def significant(value: float, digits: int) -> float:
    """Round to a number of significant digits."""
    return float(f"{value:.{digits}g}")


def _versions() -> dict[str, str]:
    versions = {
        "mirror_modules": mirror_modules.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        import triton
    except ImportError:
        return versions
    return {**versions, "triton": triton.__version__}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    described = _git("rev-parse", "--short=12", "HEAD")
    if described is None:
        return "none"
    # Exclude the results: each run appends to them.
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return described + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
