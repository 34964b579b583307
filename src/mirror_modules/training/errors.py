"""The errors that end a run."""

from __future__ import annotations

import signal

import torch


class TrainingError(RuntimeError):
    """Training cannot continue; all files on disk are intact."""


class Interrupted(TrainingError):
    """SIGINT or SIGTERM was received; the step was finished and its checkpoint written.

    Args:
        message: The newest checkpoint, and how to continue.
        number: The signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status of a shell, 128 plus the signal: 130 or 143."""
        return 128 + signal.Signals(self.number)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch means that the GPU or the machine ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_dead_worker(error: BaseException | None) -> bool:
    """Whether an error means that a loader process died; torch raises it from a signal handler, at any point."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
