"""How a phase ends before its last step: by a signal, by what is not finite, by a worker's death, by a full disk."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.kill_and_resume import differing, figures
from mirror_modules.cli import main
from mirror_modules.data import RepeatableBatches
from mirror_modules.training import engine, loop
from mirror_modules.training.checkpoints import load_checkpoint
from mirror_modules.training.errors import Interrupted, TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import PHASES

OPTIONS = [
    *("--data.training-images", 23, "--data.validation-images", 19, "--evaluation.candidates", 5),
    *("--evaluation.report-images", 2, "--model.resolutions", 8, 16, "--model.channels", 3),
    *("--model.discriminator-channels", 3, "--model.word-dim", 10, "--logging.every", 1, "--device", "cpu"),
    *("--engine.checkpoint-every", 50, "--logging.samples-every", 0, "--phases", "stem"),
]


def words(folder, *options):
    return [str(word) for word in ("train", "demo", "--out", folder, *OPTIONS, "--steps", 20, *options)]


def refusal(err):
    """What is said besides the progress."""
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("mirror-modules")]


@pytest.fixture
def recipe(tiny_recipe):
    phases = {phase: dataclasses.replace(getattr(tiny_recipe, phase), steps=6) for phase in PHASES}
    logging = dataclasses.replace(tiny_recipe.logging, samples_every=0)
    everything = dataclasses.replace(tiny_recipe.engine, checkpoint_every=1, most_skipped_in_a_row=3)
    return dataclasses.replace(tiny_recipe, **phases, logging=logging, engine=everything)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(folder)) == 0
    return RunFolder(folder)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(tmp_path, capsys, whole_run, number, status):
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "mirror_modules.cli", *words(folder.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (folder.log.exists() and folder.log.stat().st_size):
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    (line,) = refusal(err)
    assert f"stopped by {number.name} after step" in line
    assert "Go on with --resume" in line
    assert "Traceback" not in err
    (checkpoint,) = folder.checkpoints.iterdir()
    assert str(checkpoint) in line

    capsys.readouterr()
    assert main(words(folder.path)) == 2
    assert "go on with --resume" in refusal(capsys.readouterr().err)[0]
    assert main(words(folder.path, "--resume")) == 0
    assert differing(whole_run, folder) == []


def signals_in_step(monkeypatch, step, *numbers):
    """Send this process signals in the middle of a step."""
    record = engine.PhaseRun.record

    def send(self, outcome):
        if self.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        record(self, outcome)

    monkeypatch.setattr(engine.PhaseRun, "record", send)


def test_the_handlers_of_before_are_put_back(recipe, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signals_in_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 6 of phase stem") as stopped:
        train(recipe, tmp_path / "run")
    assert stopped.value.status == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_two_signals_at_once_are_one_wish(recipe, tmp_path, monkeypatch):
    signals_in_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 4"):
        train(recipe, tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "SECONDS_BETWEEN_WISHES", -1.0)
        signals_in_step(patch, 3, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    assert figures(folder)[-1]["step"] == 6


def poison(monkeypatch, steps):
    """Put one NaN into the images of these steps' batches."""
    to_device, count = engine.to_device, iter(range(1, 999))

    def poisoned(batch, device):
        batch = to_device(batch, device)
        if next(count) in steps:
            batch.images[2, 1, 3, 5] = float("nan")
        return batch

    monkeypatch.setattr(engine, "to_device", poisoned)


def moved(before, after, prefix=""):
    """Names of the tensors that differ."""
    if isinstance(before, torch.Tensor):
        return [] if torch.equal(before, after) else [prefix]
    if isinstance(before, dict):
        return [name for key in before for name in moved(before[key], after[key], f"{prefix}.{key}")]
    if isinstance(before, list):
        return [name for i, pair in enumerate(zip(before, after)) for name in moved(*pair, f"{prefix}.{i}")]
    return []


def state_after(folder, phase, step):
    return load_checkpoint(next(folder.checkpoints.glob(f"{phase}-{step:08}-*")))["state"]


