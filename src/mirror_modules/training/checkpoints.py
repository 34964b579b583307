"""Checkpoints of a phase: written atomically, verified by checksum; the newest few and the best one are kept.

`glam-00000250-3f9a0c11d2e4b5a7.pt` is phase `glam` after 250 steps; the name ends with the first digits of the file's
SHA-256. The content is tensors and plain Python, for `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mirror_modules._files import flush_to_disk, replace
from mirror_modules.training.errors import is_dead_worker

DIGITS = 16


class Checkpoints:
    """The checkpoints of one phase.

    Args:
        folder: Their folder, created with the first one.
        phase: Name of the phase.
        kept: Number of newest checkpoints that are kept.
    """

    def __init__(self, folder: Path, phase: str, kept: int) -> None:
        self.folder, self.phase, self.kept = folder, phase, kept
        self._name = re.compile(rf"{re.escape(phase)}-(\d+)-([0-9a-f]{{{DIGITS}}})\.pt")

    def files(self) -> dict[int, Path]:
        """The checkpoints by step, oldest first."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        found = [(match, self.folder / name) for name in names if (match := self._name.fullmatch(name))]
        return {int(match[1]): path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))}

    def save(self, step: int, state: dict[str, Any], best_step: int | None = None) -> Path:
        """Write a checkpoint, and only then remove old ones.

        Args:
            step: Number of finished steps.
            state: Tensors and plain Python.
            best_step: A step whose checkpoint is kept at any age.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written; older checkpoints are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{self.phase}-{step:08}"
        try:
            try:
                with temporary.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:
                if is_dead_worker(error):
                    raise
                # torch wraps a failed write, or anything else raised during it, in a RuntimeError.
                raise error.__context__ or OSError(str(error)) from None
            path = self.folder / f"{self.phase}-{step:08}-{checksum(temporary)}.pt"
            flush_to_disk(temporary)
            replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_to_disk(self.folder)
        files = self.files()
        for old in list(files)[: -self.kept]:
            if old != best_step:
                # Windows refuses this while another program has the file open; the next save tries again.
                with suppress(PermissionError):
                    files[old].unlink()
        return path

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose checksum matches; None if there is none.

        Damaged checkpoints are renamed, so that they are not found again, and named in a warning.
        """
        for temporary in self.folder.glob(f".{self.phase}-*"):
            temporary.unlink()
        for path in reversed(self.files().values()):
            if is_whole(path):
                return path
            renamed = path.with_suffix(".damaged")
            replace(path, renamed)
            fallback = "the one before it is used" if self.files() else "there is no other: the phase starts again"
            warnings.warn(
                f"{path} is damaged: its checksum is not the one in its name. It is now {renamed.name}, and "
                f"{fallback}.",
                stacklevel=2,
            )
        return None


def checksum(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:DIGITS]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint exists and its checksum matches its name."""
    return path.is_file() and checksum(path) == path.stem.rpartition("-")[2]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
