"""What does each part of the objective do? The same data, seeds and steps, with one thing changed at a time.

The phases before the generator are trained once for each seed and shared by all cells. A cell is one choice of what the
generator learns from; its run is a folder like any other. Each cell of each seed is trained by a process of its own,
and goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirror_modules.data import attributes_named, measured_colors, to_bytes, to_float
from mirror_modules.metrics import expected_hits
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import load_weights, read_json, write_json, write_whole
from mirror_modules.training.ablation_table import as_markdown, draw, summarize
from mirror_modules.training.attributes import AttributeJudge, fit_attribute_judge
from mirror_modules.training.batches import Splits, load_splits
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.folder import RunFolder, versions
from mirror_modules.training.loop import load_pair, train
from mirror_modules.training.recipes import Recipe, differences
from mirror_modules.training.validation import (
    generate_images,
    image_features,
    sentence_features,
    unseen_pairs,
    word_accuracy,
)

SHARED_PHASES = ("stem", "stream", "judge")
KIND = "ablation"


class Cell(NamedTuple):
    """One choice of what the generator learns from."""

    name: str
    """Also the name of its folder."""
    fields: dict[str, Any]
    """What differs from the recipe, as `Recipe.from_dict` takes it."""


def ablation_cells() -> list[Cell]:
    """The questions of the paper's ablation (Sec. 4.2), on both sides of the switch for mismatched pairs, and one more.

    Word attention alone, with the global attention too, and weights of the redescription loss from 0 to 20; then
    a balance of gradients in place of a weight (see `AdversarialRecipe.redescription_ratio`).
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
    glam = {"redescription_weight": weight, "redescription_ratio": ratio, "mismatched_pairs": mismatched}
    return {"model": {"attention": attention}, "glam": glam}


