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


def test_records_round_trip_through_a_file(tmp_path):
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
        ({"error": 0.2, "error_allowed": 0.1}, "error 0.2 exceeds the tolerance of 0.1"),
        ({"error": float("nan"), "error_allowed": 0.1}, "error nan exceeds the tolerance of 0.1"),
    ],
)
def test_impossible_values_are_refused(changes, message):
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


def test_records_of_operations_round_trip_through_a_file(tmp_path):
    rates = {"bandwidth_share": 0.5, "matrix_share": 0.25, "copy_gb_per_s": 2500.0, "matrix_tflops": 640.5}
    record = a_record(least_bytes=11, least_operations=13, error=1e-3, error_allowed=2e-3, **rates)
    _record.append(record, tmp_path / "file.jsonl")
    assert _record.read(tmp_path / "file.jsonl") == [record]


def test_fields_missing_in_older_lines_are_none(tmp_path):
    fields = dataclasses.asdict(a_record())
    later = ("others", "least_bytes", "least_operations", "bandwidth_share", "matrix_share", "error", "error_allowed")
    later += ("copy_gb_per_s", "matrix_tflops")
    for name in later:
        del fields[name]
    (tmp_path / "file.jsonl").write_text(json.dumps(fields))
    (record,) = _record.read(tmp_path / "file.jsonl")
    assert {getattr(record, name) for name in later} == {None}


def test_a_record_names_its_gpu(monkeypatch):
    monkeypatch.setattr(_record.torch.cuda, "get_device_name", lambda: "Some GPU")
    assert _record.environment("cuda")["device"] == "Some GPU"
    assert _record.environment()["device"] == "cpu"


@pytest.mark.parametrize("path", sorted(_record.RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_recorded_results_are_records(path):
    for record in _record.read(path):
        assert set(record.versions) - {"triton"} == {"mirror_modules", "torch", "python"}
        assert record.shape
        assert record.threads >= 1
