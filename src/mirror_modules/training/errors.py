"""What ends a run, besides its last step."""

from __future__ import annotations

import signal

import torch


class TrainingError(RuntimeError):
    """The run cannot go on; what is on disk is whole."""


class Interrupted(TrainingError):
    """SIGINT or SIGTERM came; the step was finished and its checkpoint written.

    Args:
        message: What is kept, and how to go on.
        number: The signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status, 128 and the signal, as a shell gives it: 130 or 143."""
        return 128 + signal.Signals(self.number)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Does an error of torch say that memory, of a GPU or of the machine, was not enough?"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_dead_worker(error: BaseException | None) -> bool:
    """Does torch say that a process of a loader has died? It says so by a signal, in the middle of anything."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
