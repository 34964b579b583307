"""The log of a phase: a progress bar or printed lines, metrics.jsonl, and optionally TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mirror_modules._files import write_text
from mirror_modules.training.recipes import LoggingRecipe

# Columns that a progress bar keeps; what does not fit beside it is not shown.
BAR_COLUMNS = 20
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
# Without the rate, for narrow terminals.
SHORT_BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"
# Seconds over which a rate is measured, and the share of the best rate below which it is slow.
RATE_SECONDS = 60.0
SLOW_SHARE = 1 / 3
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
        device: Device that trains; names the remedy where training becomes slow.
        writes: Whether this rank writes and prints.
        clock: Seconds since some moment.
    """

    def __init__(
        self,
        phase: str,
        steps: int,
        path: Path,
        recipe: LoggingRecipe,
        *,
        done: dict[str, Any] | None = None,
        device: torch.device | None = None,
        writes: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.phase, self.steps, self.path, self.recipe, self.writes = phase, steps, path, recipe, writes
        self.device, self.clock = device or torch.device("cpu"), clock
        state = done or {"step": 0, "images": 0, "seconds": 0.0, "waited": 0.0}
        self.step, self.images = int(state["step"]), int(state["images"])
        self.seconds_before, self.waited = float(state["seconds"]), float(state["waited"])

    def __enter__(self) -> PhaseLog:
        self.started = self.summarized = self.rated = self.clock()
        self.begun_with = self.rated_images = self.images
        self.best_rate, self.is_slow = 0.0, False
        self.bar = progress_bar(
            desc=self.phase,
            initial=self.images,
            unit=" images",
            unit_scale=True,
            mininterval=0.5,
            **({} if self.writes else {"disable": True}),
        )
        self.board: Any = None
        if self.writes:
            truncate_phase(self.path, self.phase, self.step)
            self.file = self.path.open("a", encoding="utf-8", newline="\n")
            if self.recipe.tensorboard:
                self.board = _summary_writer()(str(self.path.parent / "tensorboard"), purge_step=self.step + 1)
        if self.bar.disable:
            self.info(f"starts after step {self.step} of {self.steps}" if self.step else f"starts, {self.steps} steps")
        return self

    @property
    def seconds(self) -> float:
        """Time spent in the phase, earlier runs included."""
        return self.seconds_before + self.clock() - self.started

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
        self._check_rate()
        if not due or not self.writes:
            return
        values = read_figures(figures)
        count = int(skipped) if skipped is not None else 0
        self.write(values, waited=round(self.waited, 3), skipped=count)
        hidden = ("accuracy", "norm", "learning_rate")
        shown = {name: f"{value:.2f}" for name, value in values.items() if not any(part in name for part in hidden)}
        self.bar.set_postfix({"step": f"{self.step}/{self.steps}", **dict(list(shown.items())[-5:])})
        quiet_for = self.clock() - self.summarized
        if self.bar.disable and (quiet_for > 60 * self.recipe.summary_minutes or self.step == self.steps):
            self.summarized = self.clock()
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
        rate = (self.images - self.begun_with) / max(self.clock() - self.started, 1e-9)
        remaining = (self.steps - self.step) * self.images / max(self.step, 1) / max(rate, 1e-9)
        parts = [f"step {self.step} of {self.steps}", f"{rate:.1f} images/s"]
        if self.step < self.steps:
            parts.append(f"{in_minutes(remaining)} left")
        else:
            parts.append(f"finished after {in_minutes(self.seconds)}")
        parts.append(f"{self.waited / max(self.seconds, 1e-9):.1%} waited for data")
        return ", ".join(parts + ([f"{skipped} steps skipped"] if skipped else []))

    def _check_rate(self) -> None:
        """Print a line, once, when the rate falls far below the best one of the phase."""
        seconds = self.clock() - self.rated
        if seconds < RATE_SECONDS:
            return
        rate = (self.images - self.rated_images) / seconds
        self.rated, self.rated_images = self.clock(), self.images
        self.best_rate = max(self.best_rate, rate)
        if rate >= SLOW_SHARE * self.best_rate or self.is_slow:
            return
        self.is_slow = True
        if self.device.type != "cpu":
            remedy = "other programs may use the GPU or the processor"
        elif torch.get_num_threads() > 1:
            remedy = (
                "other programs may use the processor, where several threads wait for each other: stop with Ctrl-C and "
                "continue with --resume --threads 1"
            )
        else:
            remedy = "other programs may use the processor"
        self.info(f"slow, {rate:.1f} images/s in the last minute after up to {self.best_rate:.1f}; {remedy}")

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


def progress_bar(**options: Any) -> Any:
    """A tqdm progress bar in a terminal, nothing elsewhere. The bar keeps its width: what does not fit is not shown.

    Args:
        options: Arguments of tqdm.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        @staticmethod
        def format_meter(
            n: float, total: float, elapsed: float, ncols: int | None = None, postfix: str | None = None, **options: Any
        ) -> str:
            entries = postfix.split(", ") if postfix else []
            layouts = [(BAR_FORMAT, ", ".join(entries[:count])) for count in range(len(entries), -1, -1)]
            for bar_format, shown in [*layouts, (SHORT_BAR_FORMAT, "")]:
                options |= {"bar_format": bar_format, "postfix": shown}
                without_bar = {**options, "bar_format": bar_format.replace("{bar}", "")}
                used = len(tqdm.format_meter(n, total, elapsed, **without_bar))
                if ncols is None or used + BAR_COLUMNS <= ncols:
                    break
            return str(tqdm.format_meter(n, total, elapsed, ncols=ncols, **options))

    return Bar(**{"dynamic_ncols": True, "disable": None, **options})


def in_minutes(seconds: float) -> str:
    """A duration such as "3 min 20 s"."""
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


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
