"""`python -m benchmarks.report`: write `docs/benchmarks.md` and its pictures out of the operations' newest records.

The page is generated as a whole: to change its words, change them here.
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

How fast are the two operations that have more than one implementation, how much memory do they take, and how far are
they from what the machine can do? This page is generated out of the records in `benchmarks/results`
(`make bench-report`). A training step as a whole is on [another page](results.md#speed-and-memory).

## What is compared

- `published`: the formulation of the published code, written down from its equations. Attention: positions become rows
  by transposed copies, and the sentence is repeated over all positions. Similarity: one caption after the other, each
  repeated for all images.
- `loop` (similarity only): `published` without the copies of what it transposes; the fairer one to compare with.
- `sdpa` (attention only): `scaled_dot_product_attention` for the words, plain PyTorch for the sentence.
- `flex` (attention only, on a GPU only): compiled `flex_attention` for the words, the sentence compiled with it.
- `compiled`: `torch.compile` of our plain PyTorch.
- `torch`: ours, `impl="torch"`.
- `triton`: ours, `impl="triton"`, on a GPU only.

All get the same tensors, captions of a third of the words to all of them, and each caption's own mask. (The published
code repeats the masks [in a wrong order](differences.md), which costs and saves no time; here it gets the right one.)

| Direction | What a call does |
|---|---|
| `forward` | outputs only, nothing is kept for a backward pass |
| `backward` | gradients of all inputs, from a graph that is already there |
| `both` | forward with a graph, then backward, as in training |

## How to read it

- **Right first.** Before an implementation is timed, its outputs and all gradients are compared with the definition in
  float64, at the size that is timed. It may be off by twice as much as the plain definition in the same precision.
  What is further off gets no time.
- **On a CPU: ratios.** 0.5 means half of the time of `published`, or of what the column *Against* names.
  Implementations take turns in one process; the figure is the median over the rounds, in brackets are the lowest and
  the highest round. If they enclose 1, no difference was shown.
- **On a GPU: milliseconds,** medians between two events on the GPU, with the cache flushed before each call; in
  brackets how many times as fast as `published` in the same run.
- **Share of the machine.** Every implementation must read its inputs, write its outputs, and make two matrix products
  forward and four backward. 100 % of the *copy rate* means: it took no longer than a copy that moves as many bytes;
  of the *matrix rate*: no longer than one large matrix product with as many operations. The higher of the two says
  how much is left to gain. Both rates are measured on the same GPU in the same run.
- **Memory** is what a call takes beyond its inputs, its outputs or gradients included; of `backward`, beyond its
  graph. What training needs is the one of `both`.
- **A dash**: not measured. What could not run has no record; the run says why.

## How to repeat it

```bash
make bench ARGS=attention                     # on this machine's CPU; then ARGS=similarity
python benchmarks/run.py --device cuda        # on a GPU: both, within nine minutes
make bench ARGS="attention --quick"           # a small shape, to see that all runs
make bench-report                             # this page
```

The second needs PyTorch and einops alone; without an installation, put `PYTHONPATH=src` before it. `--results DIR`
writes elsewhere. `--budget SECONDS` ends earlier: the most important shapes come first, and what is left out is named.
The rules, such as how quiet the machine has to be, and what each file measures are in `benchmarks/README.md`.
"""


class Target(NamedTuple):
    """What an implementation of ours is to reach on a GPU."""

    words: str
    op: str
    shape: str
    direction: str
    figure: Callable[[dict[str, Record]], float | None]
    """Of the records of that shape and direction in bfloat16, by implementation; None if one is missing."""
    reached: Callable[[float], bool]
    show: str
    """Format of the figure."""


def _share(name: str) -> Callable[[dict[str, Record]], float | None]:
    return lambda records: getattr(records["triton"], name) if "triton" in records else None


