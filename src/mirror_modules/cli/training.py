"""The commands `train`, `recipes` and `ablate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

from mirror_modules.cli.evaluation import print_metrics
from mirror_modules.cli.parsing import Device, device_of, option, parse
from mirror_modules.models import MirrorGANConfig
from mirror_modules.training.recipes import (
    RECIPES,
    EvaluatorRecipe,
    Recipe,
    describe_recipes,
    from_scratch,
    get_recipe,
    load_recipe,
)

PARTS_HELP = (
    "Options of a part that the recipe lacks add it: --evaluator.backbone.name, --second-evaluator.steps and the like."
)


@dataclass(frozen=True)
class TrainOptions:
    """Train a model phase by phase, evaluate it, and write a report. Finished phases are kept and reused."""

    recipe: Recipe
    out: Path | None = None
    """Folder of the run; runs/RECIPE by default."""
    data: Path | None = None
    """Folder of captioned photographs, in any format that `mirror-modules data inspect` recognizes; for recipes that
    train on photographs."""
    steps: int | None = None
    """Optimizer steps of every phase, instead of the recipe's; --glam.steps and the like override it for one phase."""
    from_scratch: bool = False
    """Train all backbones from scratch, in place of a recipe's pretrained ones."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""
    threads: int | None = None
    """Threads on a CPU; torch's default is the number of cores. One thread is faster while other programs compute."""
    phases: tuple[
        Literal[
            "pretraining",
            "stem",
            "stream",
            "first_stage",
            "keypoints",
            "glam",
            "evaluator_pretraining",
            "evaluator",
            "second_evaluator",
        ],
        ...,
    ] = ()
    """Phases to train; all by default."""
    resume: bool = False
    """Continue an interrupted run from its newest checkpoint; in a new folder, start the run."""
    config: Path | None = None
    """JSON file with the fields that differ from the recipe's, or a run's config.json; command-line options win."""

    def resolve(self) -> Recipe:
        """The recipe with --data and --threads."""
        return _with_threads(self.recipe if self.data is None else _with_data(self.recipe, self.data), self.threads)


def train(arguments: list[str]) -> None:
    """Run `mirror-modules train`."""
    name, base = _recipe_of(arguments, "demo")
    if (file := option("--config", arguments)) is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--config {file}: there is no such file; expected JSON with fields of a recipe.")
        base = load_recipe(file, base)
    base = from_scratch(base) if option("--from-scratch", arguments) is not None else base
    options: TrainOptions = parse(
        TrainOptions,
        arguments,
        f"train {name}",
        default=TrainOptions(_with_steps(_with_parts(base, arguments), arguments)),
        # The help joins lines that do not begin with a space.
        description=f"{TrainOptions.__doc__}\n\n{PARTS_HELP}\n\nRecipes, as in `mirror-modules train RECIPE`:\n"
        + indent(describe_recipes(), "  "),
    )
    from mirror_modules.evaluation.evaluation import evaluate
    from mirror_modules.training.distributed import is_main_process
    from mirror_modules.training.loop import train

    device = device_of(options.device)
    out = options.out or Path("runs") / name
    recipe = options.resolve()
    phases = options.phases or recipe.phases
    folder = train(recipe, out, phases=phases, device=device, resume=options.resume)
    if not is_main_process():
        return
    if all(folder.weights(phase).exists() for phase in recipe.phases):
        print_metrics(evaluate(out, device=device, threads=recipe.engine.threads))
        print(f"Open {folder.report}")
    else:
        print(f"Phases {', '.join(phases)} are in {folder.path}; the other phases are not trained yet.")


@dataclass(frozen=True)
class RecipesOptions:
    """List the recipes of `mirror-modules train`, and the data that each trains on."""


def recipes(arguments: list[str]) -> None:
    """Run `mirror-modules recipes`."""
    parse(RecipesOptions, arguments, "recipes")
    print(describe_recipes())


