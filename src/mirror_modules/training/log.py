"""The log of a phase: a progress bar or printed lines, metrics.jsonl, and optionally TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mirror_modules._files import write_text
from mirror_modules.training.recipes import LoggingRecipe

# Fields of a line that are not training metrics.
BOOKKEEPING = ("phase", "step", "seconds", "images", "waited", "skipped")


class PhaseLog:
    """Progress of one phase. Losses are fetched from the device only when they are logged.

    Args:
        phase: Name of the phase.
        steps: Total number of steps.
        path: The metrics.jsonl; lines of this phase after the restored step, from an interrupted run, are removed.
        recipe: How often to log, and where.
        done: `state_dict` of the checkpoint to continue from; None starts the phase.
        writes: Whether this rank writes and prints.
    """

    def __init__(
        self,
        phase: str,
        steps: int,
        path: Path,
        recipe: LoggingRecipe,
        *,
        done: dict[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.phase, self.steps, self.path, self.recipe, self.writes = phase, steps, path, recipe, writes
        state = done or {"step": 0, "images": 0, "seconds": 0.0, "waited": 0.0}
        self.step, self.images = int(state["step"]), int(state["images"])
        self.seconds_before, self.waited = float(state["seconds"]), float(state["waited"])

    def __enter__(self) -> PhaseLog:
        from tqdm import tqdm

        self.started = self.summarized = time.perf_counter()
        self.begun_with = self.images
        self.bar: Any = tqdm(
            desc=self.phase,
            initial=self.images,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5,
            # None: where there is no terminal.
            disable=None if self.writes else True,
        )
        self.board: Any = None
        if self.writes:
            truncate_phase(self.path, self.phase, self.step)
            self.file = self.path.open("a", encoding="utf-8", newline="\n")
            if self.recipe.tensorboard:
                self.board = _summary_writer()(str(self.path.parent / "tensorboard"), purge_step=self.step + 1)
        return self

    @property
    def seconds(self) -> float:
        """Time spent in the phase, earlier runs included."""
        return self.seconds_before + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """The counters of a resumed run. All lines written so far are on disk afterwards."""
        if self.writes:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"step": self.step, "images": self.images, "seconds": self.seconds, "waited": self.waited}

    def is_due(self) -> bool:
        """Whether the next step gets a line: the first, the last, and every nth one do."""
        step = self.step + 1
        return step % self.recipe.every == 0 or step in (1, self.steps)

    def record(self, images: int, figures: dict[str, Tensor | float], skipped: Tensor | None = None) -> None:
        """Count a step of `images` images, and log it if a line is due."""
        due = self.is_due()
        self.step += 1
        self.images += images
        if self.bar.total is None:
            self.bar.total = self.images + (self.steps - self.step) * images
        self.bar.update(images)
        if not due or not self.writes:
            return
        values = read_figures(figures)
        count = int(skipped) if skipped is not None else 0
        self.write(values, waited=round(self.waited, 3), skipped=count)
        hidden = ("accuracy", "norm", "learning_rate")
        shown = {name: f"{value:.2f}" for name, value in values.items() if not any(part in name for part in hidden)}
        self.bar.set_postfix({"step": f"{self.step}/{self.steps}", **dict(list(shown.items())[-5:])})
        quiet_for = time.perf_counter() - self.summarized
        if self.bar.disable and (quiet_for > 60 * self.recipe.summary_minutes or self.step == self.steps):
            self.summarized = time.perf_counter()
            self.info(", ".join([self.summary(count), *(f"{name} {value}" for name, value in shown.items())]))

    def write(self, values: dict[str, float], **bookkeeping: float) -> None:
        """Write a line of metrics.jsonl, and the same values to TensorBoard."""
        if not self.writes:
            return
        head = {"phase": self.phase, "step": self.step, "seconds": round(self.seconds, 3), "images": self.images}
        # JSON has neither NaN nor infinity.
        figures = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({**head, **bookkeeping, **figures}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{self.phase}/{name}", value, self.step)

    def show(self, name: str, picture: Any) -> None:
        """Write a picture (height, width, 3) to TensorBoard, if it is on."""
        if self.board is not None:
            self.board.add_image(f"{self.phase}/{name}", picture, self.step, dataformats="HWC")

    def summary(self, skipped: int) -> str:
        """Progress in words: step, rate, time left, share of time spent waiting for data, skipped steps."""
        rate = (self.images - self.begun_with) / max(time.perf_counter() - self.started, 1e-9)
        remaining = (self.steps - self.step) * self.images / max(self.step, 1) / max(rate, 1e-9)
        parts = [f"step {self.step} of {self.steps}", f"{rate:.1f} images/s"]
        if self.step < self.steps:
            parts.append(f"{int(remaining // 60)} min {int(remaining % 60)} s left")
        parts.append(f"{self.waited / max(self.seconds, 1e-9):.1%} waited for data")
        return ", ".join(parts + ([f"{skipped} steps skipped"] if skipped else []))

    def info(self, message: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.writes:
            self.bar.write(f"{self.phase}: {message}", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.writes:
            try:
                self.file.close()
            except OSError:
                # On a full disk, closing fails as the write before it did, whose error is the one to report.
                if kind is None:
                    raise
            if self.board is not None:
                self.board.close()


def read_figures(figures: dict[str, Tensor | float]) -> dict[str, float]:
    """Scalars as Python numbers, fetched from the device in one transfer."""
    tensors = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
    fetched = torch.stack([value.detach().float() for value in tensors.values()]).tolist() if tensors else []
    values = {**figures, **dict(zip(tensors, fetched))}
    return {name: round(float(value), 6) for name, value in values.items()}


def truncate_phase(path: Path, phase: str, step: int) -> None:
    """Remove from metrics.jsonl the lines of a phase after a step, and a truncated last line."""
    if path.exists():
        kept = [entry for entry in read_log(path) if entry["phase"] != phase or entry["step"] <= step]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_text(path, text)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The logged steps of metrics.jsonl. A truncated last line, from a run that was killed, is skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a logged step.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 text ({error}); remove the file.") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not _is_logged(entry):
            raise ValueError(f"{path} is damaged: line {number} is not a logged step; remove the line.")
        entries.append(entry)
    return entries


def _is_logged(entry: dict[str, Any]) -> bool:
    # Validation lines have no field `waited`.
    numbers = [entry.get(name) for name in ("step", "seconds", "images")] + [entry.get("waited", 0)]
    return isinstance(entry.get("phase"), str) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and number >= 0 for number in numbers
    )


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ImportError("logging.tensorboard needs more packages: pip install 'mirror-modules[train]'") from error
    return SummaryWriter
