"""`python benchmarks/run.py [attention | similarity | sample | step | demo | all]`: measure and append to `results/`.

The operations need only torch and einops; `step` also torchvision, `demo` the packages for training, and `sample` these
for the start of the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
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
SAMPLE, STEP = "sample", "step"
TRAINING = (STEP, "demo")
INTERPRETER = "interpreter"
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
    if options.device != "cpu" and options.what == "demo":
        parser.error("'demo' is measured on a CPU only")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU here")
    if options.device == INTERPRETER:
        # The first is read when a kernel is first imported; the second makes torch.compile return its argument.
        os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
        options.quick = True
    if options.what == "demo" and options.quick:
        parser.error("--quick: 'demo' has no small shape")
    if options.what == "all" and (options.device != "cpu" or options.quick):
        selected = [name for name in selected if name in OPERATIONS]
    if options.shapes or options.dtypes or options.impls:
        require_known_names(parser, selected, options)

    from benchmarks._measure import BusyError

    wrong: list[str] = []
    try:
        operations = [OPERATIONS[name] for name in selected if name in OPERATIONS]
        if operations:
            wrong = measure_operations(operations, options)
        for name in selected:
            if name == SAMPLE:
                measure_sampling(options)
            elif name == STEP and (options.device != "cpu" or options.quick):
                wrong += measure_step_on_gpu(options)
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

    settings = _operation.Settings(
        device=options.device,
        results=None if options.no_record or options.quick else options.results,
        rounds=1 if options.device == INTERPRETER else 2 if options.quick else options.rounds,
        threads=options.threads,
        quiet=math.inf if options.quick else options.quiet,
        memory=not options.quick,
        quick=options.quick,
        shapes=() if options.quick else tuple(options.shapes),
        dtypes=tuple(options.dtypes),
        impls=tuple(options.impls),
        deadline=STARTED + budget_of(options),
    )
    return _operation.measure([_operation.find(name) for name in names], settings)


def budget_of(options: argparse.Namespace) -> float:
    """Seconds after which no new measurement starts."""
    if options.budget is not None:
        return options.budget
    return BUDGET_ON_GPU if options.device == "cuda" else math.inf


def require_known_names(parser: argparse.ArgumentParser, selected: list[str], options: argparse.Namespace) -> None:
    """Require that each selected shape, precision and implementation exists: a misspelled one would measure nothing."""
    from benchmarks import _operation

    operations = [_operation.find(OPERATIONS[name]) for name in selected if name in OPERATIONS]
    known = {
        "shapes": [shape.name for operation in operations for shape in operation.shapes],
        "dtypes": [*_operation.CUDA_DTYPES] if operations else [],
        "impls": [impl for operation in operations for impl in operation.implementations("cuda")],
    }
    if STEP in selected:
        from benchmarks import step

        known["dtypes"] += step.PRECISIONS_ON_GPU
        known["impls"] += step.ON_GPU
    for option, names in known.items():
        unknown = [name for name in getattr(options, option) if name not in names]
        if unknown:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known are {', '.join(dict.fromkeys(names))}")


def measure_sampling(options: argparse.Namespace) -> None:
    """Measure the generator, and the start of `mirror-modules generate`."""
    from benchmarks import sample

    records = sample.measure(
        sample.QUICK if options.quick else sample.Sizes(),
        2 if options.quick else options.rounds,
        threads=options.threads,
        quiet=math.inf if options.quick else options.quiet,
        device="cuda" if options.device == "cuda" else "cpu",
        starts=0 if options.device == INTERPRETER else 1 if options.quick else sample.STARTS,
    )
    finish(SAMPLE, records, None if options.no_record or options.quick else options.results)


def measure_step_on_gpu(options: argparse.Namespace) -> list[str]:
    """Measure a training step in each precision; returns the implementations that differ from the published one.

    On a CPU, the same at a small size without times.
    """
    import torch

    from benchmarks import step

    torch.set_num_threads(options.threads)
    device = "cuda" if options.device == "cuda" else "cpu"
    default = step.QUICK if options.quick else step.Sizes(batch=step.BATCH_ON_GPU)
    sizes = dataclasses.replace(default, **given_sizes(options))
    dtypes = options.dtypes or step.PRECISIONS_ON_GPU
    impls = [impl for impl in step.ON_GPU if not options.impls or impl in options.impls]
    wrong: list[str] = []
    with step.published_pairs():
        reference = step.first_step(step.build_step(step.PUBLISHED, sizes, device, "float64"))
        for position, dtype in enumerate(dtypes, start=1):
            # Each precision gets the same share of the time.
            deadline = STARTED + budget_of(options) * position / len(dtypes)
            records, differing = step.measure_on_gpu(sizes, dtype, impls, reference, device, deadline)
            finish(STEP, records, None if options.no_record or options.quick else options.results)
            wrong += differing
    return wrong


def given_sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The sizes of a step that the command line gives."""
    sizes = {size: getattr(options, size) for size in SIZES_OF_STEP}
    return {
        size: tuple(value) if size == "resolutions" else value for size, value in sizes.items() if value is not None
    }


def measure_training(name: str, options: argparse.Namespace) -> None:
    """Measure a training step."""
    record, common = not options.no_record, {"threads": options.threads, "quiet": options.quiet}
    if record:
        require_passing_tests()
    if name == "step":
        from benchmarks import step

        records = step.measure(step.Sizes(**given_sizes(options)), options.rounds, **common)
    else:
        from benchmarks import profile_demo

        records = profile_demo.measure(options.steps, **common)
    finish(name, records, options.results if record else None)


def finish(name: str, records: Iterable[Record], results: Path | None) -> None:
    """Print records of training steps or of sampling, and append each to the results as soon as it comes."""
    from benchmarks import _record

    for entry in records:
        low, high = entry.spread
        memory = "?" if entry.peak_memory_mib is None else f"{entry.peak_memory_mib:.0f}"
        title = f"{entry.op}, {entry.impl}"
        if entry.quantity == "ms" or entry.op == "sampling":
            title += f", {entry.dtype}, batch {entry.shape['batch']}"
        print(f"{title}: {entry.median:.3f} {entry.quantity} ({low:.3f} to {high:.3f}), {memory} MiB", flush=True)
        if entry.quantity == "ms":
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
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda", INTERPRETER],
        default="cpu",
        help="device (%(default)s); 'interpreter' is a dry run of 'cuda --quick' on a CPU, in Triton's interpreter",
    )
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
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="of the operations, and of 'step' on a GPU: start no new measurement after this time "
        f"({BUDGET_ON_GPU:.0f} on a GPU, no limit on a CPU)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smoke test with a small shape, except 'demo'; nothing is recorded",
    )
    for name, where in (("shapes", ""), ("dtypes", ", and 'step' on a GPU"), ("impls", ", and 'step' on a GPU")):
        text = f"of 'attention' and 'similarity'{where}: measure only these"
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help=text)
    demo = parser.add_argument_group("'demo'")
    demo.add_argument("--steps", type=int, default=20, help="measured steps (%(default)s)")
    step = parser.add_argument_group(
        "sizes of 'step'; defaults are those of the published model for birds, batch 4, on a GPU 16"
    )
    for size in SIZES_OF_STEP[:-1]:
        step.add_argument("--" + size.replace("_", "-"), type=int)
    step.add_argument("--resolutions", type=int, nargs="+", metavar="PIXELS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