@dataclass(frozen=True)
class AblateOptions:
    """Train and evaluate the paper's ablation: equal data, seeds and steps, with one change at a time.

    After an interruption, the same command continues.
    """

    recipe: Recipe
    out: Path | None = None
    """Folder of all runs; runs/RECIPE by default."""
    data: Path | None = None
    """Folder of captioned photographs, for recipes that train on photographs."""
    steps: int | None = None
    """Optimizer steps of every phase, instead of the recipe's."""
    from_scratch: bool = False
    """Train all backbones from scratch, in place of a recipe's pretrained ones."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of data, weights and noise; one run per seed and cell."""
    cells: tuple[str, ...] = ()
    """Names of the cells to train; all by default."""
    jobs: int = 1
    """Cells trained at the same time."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""
    threads: int | None = None
    """Threads on a CPU, divided among the jobs; torch's default is the number of cores."""


def ablate(arguments: list[str]) -> None:
    """Run `mirror-modules ablate`."""
    name, base = _recipe_of(arguments, "ablation")
    if base.model.system != MirrorGANConfig.system:
        raise ValueError(
            f"ablate varies the attention and the redescription of MirrorGAN, but {name!r} is a recipe of the system "
            f"{base.model.system!r}; `mirror-modules compare` compares systems."
        )
    if option("--seed", arguments) is not None:
        raise ValueError("--seed has no effect on an ablation, which trains each cell with several: use --seeds 0 1 2.")
    base = from_scratch(base) if option("--from-scratch", arguments) is not None else base
    default = AblateOptions(_with_steps(_with_parts(base, arguments), arguments))
    description = f"{AblateOptions.__doc__}\n\n{PARTS_HELP}"
    options: AblateOptions = parse(AblateOptions, arguments, f"ablate {name}", default=default, description=description)
    from mirror_modules.evaluation.ablation import ablate, ablation_cells

    recipe = _with_threads(
        options.recipe if options.data is None else _with_data(options.recipe, options.data), options.threads
    )
    cells = {cell.name: cell for cell in ablation_cells()}
    for cell in options.cells:
        if cell not in cells:
            close = get_close_matches(cell, cells, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, cells))}."
            raise ValueError(f"--cells: unknown cell {cell!r}; {hint}")
    out = options.out or Path("runs") / name
    chosen = [cell for cell in cells.values() if not options.cells or cell.name in options.cells]
    ablate(recipe, out, cells=chosen, seeds=options.seeds, jobs=options.jobs, device=device_of(options.device))
    print((out / "ablation.md").read_text(encoding="utf-8"), end="")
    print(f"Open {out / 'ablation.png'}")


def _recipe_of(arguments: list[str], default: str) -> tuple[str, Recipe]:
    """The recipe that the first word names, which is removed."""
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default
    if name not in RECIPES and Path(name).is_dir():
        raise ValueError(f"{name!r} is a folder, not a recipe; to train on it, write photos-64 --data {name}.")
    return name, get_recipe(name)


def _with_data(recipe: Recipe, path: Path) -> Recipe:
    return replace(recipe, data=replace(recipe.data, path=str(path)))


def _with_threads(recipe: Recipe, threads: int | None) -> Recipe:
    return recipe if threads is None else replace(recipe, engine=replace(recipe.engine, threads=threads))


def _with_parts(recipe: Recipe, arguments: list[str]) -> Recipe:
    """The recipe with the parts that it lacks and whose fields are given, such as --second-evaluator.steps."""
    if recipe.second_evaluator is None and _names(arguments, "--second-evaluator."):
        recipe = replace(recipe, second_evaluator=EvaluatorRecipe())
    for phase in recipe.phases:
        own = recipe.phase(phase)
        prefix = f"--{phase.replace('_', '-')}.backbone."
        if isinstance(own, EvaluatorRecipe) and own.backbone is None and _names(arguments, prefix):
            changes: dict[str, Any] = {phase: replace(own, backbone=recipe.model.image_backbone)}
            recipe = replace(recipe, **changes)
    return recipe


def _names(arguments: list[str], prefix: str) -> bool:
    return any(word.replace("_", "-").startswith(prefix) for word in arguments)


def _with_steps(recipe: Recipe, arguments: list[str]) -> Recipe:
    """The recipe with --steps, on which the defaults of --glam.steps and the like depend."""
    try:
        steps = int(option("--steps", arguments) or "")
    except ValueError:
        # Missing, or not a whole number, which tyro reports.
        return recipe
    changes: dict[str, Any] = {phase: replace(recipe.phase(phase), steps=steps) for phase in recipe.phases}
    return replace(recipe, **changes)
