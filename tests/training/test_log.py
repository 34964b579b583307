"""Progress of a phase: lines of metrics.jsonl, also after a killed run, printed summaries, and TensorBoard."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
import torch

from mirror_modules.training.log import PhaseLog, read_log, truncate_phase
from mirror_modules.training.recipes import LoggingRecipe


def line(phase, step=1, **losses):
    return {"phase": phase, "step": step, "seconds": 0.5, "images": 7, **losses}


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize(
    ("steps", "every", "logged"), [(7, 3, [1, 3, 6, 7]), (6, 3, [1, 3, 6]), (2, 5, [1, 2]), (1, 1, [1])]
)
def test_the_first_the_last_and_every_nth_step_are_logged(tmp_path, steps, every, logged):
    with PhaseLog("glam", steps, tmp_path / "log", LoggingRecipe(every=every)) as log:
        for i in range(steps):
            log.record(5, {"loss": torch.tensor(i / 3)})
    lines = read_log(tmp_path / "log")
    assert [entry["step"] for entry in lines] == logged
    assert [entry["images"] for entry in lines] == [5 * step for step in logged]
    assert [entry["loss"] for entry in lines] == [round((step - 1) / 3, 6) for step in logged]
    assert all(entry["phase"] == "glam" and entry["seconds"] >= 0 for entry in lines)


def test_a_line_is_written_as_soon_as_its_step_is_done(tmp_path):
    with PhaseLog("glam", 3, tmp_path / "log", LoggingRecipe(every=1)) as log:
        log.record(5, {"loss": torch.zeros(())})
        assert [entry["step"] for entry in read_log(tmp_path / "log")] == [1]


def test_a_restarted_phase_replaces_only_its_own_lines(tmp_path):
    path = tmp_path / "log"
    write(path, line("stem"), line("glam", 1), line("evaluator"), line("glam", 2))
    with PhaseLog("glam", 1, path, LoggingRecipe(every=1)) as log:
        log.record(3, {})
    assert [(entry["phase"], entry["step"], entry["images"]) for entry in read_log(path)] == [
        ("stem", 1, 7),
        ("evaluator", 1, 7),
        ("glam", 1, 3),
    ]


def test_a_truncated_last_line_is_skipped(tmp_path):
    path = tmp_path / "log"
    write(path, line("stem", loss=0.1), line("glam"))
    with path.open("a") as file:
        file.write('{"phase": "gl')
    assert read_log(path) == [line("stem", loss=0.1), line("glam")]
    truncate_phase(path, "glam", 0)
    assert path.read_text() == json.dumps(line("stem", loss=0.1)) + "\n"


def test_truncating_a_phase_without_lines_changes_nothing(tmp_path):
    truncate_phase(tmp_path / "none", "glam", 0)
    assert not (tmp_path / "none").exists()
    path = tmp_path / "log"
    write(path, line("stem", loss=1e-6), line("evaluator", loss=float("inf")))
    before = path.read_bytes()
    truncate_phase(path, "glam", 0)
    assert path.read_bytes() == before


WAITED_AS_TEXT = '{"phase": "glam", "step": 1, "seconds": 1, "images": 1, "waited": "long"}'


@pytest.mark.parametrize("damage", ["{", "[]", "3", "{}", "", '{"phase": "glam", "step": 1}', WAITED_AS_TEXT])
def test_a_damaged_line_is_reported_by_number_and_the_file_is_unchanged(tmp_path, damage):
    path = tmp_path / "log"
    text = f"{json.dumps(line('stem'))}\n{damage}\n{json.dumps(line('glam'))}\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="log is damaged: line 2 is not a logged step"):
        truncate_phase(path, "glam", 0)
    assert path.read_text() == text


def test_a_resumed_phase_keeps_the_lines_up_to_its_step_and_continues_the_counters(tmp_path):
    path = tmp_path / "log"
    write(path, line("stem", 9), line("glam", 1), line("glam", 2), line("glam", 3))
    done = {"step": 2, "images": 14, "seconds": 100.0, "waited": 1.0}
    with PhaseLog("glam", 4, path, LoggingRecipe(every=1), done=done) as log:
        log.record(7, {"loss": torch.zeros(())})
        state = log.state_dict()
    assert [(entry["phase"], entry["step"]) for entry in read_log(path)] == [
        ("stem", 9),
        ("glam", 1),
        ("glam", 2),
        ("glam", 3),
    ]
    last = read_log(path)[-1]
    assert (last["images"], last["loss"]) == (21, 0.0)
    assert last["seconds"] >= 100
    assert (state["step"], state["images"], state["waited"]) == (3, 21, 1.0)


def test_ranks_other_than_0_write_and_print_nothing(tmp_path, capsys):
    with PhaseLog("glam", 1, tmp_path / "log", LoggingRecipe(every=1), writes=False) as log:
        log.record(7, {"loss": torch.zeros(())})
        log.info("nothing")
        log.write({"loss": 1.0})
    assert not (tmp_path / "log").exists()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_summaries_are_printed(tmp_path, capsys):
    recipe = LoggingRecipe(every=1, summary_minutes=1e-9)
    with PhaseLog("glam", 3, tmp_path / "log", recipe) as log:
        for _ in range(2):
            log.record(5, {"kl": torch.tensor(0.25), "accuracy_real_8": torch.ones(())}, torch.tensor(1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "glam: starts, 3 steps"
    assert lines[2].startswith("glam: step 2 of 3, ")
    assert "images/s" in lines[2]
    assert "left" in lines[2]
    assert "waited for data, 1 steps skipped, kl 0.25" in lines[2]
    assert "accuracy" not in lines[2]


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def lines_at_rates(path, capsys, rates, **options):
    """The printed lines about the rate, if a step of 60 images takes the time that its rate in images/s gives it."""
    clock = Clock()
    with PhaseLog("glam", 1000, path, LoggingRecipe(every=1), clock=clock, **options) as log:
        for rate in rates:
            clock.seconds += 60 / rate
            log.record(60, {})
    return [line for line in capsys.readouterr().err.splitlines() if "slow" in line]


@pytest.mark.parametrize(
    ("threads", "device", "remedy"),
    [
        (
            2,
            "cpu",
            "other programs may use the processor, where several threads wait for each other: stop with Ctrl-C and "
            "continue with --resume --threads 1",
        ),
        (1, "cpu", "other programs may use the processor"),
        (2, "cuda", "other programs may use the GPU or the processor"),
    ],
)
def test_a_rate_below_a_third_of_the_best_minute_is_reported_once(
    tmp_path, capsys, monkeypatch, threads, device, remedy
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # The first minute compiles and fills caches; the rate then falls to less than a third for several minutes.
    lines = lines_at_rates(tmp_path / "log", capsys, [1, *[30] * 60, *[8] * 30], device=torch.device(device))
    assert lines == [f"glam: slow, 8.0 images/s in the last minute after up to 30.0; {remedy}"]


def test_a_rate_above_a_third_of_the_best_minute_is_not_reported(tmp_path, capsys):
    assert lines_at_rates(tmp_path / "log", capsys, [*[30] * 60, *[11] * 30]) == []
    # A single slow step within a fast minute.
    assert lines_at_rates(tmp_path / "log", capsys, [*[30] * 60, 2, *[30] * 60]) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 99


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_the_bar_keeps_its_width_and_losses_are_shown_whole_or_not_at_all(tmp_path, monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, 25)))
    losses = {"kl": 0.25, "generator_32": 1.5, "generator_64": 12.25, "redescription": 3.5}
    with PhaseLog("evaluator", 2000, tmp_path / "log", LoggingRecipe(every=1)) as log:
        for _ in range(30):
            log.record(96, losses)
    written = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if line.strip()]
    # The bar of the last refresh, which closing it writes.
    line = written[-1]
    assert len(line) <= columns
    before, bar, after = line.split("|")
    assert before == "evaluator:   2%"
    assert len(bar) >= 20
    entries = ["step=30/2000", *(f"{name}={value:.2f}" for name, value in losses.items())]
    shown = after.split(", ")[2:]
    assert shown == entries[: len(shown)]
    assert len(shown) == {60: 0, 80: 1, 100: 2, 200: 5}[columns]


def test_tensorboard_gets_the_logged_values_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with PhaseLog("glam", 2, tmp_path / "log", LoggingRecipe(every=1, tensorboard=True)) as log:
        for i in range(2):
            log.record(5, {"kl": torch.tensor(0.25 + i), "learning_rate": 0.5})
        log.show("samples", np.zeros((4, 6, 3), np.uint8))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("glam/kl")] == [(1, 0.25), (2, 1.25)]
    assert [event.step for event in events.Images("glam/samples")] == [2]
