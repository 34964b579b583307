"""Records: one measurement is one line of JSON, appended to a file of `results/` and never edited."""

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
    """What was measured, on what, and what came out."""

    op: str
    """The operation, such as "training_step"."""
    impl: str
    """Whose implementation."""
    direction: str
    """What a call does: "forward" (without a graph), "backward" (its graph is there), "both", or in words."""
    shape: dict[str, Any]
    """All sizes, by name."""
    dtype: str
    """Of weights and activations."""
    quantity: str
    """What median and spread are: "time / time of NAME", "ms" (on a GPU only), or a rate such as "images/s"."""
    median: float
    """Over the rounds."""
    spread: tuple[float, float]
    """Lowest and highest round."""
    rounds: int
    """Measured calls of each implementation, without the first, which warms up."""
    peak_memory_mib: float | None
    """Most memory in use at a time during a call, beyond weights and data; None where the system does not tell."""
    process_memory_mib: float | None
    """The same of the whole process, libraries included."""
    shares: dict[str, float]
    """Share of each part in the time, which sum to 1; empty if the parts were not measured."""
    device: str
    """ "cpu", or the accelerator's name."""
    cpu: str
    """The processor's model."""
    threads: int
    """Threads of torch."""
    versions: dict[str, str]
    """Of this package, torch and Python, and of triton where it is there."""
    commit: str
    """What was measured; "+changes" where the working tree differed from it."""
    date: str
    """UTC, ISO 8601. Implementations that took turns have the same."""
    others: float | None = None
    """Largest share of the processors that other programs used in a round; None where it was not measured."""
    least_bytes: int | None = None
    """Bytes that every implementation must read or write."""
    least_operations: int | None = None
    """Additions and multiplications of the matrix products that every implementation must make."""
    bandwidth_share: float | None = None
    """`least_bytes` per time of a call, as a share of `copy_gb_per_s`."""
    matrix_share: float | None = None
    """`least_operations` per time of a call, as a share of `matrix_tflops`."""
    error: float | None = None
    """Distance to the definition in float64, as a share of its largest value: of the worst output or gradient."""
    error_allowed: float | None = None
    """The largest that was allowed there."""
    copy_gb_per_s: float | None = None
    """Gigabytes (10^9) per second that a large copy read and wrote, on the same device in the same run."""
    matrix_tflops: float | None = None
    """10^12 operations per second of a large matrix product in the same dtype, on the same device in the same run."""

    def __post_init__(self) -> None:
        # JSON has lists only.
        object.__setattr__(self, "spread", tuple(self.spread))
        low, high = self.spread
        if not 0 < low <= self.median <= high < math.inf:
            raise ValueError(f"Record: median {self.median} must lie within its spread {low} to {high}, all positive.")
        if self.rounds < 1:
            raise ValueError(f"Record: rounds must be at least 1, but it is {self.rounds}.")
        if self.shares and not math.isclose(sum(self.shares.values()), 1, abs_tol=0.01):
            raise ValueError(f"Record: shares must sum to 1, but they sum to {sum(self.shares.values()):.3f}.")
        if self.error is not None and self.error_allowed is not None and not self.error <= self.error_allowed:
            raise ValueError(f"Record: error {self.error} is more than the {self.error_allowed} that are allowed.")


def environment(device: str = "cpu") -> dict[str, Any]:
    """The fields of a `Record` that say on what, and when, was measured."""
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def append(record: Record, path: Path) -> None:
    """Add one line to a file of results."""
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
    # The results themselves grow with each run.
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
