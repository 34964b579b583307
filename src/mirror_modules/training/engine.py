"""The steps of a phase: where they begin, what is kept of them, and how they end.

    with PhaseRun(run, "glam", state, recipe.glam) as phase:
        for batch in phase.batches():
            phase.record(adversarial_step(state, batch, recipe.glam))

A run that is stopped, by whatever, goes on from its newest whole checkpoint as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch

from mirror_modules.data import CaptionBatch, RepeatableBatches
from mirror_modules.data.batching import seeded
from mirror_modules.training.batches import Splits, load_batches, to_device
from mirror_modules.training.checkpoints import Checkpoints, is_whole, load_checkpoint
from mirror_modules.training.errors import Interrupted, TrainingError, is_dead_worker, is_out_of_memory
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import PhaseLog, read_figures
from mirror_modules.training.recipes import (
    PHASES,
    AdversarialRecipe,
    CaptionerRecipe,
    MatchingRecipe,
    Recipe,
    differences,
)
from mirror_modules.training.trainee import Outcome, Trainee
from mirror_modules.training.validation import Unseen, unseen_pairs
from mirror_modules.training.world import World

# A terminal and torchrun may both send the same SIGINT.
SECONDS_BETWEEN_WISHES = 1.0
LOWER_IS_BETTER = ("cross_entropy", "redescription")


class Signals:
    """SIGINT and SIGTERM, remembered until the step is done. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread alone.
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and time.monotonic() - self._since > SECONDS_BETWEEN_WISHES
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = number, time.monotonic()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """What all phases of a run share."""

    recipe: Recipe
    folder: RunFolder
    splits: Splits
    world: World
    signals: Signals = field(default_factory=Signals)

    @cached_property
    def unseen(self) -> Unseen:
        """What is measured on."""
        return unseen_pairs(self.splits, self.recipe.model.max_words)

    def stop_if_asked(self) -> None:
        """Between two phases: end, if a signal has come.

        Raises:
            Interrupted: It has.
        """
        if self.world.any(self.signals.received is not None):
            number = self.signals.received or signal.SIGTERM
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name}; finished phases are in {self.folder.path}. Go on with --resume.", number
            )


