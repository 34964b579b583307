"""Runs that share the phases before the generator: the machinery of `ablate` and `compare`.

The shared phases are trained once per seed. A cell differs in its generator; its run folder is like any other. Each
cell is trained once per seed, each time in its own process, and resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirror_modules._checks import check_positive
from mirror_modules._files import as_folder, file_name, read_json, write_json, write_whole
from mirror_modules.evaluation.attributes import AttributeClassifier, fit_attribute_classifier
from mirror_modules.evaluation.processes import in_processes
from mirror_modules.evaluation.results import measure, measure_bounds, read_mean_bounds, read_results
from mirror_modules.evaluation.samples import draw_samples, write_samples
from mirror_modules.evaluation.tables import REAL, summarize, unrankable
from mirror_modules.models import TextToImage
from mirror_modules.training.batches import load_splits, open_splits
from mirror_modules.training.distributed import cpu_threads
from mirror_modules.training.folder import FORMAT, LOCK, RunFolder, versions, with_article
from mirror_modules.training.loop import train
from mirror_modules.training.plan import make_plan
from mirror_modules.training.recipes import Recipe, differences

RESULT, REAL_RESULT, BOUNDS, SAMPLES = "result.json", "real.json", "bounds.json", "samples.npz"


class GridCell(NamedTuple):
    """A row of the tables: trained once per seed."""

    name: str
    """Shown in the tables. The name of the cell's folder is derived from it."""
    recipe: Recipe
    """Its settings; the seed is replaced."""


class Trained(NamedTuple):
    """A cell with one seed, ready to be measured."""

    run: RunFolder
    recipe: Recipe
    model: TextToImage
    """In evaluation mode."""
    is_new: bool
    """Whether this process has trained the cell, or else only measures it."""


