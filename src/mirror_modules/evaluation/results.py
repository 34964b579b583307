"""The metrics of a grid's runs: measured on each image, and read back from the files of all runs.

result.json holds those of a cell with one seed, real.json those of the real images, and bounds.json the bounds of each
R-precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mirror_modules._files import read_json
from mirror_modules.data import attributes_named, measured_box, to_bytes, to_float
from mirror_modules.evaluation.attributes import AttributeClassifier, predict_attributes
from mirror_modules.evaluation.retrieval import (
    Candidates,
    Evaluator,
    RankedSplit,
    bounds,
    candidate_sets,
    expected_precision,
    load_evaluators,
    own_class,
    ranked_splits,
    text_queries,
)
from mirror_modules.evaluation.tables import REAL, r_precision_name
from mirror_modules.metrics import box_overlap
from mirror_modules.models import TextToImage, build_model
from mirror_modules.models.pretrained import load_weights
from mirror_modules.training.batches import Splits, has_classes, usable_candidates
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import Recipe
from mirror_modules.training.validation import (
    Unseen,
    WordAccuracy,
    generate_images,
    image_features,
    predict_words,
    sentence_features,
)


class Ranking(NamedTuple):
    """An R-precision: who ranks which captions among which candidates."""

    metric: str
    """Its name."""
    evaluator: Evaluator
    split: RankedSplit
    candidates: Candidates


def measure(
    recipe: Recipe,
    folder: RunFolder,
    splits: Splits,
    device: str,
    classifier: AttributeClassifier | None,
    model: TextToImage | None,
) -> dict[str, list[float]]:
    """Metrics per validation caption, in [0, 1]: `{"r_precision": [...], ...}`.

    `r_precision` is the expected top-1 precision by the encoder pair of phase `evaluator`. With classes there are also
    `r_precision_other_classes`, among candidates of other classes only, and `held_out_r_precision`, on images of
    training classes held out from all training; and with a second evaluator the same ones, as `second_r_precision`.
    `attributes` is the share of the attributes in the caption that the attribute classifier predicts for the image;
    `colors` is the same share for the two colors measured in the pixels. Of scattered flowers, there is `box_overlap`,
    of the measured box with that of the caption's real image, in place of `attributes`. `words` holds a single value,
    the captioner's word accuracy over the split.

    Args:
        recipe: The recipe of the run.
        folder: The run that holds the weights of phases `stream` and `evaluator`.
        splits: The data of the recipe.
        device: "cpu" or "cuda".
        classifier: The attribute classifier of drawn flowers; None if the data have no attributes, or flowers are
            scattered.
        model: Generates the images; None evaluates the real images instead.
    """
    captioner = build_model(recipe.model, splits.vocabulary).captioner
    load_weights(captioner, folder.weights("stream"))
    captioner.to(device).eval()
    rankings = _rankings(recipe, folder, splits, device)
    pairs = {each.evaluator.phase: each.evaluator.pair for each in rankings}
    unseen = {each.split.name: each.split.unseen for each in rankings}

    def compute(part: Unseen, rows: Tensor, *, features_only: bool) -> dict[str, Any]:
        images = (
            to_float(part.images)
            if model is None
            else generate_images(model, part.tokens, part.word_mask, recipe.seed, part.location(model), rows)
        )
        found: dict[str, Any] = {"features": {phase: image_features(pair, images) for phase, pair in pairs.items()}}
        if features_only:
            return found
        found["predicted"] = predict_words(captioner, images, part.tokens, part.word_mask)
        if recipe.data.scatter:
            found["boxes"] = measured_box(to_bytes(images))
        if recipe.data.scatter or classifier is not None:
            found |= predict_attributes(images, classifier, found.get("boxes"))
        return found

    # By split: all sets of candidates are ranked by the same features.
    computed = {
        name: each.in_chunks(partial(compute, features_only=name != "validation")) for name, each in unseen.items()
    }
    metrics: dict[str, list[float]] = {}
    for metric, evaluator, split, candidates in rankings:
        sentences = sentence_features(evaluator.pair, split.unseen.tokens, split.unseen.word_mask)
        features = computed[split.name]["features"][evaluator.phase]
        metrics[metric] = expected_precision(features, sentences, candidates).tolist()
    return metrics | _other_metrics(computed["validation"], unseen["validation"])


def _other_metrics(computed: Mapping[str, Any], unseen: Unseen) -> dict[str, list[float]]:
    """The metrics of the validation images besides R-precision."""
    metrics = {"words": [WordAccuracy.of(computed["predicted"]).accuracy]}
    named = [attributes_named(caption) for caption in unseen.captions]
    for metric, method in (("attributes", "classifier"), ("colors", "measured_colors")):
        if method in computed:
            metrics[metric] = _shares_correct(computed[method], named)
    if "boxes" in computed and unseen.boxes is not None:
        metrics["box_overlap"] = box_overlap(computed["boxes"], unseen.boxes).tolist()
    return metrics


def _shares_correct(predicted: Mapping[str, Sequence[str]], named: Sequence[Mapping[str, str]]) -> list[float]:
    """For each caption, the share of its attributes, among the predicted ones, that match the prediction."""
    shares = []
    for i, attributes in enumerate(named):
        correct = [predicted[name][i] == value for name, value in attributes.items() if name in predicted]
        # Never empty: every caption names the color of the petals.
        shares.append(sum(correct) / len(correct))
    return shares


def measure_bounds(recipe: Recipe, folder: RunFolder, splits: Splits, device: str) -> dict[str, dict[str, float]]:
    """The bounds of each R-precision of `measure`, by which its values are judged.

    They are the R-precision of a random ranking, of an oracle that knows the class alone, and of other captions of the
    same image; and with classes how real images rank captions of their own class.
    """
    return {
        each.metric: {**bounds(each.split, each.candidates), **_measured_bounds(each)}
        for each in _rankings(recipe, folder, splits, device)
    }


def _rankings(recipe: Recipe, folder: RunFolder, splits: Splits, device: str) -> list[Ranking]:
    usable_candidates(recipe.evaluation.candidates, splits)
    ranked = ranked_splits(splits, recipe.model.max_words)
    return [
        Ranking(r_precision_name(evaluator.phase, split.name, candidates.name), evaluator, split, candidates)
        for evaluator in load_evaluators(folder, recipe, splits, device)
        for split in ranked
        for candidates in candidate_sets(split.unseen.class_ids, recipe.evaluation.candidates)
        if candidates.size >= 2
    ]


def _measured_bounds(ranking: Ranking) -> dict[str, float]:
    _, evaluator, split, candidates = ranking
    unseen, found = split.unseen, {}
    sentences = sentence_features(evaluator.pair, unseen.tokens, unseen.word_mask)
    queries = text_queries(evaluator.pair, split)
    if queries is not None:
        precision = expected_precision(queries, sentences.to(queries.dtype), candidates)
        found["text_ceiling"] = float(precision.mean())
    if candidates.class_ids is None and has_classes(unseen.class_ids):
        features = unseen.in_chunks(lambda part, rows: image_features(evaluator.pair, part.images))
        within = own_class(features, sentences, unseen.class_ids)
        found |= {"own_class": within.share, "own_class_error": within.standard_error}
    return found


def read_results(files: Mapping[str, Sequence[Path]]) -> dict[str, list[dict[str, list[float]]]]:
    """Read what `measure` returned, for each cell and seed.

    Raises:
        ValueError: A file holds something else, or metrics of other captions than those of the real images.
    """
    results = {name: [read_json(path) for path in paths] for name, paths in files.items()}
    counts = {name: [_count_values(metrics) for metrics in row] for name, row in results.items()}
    metrics_of_all = set(counts[REAL][0] or ())
    for name in (REAL, *files):
        for path, count, real_count in zip(files[name], counts[name], counts[REAL]):
            if count is None or count != real_count or count.keys() != metrics_of_all:
                raise ValueError(
                    f"{path} is damaged: it must hold the metrics of a run, each as a list of numbers from 0 to 1, "
                    "and the same ones for every run; remove it and repeat the command, which measures this run again."
                )
    return results


def _count_values(metrics: Any) -> dict[str, int] | None:
    """The number of values of each metric; None if these are no metrics."""
    if not isinstance(metrics, dict) or not {"r_precision", "words"} <= metrics.keys():
        return None
    for values in metrics.values():
        if not isinstance(values, list) or not values:
            return None
        if not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
            return None
    return {name: len(values) for name, values in metrics.items()}


def read_mean_bounds(paths: Sequence[Path], metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The means over seeds of what `measure_bounds` returned.

    Raises:
        ValueError: A file holds something else.
    """
    files = [read_json(path) for path in paths]
    names = [name for name in metrics if "r_precision" in name]
    for path, content in zip(paths, files):
        if not isinstance(content, dict) or not all(
            _are_bounds(content.get(name), files[0].get(name)) for name in names
        ):
            raise ValueError(
                f"{path} is damaged: it must hold the bounds of each R-precision; remove it and repeat the command, "
                "which measures them again."
            )
    return {
        name: {key: sum(each[name][key] for each in files) / len(files) for key in files[0][name]} for name in names
    }


def _are_bounds(values: Any, first: Any) -> bool:
    return (
        isinstance(values, dict)
        and isinstance(first, dict)
        and "chance" in values
        and values.keys() == first.keys()
        and all(type(value) in (int, float) and 0 <= value <= 1 for value in values.values())
    )
