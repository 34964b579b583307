"""Ablation of the generator's objective: the same data, seeds and steps, with one setting changed at a time.

The phases before the generator are trained once per seed and shared by all cells. A cell is one setting of the
generator's objective and attention; its run folder is like any other. Each cell is trained once per seed, each time in
its own process, and resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules._files import file_name, read_json, write_json, write_text, write_whole
from mirror_modules.data import attributes_named, measured_colors, to_bytes, to_float
from mirror_modules.evaluation.ablation_table import REAL, as_markdown, draw, r_precision_name, summarize, unrankable
from mirror_modules.evaluation.attributes import AttributeClassifier, fit_attribute_classifier
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
from mirror_modules.models import MirrorGANConfig, TextToImage, build_model
from mirror_modules.models.pretrained import load_weights
from mirror_modules.training.batches import Splits, has_classes, load_splits, usable_candidates
from mirror_modules.training.distributed import cpu_threads, resolve_device
from mirror_modules.training.folder import FORMAT, LOCK, RunFolder, versions
from mirror_modules.training.loop import train
from mirror_modules.training.plan import make_plan
from mirror_modules.training.recipes import ALL_PHASES, AdversarialRecipe, Recipe, differences
from mirror_modules.training.validation import (
    generate_images,
    image_features,
    sentence_features,
    unseen_pairs,
    word_accuracy,
)

# Fields of the recipe on which the shared phases and the evaluation depend; a cell cannot override them.
SHARED_FIELDS = ("seed", "data", *(phase for phase in ALL_PHASES if phase != "glam"), "evaluation")
KIND = "ablation"


class Cell(NamedTuple):
    """One setting of the ablation."""

    name: str
    """Shown in the tables: one line without "|". The name of the cell's folder is derived from it."""
    fields: dict[str, Any]
    """Recipe fields that the cell overrides, in the form that `Recipe.from_dict` accepts: those of the generator's
    training (`glam`, `model`, `engine`, `logging`). The other ones are shared."""