@dataclass(frozen=True)
class Grid:
    """The folder of all runs, and what they share.

    Args:
        command: Command that fills the grid, for messages: "ablate" or "compare".
        kind: What the folder holds, for its config.json: "ablation" or "comparison".
        noun: What a cell is, for messages: "cell" or "recipe".
        out: The folder.
        shared: Recipe of the shared phases: all of its phases but `glam`.
        device: "cpu" or "cuda".
        record: Called with each cell before its images are generated; writes further files into the cell's folder. A
            function of a module, because it is called in other processes.
        files: Files that the folder of a finished cell has: those of `record`, its samples, and result.json.
    """

    command: str
    kind: str
    noun: str
    out: Path
    shared: Recipe
    device: str
    record: Callable[[Trained], None] | None = None
    files: tuple[str, ...] = (SAMPLES, RESULT)

    @property
    def shared_phases(self) -> list[str]:
        """The phases that all cells of a seed share."""
        return [phase for phase in self.shared.phases if phase != "glam"]

    def own_phases(self, recipe: Recipe) -> list[str]:
        """The phases that a cell trains itself."""
        return [phase for phase in recipe.phases if phase not in self.shared_phases]

    def shared_folder(self, seed: int) -> Path:
        """The run folder of the shared phases."""
        return self.out / "shared" / f"seed-{seed}"

    def cell_folder(self, name: str, seed: int) -> Path:
        """The run folder of a cell."""
        return self.out / "cells" / folder_name(name) / f"seed-{seed}"

    def is_finished(self, cell: GridCell, seed: int) -> bool:
        """Whether a cell was trained with these settings for this number of steps, and measured.

        Raises:
            ValueError: Its folder holds other settings or more steps.
        """
        recipe, folder = dataclasses.replace(cell.recipe, seed=seed), RunFolder(self.cell_folder(cell.name, seed))
        try:
            plan = make_plan(recipe, folder, recipe.phases, resume=True)
        except ValueError as error:
            raise ValueError(f"{self.command}: {self.noun} {cell.name!r}: {error}") from error
        trained = all(phase in plan.finished for phase in self.own_phases(recipe))
        return trained and all((folder.path / name).exists() for name in self.files)

    def has_real(self, seed: int) -> bool:
        """Whether the shared phases of a seed are trained, and the real images measured."""
        return all((self.shared_folder(seed) / name).exists() for name in (SAMPLES, BOUNDS, REAL_RESULT))

    def check_folder(self) -> None:
        """Require that the folder is new or empty, or holds a grid of this kind with the same shared recipe.

        Raises:
            ValueError: It holds another one, or something else.
        """
        config, kind = self.out / "config.json", with_article(self.kind)
        if config.exists():
            content = read_json(config)
            if not isinstance(content, dict) or content.get("kind") != self.kind:
                raise ValueError(f"{config} does not belong to {kind}; choose another --out.")
            before = RunFolder(self.out).read_recipe(self.kind)
            changed = [text for text, harmless in differences(before, self.shared) if not harmless]
            if changed:
                raise ValueError(
                    f"{self.out} holds {kind} with other settings ({'; '.join(changed)}); choose another --out, or "
                    "remove it."
                )
        elif self.out.is_dir() and any(path.name != LOCK for path in self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no {self.kind}; choose another --out.")


def check_seeds(command: str, seeds: Sequence[int], recipe: Recipe) -> None:
    """Require one or more distinct seeds that a recipe accepts.

    Raises:
        ValueError: They are not.
    """
    is_list = isinstance(seeds, Sequence) and not isinstance(seeds, str)
    if not is_list or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{command}: seeds must be a list of one or more distinct numbers, but they are {seeds!r}.")
    for seed in seeds:
        # Raises if the seed is out of range.
        dataclasses.replace(recipe, seed=seed)


def check_name(command: str, noun: str, name: Any) -> None:
    """Require a name for tables.

    Raises:
        ValueError: The name is unsuitable.
    """
    is_text = isinstance(name, str) and name.isprintable() and name == name.strip()
    if not is_text or not name or "|" in name or name == REAL:
        raise ValueError(
            f"{command}: the name of a {noun} must be one line of printable characters without '|' and without spaces "
            f"at its ends, and not {REAL!r}, but it is {name!r}."
        )


def check_folders(command: str, noun: str, names: Sequence[str]) -> None:
    """Require folders that no other cell has, also where names ignore case.

    Raises:
        ValueError: Two cells have the same name, or names that would share a folder.
    """
    taken: dict[str, str] = {}
    for name in names:
        folder = unicodedata.normalize("NFC", folder_name(name)).casefold()
        if folder in taken:
            raise ValueError(
                f"{command}: the {noun}s {taken[folder]!r} and {name!r} would have the same folder, {folder!r}; rename "
                "one."
            )
        taken[folder] = name


def fill(grid: Grid, cells: Sequence[GridCell], seeds: Sequence[int], jobs: int) -> None:
    """Train and measure every cell with every seed; finished ones are reused.

    Args:
        grid: The folder, and what the cells share.
        cells: The cells, with different folders.
        seeds: Each seed determines the data, initial weights and noise of one run per cell.
        jobs: Number of processes that train at the same time; they divide the CPU threads among them.

    Raises:
        ValueError: The folder holds a grid of another recipe, a cell with other settings or more steps, or another
            process is training in it; the data are not as expected, or have no places for a system that needs them; or
            `jobs` is out of range.
        TrainingError: A process failed.
    """
    check_positive(grid.command, jobs=jobs)
    grid.check_folder()
    for cell in cells:
        for seed in seeds:
            as_folder(f"{grid.command}: the folder of a {grid.noun}", grid.cell_folder(cell.name, seed))
    for seed in seeds:
        RunFolder(grid.shared_folder(seed)).check(dataclasses.replace(grid.shared, seed=seed))
    # The processes divide the threads among them.
    of_process = dataclasses.replace(grid, shared=_without_threads(grid.shared))
    missing = {
        f"phases {', '.join(grid.shared_phases)}, seed {seed}": (of_process, seed)
        for seed in seeds
        if not grid.has_real(seed)
    }
    unfinished = {
        f"{grid.noun} {cell.name!r}, seed {seed}": (
            cell._replace(recipe=_without_threads(cell.recipe)),
            of_process,
            seed,
        )
        for seed in seeds
        for cell in cells
        if not grid.is_finished(cell, seed)
    }
    if missing or unfinished:
        # Errors in the data come before training, also those that only a system that places its subject has.
        for recipe in {cell.recipe.model.takes_location: cell.recipe for cell in cells}.values():
            if not recipe.data.is_drawn:
                open_splits(recipe.data, recipe.model)
    # The caller may have turned gradients off.
    with (
        RunFolder(grid.out).locked(),
        cpu_threads(grid.shared.engine.threads),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        settings = {"format": FORMAT, "kind": grid.kind, "recipe": grid.shared.to_dict(), "versions": versions()}
        write_json(grid.out / "config.json", settings)
        # Trained before the processes start: each of them would train its own.
        _attribute_classifier(grid)
        in_processes(train_shared, missing, jobs, title="shared phases", command=grid.command)
        in_processes(run_cell, unfinished, jobs, title=f"{grid.noun}s", command=grid.command)


def collect(grid: Grid, names: Sequence[str], seeds: Sequence[int], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Summarize the metrics of finished cells: the fields that the files of all grids have.

    Args:
        grid: The folder.
        names: The cells, in the order of the tables.
        seeds: Seeds with which all of them are finished.
        pairs: Pairs of a cell and its baseline; those with other cells than `names` are left out.

    Raises:
        ValueError: A file is damaged.
    """
    files = {name: [grid.cell_folder(name, seed) / RESULT for seed in seeds] for name in names}
    files[REAL] = [grid.shared_folder(seed) / REAL_RESULT for seed in seeds]
    results = read_results(files)
    content = summarize(results, seeds, pairs)
    content["bounds"] = read_mean_bounds([grid.shared_folder(seed) / BOUNDS for seed in seeds], results[REAL][0])
    content["recipe"] = grid.shared.to_dict()
    content["versions"] = read_json(grid.out / "config.json")["versions"]
    content["cannot_rank"] = unrankable(results, content["bounds"])
    return content


def draw_sheet(grid: Grid, names: Sequence[str], seed: int) -> None:
    """Write samples.png: a few captions, and for each the real image and those of finished cells, of one seed."""
    folders = [grid.shared_folder(seed), *(grid.cell_folder(name, seed) for name in names)]
    draw_samples([folder / SAMPLES for folder in folders], names, grid.out / "samples.png")


def run_cell(cell: GridCell, grid: Grid, seed: int) -> None:
    """Train one cell with one seed, measure it, and write the metrics to its result.json."""
    run, shared = RunFolder(grid.cell_folder(cell.name, seed)), RunFolder(grid.shared_folder(seed))
    recipe = dataclasses.replace(cell.recipe, seed=seed)
    run.check(recipe)
    if not run.config.exists():
        # An existing one is left to `train`, which compares its number of steps first.
        run.begin(recipe)
    for phase in grid.shared_phases:
        if not run.weights(phase).exists():
            run.weights(phase).parent.mkdir(exist_ok=True)
            write_whole(run.weights(phase), partial(shutil.copyfile, shared.weights(phase)))
    phases = grid.own_phases(recipe)
    is_new = bool(make_plan(recipe, run, phases, resume=True).to_train)
    # Those of a finished cell that is trained further.
    for name in grid.files if is_new else (RESULT,):
        (run.path / name).unlink(missing_ok=True)
    # Progress bars of processes that run at the same time would overwrite each other in the terminal.
    with (run.path / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        train(recipe, run.path, phases=phases, device=grid.device, resume=True)
    model = TextToImage.from_pretrained(run.model, device=grid.device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    if grid.record is not None:
        grid.record(Trained(run, recipe, model, is_new))
    write_samples(run.path / SAMPLES, splits, recipe.model.max_words, model, seed)
    write_json(run.path / RESULT, measure(recipe, run, splits, grid.device, _attribute_classifier(grid), model))


def train_shared(grid: Grid, seed: int) -> None:
    """Train the phases that all cells of a seed share; measure the real images as their ceiling, and the bounds."""
    run, recipe, device = RunFolder(grid.shared_folder(seed)), dataclasses.replace(grid.shared, seed=seed), grid.device
    run.path.mkdir(parents=True, exist_ok=True)
    train(recipe, run.path, phases=grid.shared_phases, device=device, resume=True)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    write_samples(run.path / SAMPLES, splits, recipe.model.max_words, None, seed)
    write_json(run.path / BOUNDS, measure_bounds(recipe, run, splits, device))
    write_json(run.path / REAL_RESULT, measure(recipe, run, splits, device, _attribute_classifier(grid), None))


def _attribute_classifier(grid: Grid) -> AttributeClassifier | None:
    if not grid.shared.data.is_drawn or grid.shared.data.scatter:
        return None
    return fit_attribute_classifier(grid.out / "attributes.safetensors", grid.shared.model.resolutions[-1])


def folder_name(name: str) -> str:
    """The name of a cell's folder."""
    return file_name(name.replace(", ", "-").replace(" ", "-"))


def _without_threads(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, threads=None))
