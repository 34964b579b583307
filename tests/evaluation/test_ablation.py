"""Ablation: its cells, the shared phases, resuming, and the statistics of its tables."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirror_modules.evaluation import grid, tables
from mirror_modules.evaluation.ablation import PAIRS, Cell, ablate, ablation_cells
from mirror_modules.evaluation.grid import Grid, GridCell, run_cell
from mirror_modules.evaluation.samples import SHEET_ROWS
from mirror_modules.evaluation.tables import as_markdown, bootstrap_interval, summarize, unrankable
from mirror_modules.metrics import class_oracle
from mirror_modules.pictures.grids import CAPTION_WIDTH
from mirror_modules.training.batches import load_splits
from mirror_modules.training.distributed import cpu_threads
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import RECIPES, DataRecipe, Recipe, get_recipe
from tests.layouts import make_birds
from tests.runs import make_tiny_recipe

CELLS = [cell for cell in ablation_cells() if cell.name in ("weight 0", "weight 20")]


def make_recipe(steps=3):
    """A checkpoint after every step."""
    base = make_tiny_recipe()
    engine = dataclasses.replace(base.engine, checkpoint_every=1)
    return dataclasses.replace(base, engine=engine, glam=dataclasses.replace(base.glam, steps=steps))


@pytest.fixture
def recipe():
    return make_recipe()


def grid_of(out, recipe=None):
    return Grid("ablate", "ablation", "cell", out, recipe or make_recipe(), "cpu")


def run_here(monkeypatch):
    """Run tasks in this process, without the attribute classifier, which is inaccurate on such small images.

    Returns a list of the tasks that were run.
    """

    def run_tasks(function, tasks, jobs, *, title, command):
        finished.extend(tasks.values())
        for task in tasks.values():
            function(*task)

    finished = []
    monkeypatch.setattr(grid, "in_processes", run_tasks)
    monkeypatch.setattr(grid, "fit_attribute_classifier", lambda *_: None)
    return finished


@pytest.fixture
def without_processes(monkeypatch):
    return run_here(monkeypatch)


@pytest.fixture(scope="module")
def finished_ablation(tmp_path_factory):
    """The folder of an ablation of the cell "weight 0", trained once; tests that modify it use `out`."""
    folder = tmp_path_factory.mktemp("ablations") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch)
        ablate(make_recipe(), folder, cells=CELLS[:1], seeds=(0,))
    return folder


@pytest.fixture
def out(finished_ablation, tmp_path):
    return shutil.copytree(finished_ablation, tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in RECIPES if get_recipe(name).model.system == "mirrorgan"])
def test_every_cell_fits_every_recipe_of_mirrorgan(name):
    for cell in ablation_cells():
        Recipe.from_dict(cell.fields, get_recipe(name))


def test_the_fields_of_the_cells_match_their_names():
    cells = {cell.name: Recipe.from_dict(cell.fields, get_recipe("ablation")) for cell in ablation_cells()}
    assert len(cells) == 25
    for name, recipe in cells.items():
        assert recipe.glam.mismatched_pairs == ("no mismatched" not in name)
        assert recipe.model.attention == ("word" if "word" in name else "global-local")
        assert (recipe.glam.matching_weight, recipe.glam.matching_ratio) == (0, 0.5 if "matching" in name else None)
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
    bounds = [json.loads((tmp_path / "out" / "shared" / f"seed-{seed}" / "bounds.json").read_text()) for seed in (0, 3)]
    # Drawn flowers have no classes.
    assert [set(each["r_precision"]) for each in bounds] == [{"chance", "text_ceiling"}] * 2
    assert content["bounds"]["r_precision"]["chance"] == 1 / 11
    ceilings = [each["r_precision"]["text_ceiling"] for each in bounds]
    assert content["bounds"]["r_precision"]["text_ceiling"] == pytest.approx(sum(ceilings) / 2)
    # Three steps teach nothing.
    assert list(content["cannot_rank"]) == ["r_precision"]
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| | R-precision, top 1 [1] | word accuracy |" in table
    assert f"| other captions of the same image | {100 * sum(ceilings) / 2:.1f} | – |" in table
    assert "| chance | 9.1 | – |" in table
    assert "[1] Cannot rank these images: real images, at " in table
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
    assert [(task[0].name, task[2]) for task in without_processes] == [("weight 20", 3)]
    assert (tmp_path / "out" / "ablation.json").read_bytes() == before


def names_of(tasks):
    return [task[0].name for task in tasks if isinstance(task[0], GridCell)]


def test_a_finished_cell_is_trained_further_for_more_steps(out, tmp_path, without_processes):
    """As if all steps had been requested at once, and not compared with cells of other numbers of steps."""
    ablate(make_recipe(5), out, cells=CELLS[1:], seeds=(0,))
    content = json.loads((out / "ablation.json").read_text())
    assert set(content["figures"]) == set(content["cells"]) | {"real images"} == {"weight 20", "real images"}
    assert content["differences"] == []

    without_processes.clear()
    content = ablate(make_recipe(5), out, cells=CELLS, seeds=(0,))
    assert names_of(without_processes) == ["weight 0"]
    assert set(content["figures"]) == {"weight 0", "weight 20", "real images"}
    assert json.loads((out / "cells/weight-0/seed-0/config.json").read_text())["recipe"]["glam"]["steps"] == 5
    at_once = ablate(make_recipe(5), tmp_path / "at-once", cells=CELLS[:1], seeds=(0,))
    assert content["figures"]["weight 0"] == at_once["figures"]["weight 0"]

    with pytest.raises(
        ValueError, match=r"ablate: cell 'weight 0': .* holds phase 'glam' after 5 steps; glam\.steps=3 would be fewer"
    ):
        ablate(make_recipe(3), out, cells=CELLS[:1], seeds=(0,))
    assert json.loads((out / "config.json").read_text())["recipe"]["glam"]["steps"] == 5
    assert (out / "cells/weight-0/seed-0/result.json").exists()


def test_the_sheet_has_a_row_per_caption_and_a_column_per_cell(out, without_processes):
    with Image.open(out / "samples.png") as picture:
        assert picture.height > SHEET_ROWS * CAPTION_WIDTH
        assert picture.width > 2 * CAPTION_WIDTH
    paths = [out / folder / "seed-0/samples.npz" for folder in ("shared", "cells/weight-0")]
    real, generated = (np.load(path) for path in paths)
    assert generated["captions"].tolist() == real["captions"].tolist()
    assert (generated["images"] != real["images"]).any()
    # A folder of an earlier version has none: the cell is measured again, but not trained.
    paths[1].unlink()
    log = (out / "cells/weight-0/seed-0/metrics.jsonl").read_bytes()
    ablate(make_recipe(3), out, cells=CELLS[:1], seeds=(0,))
    assert len(without_processes) == 1
    assert paths[1].exists()
    assert (out / "cells/weight-0/seed-0/metrics.jsonl").read_bytes() == log


def test_a_cell_without_its_last_checkpoint_is_not_extended(out, without_processes):
    shutil.rmtree(out / "cells/weight-0/seed-0/checkpoints")
    with pytest.raises(ValueError, match=r"ablate: cell 'weight 0': .* there is no checkpoint of its last step"):
        ablate(make_recipe(5), out, cells=CELLS[:1], seeds=(0,))
    assert without_processes == []
    assert json.loads((out / "cells/weight-0/seed-0/config.json").read_text())["recipe"]["glam"]["steps"] == 3


def test_an_interrupted_extension_does_not_keep_the_old_metrics(out, recipe, without_processes, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(grid, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            ablate(make_recipe(5), out, cells=CELLS[:1], seeds=(0,))
    without_processes.clear()
    ablate(make_recipe(5), out, cells=CELLS[:1], seeds=(0,))
    assert names_of(without_processes) == ["weight 0"]


def test_a_finished_cell_with_other_settings_is_refused(out, recipe, without_processes):
    before = (out / "ablation.json").read_bytes()
    other = Cell("weight 0", {"glam": {"redescription_weight": 7.0, "redescription_ratio": None}})
    message = (
        r"ablate: cell 'weight 0': .*weight-0.seed-0 holds a run with other settings "
        r"\(glam\.redescription_weight is 0\.0 there and 7\.0 now\)"
    )
    with pytest.raises(ValueError, match=message):
        ablate(recipe, out, cells=[other], seeds=(0,))
    assert (out / "ablation.json").read_bytes() == before
    assert without_processes == []


def test_cells_of_earlier_calls_with_other_settings_are_not_in_the_tables(out, recipe, without_processes):
    config = out / "cells/weight-0/seed-0/config.json"
    content = json.loads(config.read_text())
    content["recipe"]["glam"]["redescription_weight"] = 7.0
    config.write_text(json.dumps(content))
    assert set(ablate(recipe, out, cells=[], seeds=(0,))["figures"]) == {"real images"}


def test_shared_phases_of_another_seed_are_refused(out, recipe, without_processes):
    shutil.copytree(out / "shared/seed-0", out / "shared/seed-3")
    with pytest.raises(
        ValueError, match=r"shared.seed-3 holds a run with other settings \(seed is 0 there and 3 now\)"
    ):
        ablate(recipe, out, cells=CELLS[:1], seeds=(3,))


REAL, RESULT = "shared/seed-0/real.json", "cells/weight-0/seed-0/result.json"


@pytest.mark.parametrize("name", [REAL, RESULT])
@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"r_precision": [0.5]}',
        '{"r_precision": 0.5, "words": 0.5}',
        '{"r_precision": [], "words": []}',
        '{"r_precision": ["a"], "words": [null]}',
        '{"r_precision": [0.5], "words": [NaN]}',
        '{"r_precision": [true], "words": [0.5]}',
        '{"r_precision": [5], "words": [0.5]}',
        '{"r_precision": [0.5], "words": [-0.5]}',
        '{"r_precision": [[0.5]], "words": [{}]}',
    ],
)
def test_a_damaged_result_is_named(out, recipe, without_processes, name, content):
    (out / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: it must hold the metrics of a run, .* remove it"):
        ablate(recipe, out, cells=CELLS[:1], seeds=(0,))


@pytest.mark.parametrize("change", [{"r_precision": [0.5] * 30}, {"colors": [0.5] * 31}, {"words": [0.5] * 2}])
def test_a_result_with_other_metrics_than_the_real_images_is_named(out, recipe, without_processes, change):
    """They would be broadcast to those of the other cell, or missing in the tables."""
    metrics = json.loads((out / RESULT).read_text())
    (out / RESULT).write_text(json.dumps({**metrics, **change}))
    with pytest.raises(ValueError, match=rf"{RESULT} is damaged: .* the same ones for every run"):
        ablate(recipe, out, cells=CELLS[:1], seeds=(0,))


def test_the_caller_may_have_turned_gradients_off(out, recipe, without_processes, monkeypatch):
    """The attribute classifier is trained in the caller's process."""
    modes = []
    monkeypatch.setattr(
        grid,
        "fit_attribute_classifier",
        lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())),
    )
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            ablate(recipe, out, cells=CELLS[:1], seeds=(0,))
    assert modes == [(True, False)] * 2


