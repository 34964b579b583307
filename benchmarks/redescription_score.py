"""Which attributes the redescription score detects, and what selection by it gains, on drawn flowers.

    python benchmarks/redescription_score.py runs/demo [--pairs 1000] [--captions 500] [--best-of 8]

The run must be evaluated, so that it has its attribute classifier. Two tables are printed as Markdown.

Pairs: a real drawing with a caption of its own, against the same caption with one attribute changed. The share of pairs
in which the true caption has the higher score; chance is 50 %.

Best of n: n generated images of each held-out caption, of which one is selected by a score. The attributes of the
selected images, by the attribute classifier, and their R-precision, by the evaluator, neither of which selected.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules import MirrorGAN, RedescriptionScore
from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named
from mirror_modules.data.flowers.captions import PLACES, WORDS
from mirror_modules.evaluation.attributes import attribute_accuracy, fit_attribute_classifier
from mirror_modules.functional import append_end, r_precision
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.models.pretrained import load_weights
from mirror_modules.training.batches import load_splits
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.validation import unseen_pairs

Score = Callable[[Tensor, list[str]], Tensor]
CHUNK = 100
RESAMPLES = 2000
# No run draws its flowers with this seed.
SEED = 77
REFERENCES = 32


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--best-of", type=int, default=8)
    options = parser.parse_args()
    folder = RunFolder(options.run)
    model = MirrorGAN.from_pretrained(folder.model)
    scores = make_scores(folder, model)
    with torch.no_grad():
        print(pairs_table(scores, model.config.resolutions[-1], options.pairs))
        print()
        print(selection_table(scores, folder, model, options.captions, options.best_of))


def make_scores(folder: RunFolder, model: MirrorGAN) -> dict[str, Score]:
    """The scores that are compared, each (images, captions) -> (B,)."""

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        return append_end(*model.vocabulary.encode(captions, max_words=model.config.max_words))

    pair = load_pair(folder, model, "stem")
    return {
        "log likelihood": RedescriptionScore(model.captioner, encode=encode),
        "debiased, blank image": RedescriptionScore(model.captioner, debias="blank", encode=encode),
        f"debiased, {REFERENCES} drawings": RedescriptionScore(
            model.captioner, debias="prior", reference=drawings(REFERENCES, model.config.resolutions[-1]), encode=encode
        ),
        "cosine of the encoders of `stem`": lambda images, captions: cosine(pair, model, images, captions),
    }


def drawings(count: int, resolution: int) -> Tensor:
    """Real drawings, (N, 3, H, W) in [-1, 1], that neither table measures."""
    flowers = SyntheticFlowers(count, resolution=resolution, split="validation", seed=SEED + 1)
    return torch.stack([torch.from_numpy(flower.image) for flower in flowers]).permute(0, 3, 1, 2) / 127.5 - 1


def load_pair(folder: RunFolder, model: MirrorGAN, phase: str) -> EncoderPair:
    """The encoders of a phase."""
    pair = EncoderPair(model.config, len(model.vocabulary))
    load_weights(pair, folder.weights(phase))
    return pair.eval()


def features(pair: EncoderPair, model: MirrorGAN, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Image and sentence features, (B, D) each."""
    tokens, word_mask = model.vocabulary.encode(captions, max_words=model.config.max_words)
    return pair.image_encoder(images).image, pair.text_encoder(tokens, word_mask).sentence


def cosine(pair: EncoderPair, model: MirrorGAN, images: Tensor, captions: list[str]) -> Tensor:
    """Cosine similarity of image and sentence features, (B,)."""
    return F.cosine_similarity(*features(pair, model, images, captions), dim=1)


def in_chunks(score: Score, images: Tensor, captions: list[str]) -> Tensor:
    """The score of many pairs."""
    starts = range(0, len(captions), CHUNK)
    return torch.cat([score(images[i : i + CHUNK], captions[i : i + CHUNK]) for i in starts])


