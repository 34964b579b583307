"""The folder of a run: paths of its files, and checks that no run overwrites another."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import mirror_modules
from mirror_modules._files import as_folder, locked, read_json, write_json
from mirror_modules.stem import Vocabulary
from mirror_modules.training.recipes import ALL_PHASES, Recipe, differences

WRITTEN_WHOLE = (
    "config.json",
    "metrics.jsonl",
    "evaluation.json",
    "vocabulary.json",
    "report.html",
    *(f"{phase}.safetensors" for phase in ALL_PHASES),
)

LOCK = ".lock"
FORMAT = "mirror-modules run 2"
# The names that `write_whole` gives to temporary files.
_TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, WRITTEN_WHOLE))})\.[a-z0-9_]{{8}}")


class RunFolder:
    """The paths of a run's files.

    Args:
        path: The folder; it is created when training starts.

    Examples:
        >>> from mirror_modules.training import RunFolder
        >>> folder = RunFolder("runs/demo")
        >>> folder.weights("glam").as_posix()
        'runs/demo/phases/glam.safetensors'
        >>> folder.report.name, folder.model.name
        ('report.html', 'model')
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.evaluation = self.path / "config.json", self.path / "evaluation.json"
        self.log, self.report = self.path / "metrics.jsonl", self.path / "report.html"
        self.model, self.pictures = self.path / "model", self.path / "pictures"
        self.vocabulary, self.checkpoints = self.path / "vocabulary.json", self.path / "checkpoints"
        self.samples, self.features = self.path / "samples", self.path / "features"

    def weights(self, phase: str) -> Path:
        """Path of a finished phase's weights."""
        return self.path / "phases" / f"{phase}.safetensors"

    def check(self, recipe: Recipe) -> None:
        """Require that the folder is new or empty, or holds a run of this recipe.

        Raises:
            ValueError: The folder holds a run of another recipe, of an earlier version, or something that is not a run.
        """
        if self.config.exists():
            found = [words for words, harmless in differences(self.read_recipe(), recipe) if not harmless]
            if found:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({'; '.join(found)}); nothing in it was changed. "
                    "Choose another --out, or remove the folder."
                )
        elif self.path.is_dir() and any(not _is_leftover(path) for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run; choose another --out.")
        as_folder("the folder of a run (--out)", self.path)
        for path in (self.path / "phases", self.checkpoints, self.samples, self.features, self.model):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is a file, and a run needs a folder there; choose another --out.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other training processes, where the system has locks.

        Raises:
            ValueError: Another process trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / LOCK) as is_acquired:
            if not is_acquired:
                raise ValueError(
                    f"{self.path} is being trained by another process; wait for it, or choose another --out."
                )
            yield

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Require that finished phases, if any, were trained with this vocabulary.

        Raises:
            ValueError: They were trained with another one.
        """
        if self.vocabulary.exists() and Vocabulary.load(self.vocabulary) != vocabulary:
            raise ValueError(
                f"{self.vocabulary} is not the vocabulary of the training captions: they have changed since the run "
                "started. Restore them, or choose another --out."
            )

    def read_recipe(self, kind: str | None = None) -> Recipe:
        """The recipe in config.json.

        Args:
            kind: What the folder must hold; None stands for the run of a single model.

        Raises:
            FileNotFoundError: There is no run in the folder.
            ValueError: The file is damaged, does not describe a run, or was written by an earlier version.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is not a run: config.json is missing; expected a folder of `train`.")
        content = read_json(self.config)
        if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
            raise ValueError(f"{self.config} holds no recipe; expected the config.json of a run.")
        if not isinstance(content.get("versions", {}), dict):
            raise ValueError(f"{self.config} is damaged: versions must be an object of names; remove that field.")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{self.path} holds a run of another version of mirror-modules, which this one cannot read (its format "
                f"is {content.get('format')!r}, not {FORMAT!r}); use that version, or train again with another --out."
            )
        if content.get("kind") != kind:
            expected = "a single run" if kind is None else with_article(kind)
            raise ValueError(f"{self.config} is not that of {expected}; choose another folder.")
        if isinstance(content["recipe"].get("model"), dict):
            # Runs without it are older than the other systems.
            content["recipe"]["model"].setdefault("system", "mirrorgan")
        # Runs without it are older than the phase.
        content["recipe"].setdefault("keypoints", None)
        try:
            recipe = Recipe.from_dict(content["recipe"])
            if missing := list(_missing(recipe.to_dict(), content["recipe"])):
                raise ValueError(f"it lacks {', '.join(missing)}")
        except ValueError as error:
            raise ValueError(f"{self.config} was written by another version, or edited: {error}") from error
        return recipe

    def begin(self, recipe: Recipe) -> None:
        """Create the folder and write its config.json; a resumed run records its versions if they differ."""
        self.path.mkdir(parents=True, exist_ok=True)
        found = versions()
        before = read_json(self.config).get("versions", found) if self.config.exists() else found
        content = {"format": FORMAT, "recipe": recipe.to_dict(), "versions": before}
        if before != found:
            changed = ", ".join(
                f"{name} {found[name]}, not {before.get(name)}" for name in found if found[name] != before.get(name)
            )
            warnings.warn(f"{self.path} continues with {changed}: results may differ in the last digits.", stacklevel=2)
            content["versions_since"] = found
        write_json(self.config, content)
        (self.path / "phases").mkdir(exist_ok=True)
        for leftover in filter(_is_leftover, [*self.path.iterdir(), *(self.path / "phases").iterdir()]):
            if leftover.name != LOCK:
                leftover.unlink()


def versions() -> dict[str, str]:
    """The versions and the machine, on which results depend in addition to the recipe."""
    return {
        "mirror_modules": mirror_modules.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _missing(expected: dict[str, Any], found: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of the fields in `expected` that `found` lacks."""
    for name, value in expected.items():
        if name not in found:
            yield prefix + name
        elif isinstance(value, dict) and isinstance(found[name], dict):
            yield from _missing(value, found[name], f"{prefix}{name}.")


def _is_leftover(path: Path) -> bool:
    """Whether a killed run left this file before it could rename or remove it."""
    return path.is_file() and (path.name == LOCK or _TEMPORARY.fullmatch(path.name) is not None)