def test_a_removed_result_is_measured_again(out, recipe, without_processes):
    result, before = out / "cells/weight-0/seed-0/result.json", json.loads((out / "ablation.json").read_text())
    result.unlink()
    assert ablate(recipe, out, cells=CELLS[:1], seeds=(0,)) == before
    assert result.exists()


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
        ({"jobs": 0}, "ablate: jobs must be a whole number of at least 1, but it is 0"),
        ({"jobs": 1.5}, r"ablate: jobs must be a whole number of at least 1, but it is 1\.5"),
        ({"device": "gpu"}, "the device must be one of .* but it is 'gpu'"),
        ({"recipe": "ablation"}, "ablate: recipe must be a Recipe such as .* but it is 'ablation'"),
        ({"cells": CELLS[0]}, "ablate: cells must be a list of Cell, but one of them is 'weight 0'"),
    ],
)
def test_errors(recipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ablate(**{"recipe": recipe, "out": tmp_path / "out", "cells": CELLS, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["", " ", " weight 3", "weight 3 ", "two\nlines", "tab\there", "a|b", "real images", "\u2028", "\ud800", None, 3],
)
def test_names_that_break_tables_are_refused(recipe, tmp_path, name):
    message = f"ablate: the name of a cell must be one line .* and not 'real images', but it is {re.escape(repr(name))}"
    with pytest.raises(ValueError, match=message):
        ablate(recipe, tmp_path / "out", cells=[Cell(name, CELLS[0].fields)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../escape", "/tmp/escape", "C:\\escape", "~", "$x^$ & <b> `y`", "caf\u00e9"])
def test_other_names_stay_in_the_folder_and_are_shown(tmp_path, name):
    folder = grid_of(tmp_path / "out").cell_folder(name, 0)
    assert folder.resolve().parent.parent == (tmp_path / "out" / "cells").resolve()
    content = summarize({name: [{"words": [0.5]}]}, (0,), PAIRS)
    assert f"| {name} | 50.0 |" in as_markdown(content)
    tables.draw(content, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"glam": {"redescription_wieght": 1}}, "unknown field 'glam.redescription_wieght'; did you mean"),
        ({"glam": {"redescription_weight": -1.0}}, "redescription_weight must be 0 or more"),
        (None, "must be an object of named fields, but it is None"),
        ({"seed": 7}, "ablate: cell 'other' overrides seed, which all cells share; set it in the recipe"),
        (
            {"stem": {"steps": 7}, "data": {"min_count": 2}},
            "ablate: cell 'other' overrides data, stem, which all cells share",
        ),
        ({"evaluation": {"candidates": 7}}, "ablate: cell 'other' overrides evaluation"),
    ],
)
def test_unsuitable_fields_of_a_cell_are_refused(recipe, tmp_path, fields, message):
    """The shared phases would ignore them, or the cells would be compared by different measures."""
    with pytest.raises(ValueError, match=message):
        ablate(recipe, tmp_path / "out", cells=[Cell("other", fields)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("one", "other", "folder"),
    [
        ("kl 2", "kl 2", "kl-2"),
        ("kl 2", "KL 2", "kl-2"),
        ("kl: 2", "kl? 2", "kl--2"),
        ("weight, 1", "another", "weight-1"),
        ("kl/2", "kl?2", "kl-2"),
        ("caf\u00e9", "cafe\u0301", "caf\u00e9"),
        (".", "..", "_"),
        ("x" * 80, "x" * 81, "x" * 80),
        ("Weight 20", "another", "weight-20"),
    ],
)
def test_cells_that_would_share_a_folder_are_refused(recipe, tmp_path, one, other, folder):
    """On some systems names ignore case, or the form of accents, and not all characters are allowed."""
    cells = [Cell(name, CELLS[0].fields) for name in (one, other)]
    if other == "another":
        # The tables also list the paper's cells.
        other = folder.replace("-", " ")
    with pytest.raises(
        ValueError, match=re.escape(f"ablate: the cells {one!r} and {other!r} would have the same folder")
    ):
        ablate(recipe, tmp_path / "out", cells=cells)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_fill_one_folder(recipe, tmp_path, without_processes):
    out = tmp_path / "out"
    with RunFolder(out).locked(), pytest.raises(ValueError, match="out is being trained by another process; wait"):
        ablate(recipe, out, cells=CELLS[:1], seeds=(0,))
    assert not without_processes
    # What the lock leaves behind is no reason to refuse the folder.
    ablate(recipe, out, cells=CELLS[:1], seeds=(0,))
    assert without_processes


def test_a_cell_of_the_paper_may_be_replaced(recipe, tmp_path, without_processes):
    cell = Cell("weight 0", {"glam": {"redescription_weight": 0.0, "redescription_ratio": None, "steps": 2}})
    content = ablate(recipe, tmp_path / "out", cells=[cell], seeds=(0,))
    assert content["cells"] == {"weight 0": cell.fields}


def test_the_folders_of_the_paper_s_cells_keep_their_names():
    """Finished cells of earlier versions are reused."""
    folders = [grid_of(Path("out")).cell_folder(cell.name, 3).as_posix() for cell in ablation_cells()]
    assert folders[0] == "out/cells/word-attention-weight-0/seed-3"
    assert folders[-1] == "out/cells/matching-ratio-0.5/seed-3"
    assert len(set(folders)) == 25


def test_the_start_and_the_end_of_each_process_are_printed(capfd):
    tasks = {name: (f"from {name}",) for name in ("phases stem, seed 0", "cell 'weight 0', seed 3")}
    grid.in_processes(print, tasks, 1, title="cells", command="ablate")
    captured = capfd.readouterr()
    assert captured.out.splitlines() == [f"from {name}" for name in tasks]
    lines = [re.sub(r"\d+ min \d+ s", "T", line) for line in captured.err.splitlines()]
    assert lines == [
        "phases stem, seed 0 (1 of 2): starts",
        "phases stem, seed 0 (1 of 2): finished after T",
        "cell 'weight 0', seed 3 (2 of 2): starts",
        "cell 'weight 0', seed 3 (2 of 2): finished after T",
    ]


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_process_has_the_threads_of_those_that_are_not_started(capfd, tasks):
    code = "import torch; print(torch.get_num_threads())"
    with cpu_threads(6):
        grid.in_processes(exec, {f"task {i}": (code,) for i in range(tasks)}, 3, title="cells", command="ablate")
    assert capfd.readouterr().out.split() == [str(6 // tasks)] * tasks


def test_the_processes_are_named_and_divide_the_threads(recipe, tmp_path, monkeypatch):
    started = {}

    def record(function, tasks, jobs, *, title, command):
        started.update(tasks)
        threads.append(torch.get_num_threads())
        run_tasks(function, tasks, jobs, title=title, command=command)

    threads = []
    run_here(monkeypatch)
    run_tasks = grid.in_processes
    monkeypatch.setattr(grid, "in_processes", record)
    engine = dataclasses.replace(recipe.engine, threads=3)
    ablate(dataclasses.replace(recipe, engine=engine), tmp_path / "out", cells=CELLS[:1], seeds=(0, 3))
    phases = "phases stem, stream, evaluator"
    assert list(started) == [
        f"{phases}, seed 0",
        f"{phases}, seed 3",
        "cell 'weight 0', seed 0",
        "cell 'weight 0', seed 3",
    ]
    assert threads == [3, 3]
    assert torch.get_num_threads() == 1
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["recipe"]["engine"]["threads"], content["versions"]["machine"][-11:]) == (3, ", 3 threads")
    # Each process sets its own share.
    assert all(task[-2].shared.engine.threads is None for task in started.values())
    assert {task[0].recipe.engine.threads for task in started.values() if isinstance(task[0], GridCell)} == {None}


def test_options_of_a_part_that_a_cell_turns_off_are_reset():
    base = get_recipe("ablation")
    model = dataclasses.replace(base.model, sentence_axis="positions")
    glam = dataclasses.replace(base.glam, redescription_reduction="sentence")
    recipes = {
        cell.name: Recipe.from_dict(cell.fields, dataclasses.replace(base, model=model, glam=glam))
        for cell in ablation_cells()
    }
    assert recipes["word attention, weight 1"].model.sentence_axis == "channels"
    assert recipes["word attention, weight 1"].glam.redescription_reduction == "sentence"
    assert recipes["weight 0"].model.sentence_axis == "positions"
    assert recipes["weight 0"].glam.redescription_reduction == "word"


def test_few_validation_images_lower_the_number_of_candidates(recipe, tmp_path, without_processes, capsys):
    few = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, validation_images=5))
    content = ablate(few, tmp_path / "out", cells=CELLS[:1], seeds=(0,))
    assert "R-precision among 5 captions instead of evaluation.candidates=11" in capsys.readouterr().err
    assert 0 <= content["figures"]["weight 0"]["r_precision"]["mean"] <= 1


def test_a_failed_process_is_reported(recipe, tmp_path, capfd):
    """The shared phases of the cell are missing."""
    with pytest.raises(
        TrainingError, match=r"a process of `ablate` exited with status 1; .* repeat the command to continue"
    ):
        grid.in_processes(
            run_cell,
            {"cell": (GridCell("weight 0", recipe), grid_of(tmp_path, recipe), 0)},
            1,
            title="cells",
            command="ablate",
        )
    assert "mirror-modules ablate: FileNotFoundError" in capfd.readouterr().err


def test_a_process_that_cannot_start_is_reported(tmp_path):
    """The process is not terminated, which would hide the reason."""

    def not_importable():
        pass

    with pytest.raises((AttributeError, pickle.PicklingError), match="not_importable"):
        grid.in_processes(not_importable, {"task": ()}, 1, title="cells", command="ablate")


def test_a_script_without_a_guard_gets_pythons_explanation(tmp_path):
    call = "in_processes(print, {'task': ()}, 1, title='cells', command='ablate')"
    script = f"from mirror_modules.evaluation.processes import in_processes\n{call}\n"
    (tmp_path / "start.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "start.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr
    assert "AttributeError" not in done.stderr
    assert "a process of `ablate` exited with status 1" in done.stderr


def test_child_processes_end_when_their_parent_is_killed(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(300)"
    call = f"in_processes(exec, {{'task': ({code!r},)}}, 1, title='processes', command='ablate')"
    start = f"from mirror_modules.evaluation.processes import in_processes; {call}"
    guarded = f"if __name__ == '__main__':\n    {start}\n"
    (tmp_path / "start.py").write_text(guarded, encoding="utf-8")
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen([sys.executable, tmp_path / "start.py"], stderr=log)
    try:
        wait_for(lambda: parent.poll() is not None or (pid.exists() and pid.read_text()))
        assert parent.poll() is None, (tmp_path / "log").read_text()
    finally:
        parent.kill()
        parent.wait()
    child = int(pid.read_text())
    wait_for(lambda: not is_running(child))


def is_running(pid):
    try:
        # A process that has ended is a zombie, Z, until its parent has noticed.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_summaries_average_over_seeds_and_pairs():
    results = {
        "weight 0": [{"r_precision": [0.0, 0.5]}, {"r_precision": [0.5, 0.5]}],
        "weight 1": [{"r_precision": [0.5, 0.5]}, {"r_precision": [1.0, 0.5]}],
    }
    content = summarize(results, (4, 5), PAIRS)
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
    table = as_markdown(summarize(single_values, (4,), PAIRS))
    assert "| weight 0 | 50.0 |" in table
    assert "| weight 1 | weight 0 | +0.0 |" in table


HELD_OUT = ("r_precision", "r_precision_other_classes", "held_out_r_precision", "held_out_r_precision_other_classes")


def test_photographs_are_measured_on_both_kinds_of_classes(tmp_path, monkeypatch):
    """And by two evaluators, if the recipe has a second one."""
    root, base = tmp_path / "data", make_recipe()
    make_birds(root, training=29, validation=23)
    data = DataRecipe("birds", str(root), None, None, held_out_share=0.4)
    recipe = dataclasses.replace(base, data=data, second_evaluator=dataclasses.replace(base.evaluator, steps=2))
    run_here(monkeypatch)
    content = ablate(recipe, tmp_path / "out", cells=CELLS, seeds=(0,))
    names = [*HELD_OUT, *(f"second_{name}" for name in HELD_OUT)]
    assert set(content["figures"]["weight 0"]) == {*names, "words"}
    counts = {
        name: len(values) for name, values in json.loads((tmp_path / "out/shared/seed-0/real.json").read_text()).items()
    }
    assert counts["r_precision"] == counts["second_r_precision_other_classes"] == 23
    assert counts["held_out_r_precision"] == 11
    for name in names:
        with_classes = set() if name.endswith("other_classes") else {"class_oracle", "own_class", "own_class_error"}
        assert set(content["bounds"][name]) == {"chance", "text_ceiling"} | with_classes
    splits = load_splits(recipe.data, recipe.model, 0)
    oracle = class_oracle(splits.held_out.class_ids, candidates=11).mean()
    assert content["bounds"]["second_held_out_r_precision"]["class_oracle"] == pytest.approx(float(oracle))
    # The two evaluators were trained with their own weights.
    real = content["figures"]["real images"]
    assert real["r_precision"]["mean"] != real["second_r_precision"]["mean"]
    table = (tmp_path / "out/ablation.md").read_text()
    assert "R-precision, top 1, training classes, among other classes, second evaluator" not in table
    assert "R-precision, top 1, second evaluator, training classes, among other classes" in table
    assert "| class alone | " in table


@pytest.mark.parametrize("content", [[], {}, {"r_precision": {}}, {"r_precision": {"chance": "1"}}])
def test_damaged_bounds_are_named(out, recipe, without_processes, content):
    (out / "shared/seed-0/bounds.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"bounds\.json is damaged: it must hold the bounds of each R-precision; remove"
    ):
        ablate(recipe, out, cells=CELLS[:1], seeds=(0,))


def test_lost_bounds_are_measured_again(out, recipe, without_processes):
    path = out / "shared/seed-0/bounds.json"
    before = path.read_bytes()
    path.unlink()
    ablate(recipe, out, cells=CELLS[:1], seeds=(0,))
    assert path.read_bytes() == before


def test_columns_that_cannot_rank_have_footnotes():
    """Not those that can; the worst cell counts for generated images."""
    results = {
        "real images": [{"r_precision": [0.2, 0.3] * 50, "held_out_r_precision": [0.2, 0.3] * 50}] * 2,
        "weight 0": [{"r_precision": [0.1] * 100, "held_out_r_precision": [0.1] * 100}] * 2,
        "weight 1": [{"r_precision": [0.1] * 100, "held_out_r_precision": [0.9] * 100}] * 2,
    }
    bounds = {name: {"chance": 0.01, "class_oracle": 0.1} for name in results["weight 0"][0]}
    found = unrankable(results, bounds)
    # The standard error of the mean over 100 captions and two seeds: 0.05 / sqrt(99) / sqrt(2).
    assert found == {
        "held_out_r_precision": ["real images, at 25.0% ± 0.4, are below generated ones, at 90.0%"],
    }
    table = as_markdown({**summarize(results, (0, 1), PAIRS), "bounds": bounds, "cannot_rank": found})
    assert "| | R-precision, top 1 | R-precision, top 1, training classes [1] |" in table
    assert "| class alone | 10.0 | 10.0 |\n| chance | 1.0 | 1.0 |\n\n[1] Cannot rank these images: real" in table
    assert "at 90.0%. Differences in this column have no meaning." in table
    assert unrankable({"real images": results["real images"]}, bounds) == {}
    # Not above the class alone, unless captions of the same class are told apart.
    higher = {"r_precision": {"chance": 0.01, "class_oracle": 0.3}}
    assert "knows the class alone, at 30.0%" in unrankable(results, higher)["r_precision"][0]
    for share, expected in ((0.6, {}), (0.51, {"r_precision"})):
        within = {"r_precision": {**higher["r_precision"], "own_class": share, "own_class_error": 0.01}}
        assert unrankable(results, within).keys() == set(expected)


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
    monkeypatch.setattr(tables, "RESAMPLES", 500)
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(60):
        seeds = rng.normal(size=12)
        low, high = bootstrap_interval([mean + rng.normal(size=20) for mean in seeds], seed=i)
        covered += low <= 0 <= high
    assert covered >= 51