def _times_as_fast_as(*others: str) -> Callable[[dict[str, Record]], float | None]:
    def figure(records: dict[str, Record]) -> float | None:
        ours = records.get("triton")
        theirs = [records[name].median for name in others if name in records and same_run(records[name], ours)]
        return min(theirs) / ours.median if ours is not None and theirs else None

    return figure


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
            _times_as_fast_as(*others),
            lambda x, least=least: x >= least,
            "{:.1f}",
        )
        for least, name, others in ((8, "`published`", ("published",)), (1.5, "the best stock path", STOCK))
        for direction in ("forward", "both")
    ),
    Target(
        "similarity, B = 48: forward and backward 15 times as fast as `published` or more",
        "word_region_similarity",
        "b48",
        "both",
        _times_as_fast_as("published"),
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
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write the page of benchmarks.")
    parser.add_argument("--results", type=Path, default=_record.RESULTS, help="folder of the records")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    options = parser.parse_args(arguments)
    records = newest(read_all(options.results))
    pictures = draw(records, options.docs / "assets")
    (options.docs / "benchmarks.md").write_text(render(records, pictures), encoding="utf-8")
    print(options.docs / "benchmarks.md")


def read_all(folder: Path) -> list[Record]:
    """All records of the operations."""
    paths = [folder / f"{op}.jsonl" for op in OPERATIONS]
    return [record for path in paths if path.exists() for record in _record.read(path)]


def newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each operation, implementation, direction, shape, precision and device."""
    latest: dict[tuple[object, ...], Record] = {}
    for record in sorted(records, key=lambda record: record.date):
        latest[record.op, record.impl, record.direction, shape_key(record), record.dtype, record.device] = record
    return list(latest.values())


def shape_key(record: Record) -> tuple[tuple[str, object], ...]:
    """The sizes, fit for a dictionary."""
    return tuple(sorted(record.shape.items()))


def same_run(record: Record, other: Record | None) -> bool:
    """Did they take turns? Otherwise their times do not compare."""
    return other is not None and record.date == other.date


def render(records: Sequence[Record], pictures: dict[tuple[str, str], str] | None = None) -> str:
    """The page."""
    gpus = sorted({record.device for record in records} - {"cpu"})
    parts = [PAGE, targets(records, gpus)]
    for gpu in gpus or [None]:
        parts.append(f"## On a GPU: {gpu or NOT_MEASURED}\n")
        parts.append(section([record for record in records if record.device == gpu], gpu_tables, gpu, pictures or {}))
    parts.append("## On a CPU\n")
    on_cpu = [record for record in records if record.device == "cpu"]
    parts.append(section(on_cpu, cpu_tables, "cpu", pictures or {}))
    return "\n".join(parts).rstrip() + "\n"


def section(
    records: Sequence[Record],
    tables: Callable[[list[Record]], str],
    device: str | None,
    pictures: dict[tuple[str, str], str],
) -> str:
    """All operations on one device."""
    lines = [machine(records)] if records else []
    for op, title in OPERATIONS.items():
        mine = [record for record in records if record.op == op]
        lines.append(f"### {title}: `{op}`\n")
        if not mine:
            lines.append(f"{NOT_MEASURED}\n")
            continue
        if (op, device) in pictures:
            lines.append(f"![{title}: time and memory of the implementations]({pictures[op, device]})\n")
        lines.append(tables(mine))
    return "\n".join(lines)


def machine(records: Sequence[Record]) -> str:
    """On what was measured, and what it can do: a line for each combination that occurs."""
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
    """What is to be reached on a GPU, and what was."""
    lines = ["## Targets on a GPU\n"]
    lines.append(
        "For `triton` in bfloat16, on one H100 or H200. The best stock path is the fastest of `sdpa`, `flex` and"
    )
    lines.append("`compiled`.\n")
    lines.append(table_head(["Target", *(gpus or ["Measured"])]))
    for target in TARGETS:
        cells = []
        for gpu in gpus or [None]:
            found = {
                record.impl: record
                for record in records
                if (record.device, record.dtype, record.op) == (gpu, "bfloat16", target.op)
                and (record.shape["name"], record.direction) == (target.shape, target.direction)
            }
            figure = target.figure(found)
            if figure is None:
                cells.append(NOT_MEASURED)
            else:
                cells.append(f"{target.show.format(figure)}, {'reached' if target.reached(figure) else 'not reached'}")
        lines.append(row([target.words, *cells]))
    return "\n".join(lines) + "\n"


def cpu_tables(records: list[Record]) -> str:
    """Ratios and memory."""

    def ratio(record: Record, _: dict[str, Record]) -> str:
        low, high = record.spread
        return "1" if low == high == 1 else f"{record.median:.2f} ({low:.2f} to {high:.2f})"

    def against(group: dict[str, Record]) -> str:
        return "`" + next(iter(group.values())).quantity.removeprefix("time / time of ") + "`"

    words = f"Time, float32. {shapes_of(records)}\n"
    memory = "Memory, MiB:\n"
    return "\n".join([words, table(records, ratio, ("Against", against)), memory, table(records, _memory_of_a_call)])


def gpu_tables(records: list[Record]) -> str:
    """Milliseconds, shares and memory, for each precision."""

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
        mine = [record for record in records if record.dtype == dtype]
        lines += [f"#### {dtype}\n", "Milliseconds:\n", table(mine, milliseconds)]
        lines += ["Share of the copy rate / of the matrix rate:\n", table(mine, shares)]
        lines += ["Memory, MiB:\n", table(mine, _memory_of_a_call)]
    return "\n".join(lines)


def _memory_of_a_call(record: Record, _: dict[str, Record]) -> str:
    return "–" if record.peak_memory_mib is None else f"{record.peak_memory_mib:,.0f}"


def table(
    records: Sequence[Record],
    cell: Callable[[Record, dict[str, Record]], str],
    column: tuple[str, Callable[[dict[str, Record]], str]] | None = None,
) -> str:
    """Shapes and directions down, implementations across, with one more column if given."""
    impls = [impl for impl in IMPLEMENTATIONS if any(record.impl == impl for record in records)]
    extra = [] if column is None else [column[0]]
    lines = [table_head(["Shape", "Direction", *extra, *(f"`{impl}`" for impl in impls)])]
    for shape in in_order(records):
        for direction in DIRECTIONS:
            group = {r.impl: r for r in records if (shape_key(r), r.direction) == (shape, direction)}
            if group:
                more = [] if column is None else [column[1](group)]
                figures = [cell(group[impl], group) if impl in group else "–" for impl in impls]
                lines.append(row([dict(shape)["name"], f"`{direction}`", *more, *figures]))
    return "\n".join(lines) + "\n"


def in_order(records: Sequence[Record]) -> list[tuple[tuple[str, object], ...]]:
    """The shapes that occur, in the order of the operation's file."""
    operation: Operation = find(records[0].op)
    names = [shape.name for shape in (*operation.shapes, operation.quick)]
    keys = dict.fromkeys(shape_key(record) for record in records)
    return sorted(keys, key=lambda key: names.index(dict(key)["name"]) if dict(key)["name"] in names else len(names))


def shapes_of(records: Sequence[Record]) -> str:
    """What the names of the shapes mean."""
    described = []
    for shape in in_order(records):
        sizes = ", ".join(f"{SIZES.get(name, name)} = {size}" for name, size in shape_items(dict(shape)))
        described.append(f"{dict(shape)['name']}: {sizes}")
    return "; ".join(described) + "."


def shape_items(shape: dict[str, object]) -> list[tuple[str, object]]:
    """The sizes without the name, in the usual order."""
    return [(name, shape[name]) for name in SIZES if name in shape]


def table_head(names: Sequence[str]) -> str:
    """The first two lines of a table."""
    return row(names) + "\n" + "|" + "---|" * len(names)


def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(records: Sequence[Record], folder: Path) -> dict[tuple[str, str], str]:
    """A picture for each operation and device; returns where they are, as the page links to them."""
    pictures = {}
    for op in OPERATIONS:
        for device in sorted({record.device for record in records if record.op == op}):
            mine = [record for record in records if (record.op, record.device) == (op, device)]
            dtype = "bfloat16" if any(record.dtype == "bfloat16" for record in mine) else mine[0].dtype
            name = f"bench-{op.replace('_', '-')}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png"
            _draw([record for record in mine if record.dtype == dtype], dtype, folder / name)
            pictures[op, device] = f"assets/{name}"
    return pictures


def _draw(records: Sequence[Record], dtype: str, path: Path) -> None:
    """Time of `forward` and `both`, and memory of `both`, side by side: a row of points for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shapes = in_order(records)
    impls = [impl for impl in IMPLEMENTATIONS if any(record.impl == impl for record in records)]
    panels = [("forward", "time"), ("both", "time"), ("both", "memory")]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(12, 1.8 + 0.5 * len(shapes)), sharey=True, layout="constrained"
    )
    for axis, (direction, what) in zip(axes, panels):
        shown = [record for record in records if record.direction == direction]
        for position, impl in enumerate(impls):
            mine = [record for record in shown if record.impl == impl]
            if what == "memory":
                mine = [record for record in mine if record.peak_memory_mib]
            lines = [shapes.index(shape_key(record)) + 0.7 * (position + 0.5) / len(impls) - 0.35 for record in mine]
            values = [record.peak_memory_mib if what == "memory" else record.median for record in mine]
            spread = [[r.median - r.spread[0] for r in mine], [r.spread[1] - r.median for r in mine]]
            axis.errorbar(
                values,
                lines,
                xerr=None if what == "memory" else spread,
                fmt="o",
                markersize=4,
                color=f"C{IMPLEMENTATIONS.index(impl)}",
                label=impl,
            )
        unit = "MiB" if what == "memory" else " or ".join(sorted({record.quantity for record in shown}))
        axis.set_title(f"{direction}: {what}, {unit}", fontsize=9)
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