def ablation_cells() -> list[Cell]:
    """The paper's ablation (Sec. 4.2), with and without mismatched pairs, plus balanced gradients.

    Word attention alone or with sentence attention; weights of the redescription loss from 0 to 20; and balanced
    gradients in place of a weight (see `AdversarialRecipe.redescription_ratio`).

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
    return [
        *cells,
        Cell("word attention, ratio 0.25", _fields(None, 0.25, attention="word")),
        Cell("no mismatched pairs, ratio 0.25", _fields(None, 0.25, mismatched=False)),
    ]


def _fields(
    weight: float | None, ratio: float | None = None, *, mismatched: bool = True, attention: str = "global-local"
) -> dict[str, Any]:
    glam: dict[str, Any] = {
        "redescription_weight": weight,
        "redescription_ratio": ratio,
        "mismatched_pairs": mismatched,
    }
    model = {"attention": attention}
    # A recipe refuses options that have no effect; those of a part that the cell turns off get their defaults.
    if weight == 0:
        glam["redescription_reduction"] = AdversarialRecipe.redescription_reduction
    if attention == "word":
        model["sentence_axis"] = MirrorGANConfig.sentence_axis
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
    """Train and evaluate every cell with every seed; write ablation.json, ablation.md and ablation.png.

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
    folder = Path(out)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"ablate: seeds must be one or more distinct numbers, but they are {list(seeds)}.")
    for seed in seeds:
        # Raises if the seed is out of range.
        dataclasses.replace(recipe, seed=seed)
    check_positive("ablate", jobs=jobs)
    device = resolve_device(device)
    _check_cells(cells, recipe)
    _check_folder(folder, recipe)
    for seed in seeds:
        RunFolder(_shared_folder(folder, seed)).check(dataclasses.replace(recipe, seed=seed))
    # The processes divide the threads among them.
    of_process = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, threads=None))
    tasks = [(of_process, folder, seed, device) for seed in seeds]
    unfinished = [(cell, *task) for task in tasks for cell in cells if not _is_finished(cell, recipe, folder, task[2])]
    real_paths = {seed: _shared_folder(folder, seed) / "real.json" for seed in seeds}
    bounds_paths = {seed: _shared_folder(folder, seed) / "bounds.json" for seed in seeds}
    missing = [task for task in tasks if not (real_paths[task[2]].exists() and bounds_paths[task[2]].exists())]
    # The caller may have turned gradients off.
    with (
        RunFolder(folder).locked(),
        cpu_threads(recipe.engine.threads),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        settings = {"format": FORMAT, "kind": KIND, "recipe": recipe.to_dict(), "versions": versions()}
        write_json(folder / "config.json", settings)
        # Trained before the processes start: each of them would train its own.
        _attribute_classifier(recipe, folder)
        shared = {f"phases {', '.join(_shared_phases(recipe))}, seed {task[2]}": task for task in missing}
        in_processes(train_shared, shared, jobs, title="shared phases")
        named = {f"cell {task[0].name!r}, seed {task[3]}": task for task in unfinished}
        in_processes(run_cell, named, jobs, title="cells")
    known = {cell.name: cell for cell in [*ablation_cells(), *cells]}
    shown = [cell for cell in known.values() if cell in cells or _was_finished(cell, recipe, folder, seeds)]
    files = {cell.name: [_cell_folder(folder, cell, seed) / "result.json" for seed in seeds] for cell in shown}
    files[REAL] = list(real_paths.values())
    results = _read_results(files)
    content = summarize(results, seeds)
    content |= {
        "bounds": _mean_bounds(list(bounds_paths.values()), results[REAL][0]),
        "recipe": recipe.to_dict(),
        "cells": {cell.name: cell.fields for cell in shown},
        "versions": settings["versions"],
    }
    content["cannot_rank"] = unrankable(results, content["bounds"])
    write_json(folder / "ablation.json", content)
    write_text(folder / "ablation.md", as_markdown(content))
    draw(content, folder / "ablation.png")
    return content


def run_cell(cell: Cell, recipe: Recipe, out: Path, seed: int, device: str) -> None:
    """Train one cell with one seed, evaluate it, and write the metrics to its result.json."""
    run, shared = RunFolder(_cell_folder(out, cell, seed)), RunFolder(_shared_folder(out, seed))
    recipe = _cell_recipe(cell, recipe, seed)
    run.check(recipe)
    if not run.config.exists():
        # An existing one is left to `train`, which compares its number of steps first.
        run.begin(recipe)
    # The metrics of a finished cell that is trained further.
    (run.path / "result.json").unlink(missing_ok=True)
    for phase in _shared_phases(recipe):
        if not run.weights(phase).exists():
            run.weights(phase).parent.mkdir(exist_ok=True)
            write_whole(run.weights(phase), partial(shutil.copyfile, shared.weights(phase)))
    # Progress bars of processes that run at the same time would overwrite each other in the terminal.
    with (run.path / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        train(recipe, run.path, phases=["glam"], device=device, resume=True)
    model = TextToImage.from_pretrained(run.model, device=device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    write_json(
        run.path / "result.json", measure(recipe, run, splits, device, _attribute_classifier(recipe, out), model)
    )


def train_shared(recipe: Recipe, out: Path, seed: int, device: str) -> None:
    """Train the phases that all cells of a seed share, and evaluate the real images as their ceiling.

    bounds.json gets the R-precision of a random ranking, of one who knows the class alone, and of other captions of the
    same image, for each R-precision of `measure`.
    """
    run, recipe = RunFolder(_shared_folder(out, seed)), dataclasses.replace(recipe, seed=seed)
    run.path.mkdir(parents=True, exist_ok=True)
    train(recipe, run.path, phases=_shared_phases(recipe), device=device, resume=True)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    found = {
        metric: {**bounds(split, candidates), **_measured_bounds(evaluator, split, candidates)}
        for metric, evaluator, split, candidates in _rankings(recipe, run, splits, device)
    }
    write_json(run.path / "bounds.json", found)
    write_json(run.path / "real.json", measure(recipe, run, splits, device, _attribute_classifier(recipe, out), None))


def _attribute_classifier(recipe: Recipe, out: Path) -> AttributeClassifier | None:
    if recipe.data.source != "synthetic-flowers":
        return None
    return fit_attribute_classifier(out / "attributes.safetensors", recipe.model.resolutions[-1])


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
    `colors` is the same share for the two colors measured in the pixels. `words` holds a single value, the captioner's
    word accuracy over the split.

    Args:
        recipe: The recipe of the run.
        folder: The run that holds the weights of phases `stream` and `evaluator`.
        splits: The data of the recipe.
        device: "cpu" or "cuda".
        classifier: The attribute classifier of drawn flowers; None if the data have no attributes.
        model: Generates the images; None evaluates the real images instead.
    """
    captioner = build_model(recipe.model, splits.vocabulary).captioner
    load_weights(captioner, folder.weights("stream"))
    images: dict[str, Tensor] = {}
    metrics: dict[str, list[float]] = {}
    for metric, evaluator, split, candidates in _rankings(recipe, folder, splits, device):
        unseen = split.unseen
        if split.name not in images:
            images[split.name] = (
                to_float(unseen.images)
                if model is None
                else generate_images(model, unseen.tokens, unseen.word_mask, recipe.seed, unseen.location(model))
            )
        features = image_features(evaluator.pair, images[split.name])
        sentences = sentence_features(evaluator.pair, unseen.tokens, unseen.word_mask)
        metrics[metric] = expected_precision(features, sentences, candidates).tolist()
    unseen, validation = unseen_pairs(splits, recipe.model.max_words), images["validation"]
    predicted = word_accuracy(captioner.to(device).eval(), validation, unseen.tokens, unseen.word_mask)
    metrics["words"] = [predicted.accuracy]
    if classifier is not None:
        named = [attributes_named(caption) for caption in unseen.captions]
        metrics["attributes"] = _shares_correct(classifier.predict(validation), named)
        metrics["colors"] = _shares_correct(measured_colors(to_bytes(validation)), named)
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
        within = own_class(image_features(evaluator.pair, to_float(unseen.images)), sentences, unseen.class_ids)
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


def _shared_phases(recipe: Recipe) -> list[str]:
    return [phase for phase in recipe.phases if phase != "glam"]


def _shared_folder(out: Path, seed: int) -> Path:
    return out / "shared" / f"seed-{seed}"


def _cell_folder(out: Path, cell: Cell, seed: int) -> Path:
    return out / "cells" / _folder_name(cell.name) / f"seed-{seed}"


def _folder_name(name: str) -> str:
    return file_name(name.replace(", ", "-").replace(" ", "-"))


def _check_cells(cells: Sequence[Cell], recipe: Recipe) -> None:
    """Require names for tables, valid fields, and folders that no other cell has, also where names ignore case.

    Raises:
        ValueError: A name or a field is unsuitable; or two cells have the same name, or names that would share a
            folder.
    """
    for cell in cells:
        if not isinstance(cell, Cell):
            raise ValueError(f"ablate: cells must be a list of Cell, but one of them is {cell!r}.")
        name = cell.name
        is_text = isinstance(name, str) and name.isprintable() and name == name.strip()
        if not is_text or not name or "|" in name or name == REAL:
            raise ValueError(
                f"ablate: the name of a cell must be one line of printable characters without '|' and without spaces "
                f"at its ends, and not {REAL!r}, but it is {name!r}."
            )
        Recipe.from_dict(cell.fields, recipe)
        if shared := [field for field in SHARED_FIELDS if field in cell.fields]:
            raise ValueError(
                f"ablate: cell {name!r} overrides {', '.join(shared)}, which all cells share; set it in the recipe."
            )
    names = [cell.name for cell in cells]
    names += [cell.name for cell in ablation_cells() if cell.name not in names]
    taken: dict[str, str] = {}
    for name in names:
        folder = unicodedata.normalize("NFC", _folder_name(name)).casefold()
        if folder in taken:
            raise ValueError(
                f"ablate: the cells {taken[folder]!r} and {name!r} would have the same folder, {folder!r}; rename one."
            )
        taken[folder] = name


def _cell_recipe(cell: Cell, recipe: Recipe, seed: int) -> Recipe:
    return dataclasses.replace(Recipe.from_dict(cell.fields, recipe), seed=seed)


def _is_finished(cell: Cell, recipe: Recipe, out: Path, seed: int) -> bool:
    """Whether a cell was trained with these settings for this number of steps, and evaluated.

    Raises:
        ValueError: Its folder holds other settings or more steps.
    """
    folder = _cell_folder(out, cell, seed)
    try:
        plan = make_plan(_cell_recipe(cell, recipe, seed), RunFolder(folder), recipe.phases, resume=True)
    except ValueError as error:
        raise ValueError(f"ablate: cell {cell.name!r}: {error}") from error
    return "glam" in plan.finished and (folder / "result.json").exists()


def _was_finished(cell: Cell, recipe: Recipe, out: Path, seeds: Sequence[int]) -> bool:
    """Whether earlier calls finished a cell with these settings and seeds."""
    try:
        return all(_is_finished(cell, recipe, out, seed) for seed in seeds)
    except ValueError:
        return False


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


def _check_folder(out: Path, recipe: Recipe) -> None:
    """Require that the folder is new or empty, or holds an ablation of this recipe.

    Raises:
        ValueError: It holds an ablation of another recipe, or something else.
    """
    config = out / "config.json"
    if config.exists():
        content = read_json(config)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{config} does not belong to an ablation; choose another --out.")
        changed = [text for text, harmless in differences(RunFolder(out).read_recipe(KIND), recipe) if not harmless]
        if changed:
            raise ValueError(
                f"{out} holds an ablation with other settings ({'; '.join(changed)}); choose another --out, or "
                "remove it."
            )
    elif out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no ablation; choose another --out.")
