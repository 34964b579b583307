"""How a phase ends early: signals, non-finite steps, dead loader processes, full disks, errors of torch.

This file runs itself as a process of its own where signals or the death of a process would reach the tests.
"""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
from tests.runs import make_tiny_recipe

LIMIT = 900
OPTIONS = [
    *("--data.training-images", 23, "--data.validation-images", 19, "--evaluation.candidates", 5),
    *("--evaluation.report-images", 2, "--model.resolutions", 8, 16, "--model.channels", 3),
    *("--model.discriminator-channels", 3, "--model.word-dim", 10, "--logging.every", 1, "--device", "cpu"),
    *("--engine.checkpoint-every", 50, "--logging.samples-every", 0, "--phases", "stem"),
]


def command_line(folder, *options):
    return [str(argument) for argument in ("train", "ablation", "--out", folder, *OPTIONS, "--steps", 20, *options)]


def error_lines(err):
    """The lines of stderr that are not progress."""
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("mirror-modules")]


# Code that runs in a process of its own.


def wait_in_step(folder, *words):
    """The command line, which waits in its fourth step until it has received a signal."""
    record = engine.PhaseRun.record

    def wait(self, result):
        if self.step == 3:
            (folder / "waiting").touch()
            while self.run.signals.received is None:
                time.sleep(0.01)
        record(self, result)

    engine.PhaseRun.record = wait
    sys.exit(main(words))


def kill_loader(folder):
    """A run whose loader process dies at the fourth batch."""
    get_batch, parent = RepeatableBatches.__getitem__, os.getpid()

    def die(self, number):
        if number == 3 and os.getpid() != parent:
            os._exit(1)
        return get_batch(self, number)

    RepeatableBatches.__getitem__ = die
    recipe = make_recipe(make_tiny_recipe())
    with_worker = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, loader_workers=1))
    try:
        train(with_worker, folder / "run", phases=["stem"])
    except TrainingError as error:
        sys.exit(f"TrainingError: {error}")


TASKS = {"wait": wait_in_step, "kill": kill_loader}

# Tests.


def start(task, folder, *words):
    """Start a task as the leader of a new process group."""
    command = [sys.executable, __file__, task, str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    """Status and standard error of a process."""
    try:
        _, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, err


def finish_with_signal(process, folder, send):
    """Send a signal to a process in the middle of a step."""
    end = time.monotonic() + LIMIT
    while process.poll() is None and not (folder / "waiting").exists() and time.monotonic() < end:
        time.sleep(0.01)
    if process.poll() is None:
        send()
    return finish(process)


def make_recipe(tiny_recipe):
    phases = {phase: dataclasses.replace(getattr(tiny_recipe, phase), steps=6) for phase in PHASES}
    logging = dataclasses.replace(tiny_recipe.logging, samples_every=0)
    frequent_checkpoints = dataclasses.replace(tiny_recipe.engine, checkpoint_every=1, max_skipped_steps=3)
    return dataclasses.replace(tiny_recipe, **phases, logging=logging, engine=frequent_checkpoints)


@pytest.fixture
def recipe(tiny_recipe):
    return make_recipe(tiny_recipe)


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(command_line(folder)) == 0
    return RunFolder(folder)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_the_run_can_be_resumed(tmp_path, capsys, uninterrupted_run, number, status):
    folder = RunFolder(tmp_path / "run")
    process = start("wait", tmp_path, *command_line(folder.path))
    found, err = finish_with_signal(process, tmp_path, lambda: process.send_signal(number))
    assert found == status, err
    (line,) = error_lines(err)
    assert f"stopped by {number.name} after step 4 of 20" in line
    assert "Continue with --resume" in line
    assert "Traceback" not in err
    (checkpoint,) = folder.checkpoints.iterdir()
    assert str(checkpoint) in line

    capsys.readouterr()
    assert main(command_line(folder.path)) == 2
    assert "continue with --resume" in error_lines(capsys.readouterr().err)[0]
    assert main(command_line(folder.path, "--resume")) == 0
    assert differing(uninterrupted_run, folder) == []


def signals_in_step(monkeypatch, step, *numbers):
    """Send signals to this process in the middle of a step."""
    record = engine.PhaseRun.record

    def send(self, result):
        if self.step == step:
            for number in numbers:
                signal.raise_signal(number)
        record(self, result)

    monkeypatch.setattr(engine.PhaseRun, "record", send)


def test_signal_handlers_are_restored(recipe, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signals_in_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 6 of phase stem") as stopped:
        train(recipe, tmp_path / "run")
    assert stopped.value.status == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_handler_that_was_not_installed_from_python_is_no_error(monkeypatch):
    """Python returns None for it, and cannot restore it."""
    install, installed = signal.signal, []

    def install_over_foreign_handler(number, handler):
        installed.append((number, handler))
        install(number, handler)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", install_over_foreign_handler)
            with engine.Signals():
                pass
        assert installed[2:] == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL)]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


