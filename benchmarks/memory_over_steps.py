"""Memory of the process over many steps of the adversarial phase, which must not grow.

python benchmarks/memory_over_steps.py --steps 2000
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kill_and_resume import small_recipe
from mirror_modules.training import engine
from mirror_modules.training.loop import train
from mirror_modules.training.network import StepResult

WARM_UP_STEPS = 200


def resident_mib() -> float:
    """Resident set size of this process (Linux only)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Print the memory every 100 steps, and its growth after the warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    recipe = small_recipe()
    logging = dataclasses.replace(recipe.logging, every=10)
    recipe = dataclasses.replace(
        recipe,
        glam=dataclasses.replace(recipe.glam, steps=steps),
        engine=dataclasses.replace(recipe.engine, checkpoint_every=50),
        logging=logging,
    )
    measured: dict[int, float] = {}
    record = engine.PhaseRun.record

    def measure(self: engine.PhaseRun, result: StepResult) -> None:
        record(self, result)
        if self.phase == "glam" and self.step % 100 == 0:
            measured[self.step] = resident_mib()
            print(f"step {self.step}: {measured[self.step]:.1f} MiB", flush=True)

    with tempfile.TemporaryDirectory() as folder, patch.object(engine.PhaseRun, "record", measure):
        train(recipe, Path(folder) / "run", phases=["stem", "stream", "glam"])
    after = {step: mib for step, mib in measured.items() if step >= WARM_UP_STEPS}
    first, last = after[min(after)], after[max(after)]
    print(f"from step {min(after)} to {max(after)}: {first:.1f} to {last:.1f} MiB, {last / first - 1:+.2%}")


if __name__ == "__main__":
    main()
