"""What a run is worth: measured by networks that no generator was trained against (MirrorGAN, Sec. 4.1)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules.data.transforms import to_float
from mirror_modules.metrics import (
    Diversity,
    diversity,
    expected_hits,
    frechet_distance,
    inception_score,
    kernel_distance,
    r_precision_folds,
    redescription_quality,
)
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import write_json
from mirror_modules.training.attributes import AttributeJudge, fit_attribute_judge, measure_attributes
from mirror_modules.training.batches import Splits, at_resolution, load_splits
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.extractors import (
    Extractor,
    attribute_extractor,
    fit_class_extractor,
    inception_extractor,
)
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import read_log
from mirror_modules.training.loop import load_pair
from mirror_modules.training.recipes import PHASES, Recipe
from mirror_modules.training.report import Case, Showcase, write_report
from mirror_modules.training.validation import (
    CHUNK,
    Unseen,
    derangement,
    generate_images,
    image_features,
    image_information,
    sentence_features,
    unseen_pairs,
    word_accuracy,
)

FOLDS = 10
CASES = 8
# Captions of which several images are drawn, and how many of each.
DIVERSE_CAPTIONS, IMAGES_PER_CAPTION = 30, 10


class Judges(NamedTuple):
    """Networks besides the judge of R-precision, where there are any."""

    extractor: Extractor | None = None
    attributes: AttributeJudge | None = None
    missing: str = ""
    """Why one that was asked for could not be trained."""


def evaluate(
    out: str | Path, *, device: str = "cpu", fit_judge: bool = False, inception: bool = False
) -> dict[str, Any]:
    """Measure a finished run; writes evaluation.json, the pictures and report.html.

    Each validation image has one caption, which no training image has. Images are generated from these captions and
    ranked against other captions of the validation split. The same figures for the real images are the ceiling, for
    images generated from other captions (shuffled) the floor. The captioner's word accuracy is the share of words and
    end tokens that it predicts rightly, given the words before; the image's information is how much better it predicts
    them at their own image than at another, in nats per word.

    Args:
        out: The run's folder, with phases `stream`, `glam` and `judge` trained.
        device: "cpu" or "cuda".
        fit_judge: Train the networks that FID, KID, Inception Score, diversity and the attributes of synthetic flowers
            need, and keep them in the folder; once they are there they are used. Where the data allow none, the reason
            is kept as `not_measured`.
        inception: Take torchvision's Inception v3 for FID, KID, Inception Score and diversity instead.

    Returns:
        The content of evaluation.json.

    Raises:
        FileNotFoundError: The folder is not a run, or a phase is missing.
        ValueError: A file is damaged, there are too few captions, or the training captions are not those of the run.
        OSError: The weights of Inception are not there and cannot be fetched.
    """
    folder = RunFolder(out)
    recipe = folder.read_recipe()
    for phase in PHASES:
        if not folder.weights(phase).exists():
            raise FileNotFoundError(f"{folder.path} lacks phase {phase!r}; train it with --phases {phase}.")
    model = MirrorGAN.from_pretrained(folder.model, device=device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    folder.check_vocabulary(splits.vocabulary)
    if splits.vocabulary != model.vocabulary:
        raise ValueError(
            f"{folder.model} has another vocabulary than today's training captions, so that its words would be read as "
            "others: restore the data set that it was trained on, or train anew."
        )
    pair = load_pair(folder, "judge", recipe, splits).to(device)
    # Classes are told for the extractor's sake alone, and Inception is one.
    judges = Judges() if inception and not _is_synthetic(recipe) else load_judges(folder, recipe, splits, fit_judge)
    if inception:
        judges = judges._replace(extractor=inception_extractor(device=device))

    unseen = unseen_pairs(splits, recipe.model.max_words)
    real, generated = to_float(unseen.images), generate_images(model, unseen.tokens, unseen.word_mask, recipe.seed)
    if not bool(generated.isfinite().all()):
        raise ValueError(
            f"the generator in {folder.model} draws images that hold NaN or infinite values, of which nothing can be "
            "measured: its training has diverged. Train phase 'glam' anew, for instance with a lower learning rate."
        )
    # Every image meets another image's caption. At random: neighbors in a data set are often of one class.
    others = derangement(len(generated), recipe.seed)
    images = {"generated": generated, "real": real, "shuffled": generated[others]}
    features = {name: image_features(pair, image) for name, image in images.items()}
    sentences = sentence_features(pair, unseen.tokens, unseen.word_mask)
    read = {
        name: word_accuracy(model.captioner, image, unseen.tokens, unseen.word_mask) for name, image in images.items()
    }
    candidates = recipe.evaluation.candidates
    evaluation = {
        "r_precision": {name: _precision(each, sentences, candidates, recipe.seed) for name, each in features.items()},
        "chance": 1 / candidates,
        "word_accuracy": {name: accuracy for name, (accuracy, _) in read.items()},
        "image_information": {
            name: image_information(model.captioner, image, unseen.tokens, unseen.word_mask, read[name][1], recipe.seed)
            for name, image in images.items()
        },
        "redescription": {
            name: redescription_quality(model.describe(image), unseen.captions)._asdict()
            for name, image in images.items()
        },
        "images": len(generated),
        "candidates": candidates,
        "judge": "an encoder pair trained on the same training split with another seed; no other phase used it",
        "left_out": dict(splits.left_out),
        **_judged(judges, model, splits, unseen, images, recipe.seed),
        **_speed(folder),
    }
    hits = expected_hits(features["generated"], sentences, candidates=candidates)
    cases = _cases(hits, unseen.captions, generated, unseen.images)
    write_json(folder.evaluation, evaluation)
    write_report(folder, recipe, _showcase(model, unseen, recipe, cases), evaluation)
    return evaluation


def load_judges(folder: RunFolder, recipe: Recipe, splits: Splits, fit: bool) -> Judges:
    """The judges that lie in a run's folder, or that are trained into it as far as its data allow."""
    path = folder.path / "judges" / ("attributes.safetensors" if _is_synthetic(recipe) else "classes.safetensors")
    if not fit and not path.exists():
        return Judges()
    try:
        if _is_synthetic(recipe):
            judge = fit_attribute_judge(path, recipe.model.resolutions[-1])
            return Judges(attribute_extractor(judge), judge)
        return Judges(fit_class_extractor(path, splits.training, recipe.model.resolutions[-1], recipe.seed))
    except TrainingError as error:
        return Judges(missing=str(error))


