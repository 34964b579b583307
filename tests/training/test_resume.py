"""Interrupted runs, resumed any number of times, equal an uninterrupted run bit for bit."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_and_resume import differing, figures, kill_and_resume, small_recipe
from mirror_modules.training import engine
from mirror_modules.training.checkpoints import load_checkpoint
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import PHASES


class Stopped(Exception):
    """Simulates any error that ends a run."""


def change(recipe, **fields):
    """Replace fields, written as `stem__steps=5`."""
    for name, value in fields.items():
        section, _, field = name.partition("__")
        replaced = dataclasses.replace(getattr(recipe, section), **{field: value})
        recipe = dataclasses.replace(recipe, **{section: replaced})
    return recipe


# All random draws of a run, in few steps, with a checkpoint every second step.
RECIPE = change(small_recipe(), **{f"{phase}__steps": 5 for phase in PHASES})


@pytest.fixture
def recipe():
    return RECIPE


def train_until(phase, step, *arguments, **options):
    """Train until an error in the middle of a step."""
    record = engine.PhaseRun.record

    def stop(self, result):
        if (self.phase, self.step) == (phase, step):
            raise Stopped
        record(self, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.PhaseRun, "record", stop)
        with pytest.raises(Stopped):
            train(*arguments, **options)


def test_a_run_killed_ten_times_equals_an_uninterrupted_one(recipe, tmp_path):
    recipe = change(recipe, **{f"{phase}__steps": 8 for phase in PHASES})
    result = kill_and_resume(recipe, tmp_path, kills=10)
    assert result.kills == 10
    assert result.during_a_save > 0
    assert result.different == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and one that was stopped in the fourth step of `glam`, after the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("runs")
    train_until("glam", 3, RECIPE, folder / "stopped", phases=["stem", "stream", "glam"])
    (checkpoint,) = folder.glob("stopped/checkpoints/glam-*")
    assert checkpoint.name.startswith("glam-00000002-")
    train(RECIPE, folder / "finished")
    return folder


@pytest.fixture
def stopped(trained, tmp_path):
    return RunFolder(shutil.copytree(trained / "stopped", tmp_path / "stopped"))


@pytest.fixture
def finished(trained, tmp_path):
    return RunFolder(shutil.copytree(trained / "finished", tmp_path / "finished"))


def test_a_phase_is_resumed_in_the_middle(recipe, stopped, finished, capsys):
    train(recipe, stopped.path, resume=True)
    assert differing(finished, stopped) == []
    assert "continues after step 2 of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "harmless",
    [
        {"engine__loader_workers": 2},
        {"engine__checkpoint_every": 1, "engine__checkpoints_kept": 1},
        {"engine__threads": 1},
        {"logging__validate_every": 1, "logging__samples_every": 1},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_harmless_changes_do_not_affect_the_result(recipe, stopped, finished, harmless):
    train(change(recipe, **harmless), stopped.path, resume=True)
    lines = [line for line in figures(stopped) if not any(name.startswith("validation") for name in line)]
    assert lines == figures(finished)
    assert set(differing(finished, stopped)) <= {"metrics.jsonl"}


def test_logging_may_change_when_a_run_is_resumed(recipe, stopped, finished):
    train(change(recipe, logging__every=5), stopped.path, resume=True)
    assert differing(finished, stopped) == ["metrics.jsonl"]
    assert [line["step"] for line in figures(stopped) if line["phase"] == "glam"] == [1, 2, 5]


def test_a_changed_recipe_is_rejected_with_all_differences(recipe, stopped):
    changed = change(recipe, stem__steps=9, glam__kl_weight=2.0, engine__loader_workers=1)
    before = {file: file.read_bytes() for file in stopped.path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"stem\.steps is 5 there and 9 now; glam\.kl_weight is .* and 2\.0 now\)"):
        train(changed, stopped.path, resume=True)
    assert before == {file: file.read_bytes() for file in stopped.path.rglob("*") if file.is_file()}


def test_an_interrupted_run_is_not_restarted_without_resume(recipe, stopped):
    with pytest.raises(ValueError, match="phase 'glam' after 2 of 5 steps; continue with --resume"):
        train(recipe, stopped.path)


def test_resume_starts_a_new_folder(recipe, finished, tmp_path):
    new = train(recipe, tmp_path / "new", resume=True)
    assert differing(finished, new) == []


def test_a_finished_run_can_be_extended(recipe, finished, tmp_path):
    longer = change(recipe, glam__steps=9)
    expected = train(longer, tmp_path / "longer")
    with pytest.raises(ValueError, match="continue with --resume"):
        train(longer, finished.path)
    train(longer, finished.path, resume=True)
    assert set(differing(expected, finished)) <= {"metrics.jsonl"}
    assert [line["step"] for line in figures(finished) if line["phase"] == "glam"] == list(range(1, 10))


@pytest.mark.parametrize("step", [3, 7])
def test_the_best_step_is_kept_when_a_run_is_resumed(recipe, tmp_path, monkeypatch, step):
    """Stopped before or after the best step, whose checkpoint is not among the newest at the end."""
    recipe = change(recipe, stem__steps=9, stem__keep_best="r_precision", engine__checkpoints_kept=1)
    measure, values = {"r_precision": 0.0}, {2: 0.1, 4: 0.9, 6: 0.2, 8: 0.3, 9: 0.4}
    validated = engine.PhaseRun.validated
    monkeypatch.setattr("mirror_modules.training.loop.measure_pair", lambda *_: measure)
    monkeypatch.setattr(
        engine.PhaseRun, "validated", lambda self, _: validated(self, {"r_precision": values[self.step]})
    )
    finished = train(recipe, tmp_path / "finished", phases=["stem"])
    train_until("stem", step, recipe, tmp_path / "stopped", phases=["stem"])
    stopped = train(recipe, tmp_path / "stopped", phases=["stem"], resume=True)
    assert differing(finished, stopped) == []
    for folder in (finished, stopped):
        best = next(folder.checkpoints.glob("stem-00000004-*"))
        kept = load_file(folder.weights("stem"))
        module = load_checkpoint(best)["state"]["network"]["module"]
        assert all(torch.equal(kept[name.removeprefix("pair.")], value) for name, value in module.items())


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(recipe, tmp_path, finished):
    train_until("stem", 4, recipe, tmp_path / "stopped")
    folder = RunFolder(tmp_path / "stopped")
    newest = next(folder.checkpoints.glob("stem-00000004-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        train(recipe, folder.path, resume=True)
    assert differing(finished, folder) == []


def test_a_run_is_resumed_with_another_number_of_processes(recipe, stopped, finished, capsys):
    """Phase `glam` has no dropout, so that even the result is the same."""
    path = next(stopped.checkpoints.glob("glam-*"))
    content = load_checkpoint(path)
    content["random"] = content["random"] * 2
    path.unlink()
    engine.Checkpoints(stopped.checkpoints, "glam", 2).save(2, content)
    train(recipe, stopped.path, resume=True)
    message = "it was written by 2 processes and this run has 1, so dropout is seeded anew"
    assert message in capsys.readouterr().err
    assert stopped.weights("glam").read_bytes() == finished.weights("glam").read_bytes()


def test_a_moved_run_can_be_resumed(recipe, stopped, finished, tmp_path):
    shutil.move(stopped.path, tmp_path / "moved")
    moved = train(recipe, tmp_path / "moved", resume=True)
    assert differing(finished, moved) == []


@pytest.mark.parametrize(
    ("steps", "phases", "message"),
    [
        (4, ["evaluator"], r"holds phase 'glam' after 5 steps; glam\.steps=4 would be fewer"),
        (9, ["evaluator"], r"glam\.steps=9 would make it longer, but it is not among the phases to train"),
        (9, ["glam"], r"glam\.steps=9 would make it longer, but there is no checkpoint of its last step"),
    ],
)
def test_invalid_changes_of_the_steps_of_a_finished_phase_are_rejected(recipe, finished, steps, phases, message):
    if phases == ["glam"]:
        shutil.rmtree(finished.checkpoints)
    config = finished.config.read_bytes()
    with pytest.raises(ValueError, match=message):
        train(change(recipe, glam__steps=steps), finished.path, phases=phases, resume=True)
    assert finished.config.read_bytes() == config


def test_fewer_steps_than_already_done_are_rejected(recipe, stopped):
    with pytest.raises(ValueError, match=r"holds phase 'glam' after 2 steps; glam\.steps=1 would be fewer"):
        train(change(recipe, glam__steps=1), stopped.path, resume=True)


def test_keep_best_fixes_the_checkpoint_interval(recipe, tmp_path):
    recipe = change(recipe, stem__keep_best="r_precision")
    train(recipe, tmp_path / "run", phases=["stem"])
    with pytest.raises(ValueError, match=r"engine\.checkpoint_every is 2 there and 3 now"):
        train(change(recipe, engine__checkpoint_every=3), tmp_path / "run", resume=True)


def test_a_change_of_versions_is_reported_and_recorded(recipe, stopped):
    content = json.loads(stopped.config.read_text())
    content["versions"]["torch"] = "1.0"
    stopped.config.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"continues with torch .*, not 1\.0: results may differ in the last digits"):
        train(recipe, stopped.path, resume=True)
    after = json.loads(stopped.config.read_text())
    assert after["versions"]["torch"] == "1.0"
    assert after["versions_since"]["torch"] == torch.__version__
