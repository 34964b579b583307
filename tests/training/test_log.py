"""The lines of metrics.jsonl: which steps have one, and that a run which was killed leaves none behind."""

import json

import pytest
import torch

from mirror_modules.training.log import PhaseLog, drop_phase, read_log


def line(phase, step=1, **losses):
    return {"phase": phase, "step": step, "seconds": 0.5, "images": 7, **losses}


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize(
    ("steps", "every", "logged"), [(7, 3, [1, 3, 6, 7]), (6, 3, [1, 3, 6]), (2, 5, [1, 2]), (1, 1, [1])]
)
def test_the_first_the_last_and_every_nth_step_have_a_line(tmp_path, steps, every, logged):
    with PhaseLog("glam", steps, tmp_path / "log", every) as log:
        for i in range(steps):
            log.step(5, {"loss": torch.tensor(i / 3)})
    lines = read_log(tmp_path / "log")
    assert [entry["step"] for entry in lines] == logged
    assert [entry["images"] for entry in lines] == [5 * step for step in logged]
    assert [entry["loss"] for entry in lines] == [round((step - 1) / 3, 6) for step in logged]
    assert all(entry["phase"] == "glam" and entry["seconds"] >= 0 for entry in lines)


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path):
    with PhaseLog("glam", 3, tmp_path / "log", 1) as log:
        log.step(5, {"loss": torch.zeros(())})
        assert [entry["step"] for entry in read_log(tmp_path / "log")] == [1]


def test_a_phase_that_starts_anew_replaces_its_lines_alone(tmp_path):
    path = tmp_path / "log"
    write(path, line("stem"), line("glam", 1), line("judge"), line("glam", 2))
    with PhaseLog("glam", 1, path, 1) as log:
        log.step(3, {})
    assert [(entry["phase"], entry["step"], entry["images"]) for entry in read_log(path)] == [
        ("stem", 1, 7),
        ("judge", 1, 7),
        ("glam", 1, 3),
    ]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log"
    write(path, line("stem", loss=0.1), line("glam"))
    with path.open("a") as file:
        file.write('{"phase": "gl')
    assert read_log(path) == [line("stem", loss=0.1), line("glam")]
    drop_phase(path, "glam")
    assert path.read_text() == json.dumps(line("stem", loss=0.1)) + "\n"


def test_a_phase_without_lines_changes_nothing(tmp_path):
    drop_phase(tmp_path / "none", "glam")
    assert not (tmp_path / "none").exists()
    path = tmp_path / "log"
    write(path, line("stem", loss=1e-6), line("judge", loss=float("inf")))
    before = path.read_bytes()
    drop_phase(path, "glam")
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["{", "[]", "3", "{}", "", '{"phase": "glam", "step": 1}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, damage):
    path = tmp_path / "log"
    text = f"{json.dumps(line('stem'))}\n{damage}\n{json.dumps(line('glam'))}\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="log is damaged: line 2 is not a logged step"):
        drop_phase(path, "glam")
    assert path.read_text() == text
