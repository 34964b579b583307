"""Runs for tests: a tiny recipe that trains in seconds, and a small log."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mirror_modules.data import CaptionBatch, RepeatableBatches
from mirror_modules.data.flowers.drawing import POINT_NAMES
from mirror_modules.models import MirrorGANConfig, ModelConfig
from mirror_modules.stem import Vocabulary
from mirror_modules.training.batches import load_splits, to_device
from mirror_modules.training.recipes import DataRecipe, EvaluationRecipe, LoggingRecipe, Recipe, get_recipe

TINY_SIZES: dict[str, dict[str, Any]] = {
    "gan-int-cls": {"channels": 4, "resolutions": (16,), "discriminator_channels": 4},
    "gawwn": {"channels": 2, "resolutions": (32,), "discriminator_channels": 3, "text_projection": 4},
    "stackgan": {"channels": 4, "resolutions": (8, 16), "halvings": 1, "residual_blocks": 1},
    "stackgan-v2": {"channels": 4, "residual_blocks": 1},
    "ppgn": {"channels": 4, "residual_blocks": 1, "sampling_steps": 2},
    "attngan": {"residual_blocks": 1},
}
"""What differs from the sizes of the tiny MirrorGAN."""


def make_tiny_recipe(name: str = "demo") -> Recipe:
    """A recipe whose phases take three steps; `name` is that of the recipe of its system."""
    # Pretraining, coarse steps and diversity have tests of their own; the recipe `ablation` is `demo` without them.
    base = get_recipe("ablation" if name == "demo" else name)
    base = dataclasses.replace(base, pretraining=None, evaluator_pretraining=None)
    base = dataclasses.replace(base, glam=dataclasses.replace(base.glam, coarse_steps=0))
    model = MirrorGANConfig(
        embedding_dim=7,
        word_dim=10,
        text_dropout=0.1,
        noise_dim=5,
        condition_dim=6,
        channels=3,
        resolutions=(8, 16),
        residual_blocks=1,
        discriminator_channels=3,
        image_backbone="conv",
        captioner_backbone="conv",
        captioner_projection=True,
        captioner_embedding_dim=11,
        captioner_hidden_dim=13,
    )
    if base.model.system != model.system:
        shared = {each.name: getattr(model, each.name) for each in dataclasses.fields(ModelConfig)}
        sizes = dict(TINY_SIZES[base.model.system])
        if base.model.completes_points:
            sizes |= {"place": "points", "point_names": POINT_NAMES, "keypoint_hidden_dim": 6}
        model = type(base.model)(**{**shared, **sizes})
    phases = {phase: dataclasses.replace(getattr(base, phase), steps=3, batch_size=7) for phase in base.phases}
    return dataclasses.replace(
        base,
        name="tiny",
        model=model,
        data=DataRecipe(training_images=41, validation_images=31),
        evaluation=EvaluationRecipe(candidates=11, report_images=3),
        logging=LoggingRecipe(every=1, samples_every=2),
        **phases,
    )


def drawn_batch(recipe: Recipe) -> tuple[Vocabulary, CaptionBatch]:
    """The vocabulary of a recipe's drawn flowers, and the first batch of its phase `glam`."""
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    batches = RepeatableBatches(splits.training, recipe.glam.batch_size, recipe.seed)
    return splits.vocabulary, to_device(batches[0], torch.device("cpu"))


LOG = [
    {"phase": "stem", "step": 1, "seconds": 0.1, "images": 8, "caption_by_words": 4.0},
    {"phase": "stem", "step": 10, "seconds": 1.1, "images": 80, "caption_by_words": 2.0},
    {"phase": "glam", "step": 1, "seconds": 0.3, "images": 8, "kl": 1.5, "generator_16": 1.0, "generator_64": 3.0},
    {"phase": "glam", "step": 10, "seconds": 3, "images": 80, "kl": 2.5, "generator_16": 2.0, "generator_64": 4.0},
]
"""Lines of a metrics.jsonl: one loss of phase `stem`; one loss of phase `glam` without stages, one with two."""


def write_log(path: Path, lines: Iterable[dict[str, object]] = LOG) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