def _is_synthetic(recipe: Recipe) -> bool:
    return recipe.data.source == "synthetic-flowers"


def _precision(features: Tensor, sentences: Tensor, candidates: int, seed: int) -> dict[str, Any]:
    found = r_precision_folds(
        features,
        sentences,
        candidates=candidates,
        folds=max(2, min(FOLDS, len(features) // 2)),
        generator=torch.Generator().manual_seed(seed),
    )
    return {"top1": found.top1, "top2": found.top2, "top3": found.top3, "standard_errors": [*found.standard_errors]}


def _judged(
    judges: Judges, model: MirrorGAN, splits: Splits, unseen: Unseen, images: dict[str, Tensor], seed: int
) -> dict[str, Any]:
    """What the judges say, each by its name. Attributes of synthetic flowers are measured in pixels without any."""
    figures: dict[str, Any] = {}
    if splits.validation.attributes[0]:
        figures["attributes"] = {
            name: measure_attributes(image, unseen.captions, judges.attributes) for name, image in images.items()
        }
    if judges.missing:
        figures["not_measured"] = judges.missing
    extractor = judges.extractor
    if extractor is not None:
        figures["extractor"] = extractor.name
        figures["features"] = _feature_figures(extractor, splits.training.images, images, seed)
        spread = _diversity(extractor, model, unseen, seed)
        figures["features"]["generated"] |= {
            "diversity": spread.mean,
            "diversity_standard_error": spread.standard_error,
        }
    return figures


def _feature_figures(
    extractor: Extractor, training: Tensor, images: dict[str, Tensor], seed: int
) -> dict[str, dict[str, float]]:
    """Distances from the validation images, and Inception Scores, of generated images and of real ones.

    Real images that are at a distance from those of validation are training images that the extractor has not learned
    from, at the same size. Distances of few images are too large: as many generated ones as real ones are taken.
    """
    random = torch.Generator().manual_seed(seed)
    reference = extractor.features(images["real"])
    rows = torch.arange(len(training))[extractor.unlearned]
    rows = rows[torch.randperm(len(rows), generator=random)[: len(reference)]]
    some = torch.randperm(len(reference), generator=random)[: len(rows)]
    resolution = images["real"].shape[2]
    compared = {
        "generated": extractor.features(images["generated"][some]),
        "real": torch.cat(
            [extractor.features(to_float(at_resolution(training[few], resolution))) for few in rows.split(CHUNK)]
        ),
    }
    figures = {}
    for name, features in compared.items():
        random = torch.Generator().manual_seed(seed)
        size = min(1000, len(features))
        kernel = kernel_distance(features, reference, subsets=FOLDS, subset_size=size, generator=random)
        logits = extractor.logits(images[name])
        score = inception_score(logits, splits=min(FOLDS, len(logits) // 2), generator=random)
        figures[name] = {
            "distance_images": len(features),
            "frechet_distance": frechet_distance(features, reference),
            "kernel_distance": kernel.mean,
            "inception_score": score.mean,
            "inception_score_deviation": score.standard_deviation,
        }
    return figures


def _diversity(extractor: Extractor, model: MirrorGAN, unseen: Unseen, seed: int) -> Diversity:
    """How much the images of one caption differ, which have other noise each."""
    few = unseen.spread(DIVERSE_CAPTIONS)
    tokens, word_mask = (rows.repeat_interleave(IMAGES_PER_CAPTION, dim=0) for rows in (few.tokens, few.word_mask))
    features = extractor.features(generate_images(model, tokens, word_mask, seed))
    return diversity(features.unflatten(0, (len(few.captions), IMAGES_PER_CAPTION)))


def _cases(hits: Tensor, captions: list[str], generated: Tensor, real: Tensor) -> dict[str, list[Case]]:
    """The captions that are found most surely by their images, and those that are found least."""
    order = hits.argsort(descending=True, stable=True).tolist()
    count = min(CASES, len(order) // 2)
    rows = {"best": order[:count], "worst": order[::-1][:count]}
    return {
        name: [Case(captions[i], generated[i], to_float(real[i : i + 1])[0], float(hits[i])) for i in some]
        for name, some in rows.items()
    }


def _showcase(model: MirrorGAN, unseen: Unseen, recipe: Recipe, cases: dict[str, list[Case]]) -> Showcase:
    few = unseen.spread(recipe.evaluation.report_images)
    captions, shown = few.captions, to_float(few.images)
    with warnings.catch_warnings():
        # Nobody wrote these captions just now: a rare word of the data set is no mistake.
        warnings.filterwarnings("ignore", message="unknown words")
        generated = model.generate(captions, seed=recipe.seed, need_weights=True)
    words = [[model.vocabulary.words[t] for t in row[mask].tolist()] for row, mask in zip(few.tokens, few.word_mask)]
    return Showcase(
        captions=captions,
        words=words,
        real=shown,
        generated=generated,
        real_descriptions=model.describe(shown),
        generated_descriptions=model.describe(generated.images[-1]),
        cases=cases,
    )


def _speed(folder: RunFolder) -> dict[str, dict[str, float]]:
    # Only lines of the training itself say how long it waited.
    last = {entry["phase"]: entry for entry in read_log(folder.log) if "waited" in entry}
    seconds = {phase: max(entry["seconds"], 1e-9) for phase, entry in last.items()}
    return {
        "seconds": seconds,
        "images_per_second": {phase: round(entry["images"] / seconds[phase], 1) for phase, entry in last.items()},
        "waited_for_data": {phase: round(entry["waited"] / seconds[phase], 4) for phase, entry in last.items()},
    }
