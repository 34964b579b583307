"""A run that was stopped, by whatever and however often, goes on and comes out as if it had not been."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_and_resume import differing, figures, kill_and_resume, small_recipe
from mirror_modules.training import engine
from mirror_modules.training.checkpoints import load_checkpoint
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import PHASES


class Stopped(Exception):
    """Stands for whatever ends a run."""


def change(recipe, **fields):
    """Fields as `stem__steps=5`."""
    for name, value in fields.items():
        part, _, field = name.partition("__")
        recipe = dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **{field: value})})
    return recipe


# With all that is drawn at random, few steps, and a checkpoint every second step.
RECIPE = change(small_recipe(), **{f"{phase}__steps": 5 for phase in PHASES})


@pytest.fixture
def recipe():
    return RECIPE


def train_until(phase, step, *arguments, **options):
    """Train, and end in the middle of a step."""
    record = engine.PhaseRun.record

    def stop(self, outcome):
        if (self.phase, self.step) == (phase, step):
            raise Stopped
        record(self, outcome)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.PhaseRun, "record", stop)
        with pytest.raises(Stopped):
            train(*arguments, **options)


def test_twenty_kills_change_nothing(recipe, tmp_path):
    recipe = change(recipe, **{f"{phase}__steps": 8 for phase in PHASES})
    outcome = kill_and_resume(recipe, tmp_path, kills=20)
    assert outcome.kills == 20
    assert outcome.during_a_save > 0
    assert outcome.different == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An unbroken run, and one that was stopped in the fourth step of `glam`, after the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("runs")
    train_until("glam", 3, RECIPE, folder / "stopped", phases=["stem", "stream", "glam"])
    (checkpoint,) = folder.glob("stopped/checkpoints/glam-*")
    assert checkpoint.name.startswith("glam-00000002-")
    train(RECIPE, folder / "unbroken")
    return folder


@pytest.fixture
def stopped(trained, tmp_path):
    return RunFolder(shutil.copytree(trained / "stopped", tmp_path / "stopped"))


@pytest.fixture
def unbroken(trained, tmp_path):
    return RunFolder(shutil.copytree(trained / "unbroken", tmp_path / "unbroken"))


def test_goes_on_in_the_middle(recipe, stopped, unbroken, capsys):
    train(recipe, stopped.path, resume=True)
    assert differing(unbroken, stopped) == []
    assert "goes on after step 2 of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "harmless",
    [
        {"engine__loader_workers": 2},
        {"engine__checkpoint_every": 1, "engine__checkpoints_kept": 1},
        {"data__path": "elsewhere"},
        {"logging__validate_every": 1, "logging__samples_every": 1},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_harmless_changes_do_no_harm(recipe, stopped, unbroken, harmless):
    train(change(recipe, **harmless), stopped.path, resume=True)
    lines = [line for line in figures(stopped) if not any(name.startswith("validation") for name in line)]
    assert lines == figures(unbroken)
    assert set(differing(unbroken, stopped)) <= {"metrics.jsonl"}


def test_other_lines_may_be_logged_from_then_on(recipe, stopped, unbroken):
    train(change(recipe, logging__every=5), stopped.path, resume=True)
    assert differing(unbroken, stopped) == ["metrics.jsonl"]
    assert [line["step"] for line in figures(stopped) if line["phase"] == "glam"] == [1, 2, 5]


def test_a_changed_recipe_is_refused_with_all_that_differs(recipe, stopped):
    changed = change(recipe, stem__steps=9, glam__kl_weight=2.0, engine__loader_workers=1)
    before = {file: file.read_bytes() for file in stopped.path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"stem\.steps is 5 there and 9 now; glam\.kl_weight is .* and 2\.0 now\)"):
        train(changed, stopped.path, resume=True)
    assert before == {file: file.read_bytes() for file in stopped.path.rglob("*") if file.is_file()}


def test_a_stopped_run_is_not_begun_anew(recipe, stopped):
    with pytest.raises(ValueError, match="phase 'glam' after 2 of 5 steps; go on with --resume"):
        train(recipe, stopped.path)


def test_resume_begins_a_new_folder(recipe, unbroken, tmp_path):
    new = train(recipe, tmp_path / "new", resume=True)
    assert differing(unbroken, new) == []


def test_more_steps_continue_a_finished_run(recipe, unbroken, tmp_path):
    longer = change(recipe, glam__steps=9)
    expected = train(longer, tmp_path / "longer")
    with pytest.raises(ValueError, match="go on with --resume"):
        train(longer, unbroken.path)
    train(longer, unbroken.path, resume=True)
    assert set(differing(expected, unbroken)) <= {"metrics.jsonl"}
    assert [line["step"] for line in figures(unbroken) if line["phase"] == "glam"] == list(range(1, 10))


@pytest.mark.parametrize("step", [3, 7])
def test_the_best_step_stays_the_best(recipe, tmp_path, monkeypatch, step):
    """Stopped before and after the best step, which is not among the newest checkpoints in the end."""
    recipe = change(recipe, stem__steps=9, stem__keep_best="r_precision", engine__checkpoints_kept=1)
    measure, values = {"r_precision": 0.0}, {2: 0.1, 4: 0.9, 6: 0.2, 8: 0.3, 9: 0.4}
    validated = engine.PhaseRun.validated
    monkeypatch.setattr("mirror_modules.training.loop.measure_pair", lambda *_: measure)
    monkeypatch.setattr(
        engine.PhaseRun, "validated", lambda self, _: validated(self, {"r_precision": values[self.step]})
    )
    unbroken = train(recipe, tmp_path / "unbroken", phases=["stem"])
    train_until("stem", step, recipe, tmp_path / "stopped", phases=["stem"])
    stopped = train(recipe, tmp_path / "stopped", phases=["stem"], resume=True)
    assert differing(unbroken, stopped) == []
    for folder in (unbroken, stopped):
        best = next(folder.checkpoints.glob("stem-00000004-*"))
        kept = load_file(folder.weights("stem"))
        module = load_checkpoint(best)["state"]["trainee"]["module"]
        assert all(torch.equal(kept[name], value) for name, value in module.items())


def test_a_damaged_checkpoint_costs_its_steps_alone(recipe, tmp_path, unbroken):
    train_until("stem", 4, recipe, tmp_path / "stopped")
    folder = RunFolder(tmp_path / "stopped")
    newest = next(folder.checkpoints.glob("stem-00000004-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        train(recipe, folder.path, resume=True)
    assert differing(unbroken, folder) == []


def test_as_many_processes_are_needed(recipe, stopped):
    path = next(stopped.checkpoints.glob("glam-*"))
    content = load_checkpoint(path)
    content["random"] = content["random"] * 2
    path.unlink()
    engine.Checkpoints(stopped.checkpoints, "glam", 2).save(2, content)
    with pytest.raises(TrainingError, match="is of 2 processes, and there are 1 now"):
        train(recipe, stopped.path, resume=True)


def test_a_copied_run_goes_on_elsewhere(recipe, stopped, unbroken, tmp_path):
    shutil.move(stopped.path, tmp_path / "moved")
    moved = train(recipe, tmp_path / "moved", resume=True)
    assert differing(unbroken, moved) == []


@pytest.mark.parametrize(
    ("steps", "phases", "message"),
    [
        (4, ["judge"], r"holds phase 'glam' after 5 steps; glam\.steps=4 would be fewer"),
        (9, ["judge"], r"glam\.steps=9 would make it longer, but it is not among the phases to train"),
        (9, ["glam"], r"glam\.steps=9 would make it longer, but there is no checkpoint of its last step"),
    ],
)
def test_steps_of_a_finished_phase_that_cannot_change(recipe, unbroken, steps, phases, message):
    if phases == ["glam"]:
        shutil.rmtree(unbroken.checkpoints)
    config = unbroken.config.read_bytes()
    with pytest.raises(ValueError, match=message):
        train(change(recipe, glam__steps=steps), unbroken.path, phases=phases, resume=True)
    assert unbroken.config.read_bytes() == config


def test_fewer_steps_than_were_done_are_refused(recipe, stopped):
    with pytest.raises(ValueError, match=r"holds phase 'glam' after 2 steps; glam\.steps=1 would be fewer"):
        train(change(recipe, glam__steps=1), stopped.path, resume=True)


def test_checkpoints_of_a_run_that_keeps_the_best_come_when_they_came(recipe, tmp_path):
    recipe = change(recipe, stem__keep_best="r_precision")
    train(recipe, tmp_path / "run", phases=["stem"])
    with pytest.raises(ValueError, match=r"engine\.checkpoint_every is 2 there and 3 now"):
        train(change(recipe, engine__checkpoint_every=3), tmp_path / "run", resume=True)


def test_other_versions_are_said_and_kept(recipe, stopped):
    content = json.loads(stopped.config.read_text())
    content["versions"]["torch"] = "1.0"
    stopped.config.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"goes on with torch .*, not 1\.0: its last digits may differ"):
        train(recipe, stopped.path, resume=True)
    after = json.loads(stopped.config.read_text())
    assert after["versions"]["torch"] == "1.0"
    assert after["versions_since"]["torch"] == torch.__version__