def test_two_signals_at_once_count_as_one(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_SIGNALS", LIMIT)
    signals_in_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 4"):
        train(recipe, tmp_path / "run")


def test_a_second_sigint_raises_keyboard_interrupt(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "SECONDS_BETWEEN_SIGNALS", -1.0)
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


def changed(before, after, prefix=""):
    """Names of the tensors that differ."""
    if isinstance(before, torch.Tensor):
        return [] if torch.equal(before, after) else [prefix]
    if isinstance(before, dict):
        return [name for key in before for name in changed(before[key], after[key], f"{prefix}.{key}")]
    if isinstance(before, list):
        return [name for i, pair in enumerate(zip(before, after)) for name in changed(*pair, f"{prefix}.{i}")]
    return []


def state_after(folder, phase, step):
    return load_checkpoint(next(folder.checkpoints.glob(f"{phase}-{step:08}-*")))["state"]


@pytest.mark.parametrize("phase", ["stem", "glam"])
def test_a_non_finite_step_changes_nothing_and_is_counted(recipe, tmp_path, monkeypatch, phase):
    if phase == "glam":
        train(recipe, tmp_path / "run", phases=["stem", "stream"])
    poison(monkeypatch, {5})
    recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, checkpoints_kept=9))
    folder = train(recipe, tmp_path / "run", phases=[phase])
    lines = [line for line in figures(folder) if line["phase"] == phase]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 1]
    four, five, six = (state_after(folder, phase, step) for step in (4, 5, 6))
    # The random draws of a skipped step are not undone.
    assert [name for name in changed(four, five) if "random" not in name] == []
    assert changed(five, six)


@pytest.mark.parametrize("every", [1, 10])
def test_too_many_consecutive_non_finite_steps_stop_the_run(recipe, tmp_path, monkeypatch, every):
    poison(monkeypatch, {2, 4, 5, 6})
    recipe = dataclasses.replace(recipe, logging=dataclasses.replace(recipe.logging, every=every))
    with pytest.raises(
        TrainingError,
        match=r"phase stem: 3 consecutive steps up to step 6 had a non-finite value \(caption_by_sentence, .*"
        r"gradient_norm\); .*newest checkpoint is .*stem-00000005-",
    ):
        train(recipe, tmp_path / "run", phases=["stem"])


def test_a_resumed_run_continues_the_count_of_consecutive_non_finite_steps(recipe, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4, 5})
    signals_in_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", phases=["stem"])
    with pytest.raises(TrainingError, match="3 consecutive steps up to step 5 had a non-finite value"):
        train(recipe, tmp_path / "run", phases=["stem"], resume=True)


def test_a_dead_loader_process_is_explained(recipe, tmp_path):
    status, err = finish(start("kill", tmp_path))
    assert status == 1, err
    assert "TrainingError: phase stem: after step" in err
    assert "a loader process died" in err
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    assert differing(train(recipe, tmp_path / "other", phases=["stem"]), folder) == []


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint",
        pytest.param("log", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")),
    ],
)
def test_a_full_disk_is_explained_and_the_run_can_be_resumed(recipe, tmp_path, monkeypatch, place):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        record = engine.PhaseRun.record

        def fill_disk(self, result):
            if self.step == 3:
                if place == "checkpoint":
                    patch.setattr("mirror_modules.training.checkpoints.checksum", fail)
                else:
                    # Closing the file fails as well, because it flushes the buffer.
                    self.log.file.close()
                    self.log.file = open("/dev/full", "a")  # noqa: SIM115
            record(self, result)

        patch.setattr(engine.PhaseRun, "record", fill_disk)
        with pytest.raises(
            TrainingError, match=r"phase stem: after step 4 .*No space left.*newest checkpoint is .*stem-00000003-"
        ):
            train(recipe, tmp_path / "run", phases=["stem"])
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    assert differing(train(recipe, tmp_path / "other", phases=["stem"]), folder) == []


