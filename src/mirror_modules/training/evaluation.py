"""What a run is worth: R-precision by a judge that no training has used, and words read back (MirrorGAN, Sec. 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirror_modules.data.transforms import to_float
from mirror_modules.metrics import r_precision
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import write_json
from mirror_modules.stream import append_end
from mirror_modules.training.batches import load_splits, unseen_captions
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import read_log
from mirror_modules.training.loop import load_pair
from mirror_modules.training.recipes import PHASES, Recipe
from mirror_modules.training.report import Showcase, write_report

# Images made or read at a time.
CHUNK = 100


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
    recipe = read_recipe(folder)
    for phase in PHASES:
        if not folder.weights(phase).exists():
            raise FileNotFoundError(f"{folder.path} lacks phase {phase!r}; train it with --phases {phase}.")
    model = MirrorGAN.from_pretrained(folder.model, device=device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    judge = load_pair(folder, "judge", recipe, splits).to(device)

    unseen = unseen_captions(splits)
    captions = [entry.caption for entry in unseen]
    real = splits.validation.images[[entry.image for entry in unseen]]
    tokens, word_mask = splits.vocabulary.encode(captions, max_words=recipe.model.max_words, warn_unknown=False)
    generated = _generate(model, tokens, word_mask, recipe.seed)

    def features(images: Tensor) -> Tensor:
        return torch.cat([judge.image_encoder(chunk.to(device)).image.cpu() for chunk in _chunks(images)])

    with torch.no_grad():
        sentences = torch.cat(
            [judge.text_encoder(t.to(device), m.to(device)).sentence.cpu() for t, m in _chunks(tokens, word_mask)]
        )
        by_images = {"generated": features(generated), "real": features(to_float(real))}
        # Every image meets another image's caption. At random: neighbors in a data set are often of one class.
        others = _derangement(len(unseen), recipe.seed)
        by_images["shuffled"] = by_images["generated"][others]
        draws = {name: torch.Generator().manual_seed(recipe.seed) for name in by_images}
        precision = {
            name: r_precision(
                image, sentences, candidates=recipe.evaluation.candidates, generator=draws[name]
            )._asdict()
            for name, image in by_images.items()
        }
        images = {"generated": generated, "real": to_float(real), "shuffled": generated[others]}
        accuracy = {name: _word_accuracy(model, image, tokens, word_mask) for name, image in images.items()}
    metrics = {
        "r_precision": precision,
        "chance": 1 / recipe.evaluation.candidates,
        "word_accuracy": accuracy,
        "images": len(unseen),
        "candidates": recipe.evaluation.candidates,
        "judge": "an encoder pair trained on the same training split with another seed; no other phase used it",
        **_speed(folder),
    }
    write_json(folder.metrics, metrics)
    write_report(folder, recipe, _showcase(model, real, captions, recipe), metrics)
    return metrics


def read_recipe(folder: RunFolder) -> Recipe:
    """The recipe of a run, from its config.json.

    Raises:
        FileNotFoundError: There is no run in the folder.
        ValueError: The file is damaged.
    """
    return Recipe.from_dict(folder.read_recipe_fields())


def _generate(model: MirrorGAN, tokens: Tensor, word_mask: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    images = []
    with torch.no_grad():
        for some_tokens, some_mask in _chunks(tokens, word_mask):
            noise = torch.randn(len(some_tokens), model.config.noise_dim, generator=random)
            condition_noise = torch.randn(len(some_tokens), model.config.condition_dim, generator=random)
            made = model(
                some_tokens.to(model.device),
                some_mask.to(model.device),
                noise=noise.to(model.device),
                condition_noise=condition_noise.to(model.device),
            )
            images.append(made.images[-1].cpu())
    return torch.cat(images)


def _derangement(count: int, seed: int) -> Tensor:
    """A random order in which nothing stays where it was."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def _word_accuracy(model: MirrorGAN, images: Tensor, tokens: Tensor, word_mask: Tensor) -> float:
    tokens, word_mask = append_end(tokens, word_mask)
    right = 0
    for image, some_tokens, some_mask in _chunks(images, tokens, word_mask):
        logits = model.captioner(image.to(model.device), some_tokens.to(model.device), some_mask.to(model.device))
        right += int(((logits.argmax(dim=2).cpu() == some_tokens) & some_mask).sum())
    return right / int(word_mask.sum())


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
    last = {entry["phase"]: entry for entry in read_log(folder.log)}
    return {
        "seconds": {phase: entry["seconds"] for phase, entry in last.items()},
        "images_per_second": {phase: round(entry["images"] / entry["seconds"], 1) for phase, entry in last.items()},
    }


def _chunks(*tensors: Tensor) -> Iterator[Any]:
    parts = zip(*(tensor.split(CHUNK) for tensor in tensors))
    return (part if len(part) > 1 else part[0] for part in parts)
