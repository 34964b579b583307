"""Which phases a run still has to train: a pure function of the recipe and the run's folder, which writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mirror_modules.training.checkpoints import Checkpoints
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import ALL_PHASES, AdversarialRecipe, Recipe

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
            run or an interrupted phase without `resume`; or the steps of a phase change in a way that its checkpoints
            do not allow.
    """
    for phase in phases:
        if phase not in recipe.phases:
            hint = f" It needs the recipe's field {phase}." if phase in ALL_PHASES else ""
            raise ValueError(f"unknown phase {phase!r}; choose from {', '.join(recipe.phases)}.{hint}")
        for required in (required for required in REQUIRED[phase] if required in recipe.phases):
            if required not in phases and not folder.weights(required).exists():
                raise ValueError(f"phase {phase!r} needs phase {required!r}, which {folder.path} lacks; train it too.")
    folder.check(recipe)
    _check_steps(recipe, folder, phases)
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


def _check_steps(recipe: Recipe, folder: RunFolder, phases: Sequence[str]) -> None:
    """A phase may get other steps, where its recipe allows it, if those that it has done stay as they are.

    A finished one is extended from its last checkpoint, unless another phase has started from its weights.
    """
    if not folder.config.exists():
        return
    before = folder.read_recipe()
    # A phase may be new, such as a second evaluator.
    for phase in (each for each in recipe.phases if each in before.phases):
        earlier, later = before.phase(phase), recipe.phase(phase)
        old, new = earlier.steps, later.steps
        newest, is_finished = _newest_checkpoint(folder, phase), folder.weights(phase).exists()
        steps_done = max(newest, old) if is_finished else newest
        holds, change = f"{folder.path} holds phase {phase!r} after {steps_done} steps", f"{phase}.steps={new}"
        if new < steps_done:
            raise ValueError(f"{holds}; {change} would be fewer.")
        if is_finished and new > old and (obstacle := _obstacle(recipe, folder, phases, phase, newest < old)):
            raise ValueError(f"{holds}; {change} would make it longer, but {obstacle}.")
        if isinstance(earlier, AdversarialRecipe) and isinstance(later, AdversarialRecipe):
            coarse = earlier.effective_coarse_steps, later.effective_coarse_steps
            if coarse[0] != coarse[1] and steps_done > min(coarse):
                raise ValueError(
                    f"{holds}, with the finest stage from step {coarse[0] + 1} on; {change} would begin it at step "
                    f"{coarse[1] + 1}, which changes steps already done. Choose another --out."
                )


def _obstacle(recipe: Recipe, folder: RunFolder, phases: Sequence[str], phase: str, lacks_last: bool) -> str:
    """The reason for which a finished phase cannot be extended; empty if there is none."""
    if phase not in phases:
        return "it is not among the phases to train"
    if lacks_last:
        return "there is no checkpoint of its last step"
    for other in (each for each in recipe.phases if phase in REQUIRED[each]):
        if folder.weights(other).exists() or _newest_checkpoint(folder, other) > 0:
            return f"phase {other!r} has started from its weights; choose another --out"
    return ""


def _newest_checkpoint(folder: RunFolder, phase: str) -> int:
    """Steps of the newest checkpoint; 0 if there is none."""
    return max(Checkpoints(folder.checkpoints, phase, kept=1).files(), default=0)
