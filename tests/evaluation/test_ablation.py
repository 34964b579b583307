"""Ablation: its cells, the shared phases, resuming, and the statistics of its tables."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirror_modules.evaluation import ablation, ablation_table
from mirror_modules.evaluation.ablation import ablate, ablation_cells, run_cell
from mirror_modules.evaluation.ablation_table import PAIRS, as_markdown, bootstrap_interval, summarize
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import Recipe, get_recipe

CELLS = [cell for cell in ablation_cells() if cell.name in ("weight 0", "weight 20")]


@pytest.fixture
def recipe(tiny_recipe):
    """A checkpoint after every step."""
    return dataclasses.replace(tiny_recipe, engine=dataclasses.replace(tiny_recipe.engine, checkpoint_every=1))


@pytest.fixture
def without_processes(monkeypatch):
    """Run tasks in this process, without the attribute classifier, which is inaccurate on such small images.

    Returns a list of the tasks that were run.
    """

    def run_here(function, tasks, jobs, *, title):
        finished.extend(tasks)
        for task in tasks:
            function(*task)

    finished = []
    monkeypatch.setattr(ablation, "_in_processes", run_here)
    monkeypatch.setattr(ablation, "fit_attribute_classifier", lambda *_: None)
    return finished


def test_the_fields_of_the_cells_match_their_names():
    cells = {cell.name: Recipe.from_dict(cell.fields, get_recipe("ablation")) for cell in ablation_cells()}
    assert len(cells) == 18
    for name, recipe in cells.items():
        assert recipe.glam.mismatched_pairs == ("no mismatched" not in name)
        assert recipe.model.attention == ("word" if "word" in name else "global-local")
        kind, number = name.split(" ")[-2:]
        weight, ratio = (float(number), None) if kind == "weight" else (None, float(number))
        assert (recipe.glam.redescription_weight, recipe.glam.redescription_ratio) == (weight, ratio)
    assert {name for pair in PAIRS for name in pair} == set(cells)


def test_cells_share_the_earlier_phases_and_resume(recipe, tmp_path, without_processes):
    content = ablate(recipe, tmp_path / "out", cells=CELLS, seeds=(0, 3))
    assert len(without_processes) == 2 + 4
    for seed in (0, 3):
        shared = tmp_path / "out" / "shared" / f"seed-{seed}"
        for cell in ("weight-0", "weight-20"):
            run = tmp_path / "out" / "cells" / cell / f"seed-{seed}"
            for phase in ("stem", "stream", "evaluator"):
                name = f"phases/{phase}.safetensors"
                assert (run / name).read_bytes() == (shared / name).read_bytes()
            config = json.loads((run / "config.json").read_text())["recipe"]
            assert config["seed"] == seed
            assert config["glam"]["redescription_weight"] == float(cell.rsplit("-", 1)[1])
    assert content["seeds"] == [0, 3]
    assert set(content["figures"]) == {"weight 0", "weight 20", "real images"}
    real = json.loads((tmp_path / "out" / "shared" / "seed-3" / "real.json").read_text())
    assert len(real["r_precision"]) == 31
    assert content["figures"]["real images"]["words"]["seeds"][1] == real["words"][0]
    (words,) = [each for each in content["differences"] if each["figure"] == "words"]
    figures = content["figures"]
    assert words["mean"] == pytest.approx(figures["weight 20"]["words"]["mean"] - figures["weight 0"]["words"]["mean"])
    with Image.open(tmp_path / "out" / "ablation.png") as picture:
        assert picture.size[0] > 100

    # A lost cell is trained again, the others are not; the table keeps all of them.
    before = (tmp_path / "out" / "ablation.json").read_bytes()
    shutil.rmtree(tmp_path / "out" / "cells" / "weight-20" / "seed-3")
    without_processes.clear()
    ablate(recipe, tmp_path / "out", cells=CELLS[1:], seeds=(0, 3))
    assert [(task[0].name, task[3]) for task in without_processes] == [("weight 20", 3)]
    assert (tmp_path / "out" / "ablation.json").read_bytes() == before


def test_other_settings_are_refused(recipe, tmp_path, without_processes):
    ablate(recipe, tmp_path / "out", cells=CELLS[:1], seeds=(0,))
    changed = dataclasses.replace(recipe, glam=dataclasses.replace(recipe.glam, kl_weight=7.0))
    with pytest.raises(
        ValueError, match=r"holds an ablation with other settings \(glam\.kl_weight is .* and 7\.0 now\)"
    ):
        ablate(changed, tmp_path / "out", cells=CELLS[:1], seeds=(0,))
    RunFolder(tmp_path / "run").begin(recipe)
    with pytest.raises(ValueError, match=r"config\.json does not belong to an ablation; choose another --out"):
        ablate(recipe, tmp_path / "run", cells=CELLS, seeds=(0,))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="is not empty and holds no ablation"):
        ablate(recipe, tmp_path / "other", cells=CELLS, seeds=(0,))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "ablate: seeds must be"),
        ({"seeds": (1, 1)}, "ablate: .* distinct"),
        ({"seeds": (0, -1)}, "seed must be a whole number from 0"),
        ({"jobs": 0}, "ablate: jobs must be at least 1"),
    ],
)
def test_errors(recipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ablate(recipe, tmp_path / "out", cells=CELLS, **options)
    assert not (tmp_path / "out").exists()


def test_a_failed_process_is_reported(recipe, tmp_path, capfd):
    """The shared phases of the cell are missing."""
    with pytest.raises(
        TrainingError, match=r"a process of the ablation exited with status 1; .* repeat the command to continue"
    ):
        ablation._in_processes(run_cell, [(CELLS[0], recipe, tmp_path, 0, "cpu")], 1, title="cells")
    assert "mirror-modules ablate: FileNotFoundError" in capfd.readouterr().err


def test_child_processes_end_when_their_parent_is_killed(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(300)"
    call = f"_in_processes(exec, [({code!r},)], 1, title='processes')"
    start = f"from mirror_modules.evaluation.ablation import _in_processes; {call}"
    guarded = f"if __name__ == '__main__':\n    {start}\n"
    (tmp_path / "start.py").write_text(guarded, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, tmp_path / "start.py"], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: pid.exists() and pid.read_text())
    finally:
        parent.kill()
        parent.wait()
    child = int(pid.read_text())
    wait_for(lambda: not (Path("/proc") / str(child)).exists())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_summaries_average_over_seeds_and_pairs():
    results = {
        "weight 0": [{"r_precision": [0.0, 0.5]}, {"r_precision": [0.5, 0.5]}],
        "weight 1": [{"r_precision": [0.5, 0.5]}, {"r_precision": [1.0, 0.5]}],
    }
    content = summarize(results, (4, 5))
    assert content["figures"]["weight 0"]["r_precision"] == {
        "mean": pytest.approx(0.375),
        "deviation": pytest.approx(0.125 * 2**0.5),
        "seeds": [0.25, 0.5],
    }
    (difference,) = content["differences"]
    assert (difference["cell"], difference["against"], difference["mean"]) == ("weight 1", "weight 0", 0.25)
    assert 0 <= difference["low"] < 0.25 < difference["high"] <= 0.5
    table = as_markdown(content)
    assert "| weight 0 | 37.5 ± 17.7 |" in table
    assert "| weight 1 | weight 0 | +25.0 (" in table
    single_values = {name: [{"words": [runs[0]["r_precision"][1]]}] for name, runs in results.items()}
    table = as_markdown(summarize(single_values, (4,)))
    assert "| weight 0 | 50.0 |" in table
    assert "| weight 1 | weight 0 | +0.0 |" in table


def test_the_interval_reflects_the_variance_of_seeds_and_captions():
    rng = np.random.default_rng(0)
    same = [np.full(50, 0.25)] * 3
    assert bootstrap_interval(same) == (0.25, 0.25)
    # A single seed: the variance of captions gives a standard error of 1 / sqrt(n).
    low, high = bootstrap_interval([rng.normal(size=400)])
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.1)
    # The variance between seeds dominates if that of captions is much smaller.
    low, high = bootstrap_interval([np.full(50, value) for value in (-1.0, 0.0, 1.0)])
    assert (low, high) == (pytest.approx(-1.0, abs=0.01), pytest.approx(1.0, abs=0.01))
    assert bootstrap_interval([rng.normal(size=9)], seed=1) != bootstrap_interval([rng.normal(size=9)], seed=2)


def test_the_interval_has_its_nominal_coverage_with_many_seeds(monkeypatch):
    """With as few as three seeds, coverage is lower, as the docstring states."""
    monkeypatch.setattr(ablation_table, "RESAMPLES", 500)
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(60):
        seeds = rng.normal(size=12)
        low, high = bootstrap_interval([mean + rng.normal(size=20) for mean in seeds], seed=i)
        covered += low <= 0 <= high
    assert covered >= 51