@pytest.mark.parametrize("phase", ["stem", "glam"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(recipe, tmp_path, monkeypatch, phase):
    if phase == "glam":
        train(recipe, tmp_path / "run", phases=["stem", "stream"])
    poison(monkeypatch, {5})
    recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, checkpoints_kept=9))
    folder = train(recipe, tmp_path / "run", phases=[phase])
    lines = [line for line in figures(folder) if line["phase"] == phase]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 1]
    four, five, six = (state_after(folder, phase, step) for step in (4, 5, 6))
    # Its random draws are done, whatever came of them.
    assert [name for name in moved(four, five) if "random" not in name] == []
    assert moved(five, six)


@pytest.mark.parametrize("every", [1, 10])
def test_too_many_in_a_row_stop_the_run(recipe, tmp_path, monkeypatch, every):
    poison(monkeypatch, {2, 4, 5, 6})
    recipe = dataclasses.replace(recipe, logging=dataclasses.replace(recipe.logging, every=every))
    with pytest.raises(
        TrainingError,
        match=r"phase stem: step 6 was number 3 in a row with a value that is not finite \(caption_by_sentence, .*"
        r"gradient_norm\); .*newest checkpoint is .*stem-00000005-",
    ):
        train(recipe, tmp_path / "run", phases=["stem"])


def test_skipped_steps_in_a_row_are_remembered_by_a_resumed_run(recipe, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4, 5})
    signals_in_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", phases=["stem"])
    with pytest.raises(TrainingError, match="step 5 was number 3 in a row"):
        train(recipe, tmp_path / "run", phases=["stem"], resume=True)


def test_a_worker_that_dies_is_an_error_in_words(recipe, tmp_path, monkeypatch):
    take, parent = RepeatableBatches.__getitem__, os.getpid()

    def die(self, number):
        if number == 3 and os.getpid() != parent:
            os._exit(1)
        return take(self, number)

    monkeypatch.setattr(RepeatableBatches, "__getitem__", die)
    working = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, loader_workers=1))
    with pytest.raises(TrainingError, match="a process that prepares batches has died"):
        train(working, tmp_path / "run", phases=["stem"])
    monkeypatch.undo()
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    assert differing(train(recipe, tmp_path / "other", phases=["stem"]), folder) == []


@pytest.mark.parametrize("place", ["checkpoint", "log"])
def test_a_full_disk_stops_the_run_in_words(recipe, tmp_path, monkeypatch, place):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        record = engine.PhaseRun.record

        def fill(self, outcome):
            if self.step == 3:
                if place == "checkpoint":
                    patch.setattr("mirror_modules.training.checkpoints.checksum", fail)
                else:
                    # Closing it fails as well: what could not be written is still to be written.
                    self.log.file.close()
                    self.log.file = open("/dev/full", "a")  # noqa: SIM115
            record(self, outcome)

        patch.setattr(engine.PhaseRun, "record", fill)
        with pytest.raises(
            TrainingError, match=r"phase stem: after step 4 .*No space left.*newest checkpoint is .*stem-00000003-"
        ):
            train(recipe, tmp_path / "run", phases=["stem"])
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    assert differing(train(recipe, tmp_path / "other", phases=["stem"]), folder) == []


