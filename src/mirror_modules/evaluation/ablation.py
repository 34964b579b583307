"""Ablation of the generator's objective: the same data, seeds and steps, with one setting changed at a time.

A cell is one setting of the generator's objective and attention; see `grid` for what the cells share, and how they are
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mirror_modules._files import as_folder, write_json, write_text
from mirror_modules.evaluation.grid import (
    Grid,
    GridCell,
    check_folders,
    check_name,
    check_seeds,
    collect,
    draw_sheet,
    fill,
)
from mirror_modules.evaluation.tables import as_markdown, draw
from mirror_modules.models import MirrorGANConfig
from mirror_modules.training.distributed import resolve_device
from mirror_modules.training.recipes import ALL_PHASES, AdversarialRecipe, Recipe

# Fields of the recipe on which the shared phases and the evaluation depend; a cell cannot override them.
SHARED_FIELDS = ("seed", "data", *(phase for phase in ALL_PHASES if phase != "glam"), "evaluation")

# Each cell and the baseline that it is compared with; the two differ in one setting.
PAIRS = (
    ("weight 0", "word attention, weight 0"),
    ("weight 1", "word attention, weight 1"),
    *((f"weight {weight}", "weight 0") for weight in (1, 5, 10, 20)),
    *((f"no mismatched pairs, weight {weight}", "no mismatched pairs, weight 0") for weight in (1, 5, 10, 20)),
    *((f"no mismatched pairs, weight {weight}", f"weight {weight}") for weight in (0, 20)),
    *((f"ratio {ratio}", "weight 0") for ratio in ("0.1", "0.25", "0.5", "1")),
    ("ratio 0.25", "weight 1"),
    ("no mismatched pairs, ratio 0.25", "no mismatched pairs, weight 0"),
    *((f"word attention, ratio {ratio}", "word attention, weight 0") for ratio in ("0.25", "0.5")),
    *((f"ratio {ratio}", f"word attention, ratio {ratio}") for ratio in ("0.25", "0.5")),
    *(
        (f"{side}matching, ratio {ratio}", f"{side}matching, weight 0")
        for side in ("", "word attention, ")
        for ratio in ("0.25", "0.5")
    ),
    *(
        (f"{side}matching, {setting}", f"{side}{setting}")
        for side in ("", "word attention, ")
        for setting in ("weight 0", "ratio 0.25", "ratio 0.5")
    ),
    *((f"matching, {each}", f"word attention, matching, {each}") for each in ("weight 0", "ratio 0.25", "ratio 0.5")),
)
# Gradient ratio of the matching loss in the cells that have it.
MATCHING_RATIO = 0.5


class Cell(NamedTuple):
    """One setting of the ablation."""

    name: str
    """Shown in the tables: one line without "|". The name of the cell's folder is derived from it."""
    fields: dict[str, Any]
    """Recipe fields that the cell overrides, in the form that `Recipe.from_dict` accepts: those of the generator's
    training (`glam`, `model`, `engine`, `logging`). The other ones are shared."""


def ablation_cells() -> list[Cell]:
    """The paper's ablation (Sec. 4.2), with and without mismatched pairs, plus balanced gradients and a matching loss.

    Word attention alone or with sentence attention; weights of the redescription loss from 0 to 20; balanced gradients
    in place of a weight (see `AdversarialRecipe.redescription_ratio`); and these with the matching loss of AttnGAN,
    balanced with a ratio of 0.5 (see `AdversarialRecipe.matching_ratio`).

    Examples:
        >>> from mirror_modules.evaluation import ablation_cells
        >>> [cell.name for cell in ablation_cells()][:3]
        ['word attention, weight 0', 'word attention, weight 1', 'weight 0']
    """
    cells = [
        Cell("word attention, weight 0", _fields(0.0, attention="word")),
        Cell("word attention, weight 1", _fields(1.0, attention="word")),
    ]
    for mismatched in (True, False):
        side = "" if mismatched else "no mismatched pairs, "
        cells += [
            Cell(f"{side}weight {weight:g}", _fields(weight, mismatched=mismatched))
            for weight in (0.0, 1.0, 5.0, 10.0, 20.0)
        ]
    cells += [Cell(f"ratio {ratio:g}", _fields(None, ratio)) for ratio in (0.1, 0.25, 0.5, 1.0)]
    cells += [Cell(f"word attention, ratio {ratio:g}", _fields(None, ratio, attention="word")) for ratio in (0.25, 0.5)]
    cells.append(Cell("no mismatched pairs, ratio 0.25", _fields(None, 0.25, mismatched=False)))
    for attention in ("word", "global-local"):
        side = "word attention, " if attention == "word" else ""
        cells.append(Cell(f"{side}matching, weight 0", _fields(0.0, attention=attention, matching=True)))
        cells += [
            Cell(f"{side}matching, ratio {ratio:g}", _fields(None, ratio, attention=attention, matching=True))
            for ratio in (0.25, 0.5)
        ]
    return cells