def swapped(caption: str, attribute: str, value: str) -> str:
    """The caption with another value of an attribute that it names."""
    old = attributes_named(caption)[attribute]
    names = PLACES if attribute == "background" else WORDS[attribute]
    for i, words in enumerate(names[old]):
        before, after = words, names[value][min(i, len(names[value]) - 1)]
        if before == "heart":
            before = "heart shaped"
        if after == "heart":
            after = "heart shaped"
        padded = f" {caption} "
        if f" {before} " in padded:
            return padded.replace(f" {before} ", f" {after} ", 1).strip()
    raise ValueError(f"{caption!r} does not name {attribute} by any of {names[old]}.")


def pairs_table(scores: dict[str, Score], resolution: int, pairs: int) -> str:
    """Share of pairs in which the true caption wins, for each attribute and score."""
    rng = np.random.default_rng(SEED)
    flowers = SyntheticFlowers(2 * pairs, resolution=resolution, split="validation", seed=SEED)
    lines = [f"| Attribute | {' | '.join(scores)} |", f"|---|{'---|' * len(scores)}"]
    for attribute, values in ATTRIBUTES.items():
        images, true, false = [], [], []
        for flower in flowers:
            named = [caption for caption in flower.captions if attribute in attributes_named(caption)]
            if named and len(images) < pairs:
                caption = str(rng.choice(named))
                others = [value for value in values if value != flower.attributes[attribute]]
                images.append(torch.from_numpy(flower.image))
                true.append(caption)
                false.append(swapped(caption, attribute, str(rng.choice(others))))
        pixels = torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1
        cells = []
        for score in scores.values():
            difference = in_chunks(score, pixels, true) - in_chunks(score, pixels, false)
            wins = ((difference > 0).double() + 0.5 * (difference == 0).double()).numpy()
            cells.append(with_interval(100 * wins))
        lines.append(f"| {attribute.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selection_table(scores: dict[str, Score], folder: RunFolder, model: MirrorGAN, count: int, best_of: int) -> str:
    """Attributes and R-precision of images selected by each score, and of the first image of each caption."""
    recipe = folder.read_recipe()
    unseen = unseen_pairs(load_splits(recipe.data, recipe.model, recipe.seed), recipe.model.max_words)
    captions = list(unseen.captions[:count])
    rows = [caption for caption in captions for _ in range(best_of)]
    starts = range(0, len(rows), CHUNK)
    images = torch.cat([model.generate(rows[i : i + CHUNK], seed=i) for i in starts])
    classifier = fit_attribute_classifier(folder.path / "classifiers" / "attributes.safetensors", images.shape[2])
    pair = load_pair(folder, model, "evaluator")
    names = [*ATTRIBUTES, "all"]
    lines = [
        f"| Selected by | {' | '.join(name.replace('_', ' ') for name in names)} | R-precision |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    first = torch.arange(0, len(rows), best_of)
    for name, score in {"first image": None, **scores}.items():
        if score is None:
            chosen = first
        else:
            chosen = first + in_chunks(score, images, rows).view(len(captions), best_of).argmax(dim=1)
        selected = images[chosen]
        accuracy = attribute_accuracy(classifier.predict(selected), [attributes_named(each) for each in captions])
        precision = r_precision(
            *features(pair, model, selected, captions), candidates=100, generator=torch.Generator().manual_seed(SEED)
        )
        cells = [f"{accuracy[each].share:.1%} ± {100 * accuracy[each].standard_error:.1f}" for each in names]
        cells.append(f"{precision.top1:.1%} ± {100 * precision.standard_error:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_interval(values: Sequence[float] | np.ndarray) -> str:
    """The mean with its 95 % bootstrap interval."""
    values = np.asarray(values)
    rng = np.random.default_rng(SEED)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.1f} ({low:.1f} to {high:.1f}) %"


if __name__ == "__main__":
    main()
