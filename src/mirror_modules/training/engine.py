"""The steps of a phase: batches, checkpoints, validation, and every way in which a phase may end.

    with PhaseRun(run, "glam", state, recipe.glam, state.networks()) as phase:
        for batch in phase.batches():
            phase.record(adversarial_step(state, batch, recipe.glam))

An interrupted run continues from its newest intact checkpoint exactly as if it had not been interrupted.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch

from mirror_modules.data import CaptionBatch, RepeatableBatches
from mirror_modules.data.seeding import seeded
from mirror_modules.training.batches import Splits, load_batches, to_device, usable_candidates
from mirror_modules.training.checkpoints import Checkpoints, is_whole, load_checkpoint
from mirror_modules.training.distributed import ProcessGroup
from mirror_modules.training.errors import Interrupted, TrainingError, is_dead_worker, is_out_of_memory
from mirror_modules.training.features import ViewBatches, Views
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import PhaseLog, read_figures
from mirror_modules.training.network import StepResult, TrainedNetwork
from mirror_modules.training.recipes import ALL_PHASES, PhaseRecipe, Recipe, differences
from mirror_modules.training.validation import Unseen, unseen_pairs

# A terminal and torchrun may both send the same SIGINT.
SECONDS_BETWEEN_SIGNALS = 1.0
LOWER_IS_BETTER = ("cross_entropy", "redescription")
# The number after the recipe's seed, one per purpose, so that no two streams of random numbers coincide; `data` uses 0
# to 4. Then follow the phase, whose result does not depend on which other phases ran before it, and the rank if any.
DROPOUT, BATCHES, WEIGHTS, NOISE = range(5, 9)


class Signals:
    """Records SIGINT and SIGTERM until the current step is done. A second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0

    def __enter__(self) -> Signals:
        # Python installs handlers in the main thread only.
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and time.monotonic() - self._since > SECONDS_BETWEEN_SIGNALS
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = number, time.monotonic()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None is a handler that was not installed from Python; it cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass
class Run:
    """What the phases of a run share."""

    recipe: Recipe
    folder: RunFolder
    splits: Splits
    group: ProcessGroup
    signals: Signals = field(default_factory=Signals)

    @cached_property
    def unseen(self) -> Unseen:
        """The validation pairs on which metrics are computed."""
        return unseen_pairs(self.splits, self.recipe.model.max_words)

    @cached_property
    def candidates(self) -> int:
        """Candidate captions per image for R-precision: the recipe's, or fewer where the data have fewer."""
        return usable_candidates(self.recipe.evaluation.candidates, self.splits)

    def stop_if_interrupted(self) -> None:
        """End the run between two phases if a signal was received on some rank.

        Raises:
            Interrupted: A signal was received.
        """
        if self.group.any(self.signals.received is not None):
            number = self.signals.received or signal.SIGTERM
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name}; finished phases are in {self.folder.path}. Continue with --resume.", number
            )


