"""Comparison of systems: the same data, encoders, evaluator, images seen and seeds, with another generator.

A cell is a recipe; see `grid` for what the cells share, and how they are trained.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mirror_modules._files import as_folder, read_json, write_json, write_text
from mirror_modules.evaluation.grid import (
    RESULT,
    SAMPLES,
    Grid,
    GridCell,
    Trained,
    check_folders,
    check_name,
    check_seeds,
    collect,
    draw_sheet,
    fill,
)
from mirror_modules.evaluation.tables import as_markdown, draw, mean_and_deviation
from mirror_modules.models import MirrorGANConfig, TextToImage
from mirror_modules.training.distributed import resolve_device
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import read_log
from mirror_modules.training.recipes import (
    ADVERSARIAL_PHASES,
    ALL_PHASES,
    WITHOUT_BACKBONE,
    AdversarialRecipe,
    Recipe,
)

# Fields in which the recipes must agree: data, phases before the generator, evaluation, and the engine, on which the
# cost depends.
SHARED_FIELDS = (
    "data",
    *(phase for phase in ALL_PHASES if phase not in WITHOUT_BACKBONE),
    "evaluation",
    "engine",
)
# Fields of the model that these phases read, besides the finest resolution.
SHARED_SIZES = (
    "embedding_dim",
    "word_dim",
    "text_dropout",
    "max_words",
    "image_backbone",
    "captioner_backbone",
    "captioner_projection",
    "captioner_embedding_dim",
    "captioner_hidden_dim",
    "captioner_image_skip",
)
COST = "cost.json"
# What is read from the log and the process, and what is counted in the model.
MEASURED_COSTS = ("images_per_second", "peak_memory")
COUNTED_COSTS = ("generator_parameters", "discriminator_parameters")


def compare(
    recipes: Sequence[Recipe],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    device: str = "cpu",
    baseline: str | None = None,
) -> dict[str, Any]:
    """Train and evaluate several systems on equal terms; write comparison.json, .md and .png, and samples.png.

    The phases before the generator are trained once per seed and shared by all systems. Each system is trained in a
    process of its own, which imports the main module again: call this function below `if __name__ == "__main__":` in a
    script.

    Args:
        recipes: Two or more recipes with different names, which may be your own; they must agree in the data, the
            encoders, the captioner, the evaluation, the engine, the size of the finest images, and the number of images
            that the generator is trained with.
        out: The folder of the comparison. Finished systems in it are reused if their settings are the same, and trained
            further if `glam.steps` is larger now.
        seeds: Each seed determines the data, initial weights and noise of one run per system.
        jobs: Number of processes that train at the same time; they divide the CPU threads among them.
        device: "cpu", "cuda" or "auto", which uses a GPU if there is one.
        baseline: Name of the recipe with which the other ones are compared; None takes the first.

    Returns:
        The content of comparison.json.

    Raises:
        ValueError: Recipes differ in what they must share; the folder holds another comparison, a system with other
            settings or more steps, or a damaged file, or another process is training in it; the photographs lack the
            places that a system needs; or an argument is out of range.
        TrainingError: A process failed.

    Examples:
        >>> from mirror_modules.evaluation import compare
        >>> from mirror_modules.training import get_recipe
        >>> recipes = [get_recipe(name) for name in ("demo", "attngan-demo", "stackgan-demo")]
        >>> content = compare(recipes, "runs/comparison", jobs=2)  # doctest: +SKIP
        >>> content["cost"]["demo"]["generator_parameters"]  # doctest: +SKIP
        364752

        What cannot be compared is refused before anything is trained:

        >>> recipes = [get_recipe("demo"), get_recipe("gawwn-demo")]
        >>> compare(recipes, "runs/comparison")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: compare: 'demo' and 'gawwn-demo' differ in data.scatter (False and True), which ...
    """
    if not isinstance(recipes, Sequence):
        raise ValueError(f"compare: recipes must be a list of Recipe, but it is {recipes!r}.")
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise ValueError(f"compare: recipes must be a list of Recipe, but one of them is {recipe!r}.")
        check_name("compare", "recipe", recipe.name)
    names = [recipe.name for recipe in recipes]
    if len(recipes) < 2:
        raise ValueError(f"compare: recipes must be two or more, but they are {names}.")
    check_folders("compare", "recipe", names)
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"compare: baseline must be one of {', '.join(map(repr, names))}, but it is {baseline!r}.")
    out = as_folder("compare: out (--out)", out)
    _check_comparable(recipes)
    check_seeds("compare", seeds, recipes[0])
    shared, device = _shared_recipe(recipes[0]), resolve_device(device)
    grid = Grid(
        "compare",
        "comparison",
        "recipe",
        out,
        shared,
        device,
        record=_record_cost,
        files=(SAMPLES, COST, RESULT),
    )
    fill(grid, [GridCell(recipe.name, recipe) for recipe in recipes], seeds, jobs)
    content = collect(grid, names, seeds, [(name, baseline) for name in names if name != baseline])
    content |= {
        "baseline": baseline,
        "images_seen": _images_seen(recipes[0]),
        "systems": {recipe.name: recipe.model.system for recipe in recipes},
        "recipes": {recipe.name: recipe.to_dict() for recipe in recipes},
    }
    content["cost"] = {
        name: _mean_cost([_read_cost(grid.cell_folder(name, seed) / COST) for seed in seeds]) for name in names
    }
    write_json(grid.out / "comparison.json", content)
    write_text(grid.out / "comparison.md", f"{as_markdown(content)}\n{_cost_table(content)}")
    draw(content, grid.out / "comparison.png")
    draw_sheet(grid, names, seeds[0])
    return content


def _check_comparable(recipes: Sequence[Recipe]) -> None:
    """Require equal data, encoders, evaluation and images seen.

    Raises:
        ValueError: Two recipes differ in some of them; the message names the fields.
    """
    first, *others = recipes
    for other in others:
        fields, other_fields = _shared_fields(first), _shared_fields(other)
        found = [text for name in fields for text in _differences(fields[name], other_fields[name], name)]
        if found:
            scatter = " (--scatter sets data.scatter)" if first.data.scatter != other.data.scatter else ""
            raise ValueError(
                f"compare: {first.name!r} and {other.name!r} differ in {', '.join(found)}, which all recipes must "
                f"share; change one of them{scatter}, or compare each with others like it."
            )


def _shared_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields in which recipes must agree, ready for JSON."""
    content = recipe.to_dict()
    return {
        **{name: content[name] for name in SHARED_FIELDS},
        **{f"model.{name}": content["model"][name] for name in SHARED_SIZES},
        "the size of the finest images": recipe.model.resolutions[-1],
        "the number of images seen, steps times batch_size": _images_seen(recipe),
    }