def ablate(
    recipe: Recipe,
    out: str | Path,
    *,
    cells: Sequence[Cell],
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train and measure every cell with every seed; write ablation.json, ablation.md and ablation.png.

    Args:
        recipe: What all cells share.
        out: The folder; what is finished in it is taken as it is.
        cells: What they differ in.
        seeds: Each decides data, networks and noise of one run of each cell.
        jobs: Cells trained at the same time, which share the CPU's cores.
        device: "cpu" or "cuda".

    Returns:
        The content of ablation.json.

    Raises:
        ValueError: The folder holds an ablation of another recipe, or an argument is out of its range.
        TrainingError: A cell could not be trained.
    """
    folder = Path(out)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"ablate: seeds must be one or more different numbers, but they are {list(seeds)}.")
    for seed in seeds:
        dataclasses.replace(recipe, seed=seed)
    if jobs < 1:
        raise ValueError(f"ablate: jobs must be at least 1, but it is {jobs}.")
    _begin(folder, recipe)
    tasks = [(recipe, folder, seed, device) for seed in seeds]
    # Before the processes, which would each train one.
    _attribute_judge(recipe, folder)
    shared = {seed: _shared_folder(folder, seed) / "real.json" for seed in seeds}
    _in_processes(train_shared, [task for task in tasks if not shared[task[2]].exists()], jobs)
    todo = [
        (cell, *task)
        for task in tasks
        for cell in cells
        if not (_cell_folder(folder, cell, task[2]) / "result.json").exists()
    ]
    _in_processes(run_cell, todo, jobs)
    # Cells of an earlier call are not left out of the table.
    known = {cell.name: cell for cell in [*ablation_cells(), *cells]}
    files = {name: [_cell_folder(folder, cell, seed) / "result.json" for seed in seeds] for name, cell in known.items()}
    files = {name: paths for name, paths in files.items() if all(path.exists() for path in paths)}
    results = {name: [read_json(path) for path in paths] for name, paths in files.items()}
    results["real images"] = [read_json(path) for path in shared.values()]
    content = summarize(results, seeds)
    content |= {
        "recipe": recipe.to_dict(),
        "cells": {name: known[name].fields for name in files},
        "versions": versions(),
    }
    write_json(folder / "ablation.json", content)
    write_whole(folder / "ablation.md", lambda path: path.write_text(as_markdown(content), encoding="utf-8"))
    draw(content, folder / "ablation.png")
    return content


def run_cell(cell: Cell, recipe: Recipe, out: Path, seed: int, device: str) -> None:
    """Train one cell with one seed, measure it, and keep the figures in its result.json."""
    run = RunFolder(_cell_folder(out, cell, seed))
    recipe = dataclasses.replace(Recipe.from_dict(cell.fields, recipe), seed=seed)
    shared = RunFolder(_shared_folder(out, seed))
    run.check(recipe)
    run.begin(recipe)
    for phase in SHARED_PHASES:
        if not run.weights(phase).exists():
            shutil.copyfile(shared.weights(phase), run.weights(phase))
    # Cells that are trained at the same time would write their progress over each other.
    with (run.path / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        train(recipe, run.path, phases=["glam"], device=device, resume=True)
    model = MirrorGAN.from_pretrained(run.model, device=device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    write_json(run.path / "result.json", measure(recipe, run, splits, device, _attribute_judge(recipe, out), model))


def train_shared(recipe: Recipe, out: Path, seed: int, device: str) -> None:
    """Train what all cells of a seed share, and measure the real images, which are their ceiling."""
    run, recipe = RunFolder(_shared_folder(out, seed)), dataclasses.replace(recipe, seed=seed)
    run.path.mkdir(parents=True, exist_ok=True)
    train(recipe, run.path, phases=SHARED_PHASES, device=device, resume=True)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    write_json(run.path / "real.json", measure(recipe, run, splits, device, _attribute_judge(recipe, out), None))


def _attribute_judge(recipe: Recipe, out: Path) -> AttributeJudge | None:
    if recipe.data.source != "synthetic-flowers":
        return None
    return fit_attribute_judge(out / "attributes.safetensors", recipe.model.resolutions[-1])


def measure(
    recipe: Recipe,
    folder: RunFolder,
    splits: Splits,
    device: str,
    judge: AttributeJudge | None,
    model: MirrorGAN | None,
) -> dict[str, list[float]]:
    """Figures of each validation caption's image, in [0, 1]: `{"r_precision": [...], ...}`.

    `r_precision` is the expected top-1 precision by the pair of phase `judge`. `attributes` is the share of the named
    attributes that the image has, by the attribute judge; `colors` the same of the two colors, as measured. `words` is
    the captioner's word accuracy: of the whole split, so a single number.

    Args:
        recipe: What was trained.
        folder: Where the phases `stream` and `judge` lie.
        splits: Its data.
        device: "cpu" or "cuda".
        judge: Reads the attributes of drawn flowers; None where there are none.
        model: Draws the images; None takes the real ones.
    """
    unseen = unseen_pairs(splits, recipe.model.max_words)
    captioner = MirrorGAN(recipe.model, splits.vocabulary).captioner
    load_weights(captioner, folder.weights("stream"))
    pair = load_pair(folder, "judge", recipe, splits).to(device)
    images = to_float(unseen.images)
    if model is not None:
        images = generate_images(model, unseen.tokens, unseen.word_mask, recipe.seed)
    sentences = sentence_features(pair, unseen.tokens, unseen.word_mask)
    hits = expected_hits(image_features(pair, images), sentences, candidates=recipe.evaluation.candidates)
    accuracy, _ = word_accuracy(captioner.to(device).eval(), images, unseen.tokens, unseen.word_mask)
    figures = {"r_precision": hits.tolist(), "words": [accuracy]}
    if judge is not None:
        named = [attributes_named(caption) for caption in unseen.captions]
        figures["attributes"] = _shares(judge.read(images), named)
        figures["colors"] = _shares(measured_colors(to_bytes(images)), named)
    return figures


def _shares(read: Mapping[str, Sequence[str]], named: Sequence[Mapping[str, str]]) -> list[float]:
    """For each image the share of its caption's attributes, among those that were read, which it has."""
    shares = []
    for i, caption in enumerate(named):
        right = [read[name][i] == value for name, value in caption.items() if name in read]
        # Every caption names the color of the petals.
        shares.append(sum(right) / len(right))
    return shares


def _in_processes(work: Callable[..., None], tasks: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """Do each task in a process of its own, so many at a time; the first that fails ends it.

    Raises:
        TrainingError: One failed.
    """
    from tqdm import tqdm

    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    waiting, running = list(tasks)[::-1], list[Any]()
    threads = max(1, torch.get_num_threads() // jobs)
    with tqdm(total=len(tasks), desc=work.__name__.strip("_"), unit=" runs", dynamic_ncols=True) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(context.Process(target=_do, args=(work, waiting.pop(), threads)))
                    running[-1].start()
                connection.wait([process.sentinel for process in running])
                for process in [process for process in running if not process.is_alive()]:
                    running.remove(process)
                    if process.exitcode != 0:
                        raise TrainingError(
                            f"a process of the ablation ended with status {process.exitcode}; what it printed says "
                            "why. Finished cells are kept: the same command goes on."
                        )
                    bar.update()
        finally:
            # They finish their step and write a checkpoint.
            for process in running:
                process.terminate()
            for process in running:
                process.join()


def _end_with_parent() -> None:
    """A parent that was killed leaves its processes alone, and they would be in the way of the next one's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _do(work: Callable[..., None], task: tuple[Any, ...], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        work(*task)
    except (ValueError, OSError, TrainingError, KeyboardInterrupt) as error:
        print(f"mirror-modules ablate: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def _shared_folder(out: Path, seed: int) -> Path:
    return out / "shared" / f"seed-{seed}"


def _cell_folder(out: Path, cell: Cell, seed: int) -> Path:
    return out / "cells" / cell.name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"


def _begin(out: Path, recipe: Recipe) -> None:
    """Require that the folder is new or holds an ablation of this recipe; nothing is lost otherwise."""
    config = out / "config.json"
    if config.exists():
        content = read_json(config)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{config} is not that of an ablation; choose another --out.")
        found = [words for words, harmless in differences(RunFolder(out).read_recipe(), recipe) if not harmless]
        if found:
            raise ValueError(
                f"{out} holds an ablation with other settings ({'; '.join(found)}); choose another --out, or remove it."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no ablation; choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(config, {"kind": KIND, "recipe": recipe.to_dict(), "versions": versions()})
