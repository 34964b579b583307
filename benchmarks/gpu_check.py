"""`python benchmarks/gpu_check.py [check | record] OUT`: the GPU checks, each with a time limit of its own.

`check` runs the tests that need a GPU, then the benchmarks without records: small shapes, and the headline shapes in
bfloat16. `record` runs the benchmarks and writes records to OUT/results. A step that hangs is ended and does not stop
the others. With `--dry-run`, the same commands run on a CPU at small sizes, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 0.7
"""Share of a step's time limit after which its benchmark starts no new measurement."""
LINES = 15
"""Lines of the output of a failed step to print."""


class Step(NamedTuple):
    """One command."""

    name: str
    """Also the name of its log."""
    arguments: list[str]
    """Of Python."""
    share: float
    """Share of the time of all steps; what a step does not use is divided among the later ones."""


class Result(NamedTuple):
    """Outcome of a step."""

    name: str
    status: str
    """Exit status, or "timeout"."""
    seconds: float
    skipped: int
    """Number of measurements or tests that were skipped, by its log."""


def steps_of(stage: str, out: Path, device: str) -> list[Step]:
    """The steps of a stage, the most important first."""

    def benchmark(*words: str) -> list[str]:
        return ["benchmarks/run.py", *words, "--device", device]

    if stage == "check":
        headline = ["--shapes", "headline", "b48", "b1024", "--dtypes", "bfloat16", "--no-record"]
        return [
            Step("tests", tests(), 0.3),
            Step("operations-quick", benchmark("all", "--quick"), 0.2),
            Step("operations-headline", benchmark("all", *headline), 0.25),
            Step("step-quick", benchmark("step", "--quick"), 0.15),
            Step("sample-quick", benchmark("sample", "--quick"), 0.1),
        ]
    results = ["--results", str(out / "results")]
    return [
        Step("operations", benchmark("all", *results), 0.5),
        Step("step", benchmark("step", *results), 0.3),
        Step("sample", benchmark("sample", *results), 0.2),
    ]


def tests() -> list[str]:
    """Run the files with tests that need a GPU.

    The other files, some of which import packages for development, are not collected, and the options of pyproject.toml
    that belong to pytest-markdown-docs are replaced.
    """
    paths = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    options = ["-o", "addopts=--import-mode=importlib", "-m", "gpu", "-q", "-rs", "--maxfail=25", "--tb=short"]
    return ["-m", "pytest", *options, *(str(path.relative_to(ROOT)) for path in paths)]


def run(step: Step, out: Path, limit: float) -> Result:
    """Run a step, and end it at the limit; processes that it has started and left running are ended in any case."""
    arguments = step.arguments
    if arguments[1] in ("all", "step"):
        arguments = [*arguments, "--budget", f"{BUDGET * limit:.0f}"]
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    log = out / f"{step.name}.log"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = str(process.wait(limit))
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            # A step that crashed, too: its children would keep the GPU from the next one.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text("utf-8", errors="replace").splitlines()
    if status != "0":
        print("\n".join([f"--- {step.name}, the end of {log}:", *lines[-LINES:]]), flush=True)
    # Measurements line by line; tests in pytest's summary by their number.
    skipped = sum(": skipped, " in line for line in lines)
    skipped += sum(int(match[1]) for match in map(re.compile(r"SKIPPED \[(\d+)\]").match, lines) if match)
    return Result(step.name, status, time.monotonic() - started, skipped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage and print a table of its steps.

    Returns:
        0, or 1 if a step failed.
    """
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_check.py", description="Run the GPU checks.")
    parser.add_argument("stage", choices=["check", "record"])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of logs and records")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit of all steps (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU in Triton's interpreter, at small sizes")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    steps = steps_of(options.stage, out, "interpreter" if options.dry_run else "cuda")
    results = []
    for position, step in enumerate(steps):
        share = step.share / sum(each.share for each in steps[position:])
        results.append(run(step, out, share * (end - time.monotonic())))
    print(f"\n{'step':20} {'status':>8} {'seconds':>8} {'skipped':>8}")
    for name, status, seconds, skipped in results:
        print(f"{name:20} {status:>8} {seconds:8.1f} {skipped:8}")
    return 0 if all(result.status == "0" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