def _differences(one: Any, other: Any, name: str) -> Iterator[str]:
    """Describe each field in which two values differ; one that is None differs as a whole."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one:
            yield from _differences(one[key], other[key], f"{name}.{key}")
    elif one != other:
        values = ["given" if isinstance(value, Mapping) else repr(value) for value in (one, other)]
        yield f"{name} ({' and '.join(values)})"


def _images_seen(recipe: Recipe) -> int:
    """Images that the generator is trained with, in all of its phases."""
    phases = [recipe.adversarial(phase) for phase in recipe.phases if phase in ADVERSARIAL_PHASES]
    return sum(each.steps * each.batch_size for each in phases)


def _shared_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the shared phases, which is the same for all recipes that can be compared with this one."""
    sizes = {name: getattr(recipe.model, name) for name in SHARED_SIZES}
    model = MirrorGANConfig(resolutions=recipe.model.resolutions[-1:], **sizes)
    own: dict[str, Any] = {"glam": AdversarialRecipe(), "first_stage": None, "keypoints": None}
    return dataclasses.replace(recipe, name="shared phases", seed=0, model=model, **own)


def _record_cost(trained: Trained) -> None:
    """Write what the training of a cell has cost."""
    cost = trained.run.path / COST
    if trained.is_new or not cost.exists():
        # A process that has not trained the cell has not seen its peak.
        memory = _peak_memory() if trained.is_new else None
        write_json(cost, {**_cost(trained.run, trained.model), "peak_memory": memory})


def _cost(run: RunFolder, model: TextToImage) -> dict[str, Any]:
    """What is counted in a model, and its images per second in training."""
    last = {entry["phase"]: entry for entry in read_log(run.log) if "images" in entry} if run.log.exists() else {}
    if lost := [phase for phase in model.config.adversarial_phases if phase not in last]:
        raise ValueError(
            f"{run.log} holds no line of phase {lost[0]}, so that its cost is unknown; remove the folder {run.path}, "
            "and repeat the command, which trains this system again."
        )
    phases = [last[phase] for phase in model.config.adversarial_phases]
    discriminators = [each for phase in model.config.adversarial_phases for each in model.discriminators(phase)]
    return {
        "images_per_second": sum(each["images"] for each in phases) / sum(each["seconds"] for each in phases),
        "generator_parameters": _count(model.generator_parts().values()),
        "discriminator_parameters": _count(discriminators),
    }


def _count(parts: Any) -> int:
    return sum(parameter.numel() for parameter in nn.ModuleList(parts).parameters())


def _peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not count it."""
    # On Linux, `getrusage` also counts the process that started this one, which may have been larger.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _read_cost(path: Path) -> dict[str, Any]:
    """Read what `_record_cost` wrote to cost.json.

    Raises:
        ValueError: The file holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        (type(content.get(name)) in (int, float) and 0 < content[name] < math.inf)
        or (name == "peak_memory" and content.get(name, 0) is None)
        for name in (*MEASURED_COSTS, *COUNTED_COSTS)
    ):
        raise ValueError(
            f"{path} is damaged: it must hold what the training has cost; remove it and repeat the command, which "
            "measures all of it again but the memory."
        )
    return content


def _mean_cost(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of what is measured, with the value of each seed; and what is counted, which they share."""
    result: dict[str, Any] = {name: seeds[0][name] for name in COUNTED_COSTS}
    for name in MEASURED_COSTS:
        values = [each[name] for each in seeds]
        known = [value for value in values if value is not None]
        result[name] = {
            "mean": float(np.mean(known)) if known else None,
            "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
            "seeds": values,
        }
    return result


def _cost_table(content: Mapping[str, Any]) -> str:
    lines = [
        "Cost: images per second in training, which depend on what else the machine computed; parameters in millions; "
        "and the largest resident memory of the process that trained the run, in MB. "
        f"Each generator was trained with {content['images_seen']:,} images.",
        "",
        "| | system | images per second | parameters, generator | parameters, discriminators | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in content["cost"].items():
        speed, memory = cost["images_per_second"], cost["peak_memory"]
        used = "–" if memory["mean"] is None else _in_units(memory, 1e-6, 0)
        counts = [f"{cost[each] / 1e6:.3f}" for each in COUNTED_COSTS]
        lines.append(
            f"| {name} | {content['systems'][name]} | {_in_units(speed, 1, 1)} | {' | '.join(counts)} | {used} |"
        )
    return "\n".join(lines) + "\n"


def _in_units(figure: Mapping[str, Any], unit: float, digits: int) -> str:
    return mean_and_deviation(figure["mean"], figure["deviation"], unit, digits)
