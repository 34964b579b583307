"""What runs on the simulated system: `python -m tests.platform.tasks TASK FOLDER`, in a process of its own."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from mirror_modules import MirrorGAN
from mirror_modules.data import WebDatasetCaptions, open_captions, prepare_captions
from mirror_modules.evaluation import ablate, evaluate
from mirror_modules.evaluation.ablation import Cell
from mirror_modules.training import engine, train
from mirror_modules.training.recipes import PHASES, DataRecipe
from tests.layouts import make_folder, write_shard
from tests.runs import make_tiny_recipe

TRAINING, VALIDATION, R = 41, 13, 19
CELLS = (
    Cell('ratio: "0.5" / no pairs?', {"glam": {"redescription_ratio": 0.5, "mismatched_pairs": False}}),
    Cell("aux", {"glam": {"redescription_ratio": None, "redescription_weight": 0.0}}),
)


class Stopped(Exception):
    """Simulates any error that ends a run."""


def run_training(folder):
    """Train with a log for TensorBoard and frequent checkpoints, stop in phase `glam`, resume, evaluate, save again."""
    recipe = make_tiny_recipe()
    recipe = dataclasses.replace(
        recipe,
        engine=dataclasses.replace(recipe.engine, checkpoint_every=1, checkpoints_kept=1),
        logging=dataclasses.replace(recipe.logging, tensorboard=True),
    )
    record = engine.PhaseRun.record

    def stop(self, result):
        if (self.phase, self.step) == ("glam", 1):
            raise Stopped
        record(self, result)

    engine.PhaseRun.record = stop
    try:
        train(recipe, folder / "run")
    except Stopped:
        engine.PhaseRun.record = record
    run = train(recipe, folder / "run", resume=True)
    evaluate(run.path)
    model = MirrorGAN.from_pretrained(run.model)
    model.save_pretrained(run.model)


def photographs(folder):
    """A data set with a damaged image, prepared in a single file per split, and its recipe."""
    make_folder(folder / "originals", TRAINING, VALIDATION)
    for name in ("꽃.png", "꽃.txt"):
        (folder / "originals" / "train" / name).write_text("damaged", encoding="utf-8")
    prepare_captions(folder / "originals", folder / "prepared", resolution=R, on_error="skip")
    recipe = make_tiny_recipe()
    phases = {phase: dataclasses.replace(recipe.phase(phase), steps=2) for phase in PHASES}
    data = DataRecipe(source="auto", training_images=None, validation_images=None, augment=True, on_error="skip")
    return dataclasses.replace(recipe, data=data, **phases)


def run_workers(folder):
    """Train on prepared images, which stay on disk, with batches from a worker process; then stream shards with two."""
    recipe = photographs(folder)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, path=str(folder / "prepared")),
        engine=dataclasses.replace(recipe.engine, loader_workers=1),
    )
    train(recipe, folder / "run", phases=["stem"])
    shards = [write_shard(folder / f"train-{i}.tar", range(3 * i, 3 * i + 3)) for i in range(2)]
    streamed = [sample.captions[0] for sample in WebDatasetCaptions(shards, R, buffer=2).read(workers=2)]
    (folder / "streamed.json").write_text(json.dumps(streamed), encoding="utf-8")
    originals = open_captions(folder / "originals", "train", R, on_error="skip")
    prepared = open_captions(folder / "prepared", "train", R)
    equal = [np.array_equal(prepared[i].image, originals[i].image) for i in range(len(prepared))]
    assert equal == [True] * TRAINING


def run_ablation(folder):
    """Two cells, whose names are no file names, in two processes, on photographs of which one is damaged."""
    recipe = photographs(folder)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(folder / "originals")))
    ablate(recipe, folder / "ablation", cells=CELLS, seeds=(0,), jobs=2)


TASKS = {"training": run_training, "workers": run_workers, "ablation": run_ablation}

if __name__ == "__main__":
    # As on the command line.
    sys.stdout.reconfigure(errors="backslashreplace")
    TASKS[sys.argv[1]](Path(sys.argv[2]))