def _fields(
    weight: float | None,
    ratio: float | None = None,
    *,
    mismatched: bool = True,
    attention: str = "global-local",
    matching: bool = False,
) -> dict[str, Any]:
    glam: dict[str, Any] = {
        "redescription_weight": weight,
        "redescription_ratio": ratio,
        "matching_weight": 0.0,
        "matching_ratio": MATCHING_RATIO if matching else None,
        "mismatched_pairs": mismatched,
    }
    model: dict[str, Any] = {"attention": attention}
    # A recipe refuses options that have no effect; those of a part that the cell turns off get their defaults.
    if weight == 0:
        glam["redescription_reduction"] = AdversarialRecipe.redescription_reduction
    if ratio is None and not matching:
        glam["fine_ratios"] = AdversarialRecipe.fine_ratios
    if attention == "word":
        model |= {"sentence_axis": MirrorGANConfig.sentence_axis, "sentence_noise": MirrorGANConfig.sentence_noise}
    return {"model": model, "glam": glam}


def ablate(
    recipe: Recipe,
    out: str | Path,
    *,
    cells: Sequence[Cell],
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train and evaluate every cell with every seed; write ablation.json, .md and .png, and samples.png.

    Each cell is trained in a process of its own, which imports the main module again: call this function below
    `if __name__ == "__main__":` in a script.

    Args:
        recipe: The settings that all cells share.
        out: The folder of the ablation. Finished cells in it are reused if their settings are the same, and trained
            further if `glam.steps` is larger now.
        cells: The settings to compare; `ablation_cells` lists those of the paper. The tables also include the paper's
            other cells that earlier calls finished with the same settings and steps.
        seeds: Each seed determines the data, initial weights and noise of one run per cell.
        jobs: Number of processes that train at the same time; they divide the CPU threads among them.
        device: "cpu", "cuda" or "auto", which uses a GPU if there is one.

    Returns:
        The content of ablation.json.

    Raises:
        ValueError: The folder holds an ablation of another recipe, a cell with other settings or more steps, or a
            damaged file, or another process is training in it; an argument is out of range; a cell has an unsuitable
            name or overrides a shared field; or two cells have the same name, or names that would share a folder.
        TrainingError: A process failed.

    Examples:
        >>> from mirror_modules.evaluation import ablate
        >>> from mirror_modules.evaluation import ablation_cells
        >>> from mirror_modules.training import get_recipe
        >>> cells = [cell for cell in ablation_cells() if cell.name in ("weight 0", "ratio 0.25")]
        >>> content = ablate(get_recipe("ablation"), "runs/ablation", cells=cells, jobs=2)  # doctest: +SKIP
        >>> content["figures"]["ratio 0.25"]["r_precision"]["mean"]  # doctest: +SKIP
        0.698
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"ablate: recipe must be a Recipe such as get_recipe('ablation'), but it is {recipe!r}.")
    check_seeds("ablate", seeds, recipe)
    grid = Grid("ablate", "ablation", "cell", as_folder("ablate: out (--out)", out), recipe, resolve_device(device))
    _check_cells(cells, recipe)
    chosen = [GridCell(cell.name, Recipe.from_dict(cell.fields, recipe)) for cell in cells]
    fill(grid, chosen, seeds, jobs)
    known = {cell.name: cell for cell in [*ablation_cells(), *cells]}
    shown = {cell.name: cell.fields for cell in known.values() if cell in cells or _was_finished(cell, grid, seeds)}
    content = {**collect(grid, list(shown), seeds, PAIRS), "cells": shown}
    write_json(grid.out / "ablation.json", content)
    write_text(grid.out / "ablation.md", as_markdown(content))
    draw(content, grid.out / "ablation.png")
    draw_sheet(grid, list(shown), seeds[0])
    return content


def _check_cells(cells: Sequence[Cell], recipe: Recipe) -> None:
    """Require names for tables, valid fields, and folders that no other cell has.

    Raises:
        ValueError: A name or a field is unsuitable; or two cells have the same name, or names that would share a
            folder.
    """
    for cell in cells:
        if not isinstance(cell, Cell):
            raise ValueError(f"ablate: cells must be a list of Cell, but one of them is {cell!r}.")
        check_name("ablate", "cell", cell.name)
        Recipe.from_dict(cell.fields, recipe)
        if shared := [field for field in SHARED_FIELDS if field in cell.fields]:
            raise ValueError(
                f"ablate: cell {cell.name!r} overrides {', '.join(shared)}, which all cells share; set it in the "
                "recipe."
            )
    names = [cell.name for cell in cells]
    check_folders("ablate", "cell", [*names, *(cell.name for cell in ablation_cells() if cell.name not in names)])


def _was_finished(cell: Cell, grid: Grid, seeds: Sequence[int]) -> bool:
    """Whether earlier calls finished a cell with these settings and seeds."""
    try:
        recipe = Recipe.from_dict(cell.fields, grid.shared)
        return all(grid.is_finished(GridCell(cell.name, recipe), seed) for seed in seeds)
    except ValueError:
        return False
