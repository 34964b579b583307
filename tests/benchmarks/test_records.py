import dataclasses
import json

import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _record
from benchmarks._record import Record


def a_record(**changes):
    fields = {
        "op": "training_step",
        "impl": "ours",
        "direction": "forward",
        "shape": {"batch": 3},
        "dtype": "float32",
        "quantity": "images/s",
        "median": 2.0,
        "spread": (1.5, 2.5),
        "rounds": 5,
        "peak_memory_mib": 7.5,
        "process_memory_mib": 8.5,
        "shares": {"generator": 0.3, "rest": 0.7},
        **_record.environment(),
    }
    return Record(**{**fields, **changes})


def test_a_record_survives_the_file(tmp_path):
    first, second = a_record(), a_record(median=1.5, shares={}, peak_memory_mib=None)
    for record in (first, second):
        _record.append(record, tmp_path / "new" / "file.jsonl")
    assert _record.read(tmp_path / "new" / "file.jsonl") == [first, second]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median": 3.0}, "median 3.0 must lie within"),
        ({"median": float("nan")}, "must lie within"),
        ({"median": 0.0, "spread": (0.0, 1.0)}, "all positive"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"shares": {"generator": 0.3}}, "sum to 0.300"),
    ],
)
def test_impossible_figures_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_record(**changes)


@pytest.mark.parametrize("damage", ["missing", "unknown", "cut"])
def test_a_damaged_line_is_named(damage, tmp_path):
    fields = dataclasses.asdict(a_record())
    if damage == "missing":
        del fields["commit"]
    if damage == "unknown":
        fields["speed"] = "high"
    line = json.dumps(fields)[: -30 if damage == "cut" else None]
    (tmp_path / "file.jsonl").write_text(json.dumps(dataclasses.asdict(a_record())) + "\n" + line)
    with pytest.raises(ValueError, match=r"file\.jsonl, line 2, is not a record"):
        _record.read(tmp_path / "file.jsonl")


@pytest.mark.parametrize("path", sorted(_record.RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_recorded_results_are_records(path):
    for record in _record.read(path):
        assert set(record.versions) == {"mirror_modules", "torch", "python"}
        assert record.shape
        assert record.threads >= 1
