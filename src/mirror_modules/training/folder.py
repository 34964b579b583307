"""The folder of a run: which file lies where, and that no run overwrites another."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mirror_modules
from mirror_modules.models.pretrained import read_json, write_json
from mirror_modules.training.recipes import Recipe


class RunFolder:
    """The files of a run.

    Args:
        path: The folder, made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.json"
        self.log, self.report = self.path / "metrics.jsonl", self.path / "report.html"
        self.model, self.pictures = self.path / "model", self.path / "pictures"

    def weights(self, phase: str) -> Path:
        """Where a finished phase lies."""
        return self.path / "phases" / f"{phase}.safetensors"

    def check(self, recipe: Recipe) -> None:
        """Require that the folder is new or empty, or holds a run of this recipe.

        Raises:
            ValueError: The folder holds a run of another recipe, or something that is not a run.
        """
        if self.config.exists():
            differences = list(_differences(read_json(self.config).get("recipe", {}), recipe.to_dict()))
            if differences:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({'; '.join(differences[:4])}); nothing in it was "
                    "touched. Choose another --out, or remove the folder."
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run; choose another --out.")

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and write its config.json."""
        (self.path / "phases").mkdir(parents=True, exist_ok=True)
        write_json(self.config, {"recipe": recipe.to_dict(), "versions": versions()})


def versions() -> dict[str, str]:
    """What a figure depends on besides its recipe."""
    return {
        "mirror_modules": mirror_modules.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} is {old!r} there and {new!r} now"
