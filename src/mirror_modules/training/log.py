"""What people see of a phase: a progress bar, and one line of metrics.jsonl per logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from torch import Tensor


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
    """Remove the lines of a phase from metrics.jsonl."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["phase"] != phase]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
