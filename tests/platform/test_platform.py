"""Save, resume, prepare and ablate on a simulation of Windows; `simulated/sitecustomize.py` lists its restrictions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_and_resume import differing
from mirror_modules.training.checkpoints import Checkpoints
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import PHASES
from tests.layouts import captions_of
from tests.platform.tasks import CELLS, TRAINING

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulated on Linux only")
pytest.importorskip("PIL.Image")
pytest.importorskip("webdataset")

HERE = Path(__file__).parent
LIMIT = 900


def simulated(folder, *command):
    """Run Python on the simulated system, with a terminal that lacks most characters."""
    environment = {
        **os.environ,
        "SIMULATED": str(folder),
        "PYTHONPATH": os.pathsep.join([str(HERE / "simulated"), str(HERE.parents[1])]),
        "PYTHONIOENCODING": "cp1252",
        "PYTHONWARNDEFAULTENCODING": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, timeout=LIMIT, check=False, text=True
    )


@pytest.fixture
def finished(request, tmp_path):
    """The folder in which a task ran, whose name and files are valid on Windows."""
    folder = tmp_path / "a folder 꽃"
    folder.mkdir()
    done = simulated(folder, "-m", "tests.platform.tasks", request.param, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    for path in folder.rglob("*"):
        assert not re.search(r'[\x00-\x1f<>:"|?*\\]|[. ]$', path.name), path
    return folder


RESTRICTIONS = {
    "no locks": ("__name__ = 'mirror_modules'; import fcntl", "ModuleNotFoundError: No module named 'fcntl'"),
    "no fork": ("import os; os.fork()", "there is no fork"),
    "no fork context": ("import multiprocessing as m; m.get_context('fork')", "cannot find context for 'fork'"),
    "no fsync": ("import os; os.fsync(os.open('old', os.O_RDONLY))", "Bad file descriptor"),
    "no open folders": ("import os; os.mkdir('x'); os.open('x', os.O_RDONLY)", "Permission denied"),
    "no colons": ("open('a:b', 'w')", "syntax is incorrect"),
    "no devices": ("import os; os.mkdir('aux')", "syntax is incorrect"),
    "no dots": ("import os; os.rename('old', 'old.')", "syntax is incorrect"),
    "no second case": ("open('OLD', 'w')", "old would be the same file"),
    "no replacing of open files": ("import os; file = open('old'); os.replace('new', 'old')", "it is in use"),
    "no removing of open files": ("import os; file = open('old'); os.remove('old')", "it is in use"),
    "no removing of mapped files": (
        "import mmap, os; file = open('old'); m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); file.close(); "
        "os.remove('old')",
        "it is in use",
    ),
    "no renaming of folders with open files": (
        "import os; os.mkdir('x'); f = open('x/a', 'w'); os.rename('x', 'y')",
        "it is in use",
    ),
    "no SIGTERM": (
        "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit('received')); "
        "os.kill(os.getpid(), signal.SIGTERM)",
        "",
    ),
    "no default encoding": (
        "exec(compile('open(\"old\")', 'x', 'exec'), {'__name__': 'mirror_modules.x'})",
        "EncodingWarning: 'encoding' argument not specified",
    ),
    "no other characters": ("print('꽃')", "UnicodeEncodeError"),
}


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_the_simulation_has_restrictions(tmp_path, name):
    code, message = RESTRICTIONS[name]
    for file in ("old", "new"):
        (tmp_path / file).write_text("content")
    done = simulated(tmp_path, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "received" not in done.stderr
    assert (tmp_path / "old").read_text() == "content"


@pytest.mark.parametrize("finished", ["training"], indirect=True)
def test_a_run_is_trained_resumed_evaluated_and_saved_as_elsewhere(finished, tiny_run):
    run = RunFolder(finished / "run")
    assert differing(tiny_run, run) == []
    assert run.report.exists()
    assert list((run.path / "tensorboard").iterdir())
    assert b"\r" not in run.log.read_bytes() + run.config.read_bytes() + run.vocabulary.read_bytes()
    for phase in PHASES:
        assert list(Checkpoints(run.checkpoints, phase, 1).files()) == [3]


@pytest.mark.parametrize("finished", ["workers"], indirect=True)
def test_worker_processes_read_prepared_images_and_shards(finished):
    assert RunFolder(finished / "run").weights("stem").exists()
    assert sorted(json.loads((finished / "streamed.json").read_text())) == sorted(captions_of(i)[0] for i in range(6))
    lines = (finished / "prepared" / "train.jsonl").read_bytes()
    assert lines.count(b"\n") == TRAINING
    assert b"\r" not in lines


@pytest.mark.parametrize("finished", ["ablation"], indirect=True)
def test_cells_with_any_name_are_trained_in_several_processes(finished):
    content = json.loads((finished / "ablation" / "ablation.json").read_text(encoding="utf-8"))
    assert set(content["figures"]) == {"real images", *(cell.name for cell in CELLS)}
    folders = sorted(path.name for path in (finished / "ablation" / "cells").iterdir())
    assert folders == ["_aux", "ratio---0.5----no-pairs-"]
