"""Runs that share the phases before the generator: the machinery of `ablate` and `compare`.

The shared phases are trained once per seed. A cell differs in its generator; its run folder is like any other. Each
cell is trained once per seed, each time in its own process, and resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules._files import file_name, read_json, write_json, write_whole
from mirror_modules.data import attributes_named, measured_box, to_bytes, to_float
from mirror_modules.evaluation.attributes import AttributeClassifier, fit_attribute_classifier, predict_attributes
from mirror_modules.evaluation.processes import in_processes
from mirror_modules.evaluation.retrieval import (
    Candidates,
    Evaluator,
    RankedSplit,
    bounds,
    candidate_sets,
    expected_precision,
    load_evaluators,
    own_class,
    ranked_splits,
    text_queries,
)
from mirror_modules.evaluation.samples import draw_samples, write_samples
from mirror_modules.evaluation.tables import REAL, r_precision_name, summarize, unrankable
from mirror_modules.metrics import box_overlap
from mirror_modules.models import TextToImage, build_model
from mirror_modules.models.pretrained import load_weights
from mirror_modules.training.batches import Splits, has_classes, load_splits, usable_candidates
from mirror_modules.training.distributed import cpu_threads
from mirror_modules.training.folder import FORMAT, LOCK, RunFolder, versions, with_article
from mirror_modules.training.loop import train
from mirror_modules.training.plan import make_plan
from mirror_modules.training.recipes import Recipe, differences
from mirror_modules.training.validation import (
    Unseen,
    WordAccuracy,
    generate_images,
    image_features,
    predict_words,
    sentence_features,
)

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
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{command}: seeds must be one or more distinct numbers, but they are {list(seeds)}.")
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
            process is training in it; or `jobs` is out of range.
        TrainingError: A process failed.
    """
    check_positive(grid.command, jobs=jobs)
    grid.check_folder()
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
    results = _read_results(files)
    content = summarize(results, seeds, pairs)
    content["bounds"] = _mean_bounds([grid.shared_folder(seed) / BOUNDS for seed in seeds], results[REAL][0])
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
    """Train the phases that all cells of a seed share, and measure the real images as their ceiling.

    bounds.json gets the R-precision of a random ranking, of one who knows the class alone, and of other captions of the
    same image, for each R-precision of `measure`.
    """
    run, recipe, device = RunFolder(grid.shared_folder(seed)), dataclasses.replace(grid.shared, seed=seed), grid.device
    run.path.mkdir(parents=True, exist_ok=True)
    train(recipe, run.path, phases=grid.shared_phases, device=device, resume=True)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    write_samples(run.path / SAMPLES, splits, recipe.model.max_words, None, seed)
    found = {
        metric: {**bounds(split, candidates), **_measured_bounds(evaluator, split, candidates)}
        for metric, evaluator, split, candidates in _rankings(recipe, run, splits, device)
    }
    write_json(run.path / BOUNDS, found)
    write_json(run.path / REAL_RESULT, measure(recipe, run, splits, device, _attribute_classifier(grid), None))


def _attribute_classifier(grid: Grid) -> AttributeClassifier | None:
    if grid.shared.data.source != "synthetic-flowers" or grid.shared.data.scatter:
        return None
    return fit_attribute_classifier(grid.out / "attributes.safetensors", grid.shared.model.resolutions[-1])


def measure(
    recipe: Recipe,
    folder: RunFolder,
    splits: Splits,
    device: str,
    classifier: AttributeClassifier | None,
    model: TextToImage | None,
) -> dict[str, list[float]]:
    """Metrics per validation caption, in [0, 1]: `{"r_precision": [...], ...}`.

    `r_precision` is the expected top-1 precision by the encoder pair of phase `evaluator`. With classes there are also
    `r_precision_other_classes`, among candidates of other classes only, and `held_out_r_precision`, on images of
    training classes held out from all training; and with a second evaluator the same ones, as `second_r_precision`.
    `attributes` is the share of the attributes in the caption that the attribute classifier predicts for the image;
    `colors` is the same share for the two colors measured in the pixels. Of scattered flowers, there is `box_overlap`,
    of the measured box with that of the caption's real image, in place of `attributes`. `words` holds a single value,
    the captioner's word accuracy over the split.

    Args:
        recipe: The recipe of the run.
        folder: The run that holds the weights of phases `stream` and `evaluator`.
        splits: The data of the recipe.
        device: "cpu" or "cuda".
        classifier: The attribute classifier of drawn flowers; None if the data have no attributes, or flowers are
            scattered.
        model: Generates the images; None evaluates the real images instead.
    """
    captioner = build_model(recipe.model, splits.vocabulary).captioner
    load_weights(captioner, folder.weights("stream"))
    captioner.to(device).eval()
    rankings = _rankings(recipe, folder, splits, device)
    pairs = {evaluator.phase: evaluator.pair for _, evaluator, _, _ in rankings}

    def measure_images(part: Unseen, rows: Tensor, *, features_only: bool) -> dict[str, Any]:
        images = (
            to_float(part.images)
            if model is None
            else generate_images(model, part.tokens, part.word_mask, recipe.seed, part.location(model), rows)
        )
        features = {phase: image_features(pair, images) for phase, pair in pairs.items()}
        if features_only:
            return {"features": features}
        found: dict[str, Any] = {"features": features}
        found["predicted"] = predict_words(captioner, images, part.tokens, part.word_mask)
        if recipe.data.scatter:
            found["boxes"] = measured_box(to_bytes(images))
        if recipe.data.scatter or classifier is not None:
            found |= predict_attributes(images, classifier, found.get("boxes"))
        return found

    # By split: all sets of candidates are ranked by the same features.
    unseen = {split.name: split.unseen for _, _, split, _ in rankings}
    measured = {
        name: each.in_chunks(partial(measure_images, features_only=name != "validation"))
        for name, each in unseen.items()
    }
    metrics: dict[str, list[float]] = {}
    for metric, evaluator, split, candidates in rankings:
        sentences = sentence_features(evaluator.pair, split.unseen.tokens, split.unseen.word_mask)
        features = measured[split.name]["features"][evaluator.phase]
        metrics[metric] = expected_precision(features, sentences, candidates).tolist()
    validation = measured["validation"]
    metrics["words"] = [WordAccuracy.of(validation["predicted"]).accuracy]
    named = [attributes_named(caption) for caption in unseen["validation"].captions]
    for metric, method in (("attributes", "classifier"), ("colors", "measured_colors")):
        if method in validation:
            metrics[metric] = _shares_correct(validation[method], named)
    boxes = unseen["validation"].boxes
    if "boxes" in validation and boxes is not None:
        metrics["box_overlap"] = box_overlap(validation["boxes"], boxes).tolist()
    return metrics


