"""What people see of a phase: a progress bar, and one line of metrics.jsonl per logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from mirror_modules.models.pretrained import write_whole


class PhaseLog:
    """Progress of one phase. Losses are read from the device only when they are logged.

    Args:
        phase: The phase's name.
        steps: Steps it will take.
        path: The metrics.jsonl; earlier lines of this phase, from a run that was cut off, are removed.
        every: Steps between two lines; the first and the last step always have one.
    """

    def __init__(self, phase: str, steps: int, path: Path, every: int) -> None:
        self.phase, self.steps, self.path, self.every = phase, steps, path, every
        self.done = self.images = 0

    def __enter__(self) -> PhaseLog:
        from tqdm import tqdm

        drop_phase(self.path, self.phase)
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = tqdm(desc=self.phase, unit=" images", unit_scale=True, dynamic_ncols=True, mininterval=0.5)
        self.started = time.perf_counter()
        return self

    def step(self, images: int, losses: dict[str, Tensor]) -> None:
        """Count one step of so many images."""
        self.done += 1
        self.images += images
        if self.bar.total is None:
            self.bar.total = self.steps * images
        self.bar.update(images)
        if self.done % self.every and self.done not in (1, self.steps):
            return
        values = {name: round(float(loss.detach()), 6) for name, loss in losses.items()}
        seconds = time.perf_counter() - self.started
        line = {"phase": self.phase, "step": self.done, "seconds": round(seconds, 3), "images": self.images, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        shown = {name: f"{value:.2f}" for name, value in list(values.items())[-5:]}
        self.bar.set_postfix({"step": f"{self.done}/{self.steps}", **shown})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self.started
        self.bar.close()
        self.file.close()


def drop_phase(path: Path, phase: str) -> None:
    """Remove the lines of a phase from metrics.jsonl, and a last line that was cut off."""
    if path.exists():
        text = "".join(json.dumps(entry) + "\n" for entry in read_log(path) if entry["phase"] != phase)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The logged steps of metrics.jsonl. A last line without its end, from a run that was killed, is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a logged step.
    """
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not {"phase", "step", "seconds", "images"} <= entry.keys():
            raise ValueError(f"{path} is damaged: line {number} is not a logged step; remove the line.")
        entries.append(entry)
    return entries