def test_an_unknown_field_of_a_config_file_is_rejected(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"engine": {"chekpoint_every": 3}}))
    assert main(["train", "demo", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: Recipe: unknown field 'engine.chekpoint_every'; did you mean 'checkpoint_every'?" in line
    assert not (tmp_path / "run").exists()


def test_loader_processes_survive_a_signal_to_the_whole_process_group(tmp_path):
    """Batch systems and terminals send signals to all processes of a run."""
    folder = RunFolder(tmp_path / "run")
    process = start("wait", tmp_path, *command_line(folder.path, "--engine.loader-workers", 1))
    status, err = finish_with_signal(process, tmp_path, lambda: os.killpg(process.pid, signal.SIGTERM))
    assert status == 143, err
    assert list(engine.Checkpoints(folder.checkpoints, "stem", 9).files()) == [4]


@pytest.mark.parametrize("phases", [["stem"], ["stem", "evaluator"]])
def test_a_signal_between_phases_stops_the_run(recipe, tmp_path, monkeypatch, phases):
    save = loop.save_weights

    def send(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(loop, "save_weights", send)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; finished phases are in .*run\. Continue with --resume"):
        train(recipe, tmp_path / "run", phases=phases)
    assert RunFolder(tmp_path / "run").weights("stem").exists()
    assert not RunFolder(tmp_path / "run").weights("evaluator").exists()


def test_a_folder_that_another_process_trains_in_is_rejected(recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with (
        folder.locked(),
        pytest.raises(ValueError, match="is being trained by another process; wait for it, or choose"),
    ):
        train(recipe, folder.path, phases=["stem"])
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    train(recipe, folder.path, phases=["stem"])


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (lambda content: {"x": 1}, "'random'"),
        (lambda content: [1, 2], "list indices"),
        (lambda content: {**content, "phase": "evaluator"}, "it belongs to phase 'evaluator' after step 4"),
        (lambda content: {**content, "log": {**content["log"], "step": 3}}, "after step 3"),
        (lambda content: {**content, "recipe": {**content["recipe"], "seed": 7}}, "seed is 7 there and 0 now"),
        (lambda content: {**content, "recipe": {"name": "x", "foo": 1}}, "unknown field 'foo'"),
    ],
)
def test_a_checkpoint_of_another_run_is_rejected(recipe, tmp_path, monkeypatch, replace, reason):
    with monkeypatch.context() as patch:
        signals_in_step(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "run", phases=["stem"])
    kept = engine.Checkpoints(tmp_path / "run" / "checkpoints", "stem", 9)
    content = load_checkpoint(kept.files()[4])
    kept.files()[4].unlink()
    path = kept.save(4, replace(content))
    with pytest.raises(
        TrainingError, match=rf"{path.name} is not a checkpoint of phase 'stem' of this run \(.*{reason}.*remove"
    ):
        train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    path.unlink()
    train(recipe, tmp_path / "run", phases=["stem"], resume=True)


def test_running_out_of_memory_is_explained(recipe, tmp_path, monkeypatch):
    def allocate_too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop, "matching_step", allocate_too_much)
    with pytest.raises(TrainingError, match=r"phase stem: step 1 ran out of memory; .*Lower stem\.batch_size"):
        train(recipe, tmp_path / "run", phases=["stem"])


def test_a_non_finite_metric_is_never_the_best(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, stem=dataclasses.replace(recipe.stem, keep_best="r_precision"))
    validated, values = engine.PhaseRun.validated, {1: float("nan"), 2: 0.3, 3: float("inf"), 4: 0.2}
    monkeypatch.setattr(
        engine.PhaseRun,
        "validated",
        lambda self, _: validated(self, {"r_precision": values.get(self.step, 0.1)}),
    )
    folder = train(recipe, tmp_path / "run", phases=["stem"])
    assert 2 in engine.Checkpoints(folder.checkpoints, "stem", 9).files()
    logged = [line["validation_r_precision"] for line in figures(folder) if "validation_r_precision" in line]
    assert logged == [None, 0.3, None, 0.2, 0.1, 0.1]


def test_a_short_run_of_only_non_finite_steps_fails(recipe, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 7)))
    recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, max_skipped_steps=20))
    with pytest.raises(TrainingError, match="6 consecutive steps up to step 6 had a non-finite value"):
        train(recipe, tmp_path / "run", phases=["stem"])


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
def test_batches_that_cannot_be_divided_are_rejected(recipe, tmp_path, fields, message):
    recipe = dataclasses.replace(recipe, stream=dataclasses.replace(recipe.stream, **fields))
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_set_is_reduced_with_a_message(recipe, tmp_path, capsys):
    recipe = dataclasses.replace(recipe, stem=dataclasses.replace(recipe.stem, batch_size=64))
    train(recipe, tmp_path / "run", phases=["stem"])
    assert "stem: batch size reduced to 41: there are too few training images" in capsys.readouterr().err


if __name__ == "__main__":
    torch.set_num_threads(1)
    TASKS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
