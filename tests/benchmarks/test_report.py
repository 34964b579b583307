"""The benchmark page, rendered from invented records."""

import re
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _operation, _record, report
from benchmarks._record import Record

ROOT = Path(__file__).parents[2]
ATTENTION, SIMILARITY = report.OPERATIONS
GPU = "Invented GPU"


def invented(op=ATTENTION, shape="paper64", impl="published", direction="both", *, gpu=False, **changes):
    sizes = next(known.sizes for known in _operation.find(op).shapes if known.name == shape)
    fields = {
        "op": op,
        "impl": impl,
        "direction": direction,
        "shape": {"name": shape, **sizes},
        "dtype": "bfloat16" if gpu else "float32",
        "quantity": "ms" if gpu else "time / time of published",
        "median": 1.0,
        "spread": (1.0, 1.0),
        "rounds": 5,
        "peak_memory_mib": 7.0,
        "process_memory_mib": None,
        "shares": {},
        **_record.environment(),
        "device": GPU if gpu else "cpu",
        "date": "2026-01-02T00:00:00+00:00",
    }
    if gpu:
        fields |= {"bandwidth_share": 0.5, "matrix_share": 0.25, "copy_gb_per_s": 2345.0, "matrix_tflops": 678.0}
    if "median" in changes:
        changes = {"spread": (changes["median"], changes["median"]), **changes}
    return Record(**{**fields, **changes})


def rows(page, first):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if first in line]


def outcomes(records):
    """The right column of the table of targets."""
    page = report.render(records)
    table = page[page.index("## Targets") :].split("\n## ")[0]
    return [line.strip("|").split("|")[-1].strip() for line in table.splitlines() if line.startswith("|")][2:]


def test_without_records_everything_is_not_measured():
    page = report.render([])
    assert "## On a GPU: not measured" in page
    assert page.count("\nnot measured\n") == 4  # two operations on a GPU and on a CPU
    assert outcomes([]) == ["not measured"] * len(report.TARGETS)


def test_cpu_records_give_ratios():
    records = [invented(), invented(impl="torch", median=0.5, spread=(0.25, 0.75), peak_memory_mib=1234.0)]
    page = report.render(records)
    assert "## On a GPU: not measured" in page
    assert rows(page, "| paper64 |") == [
        ["paper64", "`both`", "`published`", "1", "0.50 (0.25 to 0.75)"],
        ["paper64", "`both`", "7", "1,234"],
    ]
    assert page.count("\nnot measured\n") == 3
    assert "ms" not in page[page.index("## On a CPU") :].split()


def test_the_baseline_is_named_if_published_was_not_measured():
    records = [
        invented(SIMILARITY, "b48"),
        invented(SIMILARITY, "b256", "torch", quantity="time / time of torch"),
        invented(SIMILARITY, "b256", "compiled", quantity="time / time of torch", median=0.5, peak_memory_mib=None),
    ]
    page = report.render(records)
    assert rows(page, "| b256 |") == [
        ["b256", "`both`", "`torch`", "–", "0.50 (0.50 to 0.50)", "1"],
        ["b256", "`both`", "–", "–", "7"],
    ]


def test_gpu_records_give_milliseconds_and_shares():
    records = [invented(gpu=True, median=12.0), invented(gpu=True, impl="triton", median=1.5)]
    page = report.render(records)
    assert f"## On a GPU: {GPU}" in page
    assert "copy 2,345 GB/s, matrix product 678 TFLOP/s" in page
    assert rows(page, "| paper64 |") == [
        ["paper64", "`both`", "12", "1.5 (8.0×)"],
        ["paper64", "`both`", "50% / 25%", "50% / 25%"],
        ["paper64", "`both`", "7", "7"],
    ]


def test_times_of_different_runs_are_not_compared():
    records = [invented(gpu=True, median=12.0), invented(gpu=True, impl="triton", date="2026-01-03T00:00:00+00:00")]
    assert rows(report.render(records), "| paper64 |")[0] == ["paper64", "`both`", "12", "1"]


def test_the_newest_record_is_used():
    newer, older = invented(median=0.5, date="2026-01-03T00:00:00+00:00"), invented()
    assert report.newest([newer, older]) == [newer]
    others = [invented(impl="torch"), invented(direction="forward"), invented(shape="coco64"), invented(gpu=True)]
    others += [invented(dtype="bfloat16"), invented(SIMILARITY, "b48")]
    assert len(report.newest([newer, older, *others])) == 1 + len(others)


def headline(direction, **changes):
    return invented(ATTENTION, "headline", direction=direction, gpu=True, **changes)


def test_targets_are_compared_with_the_records():
    records = [
        headline("forward", impl="triton", bandwidth_share=0.8),
        headline("backward", impl="triton", bandwidth_share=0.64),
        headline("forward", impl="published", median=7.9),
        headline("forward", impl="sdpa", median=1.5),
        headline("forward", impl="compiled", median=9.0),
        headline("both", impl="triton"),
        headline("both", impl="published", median=8.0),
        headline("both", impl="flex", median=1.4),
        invented(SIMILARITY, "b48", "published", gpu=True, median=15.0),
        invented(SIMILARITY, "b48", "triton", gpu=True),
        invented(SIMILARITY, "b1024", "triton", gpu=True, peak_memory_mib=1000.0, matrix_share=0.35),
    ]
    assert outcomes(records) == [
        "80%, reached",
        "64%, not reached",
        "7.9, not reached",
        "8.0, reached",
        "1.5, reached",
        "1.4, not reached",
        "15.0, reached",
        "1.05 GB, not reached",
        "35%, reached",
    ]
    assert outcomes([record for record in records if record.impl != "triton"]) == ["not measured"] * 9
    # Other precisions and our own plain implementation do not count.
    other = [headline("forward", impl="triton", dtype="float32"), headline("both", impl="torch", median=0.1)]
    assert outcomes(other) == ["not measured"] * 9


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "cpu and gpu"])
def test_the_page_and_its_plots_are_written(gpu, tmp_path):
    pytest.importorskip("matplotlib")
    records = [invented(), invented(impl="torch", median=0.5), invented(SIMILARITY, "b48", peak_memory_mib=None)]
    records += [invented(gpu=True), invented(gpu=True, impl="triton", dtype="float32")] if gpu else []
    for record in records:
        _record.append(record, tmp_path / "results" / f"{record.op}.jsonl")
    report.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    plots = re.findall(r"!\[.+\]\((.+)\)", page)
    assert len(plots) == (3 if gpu else 2)
    for plot in plots:
        assert (tmp_path / "docs" / plot).read_bytes().startswith(b"\x89PNG")
    assert ("## On a GPU: not measured" in page) != gpu


def test_the_page_in_the_documentation_is_generated():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page.startswith(report.PAGE), "change the text in benchmarks/report.py, then run `make bench-report`"
    for plot in re.findall(r"!\[.+\]\((.+)\)", page):
        assert (ROOT / "docs" / plot).exists()