class PhaseState(Protocol):
    """Networks and optimizers of a phase."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        ...


class PhaseRun:
    """The remaining steps of a phase.

    Args:
        run: The run.
        phase: Name of the phase.
        state: Its networks and optimizers, initialized; entering the context restores the newest checkpoint.
        recipe: The phase's fields of the recipe.
        networks: Networks whose learning rates are logged.
        views: Views of the images whose features the steps look up; None passes the images of each batch.
    """

    def __init__(
        self,
        run: Run,
        phase: str,
        state: PhaseState,
        recipe: PhaseRecipe,
        networks: dict[str, TrainedNetwork],
        *,
        views: Views | None = None,
    ) -> None:
        self.run, self.phase, self.state, self.recipe, self.networks = run, phase, state, recipe, networks
        self.engine, self.group, self.steps = run.recipe.engine, run.group, recipe.steps
        self.source = make_batches(run, phase, recipe, views)
        self.checkpoints = Checkpoints(run.folder.checkpoints, phase, self.engine.checkpoints_kept)
        self.best: dict[str, Any] = {}
        self._change_of_ranks = ""
        device = self.group.device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.consecutive = torch.zeros((), dtype=torch.long, device=device)

    def __enter__(self) -> PhaseRun:
        with ExitStack() as stack:
            # Dropout draws from the global generator; each rank has other images and needs other draws.
            stack.enter_context(self.group.fork_rng())
            dropout = seeded(self.run.recipe.seed, DROPOUT, ALL_PHASES.index(self.phase), self.group.rank)
            torch.manual_seed(dropout.initial_seed())
            newest = self.group.broadcast(self.checkpoints.newest_whole() if self.group.is_main else None)
            self.log = PhaseLog(
                self.phase,
                self.steps,
                self.run.folder.log,
                self.run.recipe.logging,
                done=None if newest is None else self._restore(newest),
                device=self.group.device,
                writes=self.group.is_main,
            )
            stack.enter_context(self._explained_errors())
            stack.enter_context(self.log)
            if self.source.batch_size < self.recipe.batch_size:
                self.log.info(f"batch size reduced to {self.source.batch_size}: there are too few training images")
            if newest is not None:
                self.log.info(f"continues after step {self.step} of {self.steps}, from {newest}{self._change_of_ranks}")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.log.step

    def batches(self) -> Iterator[CaptionBatch]:
        """The batches of the remaining steps; checkpoints are saved between two of them."""
        loader = load_batches(
            self.source,
            self.step,
            self.steps,
            workers=self.engine.loader_workers,
            pin_memory=self.group.device.type == "cuda",
        )
        self._stop_if_interrupted(saved=True)
        while self.step < self.steps:
            started = time.perf_counter()
            batch = to_device(next(loader), self.group.device)
            self.log.waited += time.perf_counter() - started
            yield batch
            if self.checkpoint_due:
                self.save()
            self._stop_if_interrupted(saved=self.checkpoint_due)

    def record(self, result: StepResult) -> None:
        """Count a step, and log it if a line is due.

        Raises:
            TrainingError: Too many consecutive steps were not finite.
        """
        self.skipped += ~result.finite
        self.consecutive = torch.where(result.finite, 0, self.consecutive + 1)
        figures: dict[str, Any] = dict(result.losses)
        for name, network in self.networks.items():
            figures[f"learning_rate_{name}" if len(self.networks) > 1 else "learning_rate"] = network.learning_rate
        due = self.log.is_due()
        self.log.record(self.source.batch_size, figures, self.skipped)
        if due or self.step % self.engine.max_skipped_steps == 0:
            self._check_finite(figures)

    def _check_finite(self, figures: dict[str, Any]) -> None:
        consecutive = int(self.consecutive)
        if consecutive < min(self.engine.max_skipped_steps, self.steps):
            return
        values = read_figures(figures)
        names = [name for name, value in values.items() if not abs(value) < float("inf")]
        raise TrainingError(
            f"phase {self.phase}: {consecutive} consecutive steps up to step {self.step} had a non-finite value "
            f"({', '.join(names) or 'on another rank'}); these steps were skipped, and {self._newest_checkpoint()}. "
            "Start again with a lower learning rate or a higher precision, or look for non-finite values in the data."
        )

    @property
    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is written after this step."""
        return self.step % self.engine.checkpoint_every == 0 or self.step == self.steps

    @property
    def validation_due(self) -> bool:
        """Whether validation metrics are computed after this step; on rank 0 only."""
        every = self.run.recipe.logging.validate_every
        is_requested = every > 0 and self.step % every == 0
        return self.group.is_main and (is_requested or (self.recipe.keep_best is not None and self.checkpoint_due))

    @property
    def samples_due(self) -> bool:
        """Whether a sheet of samples is generated after this step; on rank 0 only."""
        every = self.run.recipe.logging.samples_every
        return self.group.is_main and every > 0 and (self.step % every == 0 or self.step == self.steps)

    def validated(self, figures: dict[str, float]) -> None:
        """Log validation metrics, and update the best step among those with a checkpoint."""
        self.log.write({f"validation_{name}": round(value, 6) for name, value in figures.items()})
        name = self.recipe.keep_best
        if name is None or not self.checkpoint_due:
            return
        sign = -1 if name in LOWER_IS_BETTER else 1
        if math.isfinite(figures[name]) and (not self.best or sign * figures[name] > sign * self.best["value"]):
            self.best = {"step": self.step, "value": figures[name]}

    def save(self) -> None:
        """Write a checkpoint with the random states of all ranks."""
        ranks = self.group.all_gather_states(_random_state(self.group.device))
        if not self.group.is_main:
            return
        content = {
            "phase": self.phase,
            "recipe": self.run.recipe.to_dict(),
            "state": self.state.state_dict(),
            "random": ranks,
            "log": self.log.state_dict(),
            "best": self.best,
            "skipped": [int(self.skipped), int(self.consecutive)],
        }
        self.checkpoints.save(self.step, content, self.best.get("step"))

    def restore_best(self) -> None:
        """Load the weights of the best step if `keep_best` selected one."""
        best = self.group.broadcast(self.best)
        if not best or best["step"] == self.step:
            return
        path = self.checkpoints.files().get(best["step"])
        if path is None or not is_whole(path):
            self.log.info(f"the checkpoint of the best step, {best['step']}, is missing or damaged; using the last one")
            return
        self.log.info(f"best step: {best['step']}, with {self.recipe.keep_best} {best['value']:.4g}")
        self.state.load_state_dict(load_checkpoint(path)["state"])

    def _restore(self, path: Path) -> dict[str, Any]:
        """Restore networks, optimizers and random states from a checkpoint; returns the state of the log."""
        try:
            content = load_checkpoint(path)
            ranks, log, old = content["random"], content["log"], Recipe.from_dict(content["recipe"])
            if content["phase"] != self.phase or self.checkpoints.files().get(log["step"]) != path:
                raise ValueError(f"it belongs to phase {content['phase']!r} after step {log['step']}")
            if other := [words for words, harmless in differences(old, self.run.recipe) if not harmless]:
                raise ValueError(f"{'; '.join(other)}")
        except Exception as error:
            # A damaged or foreign file may raise any exception.
            raise TrainingError(
                f"{path} is not a checkpoint of phase {self.phase!r} of this run "
                f"({' '.join(str(error).split())[:300]}); remove it, and continue from the checkpoint before it."
            ) from error
        self.state.load_state_dict(content["state"])
        if len(ranks) == self.group.world_size:
            _set_random_state(ranks[self.group.rank], self.group.device)
        else:
            # Networks and batches are those of all ranks; only dropout draws from the random states of single ranks.
            self._change_of_ranks = (
                f"; it was written by {len(ranks)} processes and this run has {self.group.world_size}, so dropout is "
                "seeded anew"
            )
            numbers = DROPOUT, ALL_PHASES.index(self.phase), self.group.rank, log["step"]
            torch.manual_seed(seeded(self.run.recipe.seed, *numbers).initial_seed())
        self.best = content["best"]
        self.skipped.fill_(content["skipped"][0])
        self.consecutive.fill_(content["skipped"][1])
        return dict(log)

    def _stop_if_interrupted(self, *, saved: bool) -> None:
        if not self.group.any(self.run.signals.received is not None):
            return
        if not saved:
            self.save()
        # If one rank exits, torchrun kills the rest: wait until rank 0 has saved.
        self.group.barrier()
        number = self.run.signals.received or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.steps} of phase {self.phase}; "
            f"{self._newest_checkpoint()}. Continue with --resume.",
            number,
        )

    def _newest_checkpoint(self) -> str:
        files = self.checkpoints.files()
        return f"the newest checkpoint is {files[max(files)]}" if files else "there is no checkpoint of this phase yet"

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turn errors of the system and of torch into a TrainingError that names step, checkpoint and remedy."""
        try:
            yield
        except BaseException as error:
            message = self._explanation(error)
            if message is None:
                raise
            raise TrainingError(f"phase {self.phase}: {message}") from error

    def _explanation(self, error: BaseException) -> str | None:
        if is_dead_worker(error):
            return (
                f"after step {self.step} a loader process died ({error}); {self._newest_checkpoint()}. Continue with "
                "--resume, or without engine.loader_workers."
            )
        if isinstance(error, OSError):
            return (
                f"after step {self.step} the operating system raised an error ({error}); "
                f"{self._newest_checkpoint()}. Fix the disk, and continue with --resume."
            )
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return (
                f"step {self.step + 1} ran out of memory; {self._newest_checkpoint()}. Lower "
                f"{self.phase}.batch_size, increase accumulate if the phase has it, or make the model smaller."
            )
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            return (
                f"torch.compile failed ({' '.join(str(error).split())[:200]}); install a C++ compiler, or Triton for a "
                "GPU, or turn engine.compile off."
            )
        return None


def make_batches(run: Run, phase: str, recipe: PhaseRecipe, views: Views | None = None) -> RepeatableBatches:
    """The batches of a phase for this rank; with views, their rows instead of images.

    Raises:
        ValueError: The batch cannot be divided equally among ranks and parts.
    """
    captions, group = run.splits.training, run.group
    parts = group.world_size * getattr(recipe, "accumulate", 1)
    if recipe.batch_size % parts:
        raise ValueError(
            f"{phase}.batch_size={recipe.batch_size} cannot be divided among {group.world_size} processes, "
            f"{parts // group.world_size} parts each; give a multiple of {parts}."
        )
    # A small data set gets smaller batches.
    batch_size = min(recipe.batch_size, len(captions) // parts * parts)
    if batch_size == 0:
        raise ValueError(
            f"phase {phase} divides each batch into {parts} parts, but there are {len(captions)} training images; use "
            f"more images, fewer processes, or a lower {phase}.accumulate."
        )
    resolution = run.recipe.model.resolutions[-1]
    seed = int(seeded(run.recipe.seed, BATCHES, ALL_PHASES.index(phase)).initial_seed())
    if views is not None:
        return ViewBatches(views, captions, batch_size, seed, rank=group.rank, ranks=group.world_size)
    return RepeatableBatches(
        captions,
        batch_size,
        seed,
        crop=resolution if captions.images.shape[1] > resolution else None,
        rank=group.rank,
        ranks=group.world_size,
    )


def _random_state(device: torch.device) -> torch.Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    # A checkpoint written on a CPU has no state for a GPU.
    if device.type == "cuda" and len(state) > length:
        torch.cuda.set_rng_state(state[length:], device)
