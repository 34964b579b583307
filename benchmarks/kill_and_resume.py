"""Kill training runs repeatedly, resume them, and compare the results with those of an uninterrupted run.

    python benchmarks/kill_and_resume.py --kills 200

Kills alternate between a random moment and the first checkpoint save after a random moment. Weights must be equal byte
for byte, and so must all logged values except times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mirror_modules
from mirror_modules.training.folder import LOCK, RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import Recipe, demo

# Fields that legitimately differ between runs.
TIMES = ("seconds", "waited")


class KillResult(NamedTuple):
    """Result of killing and resuming runs."""

    kills: int
    during_a_save: int
    """Number of kills that left a temporary file that was not yet renamed."""
    in_phases: dict[str, int]
    """Number of kills in each phase; the key "" counts kills before the first step."""
    runs: int
    """Number of runs that finished after being killed."""
    different: list[str]
    """Descriptions of the differences from the uninterrupted run; empty if all is identical."""


def kill_and_resume(recipe: Recipe, folder: Path, kills: int, *, seed: int = 0) -> KillResult:
    """Kill runs of a recipe until `kills` is reached, let each finish, and compare it with an uninterrupted run.

    Args:
        recipe: The recipe to train, with the number of steps and the checkpoint interval.
        folder: Parent folder; each run gets a new folder in it.
        kills: Number of kills over all runs.
        seed: Seed of the moments of the kills.
    """
    rng = random.Random(seed)
    unbroken = RunFolder(folder / "unbroken")
    # The first child starts the fork server, which imports torch.
    start_child(time.sleep, 0).join()
    started = time.perf_counter()
    child = start_child(_train, recipe, unbroken.path)
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"the uninterrupted run exited with {child.exitcode}.")
    # Below the duration of a run, so that kills cover all parts of it and most runs are killed more than once.
    longest = 0.75 * (time.perf_counter() - started)
    count = during_a_save = runs = 0
    in_phases: Counter[str] = Counter()
    different: list[str] = []
    while count < kills:
        run = RunFolder(folder / f"killed-{runs}")
        while True:
            left_before = _unnamed(run.path)
            child = start_child(_train, recipe, run.path)
            if count < kills:
                child.join(rng.uniform(0, longest))
                if count % 2:
                    _wait_for_save(child, run)
                child.kill()
            child.join()
            if child.exitcode != -signal.SIGKILL:
                break
            count += 1
            during_a_save += bool(_unnamed(run.path) - left_before)
            in_phases[_phase_of(run)] += 1
        if child.exitcode != 0:
            different.append(f"{run.path.name} exited with {child.exitcode}")
            break
        different += [f"{run.path.name}: {name}" for name in differing(unbroken, run)]
        runs += 1
    return KillResult(count, during_a_save, dict(in_phases), runs, different)


def differing(one: RunFolder, other: RunFolder) -> list[str]:
    """Names of the files that differ between two runs, ignoring times."""
    paths = [*one.path.glob("phases/*"), *one.path.glob("model/*"), one.vocabulary]
    names = [str(path.relative_to(one.path)) for path in paths]
    different = [name for name in names if (one.path / name).read_bytes() != (other.path / name).read_bytes()]
    if figures(one) != figures(other):
        different.append(one.log.name)
    return different


def figures(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def start_child(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process by forking a server that has already imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mirror_modules.training.loop", "mirror_modules.evaluation.report", "tqdm"])
    child = context.Process(target=target, args=arguments)
    child.start()
    return child


def _train(recipe: Recipe, folder: Path) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(f"{folder}.log", "a", encoding="utf-8")  # noqa: SIM115
    train(recipe, folder, resume=True)


def _wait_for_save(child: Any, run: RunFolder) -> None:
    while child.is_alive():
        if any(path.name.startswith(".") for path in run.checkpoints.glob("*")):
            return


def _unnamed(folder: Path) -> set[tuple[Path, int]]:
    """Temporary files that were not yet renamed, with their times, because a later run may reuse a name."""
    files = [path for path in folder.rglob(".*") if path.is_file() and path.name != LOCK]
    return {(path, path.stat().st_mtime_ns) for path in files}


def _phase_of(run: RunFolder) -> str:
    lines = run.log.read_text(encoding="utf-8").split("\n")[:-1] if run.log.exists() else []
    return json.loads(lines[-1])["phase"] if lines else ""


def small_recipe() -> Recipe:
    """All phases with all sources of randomness; trains in seconds."""
    phases = {phase: {"steps": 16, "batch_size": 7} for phase in ("stem", "stream", "evaluator")}
    glam = {"steps": 16, "batch_size": 7, "r1_weight": 1.0, "r1_every": 3, "coarse_steps": 3, "diversity_ratio": 0.25}
    # These phases take the steps of phase `stream`.
    left_out = {"pretraining": None, "evaluator_pretraining": None}
    sizes = {"channels": 3, "discriminator_channels": 3, "word_dim": 10, "noise_dim": 5, "condition_dim": 6}
    fields = {
        "name": "small",
        "data": {"training_images": 41, "validation_images": 31, "augment": True},
        "model": {**sizes, "resolutions": [8, 16], "captioner_embedding_dim": 11, "captioner_hidden_dim": 13},
        "evaluation": {"candidates": 11, "report_images": 3},
        "engine": {"checkpoint_every": 2},
        "logging": {"every": 1, "samples_every": 0},
        **phases,
        **left_out,
        "glam": glam,
    }
    return Recipe.from_dict(fields, demo())


def main() -> int:
    """Print the result in one line; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_and_resume(small_recipe(), Path(folder), options.kills, seed=options.seed)
    phases = ", ".join(f"{name or 'before the first step'} {count}" for name, count in result.in_phases.items())
    is_identical = "no: " + ", ".join(result.different) if result.different else "yes"
    print(
        f"{result.kills} kills, {result.during_a_save} of them during a save, in {result.runs} runs "
        f"({phases}); identical to the uninterrupted run: {is_identical}; "
        f"{platform.platform()}, {platform.machine()}, mirror_modules {mirror_modules.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    return 1 if result.different else 0


if __name__ == "__main__":
    sys.exit(main())
