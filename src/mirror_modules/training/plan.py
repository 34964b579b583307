"""Which phases a run still has to train: a pure function of the recipe and the run's folder, which writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mirror_modules.training.checkpoints import Checkpoints
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import ALL_PHASES, Recipe

REQUIRED = {
    "pretraining": (),
    "stem": ("pretraining",),
    "stream": ("stem",),
    "first_stage": ("stem", "stream"),
    "keypoints": ("stem",),
    "glam": ("stem", "stream", "first_stage", "keypoints"),
    "evaluator_pretraining": (),
    "evaluator": ("evaluator_pretraining",),
    "second_evaluator": (),
}
"""For each phase, the phases whose weights it starts from, if the recipe has them."""


class Plan(NamedTuple):
    """The requested phases that are missing and those that are finished, in the order of `Recipe.phases`."""

    to_train: tuple[str, ...]
    """Phases to start or to resume."""
    finished: tuple[str, ...]
    """Requested phases whose weights are in the folder already."""


def make_plan(recipe: Recipe, folder: RunFolder, phases: Sequence[str], *, resume: bool) -> Plan:
    """Decide which of the requested phases to train.

    Args:
        recipe: The recipe of the run.
        folder: Its folder, which may be new.
        phases: Requested phases, in any order.
        resume: Whether phases that were interrupted may be continued.

    Raises:
        ValueError: A phase is unknown or requires one that is neither requested nor finished; the folder holds another
            run or an interrupted phase without `resume`; phase `glam` would become shorter, or longer without a
            checkpoint of its last step.
    """
    for phase in phases:
        if phase not in recipe.phases:
            hint = f" It needs the recipe's field {phase}." if phase in ALL_PHASES else ""
            raise ValueError(f"unknown phase {phase!r}; choose from {', '.join(recipe.phases)}.{hint}")
        for required in (required for required in REQUIRED[phase] if required in recipe.phases):
            if required not in phases and not folder.weights(required).exists():
                raise ValueError(f"phase {phase!r} needs phase {required!r}, which {folder.path} lacks; train it too.")
    folder.check(recipe)
    _check_glam_steps(recipe, folder, phases)
    to_train, finished = [], []
    for phase in (phase for phase in recipe.phases if phase in phases):
        steps = recipe.phase(phase).steps
        steps_done = _newest_checkpoint(folder, phase)
        is_interrupted = 0 < steps_done < steps
        if folder.weights(phase).exists() and not is_interrupted:
            finished.append(phase)
            continue
        if is_interrupted and not resume:
            raise ValueError(
                f"{folder.path} holds phase {phase!r} after {steps_done} of {steps} steps; continue with --resume, or "
                "choose another --out."
            )
        to_train.append(phase)
    return Plan(tuple(to_train), tuple(finished))


def _check_glam_steps(recipe: Recipe, folder: RunFolder, phases: Sequence[str]) -> None:
    """Phase `glam` may be extended from its last checkpoint; no other change of its steps is possible."""
    if not folder.config.exists():
        return
    old, new = folder.read_recipe().glam.steps, recipe.glam.steps
    newest = _newest_checkpoint(folder, "glam")
    is_finished = folder.weights("glam").exists()
    steps_done = max(newest, old) if is_finished else newest
    if new < steps_done:
        raise ValueError(f"{folder.path} holds phase 'glam' after {steps_done} steps; glam.steps={new} would be fewer.")
    if is_finished and new > old and ("glam" not in phases or newest < old):
        reason = (
            "it is not among the phases to train" if "glam" not in phases else "there is no checkpoint of its last step"
        )
        raise ValueError(
            f"{folder.path} holds phase 'glam' after {old} steps; glam.steps={new} would make it longer, but {reason}."
        )


def _newest_checkpoint(folder: RunFolder, phase: str) -> int:
    """Steps of the newest checkpoint; 0 if there is none."""
    return max(Checkpoints(folder.checkpoints, phase, kept=1).files(), default=0)
