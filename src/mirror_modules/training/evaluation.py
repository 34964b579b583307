"""What a run is worth: R-precision by a judge that no training has used, and words read back (MirrorGAN, Sec. 4.1)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirror_modules.data.transforms import to_float
from mirror_modules.metrics import r_precision
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import write_json
from mirror_modules.training.batches import load_splits
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import read_log
from mirror_modules.training.loop import load_pair
from mirror_modules.training.recipes import PHASES, Recipe
from mirror_modules.training.report import Showcase, write_report
from mirror_modules.training.validation import (
    generate_images,
    image_features,
    sentence_features,
    unseen_pairs,
    word_accuracy,
)


def evaluate(out: str | Path, *, device: str = "cpu") -> dict[str, Any]:
    """Measure a finished run; writes metrics.json, the pictures and report.html.

    Each validation image has one caption, which no training image has. Images are generated from these captions and
    ranked against other captions of the validation split. The same figure for the real images is the ceiling, for
    images generated from other captions (shuffled) the floor. The captioner's word accuracy is the share of words and
    end tokens that it predicts rightly, given the words before.

    Args:
        out: The run's folder, with phases `stream`, `glam` and `judge` trained.
        device: "cpu" or "cuda".

    Returns:
        The content of metrics.json.

    Raises:
        FileNotFoundError: The folder is not a run, or a phase is missing.
        ValueError: A file is damaged, or there are too few captions.
    """
    folder = RunFolder(out)
    recipe = folder.read_recipe()
    for phase in PHASES:
        if not folder.weights(phase).exists():
            raise FileNotFoundError(f"{folder.path} lacks phase {phase!r}; train it with --phases {phase}.")
    model = MirrorGAN.from_pretrained(folder.model, device=device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    judge = load_pair(folder, "judge", recipe, splits).to(device)

    unseen = unseen_pairs(splits, recipe.model.max_words)
    generated = generate_images(model, unseen.tokens, unseen.word_mask, recipe.seed)
    # Every image meets another image's caption. At random: neighbors in a data set are often of one class.
    others = _derangement(len(generated), recipe.seed)
    images = {"generated": generated, "real": to_float(unseen.images), "shuffled": generated[others]}
    sentences = sentence_features(judge, unseen.tokens, unseen.word_mask)
    precision = {
        name: r_precision(
            image_features(judge, image),
            sentences,
            candidates=recipe.evaluation.candidates,
            generator=torch.Generator().manual_seed(recipe.seed),
        )._asdict()
        for name, image in images.items()
    }
    accuracy = {
        name: word_accuracy(model.captioner, image, unseen.tokens, unseen.word_mask)[0]
        for name, image in images.items()
    }
    metrics = {
        "r_precision": precision,
        "chance": 1 / recipe.evaluation.candidates,
        "word_accuracy": accuracy,
        "images": len(generated),
        "candidates": recipe.evaluation.candidates,
        "judge": "an encoder pair trained on the same training split with another seed; no other phase used it",
        **_speed(folder),
    }
    write_json(folder.metrics, metrics)
    write_report(folder, recipe, _showcase(model, unseen.images, unseen.captions, recipe), metrics)
    return metrics


def _derangement(count: int, seed: int) -> Tensor:
    """A random order in which nothing stays where it was."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def _showcase(model: MirrorGAN, real: Tensor, captions: list[str], recipe: Recipe) -> Showcase:
    count = min(recipe.evaluation.report_images, len(captions))
    shown = to_float(real[:count])
    with warnings.catch_warnings():
        # Nobody wrote these captions just now: a rare word of the data set is no mistake.
        warnings.filterwarnings("ignore", message="unknown words")
        generated = model.generate(captions[:count], seed=recipe.seed, need_weights=True)
    tokens, word_mask = model.vocabulary.encode(captions[:count], max_words=recipe.model.max_words, warn_unknown=False)
    words = [[model.vocabulary.words[t] for t in row[mask].tolist()] for row, mask in zip(tokens, word_mask)]
    return Showcase(
        captions=captions[:count],
        words=words,
        real=shown,
        generated=generated,
        real_descriptions=model.describe(shown),
        generated_descriptions=model.describe(generated.images[-1]),
    )


def _speed(folder: RunFolder) -> dict[str, dict[str, float]]:
    # Lines of a validation say nothing of waiting.
    last = {entry["phase"]: entry for entry in read_log(folder.log) if "waited" in entry}
    seconds = {phase: max(entry["seconds"], 1e-9) for phase, entry in last.items()}
    return {
        "seconds": seconds,
        "images_per_second": {phase: round(entry["images"] / seconds[phase], 1) for phase, entry in last.items()},
        "waited_for_data": {phase: round(entry["waited"] / seconds[phase], 4) for phase, entry in last.items()},
    }
