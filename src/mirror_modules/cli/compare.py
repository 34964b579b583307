"""The command `compare`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mirror_modules.cli.parsing import Device, device_of, parse

if TYPE_CHECKING:
    from mirror_modules.training.recipes import Recipe

# The recipes of the paper's seven systems, at the size of demo.
SYSTEMS = (
    "demo",
    "gan-int-cls-demo",
    "gawwn-demo",
    "stackgan-demo",
    "stackgan-v2-demo",
    "ppgn-demo",
    "attngan-demo",
)
# Those that train on photographs.
SYSTEMS_ON_PHOTOGRAPHS = tuple(
    "photos-64" if name == "demo" else name.replace("-demo", "-photos-64") for name in SYSTEMS
)


@dataclass(frozen=True)
class CompareOptions:
    """Train and evaluate several systems on equal data, images seen, encoders, evaluator and seeds.

    After an interruption, the same command continues.
    """

    systems: tuple[str, ...] = ()
    """Recipes of the systems; by default, those of all but GAWWN, which needs the place of the subject: --scatter, or
    photographs with boxes."""
    out: Path = Path("runs/comparison")
    """Folder of all runs."""
    data: Path | None = None
    """Folder of captioned photographs, in any format that `mirror-modules data inspect` recognizes, in place of drawn
    flowers; the recipes are then photos-64, attngan-photos-64 and the like."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a damaged photograph ends the command, or is skipped and listed as long as at most 5 % are damaged."""
    baseline: str | None = None
    """Recipe with which the others are compared; the first by default."""
    scatter: bool = False
    """Draw flowers of more sizes, anywhere in the image, for all systems (data.scatter); GAWWN gets their boxes."""
    steps: int | None = None
    """Optimizer steps of every phase, instead of the recipes'; the phases of a generator divide them."""
    from_scratch: bool = False
    """Train all backbones from scratch, in place of the pretrained ones of the recipes for photographs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of data, weights and noise; one run per seed and system."""
    jobs: int = 1
    """Systems trained at the same time."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""
    threads: int | None = None
    """Threads on a CPU, divided among the jobs; torch's default is the number of cores."""

    def resolve(self) -> list[Recipe]:
        """The recipes with --data, --on-error, --scatter, --steps, --from-scratch and --threads."""
        from mirror_modules.training.recipes import from_scratch, get_recipe

        if self.scatter and self.data is not None:
            raise ValueError("--scatter draws flowers, and --data replaces them by photographs: give one of them.")
        if self.on_error != "stop" and self.data is None:
            raise ValueError("--on-error is about damaged photographs: give it with --data PATH, or leave it out.")
        systems = SYSTEMS if self.data is None else SYSTEMS_ON_PHOTOGRAPHS
        recipes = [get_recipe(name) for name in self.systems or systems]
        if not (self.systems or self.scatter):
            recipes = _without_places(recipes)
        if self.scatter:
            recipes = [replace(recipe, data=replace(recipe.data, scatter=True)) for recipe in recipes]
        if self.data is not None:
            recipes = [_on_photographs(recipe, self.data, self.on_error) for recipe in recipes]
        if self.steps is not None:
            recipes = [_with_steps(recipe, self.steps) for recipe in recipes]
        if self.from_scratch:
            recipes = [from_scratch(recipe) for recipe in recipes]
        if self.threads is not None:
            recipes = [replace(recipe, engine=replace(recipe.engine, threads=self.threads)) for recipe in recipes]
        return recipes


def _without_places(recipes: list[Recipe]) -> list[Recipe]:
    """The recipes of systems that are not told where the subject is, with a line on what the others need."""
    kept = [recipe for recipe in recipes if not recipe.model.takes_location]
    for recipe in recipes:
        if recipe not in kept:
            needs = (
                "places flowers and draws them anywhere in the image; --scatter trains all systems on such images."
                if recipe.data.is_drawn
                else "needs photographs with boxes; if yours have them, name it and the others after --systems."
            )
            print(f"Without {recipe.name}, which {needs}", file=sys.stderr)
    return kept


def compare(arguments: list[str]) -> None:
    """Run `mirror-modules compare`."""
    options: CompareOptions = parse(CompareOptions, arguments, "compare")
    recipes, device = options.resolve(), device_of(options.device)
    from mirror_modules.evaluation.comparison import compare

    compare(recipes, options.out, seeds=options.seeds, jobs=options.jobs, device=device, baseline=options.baseline)
    print((options.out / "comparison.md").read_text(encoding="utf-8"), end="")
    print(f"Open {options.out / 'comparison.png'} and {options.out / 'samples.png'}")


def _on_photographs(recipe: Recipe, data: Path, on_error: Literal["stop", "skip"]) -> Recipe:
    if recipe.data.is_drawn:
        raise ValueError(
            f"--data replaces drawn flowers, but {recipe.name!r} of --systems draws them; recipes for photographs are "
            f"{', '.join(SYSTEMS_ON_PHOTOGRAPHS)}."
        )
    return replace(recipe, data=replace(recipe.data, path=str(data), on_error=on_error))


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with these steps in each phase; those that train the generator divide them as they did before."""
    from mirror_modules.training.recipes import ADVERSARIAL_PHASES

    changes: dict[str, Any] = {}
    of_generator = [phase for phase in recipe.phases if phase in ADVERSARIAL_PHASES]
    if 0 < steps < len(of_generator):
        raise ValueError(
            f"--steps must be at least {len(of_generator)} with {recipe.name}, whose phases "
            f"{' and '.join(of_generator)} divide them, but it is {steps}."
        )
    before, rest = sum(recipe.phase(phase).steps for phase in of_generator), steps
    for phase in recipe.phases:
        own = steps
        if phase in of_generator:
            own = rest if phase == of_generator[-1] else steps * recipe.phase(phase).steps // before
            rest -= own
        changes[phase] = replace(recipe.phase(phase), steps=own)
    return replace(recipe, **changes)
