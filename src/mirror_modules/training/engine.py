"""The steps of a phase: where they begin, what is kept of them, and how they end.

    with PhaseRun(run, "glam", state, recipe.glam) as phase:
        for batch in phase.batches():
            phase.record(adversarial_step(state, batch, recipe.glam))

A run that is stopped, by whatever, goes on from its newest whole checkpoint as if nothing had happened.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch

from mirror_modules.data import CaptionBatch, RepeatableBatches
from mirror_modules.data.batching import seeded
from mirror_modules.training.batches import Splits, load_batches, to_device
from mirror_modules.training.checkpoints import Checkpoints, is_whole, load_checkpoint
from mirror_modules.training.errors import Interrupted, TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import PhaseLog, read_figures
from mirror_modules.training.recipes import PHASES, AdversarialRecipe, CaptionerRecipe, MatchingRecipe, Recipe
from mirror_modules.training.trainee import Outcome, Trainee
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
    """

    def __init__(
        self,
        run: Run,
        phase: str,
        state: PhaseState,
        recipe: MatchingRecipe | CaptionerRecipe | AdversarialRecipe,
        trainees: dict[str, Trainee],
    ) -> None:
        self.run, self.phase, self.state, self.recipe, self.trainees = run, phase, state, recipe, trainees
        self.engine, self.world, self.steps = run.recipe.engine, run.world, recipe.steps
        self.source = make_batches(run, phase, recipe)
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
            content = load_checkpoint(newest)
            self._restore(content, str(newest))
            done = content["log"]
        self.log = PhaseLog(
            self.phase,
            self.steps,
            self.run.folder.log,
            self.run.recipe.logging,
            done=done,
            writes=self.world.is_main,
        ).__enter__()
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
        if in_a_row < self.engine.most_skipped_in_a_row:
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
        return (every > 0 and self.step % every == 0) or (self.recipe.keep_best is not None and self.checkpoint_due)

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
        if not self.best or sign * figures[name] > sign * self.best["value"]:
            self.best = {"step": self.step, "value": figures[name]}

    def save(self) -> None:
        """Write a checkpoint of all ranks."""
        ranks = self.world.gather_states(_random_state(self.world.device))
        if not self.world.is_main:
            return
        content = {
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

    def _restore(self, content: dict[str, Any], source: str) -> None:
        ranks = len(content["random"])
        if ranks != self.world.size:
            raise TrainingError(
                f"{source} is of {ranks} processes, and there are {self.world.size} now: a resumed run needs as many."
            )
        self.state.load_state_dict(content["state"])
        _set_random_state(content["random"][self.world.rank], self.world.device)
        self.best = content["best"]
        self.skipped.fill_(content["skipped"][0])
        self.in_a_row.fill_(content["skipped"][1])

    def _stop_if_asked(self, *, saved: bool) -> None:
        if not self.world.any(self.run.signals.received is not None):
            return
        if not saved:
            self.save()
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
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            # torch says it by a signal, which may come anywhere in the step.
            raise TrainingError(
                f"phase {self.phase}: after step {self.step} a process that prepares batches has died ({error}); "
                f"{self._last_good()}. Go on with --resume, or without engine.loader_workers."
            ) from error
        if isinstance(error, OSError):
            raise TrainingError(
                f"phase {self.phase}: after step {self.step} something could not be written ({error}); "
                f"{self._last_good()}. Mend the disk, and go on with --resume."
            ) from error


def make_batches(
    run: Run, phase: str, recipe: MatchingRecipe | CaptionerRecipe | AdversarialRecipe
) -> RepeatableBatches:
    """The batches of a phase for this rank.

    Raises:
        ValueError: The batch cannot be divided equally.
    """
    captions, world = run.splits.training, run.world
    parts = world.size * getattr(recipe, "accumulate", 1)
    # A small data set has smaller batches.
    batch_size = min(recipe.batch_size, len(captions) // parts * parts)
    if batch_size % parts or batch_size == 0:
        raise ValueError(
            f"{phase}.batch_size={recipe.batch_size} cannot be divided among {world.size} processes, "
            f"{parts // world.size} parts each; give a multiple of {parts}."
        )
    resolution = run.recipe.model.resolutions[-1]
    return RepeatableBatches(
        captions,
        batch_size,
        int(seeded(run.recipe.seed, 7, PHASES.index(phase)).initial_seed()),
        crop=resolution if captions.images.shape[1] > resolution else None,
        rank=world.rank,
        ranks=world.size,
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