def _rankings(
    recipe: Recipe, folder: RunFolder, splits: Splits, device: str
) -> list[tuple[str, Evaluator, RankedSplit, Candidates]]:
    """The name of each R-precision of `measure`, with who ranks which captions among which candidates."""
    usable_candidates(recipe.evaluation.candidates, splits)
    return [
        (r_precision_name(evaluator.phase, split.name, candidates.name), evaluator, split, candidates)
        for evaluator in load_evaluators(folder, recipe, splits, device)
        for split in ranked_splits(splits, recipe.model.max_words)
        for candidates in candidate_sets(split.unseen.class_ids, recipe.evaluation.candidates)
        if candidates.size >= 2
    ]


def _measured_bounds(evaluator: Evaluator, split: RankedSplit, candidates: Candidates) -> dict[str, float]:
    """What other captions of the same image retrieve; and with classes how real images rank captions of their class."""
    unseen, found = split.unseen, {}
    sentences = sentence_features(evaluator.pair, unseen.tokens, unseen.word_mask)
    queries = text_queries(evaluator.pair, split)
    if queries is not None:
        precision = expected_precision(queries, sentences.to(queries.dtype), candidates)
        found["text_ceiling"] = float(precision.mean())
    if candidates.class_ids is None and has_classes(unseen.class_ids):
        features = unseen.in_chunks(lambda part, rows: image_features(evaluator.pair, part.images))
        within = own_class(features, sentences, unseen.class_ids)
        found |= {"own_class": within.share, "own_class_error": within.standard_error}
    return found


def _mean_bounds(paths: Sequence[Path], metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The means over seeds of what `train_shared` wrote to bounds.json.

    Raises:
        ValueError: A file holds something else.
    """
    files = [read_json(path) for path in paths]
    names = [name for name in metrics if "r_precision" in name]
    for path, content in zip(paths, files):
        if not isinstance(content, dict) or not all(
            _are_bounds(content.get(name), files[0].get(name)) for name in names
        ):
            raise ValueError(
                f"{path} is damaged: it must hold the bounds of each R-precision; remove it and repeat the command, "
                "which measures them again."
            )
    return {
        name: {key: sum(each[name][key] for each in files) / len(files) for key in files[0][name]} for name in names
    }


def _are_bounds(values: Any, first: Any) -> bool:
    return (
        isinstance(values, dict)
        and isinstance(first, dict)
        and "chance" in values
        and values.keys() == first.keys()
        and all(type(value) in (int, float) and 0 <= value <= 1 for value in values.values())
    )


def _shares_correct(predicted: Mapping[str, Sequence[str]], named: Sequence[Mapping[str, str]]) -> list[float]:
    """For each caption, the share of its attributes, among the predicted ones, that match the prediction."""
    shares = []
    for i, attributes in enumerate(named):
        correct = [predicted[name][i] == value for name, value in attributes.items() if name in predicted]
        # Never empty: every caption names the color of the petals.
        shares.append(sum(correct) / len(correct))
    return shares


def _read_results(files: Mapping[str, Sequence[Path]]) -> dict[str, list[dict[str, list[float]]]]:
    """Read what `measure` returned, for each cell and seed.

    Raises:
        ValueError: A file holds something else, or metrics of other captions than those of the real images.
    """
    results = {name: [read_json(path) for path in paths] for name, paths in files.items()}
    counts = {name: [_count_values(metrics) for metrics in row] for name, row in results.items()}
    metrics_of_all = set(counts[REAL][0] or ())
    for name in (REAL, *files):
        for path, count, real_count in zip(files[name], counts[name], counts[REAL]):
            if count is None or count != real_count or count.keys() != metrics_of_all:
                raise ValueError(
                    f"{path} is damaged: it must hold the metrics of a run, each as a list of numbers, and the same "
                    "ones for every run; remove it and repeat the command, which measures this run again."
                )
    return results


def _count_values(metrics: Any) -> dict[str, int] | None:
    """The number of values of each metric; None if these are no metrics."""
    if not isinstance(metrics, dict) or not {"r_precision", "words"} <= metrics.keys():
        return None
    for values in metrics.values():
        if not isinstance(values, list) or not values:
            return None
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            return None
    return {name: len(values) for name, values in metrics.items()}


def folder_name(name: str) -> str:
    """The name of a cell's folder."""
    return file_name(name.replace(", ", "-").replace(" ", "-"))


def _without_threads(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, threads=None))
