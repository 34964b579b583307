"""`python -m benchmarks [step | demo]`: measure and append to `results/`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import _measure, _record, profile_demo, step


def main() -> None:
    arguments = _parser().parse_args()
    record, common = not arguments.no_record, {"threads": arguments.threads, "quiet": arguments.quiet}
    if record:
        refuse_while_red()
    try:
        if arguments.what in ("step", "all"):
            sizes = step.Sizes(
                batch=arguments.batch,
                words=arguments.words,
                word_dim=arguments.word_dim,
                channels=arguments.channels,
                discriminator_channels=arguments.discriminator_channels,
                resolutions=tuple(arguments.resolutions),
            )
            finish("step", step.measure(sizes, arguments.rounds, **common), record=record)
        if arguments.what in ("demo", "all"):
            finish("demo", profile_demo.measure(arguments.steps, **common), record=record)
    except _measure.BusyError as error:
        raise SystemExit(
            f"benchmarks: {error}, so nothing is recorded; end them, or allow more with --quiet."
        ) from None


def finish(name: str, records: list[_record.Record], *, record: bool) -> None:
    for entry in records:
        low, high = entry.spread
        memory = "?" if entry.peak_memory_mib is None else f"{entry.peak_memory_mib:.0f}"
        print(f"{entry.op}, {entry.impl}: {entry.median:.3f} {entry.quantity} ({low:.3f} to {high:.3f}), {memory} MiB")
        if entry.others is not None:
            print(f"    other programs used up to {entry.others:.1%} of the processors meanwhile")
        for part, share in sorted(entry.shares.items(), key=lambda item: -item[1]):
            print(f"    {share:6.1%}  {part}")
        if record:
            _record.append(entry, _record.RESULTS / f"{name}.jsonl")


def refuse_while_red() -> None:
    """A speed is worth nothing while the two sides compute different things."""
    root = Path(__file__).parent.parent
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/benchmarks"], cwd=root).returncode:
        raise SystemExit("benchmarks: tests/benchmarks fail, so nothing is recorded; mend them, or use --no-record.")


def _parser() -> argparse.ArgumentParser:
    sizes = step.Sizes()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and memory; the results are appended to benchmarks/results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["all", "step", "demo"], default="all")
    parser.add_argument("--rounds", type=int, default=6, help="measured calls of each implementation in 'step'")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of 'demo'")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--quiet", type=float, default=0.05, help="share of the processors that other programs may use; else it waits"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    group = parser.add_argument_group("sizes of 'step'")
    group.add_argument("--batch", type=int, default=sizes.batch)
    group.add_argument("--words", type=int, default=sizes.words)
    group.add_argument("--word-dim", type=int, default=sizes.word_dim)
    group.add_argument("--channels", type=int, default=sizes.channels)
    group.add_argument("--discriminator-channels", type=int, default=sizes.discriminator_channels)
    group.add_argument("--resolutions", type=int, nargs="+", default=sizes.resolutions, metavar="PIXELS")
    return parser


if __name__ == "__main__":
    main()