class PhaseState(Protocol):
    """What a phase carries from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        ...


class PhaseRun:
    """The steps of a phase that are still to be done.

    Args:
        run: The run.
        phase: The phase's name.
        state: Its networks and optimizers, at the phase's beginning; entering puts them where the newest checkpoint
            was.
        recipe: The phase's steps and batch size.
        trainees: Networks whose step sizes are logged.
        with_images: Whether the steps look at images.
    """

    def __init__(
        self,
        run: Run,
        phase: str,
        state: PhaseState,
        recipe: MatchingRecipe | CaptionerRecipe | AdversarialRecipe,
        trainees: dict[str, Trainee],
        *,
        with_images: bool = True,
    ) -> None:
        self.run, self.phase, self.state, self.recipe, self.trainees = run, phase, state, recipe, trainees
        self.engine, self.world, self.steps = run.recipe.engine, run.world, recipe.steps
        self.source = make_batches(run, phase, recipe, with_images=with_images)
        self.checkpoints = Checkpoints(run.folder.checkpoints, phase, self.engine.checkpoints_kept)
        self.best: dict[str, Any] = {}
        device = self.world.device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.long, device=device)
        # Dropout is drawn from here: other numbers on each rank, whose images are others.
        seed = seeded(run.recipe.seed, PHASES.index(phase), self.world.rank).initial_seed()
        torch.manual_seed(seed)

    def __enter__(self) -> PhaseRun:
        newest = self.world.agree(self.checkpoints.newest_whole() if self.world.is_main else None)
        done = None
        if newest is not None:
            done = self._restore(newest)
        self.log = PhaseLog(
            self.phase,
            self.steps,
            self.run.folder.log,
            self.run.recipe.logging,
            done=done,
            writes=self.world.is_main,
        ).__enter__()
        if self.source.batch_size < self.recipe.batch_size:
            self.log.say(f"batches of {self.source.batch_size}: there are no more training images")
        if newest is not None:
            self.log.say(f"goes on after step {self.step} of {self.steps}, from {newest}")
        return self

    @property
    def step(self) -> int:
        """Steps done."""
        return self.log.step

    def batches(self) -> Iterator[CaptionBatch]:
        """The batches of the steps to be done; between two of them, what is due is saved."""
        loader = load_batches(
            self.source,
            self.step,
            self.steps,
            workers=self.engine.loader_workers,
            pin_memory=self.world.device.type == "cuda",
        )
        self._stop_if_asked(saved=True)
        while self.step < self.steps:
            started = time.perf_counter()
            batch = to_device(next(loader), self.world.device)
            self.log.waited += time.perf_counter() - started
            yield batch
            if self.checkpoint_due:
                self.save()
            self._stop_if_asked(saved=self.checkpoint_due)

    def record(self, outcome: Outcome) -> None:
        """Count a step, and log it if it is due.

        Raises:
            TrainingError: Too many steps in a row were not finite.
        """
        self.skipped += ~outcome.finite
        self.in_a_row = torch.where(outcome.finite, 0, self.in_a_row + 1)
        figures: dict[str, Any] = dict(outcome.losses)
        for name, trainee in self.trainees.items():
            figures[f"learning_rate_{name}" if len(self.trainees) > 1 else "learning_rate"] = trainee.learning_rate
        due = self.log.is_due()
        self.log.record(self.source.batch_size, figures, self.skipped)
        if due or self.step % self.engine.most_skipped_in_a_row == 0:
            self._check_finite(figures)

    def _check_finite(self, figures: dict[str, Any]) -> None:
        in_a_row = int(self.in_a_row)
        if in_a_row < min(self.engine.most_skipped_in_a_row, self.steps):
            return
        values = read_figures(figures)
        names = [name for name, value in values.items() if not abs(value) < float("inf")]
        raise TrainingError(
            f"phase {self.phase}: step {self.step} was number {in_a_row} in a row with a value that is not finite "
            f"({', '.join(names) or 'on another rank'}); these steps were skipped, and {self._last_good()}. Lower the "
            "learning rate or raise the precision, and begin anew, or look for what is not finite in the data."
        )

    @property
    def checkpoint_due(self) -> bool:
        """Is a checkpoint written after this step?"""
        return self.step % self.engine.checkpoint_every == 0 or self.step == self.steps

    @property
    def validation_due(self) -> bool:
        """Is something measured on the validation images after this step?"""
        every = self.run.recipe.logging.validate_every
        is_asked_for = every > 0 and self.step % every == 0
        return self.world.is_main and (is_asked_for or (self.recipe.keep_best is not None and self.checkpoint_due))

    @property
    def samples_due(self) -> bool:
        """Is a sheet of samples drawn after this step?"""
        every = self.run.recipe.logging.samples_every
        return self.world.is_main and every > 0 and (self.step % every == 0 or self.step == self.steps)

    def validated(self, figures: dict[str, float]) -> None:
        """Log what was measured on the validation images, and remember the best step that has a checkpoint."""
        self.log.write({f"validation_{name}": round(value, 6) for name, value in figures.items()})
        name = self.recipe.keep_best
        if name is None or not self.checkpoint_due:
            return
        sign = -1 if name in LOWER_IS_BETTER else 1
        if math.isfinite(figures[name]) and (not self.best or sign * figures[name] > sign * self.best["value"]):
            self.best = {"step": self.step, "value": figures[name]}

    def save(self) -> None:
        """Write a checkpoint of all ranks."""
        ranks = self.world.gather_states(_random_state(self.world.device))
        if not self.world.is_main:
            return
        content = {
            "phase": self.phase,
            "recipe": self.run.recipe.to_dict(),
            "state": self.state.state_dict(),
            "random": ranks,
            "log": self.log.state_dict(),
            "best": self.best,
            "skipped": [int(self.skipped), int(self.in_a_row)],
        }
        self.checkpoints.save(self.step, content, self.best.get("step"))

    def take_best(self) -> None:
        """Put the networks where they were after the best step, if one is kept."""
        best = self.world.agree(self.best)
        if not best or best["step"] == self.step:
            return
        path = self.checkpoints.files().get(best["step"])
        if path is None or not is_whole(path):
            self.log.say(f"the checkpoint of the best step, {best['step']}, is lost or damaged; the last one is taken")
            return
        self.log.say(f"step {best['step']} was the best: {self.recipe.keep_best} {best['value']:.4g}")
        self.state.load_state_dict(load_checkpoint(path)["state"])

    def _restore(self, path: Path) -> dict[str, Any]:
        """Put everything where a checkpoint has it, and give back what the log goes on from."""
        try:
            content = load_checkpoint(path)
            ranks, log, old = content["random"], content["log"], Recipe.from_dict(content["recipe"])
            if content["phase"] != self.phase or self.checkpoints.files().get(log["step"]) != path:
                raise ValueError(f"it is one of phase {content['phase']!r} after step {log['step']}")
            if other := [words for words, harmless in differences(old, self.run.recipe) if not harmless]:
                raise ValueError(f"{'; '.join(other)}")
        except Exception as error:
            # Whatever was put there: reading it may fail in any way.
            raise TrainingError(
                f"{path} is no checkpoint of phase {self.phase!r} of this run ({' '.join(str(error).split())[:300]}); "
                "remove it, and go on from the one before."
            ) from error
        if len(ranks) != self.world.size:
            raise TrainingError(
                f"{path} is of {len(ranks)} processes, and there are {self.world.size} now: a resumed run needs as "
                "many."
            )
        self.state.load_state_dict(content["state"])
        _set_random_state(ranks[self.world.rank], self.world.device)
        self.best = content["best"]
        self.skipped.fill_(content["skipped"][0])
        self.in_a_row.fill_(content["skipped"][1])
        return dict(log)

    def _stop_if_asked(self, *, saved: bool) -> None:
        if not self.world.any(self.run.signals.received is not None):
            return
        if not saved:
            self.save()
        # A process that leaves makes torchrun end the others, and the first one is still writing.
        self.world.wait()
        number = self.run.signals.received or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.steps} of phase {self.phase}; "
            f"{self._last_good()}. Go on with --resume.",
            number,
        )

    def _last_good(self) -> str:
        files = self.checkpoints.files()
        return f"the newest checkpoint is {files[max(files)]}" if files else "there is no checkpoint of this phase yet"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.log.__exit__(kind, error, trace)
        except OSError as unwritten:
            # What could not be written to a full disk is tried once more when the file is closed.
            error = error or unwritten
        if is_dead_worker(error):
            raise TrainingError(
                f"phase {self.phase}: after step {self.step} a process that prepares batches has died ({error}); "
                f"{self._last_good()}. Go on with --resume, or without engine.loader_workers."
            ) from error
        if isinstance(error, OSError):
            raise TrainingError(
                f"phase {self.phase}: after step {self.step} the system refused something ({error}); "
                f"{self._last_good()}. Mend the disk, and go on with --resume."
            ) from error
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise TrainingError(
                f"phase {self.phase}: step {self.step + 1} needs more memory than there is; {self._last_good()}. Lower "
                f"{self.phase}.batch_size, raise accumulate where the phase has it, or make the model smaller."
            ) from error
        if kind is not None and kind.__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise TrainingError(
                f"phase {self.phase}: torch.compile failed ({' '.join(str(error).split())[:200]}); install a C++ "
                "compiler, or Triton for a GPU, or leave engine.compile out."
            ) from error


def make_batches(
    run: Run, phase: str, recipe: MatchingRecipe | CaptionerRecipe | AdversarialRecipe, *, with_images: bool = True
) -> RepeatableBatches:
    """The batches of a phase for this rank.

    Raises:
        ValueError: The batch cannot be divided equally.
    """
    captions, world = run.splits.training, run.world
    parts = world.size * getattr(recipe, "accumulate", 1)
    if recipe.batch_size % parts:
        raise ValueError(
            f"{phase}.batch_size={recipe.batch_size} cannot be divided among {world.size} processes, "
            f"{parts // world.size} parts each; give a multiple of {parts}."
        )
    # A small data set has smaller batches.
    batch_size = min(recipe.batch_size, len(captions) // parts * parts)
    if batch_size == 0:
        raise ValueError(
            f"phase {phase} divides each batch into {parts} parts, but there are {len(captions)} training images; take "
            f"more images, fewer processes, or a lower {phase}.accumulate."
        )
    resolution = run.recipe.model.resolutions[-1]
    return RepeatableBatches(
        captions,
        batch_size,
        int(seeded(run.recipe.seed, 7, PHASES.index(phase)).initial_seed()),
        crop=resolution if captions.images.shape[1] > resolution else None,
        rank=world.rank,
        ranks=world.size,
        with_images=with_images,
    )


def _random_state(device: torch.device) -> torch.Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    # A checkpoint of a CPU has none for a GPU.
    if device.type == "cuda" and len(state) > length:
        torch.cuda.set_rng_state(state[length:], device)
