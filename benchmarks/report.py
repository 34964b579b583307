"""`python -m benchmarks.report`: write `docs/benchmarks.md` and its plots from the newest records of each operation.

The page is generated completely: to change its text, change it here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import _record
from benchmarks._operation import DIRECTIONS, Operation, find
from benchmarks._record import Record

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured"
OPERATIONS = {
    "global_local_attention": "Attention of a stage",
    "word_region_similarity": "Similarity of every image with every caption",
}
IMPLEMENTATIONS = ("published", "loop", "sdpa", "flex", "compiled", "torch", "triton")
STOCK = ("sdpa", "flex", "compiled")
SIZES = {"batch": "B", "channels": "C", "height": "H", "width": "W", "regions": "R", "words": "L", "features": "D"}

PAGE = """# Benchmarks

Speed and peak memory of the two operations with several implementations, and their distance from the limits of the
hardware. This page is generated from the records in `benchmarks/results` (`make bench-report`). Benchmarks of complete
training steps are on [the results page](results.md#speed-and-memory).

## Implementations

- `published`: the formulation of the published code, implemented from its equations. Attention: positions become rows
  through transposed copies, and the sentence is repeated over all positions. Similarity: a loop over captions, each
  repeated for all images.
- `loop` (similarity only): `published` without the transposed copies; the fairer baseline.
- `sdpa` (attention only): `scaled_dot_product_attention` for the words, plain PyTorch for the sentence.
- `flex` (attention only, GPU only): `flex_attention` for the words, compiled together with the sentence attention.
- `compiled`: `torch.compile` of our plain PyTorch implementation.
- `torch`: ours, `impl="torch"`.
- `triton`: ours, `impl="triton"`, GPU only.

All get the same tensors, with captions of one third to all of the words and the correct mask for each caption. (The
published code repeats the masks [in a wrong order](differences.md); the order does not affect the time.)

| Direction | Measured call |
|---|---|
| `forward` | outputs only, without a graph for a backward pass |
| `backward` | gradients of all inputs, from an existing graph |
| `both` | forward with a graph, then backward, as in training |

## How to read the tables

- **Correctness first.** Before an implementation is timed, its outputs and all gradients are compared with the
  definition in float64, at the measured size. The tolerance is twice the error of the plain definition in the same
  precision. Implementations outside the tolerance are not timed.
- **CPU: ratios.** 0.5 means half of the time of `published`, or of the baseline in the column *Baseline*.
  Implementations are timed interleaved in one process; each entry is the median over rounds, with the lowest and
  the highest round in parentheses. If these enclose 1, no difference is shown.
- **GPU: milliseconds,** the median time between two events on the GPU, with the cache flushed before each call; the
  speedup over `published` in the same run is in parentheses.
- **Share of the hardware limit.** Every implementation must read its inputs, write its outputs, and compute two matrix
  products forward and four backward. 100 % of the *copy rate* means as fast as a copy of the same number of bytes;
  100 % of the *matrix rate* means as fast as one large matrix product with the same number of operations. The higher
  of the two bounds the possible speedup. Both rates are measured on the same GPU in the same run.
- **Memory** is the peak of a call beyond its inputs, including its outputs or gradients; for `backward`, beyond its
  graph. The value for `both` is the one that matters in training.
- **A dash** means not measured. Implementations that fail have no record; the run prints the reason.

## How to reproduce

```bash
make bench ARGS=attention                     # on this machine's CPU; then ARGS=similarity
python benchmarks/run.py --device cuda        # both operations on a GPU, within nine minutes
make bench ARGS="attention --quick"           # smoke test with a small shape
make bench-report                             # this page
```

The second command needs only PyTorch and einops; prefix it with `PYTHONPATH=src` if the package is not installed.
`--results DIR` selects another output folder. `--budget SECONDS` limits the time: the most important shapes come first,
and the run lists those that it skipped. `benchmarks/README.md` has the rules, such as the permitted load of the
machine, and describes what each file measures.
"""


class Target(NamedTuple):
    """A performance target of our implementation on a GPU."""

    description: str
    op: str
    shape: str
    direction: str
    result: Callable[[dict[str, Record]], float | None]
    """Result of the bfloat16 records of the shape and direction, by implementation. None if one is missing."""
    is_reached: Callable[[float], bool]
    format: str
    """Format string of the result."""


def _share(name: str) -> Callable[[dict[str, Record]], float | None]:
    return lambda records: getattr(records["triton"], name) if "triton" in records else None


def _speedup_over(*others: str) -> Callable[[dict[str, Record]], float | None]:
    def speedup(records: dict[str, Record]) -> float | None:
        ours = records.get("triton")
        baselines = [records[name].median for name in others if name in records and same_run(records[name], ours)]
        return min(baselines) / ours.median if ours is not None and baselines else None

    return speedup


def _gigabytes(records: dict[str, Record]) -> float | None:
    ours = records.get("triton")
    return None if ours is None or ours.peak_memory_mib is None else ours.peak_memory_mib * 2**20 / 1e9


HEADLINE = "B = 64, C = 32, 128 × 128, L = 18"
ATTENTION = ("global_local_attention", "headline")
TARGETS = (
    Target(
        f"attention, {HEADLINE}: forward at 80 % of the copy rate or more",
        *ATTENTION,
        "forward",
        _share("bandwidth_share"),
        lambda x: x >= 0.8,
        "{:.0%}",
    ),
    Target(
        "the same, backward: 65 % or more",
        *ATTENTION,
        "backward",
        _share("bandwidth_share"),
        lambda x: x >= 0.65,
        "{:.0%}",
    ),
    *(
        Target(
            f"the same, {direction}: {least} times as fast as {name} or more",
            *ATTENTION,
            direction,
            _speedup_over(*others),
            lambda x, least=least: x >= least,
            "{:.1f}",
        )
        for least, name, others in ((8, "`published`", ("published",)), (1.5, "the best stock implementation", STOCK))
        for direction in ("forward", "both")
    ),
    Target(
        "similarity, B = 48: forward and backward 15 times as fast as `published` or more",
        "word_region_similarity",
        "b48",
        "both",
        _speedup_over("published"),
        lambda x: x >= 15,
        "{:.1f}",
    ),
    Target(
        "similarity, B = 1024: forward and backward with less than 1 GB",
        "word_region_similarity",
        "b1024",
        "both",
        _gigabytes,
        lambda x: x < 1,
        "{:.2f} GB",
    ),
    Target(
        "the same: at 35 % of the matrix rate or more",
        "word_region_similarity",
        "b1024",
        "both",
        _share("matrix_share"),
        lambda x: x >= 0.35,
        "{:.0%}",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write docs/benchmarks.md.")
    parser.add_argument("--results", type=Path, default=_record.RESULTS, help="folder of the records")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    options = parser.parse_args(arguments)
    records = newest(read_all(options.results))
    plots = draw(records, options.docs / "assets")
    (options.docs / "benchmarks.md").write_text(render(records, plots), encoding="utf-8")
    print(options.docs / "benchmarks.md")


def read_all(folder: Path) -> list[Record]:
    """Read all records of the operations."""
    paths = [folder / f"{op}.jsonl" for op in OPERATIONS]
    return [record for path in paths if path.exists() for record in _record.read(path)]


def newest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each operation, implementation, direction, shape, precision and device."""
    latest: dict[tuple[object, ...], Record] = {}
    for record in sorted(records, key=lambda record: record.date):
        latest[record.op, record.impl, record.direction, shape_key(record), record.dtype, record.device] = record
    return list(latest.values())


def shape_key(record: Record) -> tuple[tuple[str, object], ...]:
    """The sizes as a hashable key."""
    return tuple(sorted(record.shape.items()))


def same_run(record: Record, other: Record | None) -> bool:
    """Check that two records were timed interleaved; otherwise their times are not comparable."""
    return other is not None and record.date == other.date


def render(records: Sequence[Record], plots: dict[tuple[str, str], str] | None = None) -> str:
    """Render the page."""
    gpus = sorted({record.device for record in records} - {"cpu"})
    parts = [PAGE, targets(records, gpus)]
    for gpu in gpus or [None]:
        parts.append(f"## On a GPU: {gpu or NOT_MEASURED}\n")
        parts.append(section([record for record in records if record.device == gpu], gpu_tables, gpu, plots or {}))
    parts.append("## On a CPU\n")
    on_cpu = [record for record in records if record.device == "cpu"]
    parts.append(section(on_cpu, cpu_tables, "cpu", plots or {}))
    return "\n".join(parts).rstrip() + "\n"


def section(
    records: Sequence[Record],
    tables: Callable[[list[Record]], str],
    device: str | None,
    plots: dict[tuple[str, str], str],
) -> str:
    """Render all operations on one device."""
    lines = [machine(records)] if records else []
    for op, title in OPERATIONS.items():
        of_operation = [record for record in records if record.op == op]
        lines.append(f"### {title}: `{op}`\n")
        if not of_operation:
            lines.append(f"{NOT_MEASURED}\n")
            continue
        if (op, device) in plots:
            lines.append(f"![{title}: time and memory of the implementations]({plots[op, device]})\n")
        lines.append(tables(of_operation))
    return "\n".join(lines)


def machine(records: Sequence[Record]) -> str:
    """List the machines and versions of the records, and the copy and matrix rates of each precision."""
    lines: dict[str, None] = {}
    for record in records:
        versions = ", ".join(f"{name} {record.versions[name]}" for name in sorted(record.versions))
        threads = f"{record.threads} thread" + ("s" if record.threads > 1 else "")
        lines[f"- {record.cpu}, {threads}; {versions}; commit {record.commit}; {record.date[:10]}"] = None
    for record in records:
        if record.copy_gb_per_s is not None:
            rates = f"copy {record.copy_gb_per_s:,.0f} GB/s, matrix product {record.matrix_tflops:,.0f} TFLOP/s"
            lines[f"- {record.dtype}: {rates}"] = None
    return "\n".join(lines) + "\n"


def targets(records: Sequence[Record], gpus: Sequence[str]) -> str:
    """Render the table of targets on a GPU, with the measured results."""
    lines = ["## Targets on a GPU\n"]
    lines.append(
        "For `triton` in bfloat16, on one H100 or H200. The best stock implementation is the fastest of `sdpa`, `flex`"
    )
    lines.append("and `compiled`.\n")
    lines.append(table_head(["Target", *(gpus or ["Measured"])]))
    for target in TARGETS:
        cells = []
        for gpu in gpus or [None]:
            by_impl = {
                record.impl: record
                for record in records
                if (record.device, record.dtype, record.op) == (gpu, "bfloat16", target.op)
                and (record.shape["name"], record.direction) == (target.shape, target.direction)
            }
            result = target.result(by_impl)
            if result is None:
                cells.append(NOT_MEASURED)
            else:
                outcome = "reached" if target.is_reached(result) else "not reached"
                cells.append(f"{target.format.format(result)}, {outcome}")
        lines.append(row([target.description, *cells]))
    return "\n".join(lines) + "\n"


def cpu_tables(records: list[Record]) -> str:
    """Tables of time ratios and of memory."""

    def ratio(record: Record, _: dict[str, Record]) -> str:
        low, high = record.spread
        return "1" if low == high == 1 else f"{record.median:.2f} ({low:.2f} to {high:.2f})"

    def baseline(group: dict[str, Record]) -> str:
        return "`" + next(iter(group.values())).quantity.removeprefix("time / time of ") + "`"

    times = table(records, ratio, ("Baseline", baseline))
    memory = table(records, _memory_of_a_call)
    return "\n".join([f"Time, float32. {shapes_of(records)}\n", times, "Peak memory, MiB:\n", memory])


def gpu_tables(records: list[Record]) -> str:
    """Tables of milliseconds, shares of the hardware limits, and memory, for each precision."""

    def milliseconds(record: Record, group: dict[str, Record]) -> str:
        published = group.get("published")
        if published is None or record.impl == "published" or not same_run(published, record):
            return f"{record.median:.3g}"
        return f"{record.median:.3g} ({published.median / record.median:.1f}×)"

    def shares(record: Record, _: dict[str, Record]) -> str:
        if record.bandwidth_share is None or record.matrix_share is None:
            return "–"
        return f"{record.bandwidth_share:.0%} / {record.matrix_share:.0%}"

    lines = [shapes_of(records) + "\n"]
    for dtype in dict.fromkeys(record.dtype for record in records):
        selected = [record for record in records if record.dtype == dtype]
        lines += [f"#### {dtype}\n", "Milliseconds:\n", table(selected, milliseconds)]
        lines += ["Share of the copy rate / of the matrix rate:\n", table(selected, shares)]
        lines += ["Peak memory, MiB:\n", table(selected, _memory_of_a_call)]
    return "\n".join(lines)


def _memory_of_a_call(record: Record, _: dict[str, Record]) -> str:
    return "–" if record.peak_memory_mib is None else f"{record.peak_memory_mib:,.0f}"


def table(
    records: Sequence[Record],
    cell: Callable[[Record, dict[str, Record]], str],
    column: tuple[str, Callable[[dict[str, Record]], str]] | None = None,
) -> str:
    """A table with a row per shape and direction and a column per implementation, plus an optional column."""
    impls = [impl for impl in IMPLEMENTATIONS if any(record.impl == impl for record in records)]
    extra = [] if column is None else [column[0]]
    lines = [table_head(["Shape", "Direction", *extra, *(f"`{impl}`" for impl in impls)])]
    for shape in in_order(records):
        for direction in DIRECTIONS:
            group = {r.impl: r for r in records if (shape_key(r), r.direction) == (shape, direction)}
            if group:
                optional = [] if column is None else [column[1](group)]
                cells = [cell(group[impl], group) if impl in group else "–" for impl in impls]
                lines.append(row([dict(shape)["name"], f"`{direction}`", *optional, *cells]))
    return "\n".join(lines) + "\n"


def in_order(records: Sequence[Record]) -> list[tuple[tuple[str, object], ...]]:
    """The shapes of the records, in the order of the operation's file."""
    operation: Operation = find(records[0].op)
    names = [shape.name for shape in (*operation.shapes, operation.quick)]
    keys = dict.fromkeys(shape_key(record) for record in records)
    return sorted(keys, key=lambda key: names.index(dict(key)["name"]) if dict(key)["name"] in names else len(names))


def shapes_of(records: Sequence[Record]) -> str:
    """The sizes of each named shape."""
    described = []
    for shape in in_order(records):
        sizes = ", ".join(f"{SIZES.get(name, name)} = {size}" for name, size in shape_items(dict(shape)))
        described.append(f"{dict(shape)['name']}: {sizes}")
    return "; ".join(described) + "."


def shape_items(shape: dict[str, object]) -> list[tuple[str, object]]:
    """The sizes without the name, in a fixed order."""
    return [(name, shape[name]) for name in SIZES if name in shape]


def table_head(names: Sequence[str]) -> str:
    """The header of a table and its separator."""
    return row(names) + "\n" + "|" + "---|" * len(names)


def row(cells: Sequence[object]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(records: Sequence[Record], folder: Path) -> dict[tuple[str, str], str]:
    """Draw a plot for each operation and device; returns their paths relative to the page."""
    plots = {}
    for op in OPERATIONS:
        for device in sorted({record.device for record in records if record.op == op}):
            selected = [record for record in records if (record.op, record.device) == (op, device)]
            dtype = "bfloat16" if any(record.dtype == "bfloat16" for record in selected) else selected[0].dtype
            name = f"bench-{op.replace('_', '-')}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png"
            _draw([record for record in selected if record.dtype == dtype], dtype, folder / name)
            plots[op, device] = f"assets/{name}"
    return plots


def _draw(records: Sequence[Record], dtype: str, path: Path) -> None:
    """Plot the time of `forward` and `both` and the memory of `both` side by side, with a row of points per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shapes = in_order(records)
    impls = [impl for impl in IMPLEMENTATIONS if any(record.impl == impl for record in records)]
    panels = [("forward", "time"), ("both", "time"), ("both", "memory")]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(12, 1.8 + 0.5 * len(shapes)), sharey=True, layout="constrained"
    )
    for axis, (direction, quantity) in zip(axes, panels):
        shown = [record for record in records if record.direction == direction]
        for position, impl in enumerate(impls):
            of_impl = [record for record in shown if record.impl == impl]
            if quantity == "memory":
                of_impl = [record for record in of_impl if record.peak_memory_mib]
            offset = 0.7 * (position + 0.5) / len(impls) - 0.35
            heights = [shapes.index(shape_key(record)) + offset for record in of_impl]
            values = [record.peak_memory_mib if quantity == "memory" else record.median for record in of_impl]
            spread = [[r.median - r.spread[0] for r in of_impl], [r.spread[1] - r.median for r in of_impl]]
            axis.errorbar(
                values,
                heights,
                xerr=None if quantity == "memory" else spread,
                fmt="o",
                markersize=4,
                color=f"C{IMPLEMENTATIONS.index(impl)}",
                label=impl,
            )
        unit = "MiB" if quantity == "memory" else " or ".join(sorted({record.quantity for record in shown}))
        axis.set_title(f"{direction}: {quantity}, {unit}", fontsize=9)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(axis="x", which="both", alpha=0.3)
    axes[0].set_yticks(range(len(shapes)), [str(dict(shape)["name"]) for shape in shapes])
    axes[0].set_ylim(len(shapes) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(impls), fontsize=8)
    figure.suptitle(f"{records[0].op}, {records[0].device}, {dtype}: further left is better", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