def test_an_unknown_field_of_a_config_file_is_refused(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"engine": {"chekpoint_every": 3}}))
    assert main(["train", "demo", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: Recipe: unknown field 'engine.chekpoint_every'; did you mean 'checkpoint_every'?" in line
    assert not (tmp_path / "run").exists()


def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_at_work(tmp_path):
    """As batch systems and terminals send it: to the workers that prepare batches too."""
    folder = RunFolder(tmp_path / "run")
    options = ["--engine.loader-workers", "1", "--steps", "3000", "--engine.checkpoint-every", "1000"]
    command = [sys.executable, "-m", "mirror_modules.cli", *words(folder.path, *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and not (folder.log.exists() and folder.log.stat().st_size):
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert len(list(folder.checkpoints.iterdir())) == 1


@pytest.mark.parametrize("phases", [["stem"], ["stem", "judge"]])
def test_a_signal_between_phases_is_not_forgotten(recipe, tmp_path, monkeypatch, phases):
    save = loop.save_weights

    def send(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(loop, "save_weights", send)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; finished phases are in .*run\. Go on with --resume"):
        train(recipe, tmp_path / "run", phases=phases)
    assert RunFolder(tmp_path / "run").weights("stem").exists()
    assert not RunFolder(tmp_path / "run").weights("judge").exists()


def test_a_folder_is_trained_in_by_one_at_a_time(recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with (
        folder.locked(),
        pytest.raises(ValueError, match="is being trained by another process; wait for it, or choose"),
    ):
        train(recipe, folder.path, phases=["stem"])
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    train(recipe, folder.path, phases=["stem"])


def foreign(content, **changes):
    return {**content, **changes}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda content: {"x": 1}, "'random'"),
        (lambda content: [1, 2], "list indices"),
        (lambda content: foreign(content, phase="judge"), "it is one of phase 'judge' after step 4"),
        (lambda content: foreign(content, log={**content["log"], "step": 3}), "after step 3"),
        (lambda content: foreign(content, recipe={**content["recipe"], "seed": 7}), "seed is 7 there and 0 now"),
        (lambda content: foreign(content, recipe={"name": "x", "foo": 1}), "unknown field 'foo'"),
    ],
)
def test_a_checkpoint_of_something_else_is_named(recipe, tmp_path, monkeypatch, make, why):
    with monkeypatch.context() as patch:
        signals_in_step(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "run", phases=["stem"])
    kept = engine.Checkpoints(tmp_path / "run" / "checkpoints", "stem", 9)
    content = load_checkpoint(kept.files()[4])
    kept.files()[4].unlink()
    path = kept.save(4, make(content))
    with pytest.raises(
        TrainingError, match=rf"{path.name} is no checkpoint of phase 'stem' of this run \(.*{why}.*remove"
    ):
        train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    path.unlink()
    train(recipe, tmp_path / "run", phases=["stem"], resume=True)


def test_too_little_memory_is_said_with_what_to_lower(recipe, tmp_path, monkeypatch):
    def take_all(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop, "matching_step", take_all)
    with pytest.raises(
        TrainingError, match=r"phase stem: step 1 needs more memory than there is; .*Lower stem\.batch_size"
    ):
        train(recipe, tmp_path / "run", phases=["stem"])


def test_a_figure_that_is_not_finite_is_never_the_best(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, stem=dataclasses.replace(recipe.stem, keep_best="r_precision"))
    validated, figures_of = engine.PhaseRun.validated, {1: float("nan"), 2: 0.3, 3: float("inf"), 4: 0.2}
    monkeypatch.setattr(
        engine.PhaseRun, "validated", lambda self, _: validated(self, {"r_precision": figures_of.get(self.step, 0.1)})
    )
    folder = train(recipe, tmp_path / "run", phases=["stem"])
    assert 2 in engine.Checkpoints(folder.checkpoints, "stem", 9).files()
    values = [line["validation_r_precision"] for line in figures(folder) if "validation_r_precision" in line]
    assert values == [None, 0.3, None, 0.2, 0.1, 0.1]


def test_a_run_of_skipped_steps_alone_is_no_success(recipe, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 7)))
    patient = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, most_skipped_in_a_row=20))
    with pytest.raises(TrainingError, match="step 6 was number 6 in a row"):
        train(patient, tmp_path / "run", phases=["stem"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 40, "accumulate": 3},
            r"stream\.batch_size=40 cannot be divided among 1 processes, 3 parts each",
        ),
        (
            {"batch_size": 64, "accumulate": 64},
            "phase stream divides each batch into 64 parts, but there are 41 training",
        ),
    ],
)
def test_batches_that_cannot_be_divided(recipe, tmp_path, fields, message):
    recipe = dataclasses.replace(recipe, stream=dataclasses.replace(recipe.stream, **fields))
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_of_more_images_than_there_are_is_said(recipe, tmp_path, capsys):
    recipe = dataclasses.replace(recipe, stem=dataclasses.replace(recipe.stem, batch_size=64))
    train(recipe, tmp_path / "run", phases=["stem"])
    assert "stem: batches of 41: there are no more training images" in capsys.readouterr().err
