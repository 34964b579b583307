"""`python benchmarks/run.py [attention | similarity | sample | step | demo | all]`: measure and append to `results/`.

The operations need only torch and einops; `step` and `demo` also need the packages for training, and `sample` for the
start of the command.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the path of a script holds only its own folder
    sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from benchmarks._record import Record

# Before torch is imported, so that the import counts toward the time budget.
STARTED = time.monotonic()
OPERATIONS = {"attention": "global_local_attention", "similarity": "word_region_similarity"}
SAMPLE = "sample"
TRAINING = ("step", "demo")
BUDGET_ON_GPU = 500.0
SIZES_OF_STEP = ("batch", "words", "word_dim", "channels", "discriminator_channels", "resolutions")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line selects.

    Returns:
        0, or 1 if an implementation differs from the definition.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    selected = [*OPERATIONS, SAMPLE, *TRAINING] if options.what == "all" else [options.what]
    if options.device == "cuda":
        if options.what in TRAINING:
            parser.error(f"{options.what!r} is measured on a CPU only")
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU here")

    if options.what in TRAINING and options.quick:
        parser.error(f"--quick: {options.what!r} has no small shape; give it small sizes")
    if options.what == "all" and (options.device == "cuda" or options.quick):
        selected = [name for name in selected if name in OPERATIONS]

    from benchmarks._measure import BusyError

    wrong: list[str] = []
    try:
        operations = [OPERATIONS[name] for name in selected if name in OPERATIONS]
        if operations:
            wrong = measure_operations(operations, options)
        for name in selected:
            if name == SAMPLE:
                measure_sampling(options)
            elif name in TRAINING:
                measure_training(name, options)
    except BusyError as error:
        raise SystemExit(
            f"benchmarks: {error}, so measuring stopped; end those programs, or allow more with --quiet."
        ) from None
    for name in wrong:
        print(f"benchmarks: {name} differs from the definition.")
    return 1 if wrong else 0


def measure_operations(names: list[str], options: argparse.Namespace) -> list[str]:
    """Measure operations; returns the implementations that differ from the definition."""
    from benchmarks import _operation

    budget = options.budget
    if budget is None:
        budget = BUDGET_ON_GPU if options.device == "cuda" else math.inf
    settings = _operation.Settings(
        device=options.device,
        results=None if options.no_record or options.quick else options.results,
        rounds=2 if options.quick else options.rounds,
        threads=options.threads,
        quiet=math.inf if options.quick else options.quiet,
        memory=not options.quick,
        quick=options.quick,
        shapes=tuple(options.shapes),
        dtypes=tuple(options.dtypes),
        impls=tuple(options.impls),
        deadline=STARTED + budget,
    )
    return _operation.measure([_operation.find(name) for name in names], settings)


def measure_sampling(options: argparse.Namespace) -> None:
    """Measure the generator, and the start of `mirror-modules generate`."""
    from benchmarks import sample

    records = sample.measure(
        sample.QUICK if options.quick else sample.Sizes(),
        2 if options.quick else options.rounds,
        threads=options.threads,
        quiet=math.inf if options.quick else options.quiet,
        device=options.device,
        starts=1 if options.quick else sample.STARTS,
    )
    finish(SAMPLE, records, None if options.no_record or options.quick else options.results)


def measure_training(name: str, options: argparse.Namespace) -> None:
    """Measure a training step."""
    record, common = not options.no_record, {"threads": options.threads, "quiet": options.quiet}
    if record:
        require_passing_tests()
    if name == "step":
        from benchmarks import step

        sizes: dict[str, Any] = {size: getattr(options, size) for size in SIZES_OF_STEP}
        sizes = {size: value for size, value in sizes.items() if value is not None}
        if "resolutions" in sizes:
            sizes["resolutions"] = tuple(sizes["resolutions"])
        records = step.measure(step.Sizes(**sizes), options.rounds, **common)
    else:
        from benchmarks import profile_demo

        records = profile_demo.measure(options.steps, **common)
    finish(name, records, options.results if record else None)


def finish(name: str, records: list[Record], results: Path | None) -> None:
    """Print records of training steps or of sampling, and append them to the results."""
    from benchmarks import _record

    for entry in records:
        low, high = entry.spread
        memory = "?" if entry.peak_memory_mib is None else f"{entry.peak_memory_mib:.0f}"
        title = f"{entry.op}, {entry.impl}" + (f", batch {entry.shape['batch']}" if entry.op == "sampling" else "")
        print(f"{title}: {entry.median:.3f} {entry.quantity} ({low:.3f} to {high:.3f}), {memory} MiB")
        if entry.op == "sampling" and entry.quantity == "ms":
            print(f"    {1000 * entry.shape['batch'] / entry.median:,.0f} images/s")
        if entry.others is not None:
            print(f"    other programs used up to {entry.others:.1%} of the processors during the measurement")
        for part, share in sorted(entry.shares.items(), key=lambda item: -item[1]):
            print(f"    {share:6.1%}  {part}")
        if results is not None:
            _record.append(entry, results / f"{name}.jsonl")


def require_passing_tests() -> None:
    """Require that the tests pass: the times of two sides that compute different things are meaningless."""
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/benchmarks"], cwd=ROOT).returncode:
        raise SystemExit("benchmarks: tests/benchmarks fail, so nothing is recorded; fix them, or use --no-record.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description="Measure speed and memory; each result is appended to a file as soon as it is available.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=["all", *OPERATIONS, SAMPLE, *TRAINING],
        default="all",
        help="'all' by default; on a GPU and with --quick, 'all' means the operations",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (%(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of the results (benchmarks/results)",
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--rounds", type=int, default=6, help="measured rounds on a CPU, except 'demo' (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (%(default)s)")
    parser.add_argument(
        "--quiet",
        type=float,
        default=0.05,
        help="wait until other programs use at most this share of the processors (%(default)s)",
    )
    operations = parser.add_argument_group("'attention' and 'similarity'")
    operations.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"start no new measurement after this time ({BUDGET_ON_GPU:.0f} on a GPU, no limit on a CPU)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smoke test of the operations or of 'sample' with a small shape; nothing is recorded",
    )
    for name in ("shapes", "dtypes", "impls"):
        operations.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help="measure only these")
    demo = parser.add_argument_group("'demo'")
    demo.add_argument("--steps", type=int, default=20, help="measured steps (%(default)s)")
    step = parser.add_argument_group("sizes of 'step'; defaults are those of the published model for birds, batch 4")
    for size in SIZES_OF_STEP[:-1]:
        step.add_argument("--" + size.replace("_", "-"), type=int)
    step.add_argument("--resolutions", type=int, nargs="+", metavar="PIXELS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
