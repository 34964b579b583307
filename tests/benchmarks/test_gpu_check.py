"""The GPU checks: time limits, logs, and the table. CI runs them in full with --dry-run."""

import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import gpu_check
from benchmarks.gpu_check import Step

HANGING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Run these steps; returns the exit status, and the rows of the table."""

    def run(*steps, seconds=60):
        monkeypatch.setattr(gpu_check, "steps_of", lambda *_: list(steps))
        status = gpu_check.main(["check", str(tmp_path), "--seconds", str(seconds)])
        head, table = capsys.readouterr().out.split("\nstep ")
        return status, head, [line.split() for line in table.splitlines()[1:]]

    return run


def test_the_table_shows_failed_steps_and_what_was_skipped(check, tmp_path):
    good = Step("good", ["-c", "print('cell, triton: skipped, no kernel\\nSKIPPED [7] file')"], 0.5)
    bad = Step("bad", ["-c", "print('a'); raise SystemExit('the reason')"], 0.5)
    status, head, rows = check(bad, good)
    assert status == 1
    assert [(row[0], row[1], row[3]) for row in rows] == [("bad", "1", "0"), ("good", "0", "8")]
    assert head.endswith("\na\nthe reason\n")
    assert (tmp_path / "bad.log").read_text() == "a\nthe reason\n"
    assert check(good)[0] == 0


CRASHING = HANGING.replace("time.sleep(60)\n", "raise SystemExit(3)\n")


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize(("code", "ending"), [(HANGING, "timeout"), (CRASHING, "3")], ids=["hangs", "crashes"])
def test_a_step_is_ended_with_its_children_and_the_next_one_runs(check, tmp_path, code, ending):
    status, _, rows = check(Step("first", ["-c", code], 0.5), Step("next", ["-c", "pass"], 0.5), seconds=20)
    assert status == 1
    assert [row[:2] for row in rows] == [["first", ending], ["next", "0"]]
    child = int((tmp_path / "first.log").read_text())
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_benchmarks_that_can_end_early_get_a_budget(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    for what, expected in (("all", ["--budget", "70"]), ("step", ["--budget", "70"]), ("sample", [])):
        result = gpu_check.run(Step(what, [str(script), what], 1.0), tmp_path, limit=100)
        assert result.status == "0"
        assert json.loads((tmp_path / f"{what}.log").read_text()) == [what, *expected]


def test_time_that_a_step_does_not_use_is_left_to_the_others(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(
        gpu_check, "run", lambda step, out, limit: limits.append(limit) or gpu_check.Result("", "0", 0, 0)
    )
    assert gpu_check.main(["record", str(tmp_path), "--seconds", "100"]) == 0
    assert limits == pytest.approx([50, 60, 100], abs=1)


def test_the_test_files_of_the_check_are_those_with_gpu_tests():
    files = {Path(word).name for word in gpu_check.tests() if word.endswith(".py")}
    assert {"test_attention.py", "test_similarity.py", "test_operations.py"} <= files
    assert "test_run.py" not in files
