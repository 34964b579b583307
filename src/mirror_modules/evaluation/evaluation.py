"""Evaluation of a trained run with networks that no generator was trained against (MirrorGAN, Sec. 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules._files import write_json
from mirror_modules._tiles import in_chunks
from mirror_modules.data.flowers.colors import measured_box
from mirror_modules.data.mapped_images import MappedImages
from mirror_modules.data.transforms import to_bytes, to_float
from mirror_modules.evaluation.attributes import (
    CHUNK,
    LOWEST_CLASSIFIED_RESOLUTION,
    AttributeClassifier,
    fit_attribute_classifier,
    measure_attributes,
    predict_attributes,
)
from mirror_modules.evaluation.extractors import (
    Extractor,
    attribute_extractor,
    backbone_extractors,
    fit_class_extractor,
    inception_extractor,
)
from mirror_modules.evaluation.report import Case, Showcase, write_report
from mirror_modules.evaluation.retrieval import (
    Evaluator,
    load_clip_evaluator,
    load_evaluators,
    measure_retrieval,
    ranked_splits,
)
from mirror_modules.metrics import (
    box_overlap,
    diversity,
    expected_hits,
    frechet_distance,
    inception_score,
    kernel_distance,
    redescription_quality,
)
from mirror_modules.models import TextToImage
from mirror_modules.pictures.attention import token_words
from mirror_modules.training.batches import Splits, announce_candidates, at_resolution, load_splits, usable_candidates
from mirror_modules.training.distributed import ProcessGroup, cpu_threads, resolve_device
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import read_log
from mirror_modules.training.recipes import Recipe
from mirror_modules.training.validation import (
    Rotation,
    Unseen,
    derangement,
    generate_images,
    image_features,
    mean_image_information,
    sentence_features,
)

# Parts of the images over which the Inception Score is averaged.
SCORE_SPLITS = 10
CASES = 8
# Diversity: the number of captions, and the number of images generated from each.
DIVERSE_CAPTIONS, IMAGES_PER_CAPTION = 30, 10


class EvaluationNetworks(NamedTuple):
    """Optional networks for the metrics other than R-precision."""

    extractors: Sequence[Extractor] = ()
    """For FID, KID, Inception Score and diversity, each on its own features."""
    classifier: AttributeClassifier | None = None
    """For the attributes of synthetic flowers."""
    missing: str = ""
    """Why a requested network could not be trained; empty if none failed."""


def evaluate(
    out: str | Path,
    *,
    device: str = "cpu",
    fit_classifier: bool | None = None,
    inception: bool = False,
    clip: str | Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Evaluate a trained run; write evaluation.json, the pictures and report.html.

    Validation images are evaluated with one caption each that no training image has; images without one are omitted.
    Images are generated from these captions, and each image ranks its caption against others of the validation split.
    The same metrics for the real images are the ceiling, and those for images generated from other captions (shuffled)
    the floor. `evaluators` has R-precision by every evaluator of the run, also on the training images held out from all
    training and with candidates of other classes only, beside that of one who knows the class alone and that of the
    other captions of each image. Where these show that an evaluator cannot rank images, `cannot_rank` is true, with
    `reasons`. Image n of a split has the seed `recipe.seed + n`, with which the model's `generate` generates it again.

    FID, KID and diversity of photographs are measured on the features of the evaluators' pretrained backbones, if there
    are any: `extractor` names the first, `features` has its values, and `further_extractors` both for each other one.

    Word accuracy is the share of words and end tokens that the captioner predicts correctly, given the preceding words;
    `image_information` is an estimate of the pointwise mutual information of image and caption, in nats per token.
    R-precision has fewer candidates than `evaluation.candidates` if fewer captions are unseen, which a printed line
    reports. The caller's global random state and number of threads are restored at the end.

    Args:
        out: The folder of the run, with all phases trained. Without its metrics.jsonl, the report has neither loss
            curves nor the speed of training.
        device: "cpu", "cuda" or "auto", which uses a GPU if there is one.
        fit_classifier: Train the classifier for FID, KID, Inception Score, diversity and, on drawn flowers, attribute
            accuracy, and save it in the folder; later calls reuse it. If the data do not allow one, the reason is
            stored as `not_measured`. None trains one for drawn flowers of at least 32 pixels, below which it is not
            accurate enough, and otherwise takes the evaluators' pretrained backbones. That of drawn flowers is also
            kept in the user's cache for other runs. False measures with neither a classifier nor a backbone.
        inception: Use torchvision's Inception v3 for FID, KID, Inception Score and diversity instead.
        clip: A checkpoint of CLIP or SigLIP, as a folder or as a name on the Hugging Face Hub, from which it is
            downloaded. It becomes a further evaluator, "clip" in `evaluators`, which also has the CLIPScore.
        threads: Threads on the CPU; None takes those of the run's recipe, or torch's default if it names none.

    Returns:
        The content of evaluation.json.

    Raises:
        FileNotFoundError: The folder is not a run, or a phase is missing.
        ValueError: A file is damaged, fewer than two captions are unseen, the training captions have changed since the
            run, the generator has diverged, `clip` is another model, or an argument is out of range.
        OSError: The weights of Inception or the checkpoint `clip` are neither on disk nor downloadable.
        ImportError: `clip` is given and transformers is missing.

    Examples:
        >>> from mirror_modules.evaluation import evaluate
        >>> metrics = evaluate("runs/demo")  # doctest: +SKIP
        >>> round(metrics["r_precision"]["generated"]["top1"], 3)  # doctest: +SKIP
        0.782
        >>> sorted(metrics["r_precision"])  # doctest: +SKIP
        ['generated', 'real', 'shuffled']
        >>> metrics["cannot_rank"]  # doctest: +SKIP
        False
        >>> metrics["evaluators"]["evaluator"]["validation"]["all_captions"]["text_ceiling"]["top1"]  # doctest: +SKIP
        0.758
    """
    group = ProcessGroup(device=torch.device(resolve_device(device)))
    folder = RunFolder(out)
    recipe = folder.read_recipe()
    for phase in recipe.phases:
        if not folder.weights(phase).exists():
            raise FileNotFoundError(f"{folder.path} lacks phase {phase!r}; train it with --phases {phase}.")
    if threads is not None:
        check_positive("evaluate", threads=threads)
    # The caller may have turned gradients off, but a classifier may have to be trained.
    with (
        cpu_threads(recipe.engine.threads if threads is None else threads),
        group.fork_rng(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        return _evaluate(folder, recipe, str(group.device), fit_classifier, inception, clip)


def _evaluate(
    folder: RunFolder,
    recipe: Recipe,
    device: str,
    fit_classifier: bool | None,
    inception: bool,
    clip: str | Path | None,
) -> dict[str, Any]:
    # Read first: a damaged log or a checkpoint that cannot be used is an error.
    speed = _speed(folder)
    pretrained = [] if clip is None else [load_clip_evaluator(str(clip), device)]
    model = TextToImage.from_pretrained(folder.model, device=device)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    folder.check_vocabulary(splits.vocabulary)
    if splits.vocabulary != model.vocabulary:
        raise ValueError(
            f"{folder.model} has a different vocabulary than the current training captions, so its token ids would "
            "stand for other words: restore the data set that it was trained on, or train again."
        )
    candidates = usable_candidates(recipe.evaluation.candidates, splits)
    announce_candidates(recipe.evaluation.candidates, candidates)
    evaluators = load_evaluators(folder, recipe, splits, device)
    networks = _choose_networks(folder, recipe, splits, evaluators, device, fit_classifier, inception)

    ranked = ranked_splits(splits, recipe.model.max_words)
    unseen = ranked[0].unseen
    ranking = [*evaluators, *pretrained]
    generated = partial(_generated, folder.model, model, recipe.seed)
    rotation = Rotation(unseen, recipe.seed)

    def encode(images: Tensor) -> dict[str, Tensor]:
        return {each.phase: image_features(each.pair, images) for each in ranking}

    def measure(images: Tensor, part: Unseen, rows: Tensor, *, shuffled: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "encoded": encode(images),
            "predicted": rotation.predict(model.captioner, images, rows, distances=3 if shuffled else 2),
            "descriptions": model.describe(images),
            "extracted": {i: _extract(extractor, images) for i, extractor in enumerate(networks.extractors)},
            **_measure_boxes(images, part, recipe),
        }
        if splits.validation.attributes[0]:
            boxes = found["boxes"] if recipe.data.scatter else None
            found["attributes"] = predict_attributes(images, networks.classifier, boxes)
        return found

    # Every image is read or generated once, for all networks, and only what they compute is kept.
    results = {
        "generated": unseen.in_chunks(lambda part, rows: measure(generated(part, rows), part, rows, shuffled=True)),
        "real": unseen.in_chunks(lambda part, rows: measure(to_float(part.images), part, rows, shuffled=False)),
    }
    predicted = {name: each.pop("predicted") for name, each in results.items()}
    # Shuffled images are at distance 1 of their captions; the other image of each caption is one step further.
    words = {
        "generated": [rotation.accuracy(predicted["generated"], distance) for distance in (0, 1)],
        "real": [rotation.accuracy(predicted["real"], distance) for distance in (0, 1)],
        "shuffled": [rotation.accuracy(predicted["generated"], distance) for distance in (1, 2)],
    }
    results = _with_shuffled(results, rotation.image_of[1])
    encoded = {"validation": {name: each["encoded"] for name, each in results.items()}}
    for split in ranked[1:]:
        of_split = {
            "generated": split.unseen.in_chunks(lambda part, rows: encode(generated(part, rows))),
            "real": split.unseen.in_chunks(lambda part, rows: encode(to_float(part.images))),
        }
        encoded[split.name] = _with_shuffled(of_split, derangement(len(split.unseen.captions), recipe.seed))
    measured: dict[str, dict[str, Any]] = {
        evaluator.phase: {
            "description": evaluator.description,
            **{
                split.name: measure_retrieval(
                    evaluator,
                    split,
                    {name: features[evaluator.phase] for name, features in encoded[split.name].items()},
                    recipe.evaluation.candidates,
                    recipe.seed,
                )
                for split in ranked
            },
        }
        for evaluator in ranking
    }
    first = measured[evaluators[0].phase]
    standard = first["validation"]["all_captions"]
    evaluation = {
        "r_precision": {name: standard[name] for name in results},
        "chance": standard["chance"],
        "cannot_rank": standard["cannot_rank"],
        "reasons": standard["reasons"],
        "word_accuracy": {name: own.accuracy for name, (own, _) in words.items()},
        "image_information": {name: mean_image_information(own, other) for name, (own, other) in words.items()},
        "redescription": {
            name: redescription_quality(each["descriptions"], unseen.captions)._asdict()
            for name, each in results.items()
        },
        "images": len(unseen.captions),
        "candidates": candidates,
        "evaluator": first["description"],
        "evaluators": measured,
        "skipped": dict(splits.skipped),
        **_network_metrics(networks, model, splits, unseen, results, recipe.seed),
        **_place_metrics(unseen, results),
        **speed,
    }
    sentences = sentence_features(evaluators[0].pair, unseen.tokens, unseen.word_mask)
    features = encoded["validation"]["generated"][evaluators[0].phase]
    precision = expected_hits(features, sentences, candidates=candidates)
    cases = _cases(precision, unseen, generated)
    write_json(folder.evaluation, evaluation)
    write_report(folder, recipe, _showcase(model, unseen, recipe, cases), evaluation)
    return evaluation


def _generated(path: Path, model: TextToImage, seed: int, part: Unseen, rows: Tensor) -> Tensor:
    """The images (B, 3, H, W) that the model, stored at `path`, generates from captions.

    Raises:
        ValueError: A value is not finite.
    """
    images = generate_images(model, part.tokens, part.word_mask, seed, part.location(model), rows)
    if not bool(images.isfinite().all()):
        raise ValueError(
            f"the generator in {path} generates images with NaN or infinite values, which cannot be evaluated: its "
            "training has diverged. Train phase 'glam' again, for instance with a lower learning rate."
        )
    return images


def _extract(extractor: Extractor, images: Tensor) -> dict[str, Tensor]:
    """Features of images, and class logits if the extractor has any."""
    logits = {} if extractor.logits is None else {"logits": extractor.logits(images)}
    return {"features": extractor.features(images), **logits}


def _measure_boxes(images: Tensor, part: Unseen, recipe: Recipe) -> dict[str, Tensor]:
    """The boxes of drawn flowers, where boxes differ or a system takes them."""
    takes_place = recipe.data.scatter or recipe.model.takes_location
    if not _is_synthetic(recipe) or part.boxes is None or not takes_place:
        return {}
    return {"boxes": measured_box(to_bytes(images))}


def _with_shuffled(results: dict[str, dict[str, Any]], order: Tensor) -> dict[str, dict[str, Any]]:
    """Add the results of shuffled images: those of other generated images, at random.

    Neighbors in a data set often share a class.
    """
    return {**results, "shuffled": _in_order(results["generated"], order)}


def _in_order(results: Any, rows: Tensor) -> Any:
    """The rows of tensors, of lists, or of dictionaries of these, in another order."""
    if isinstance(results, dict):
        return {key: _in_order(each, rows) for key, each in results.items()}
    return results[rows] if isinstance(results, Tensor) else [results[row] for row in rows.tolist()]


def _choose_networks(
    folder: RunFolder,
    recipe: Recipe,
    splits: Splits,
    evaluators: Sequence[Evaluator],
    device: str,
    fit_classifier: bool | None,
    inception: bool,
) -> EvaluationNetworks:
    """The networks asked for; by default the classifier of drawn flowers, or else the evaluators' backbones."""
    is_synthetic, extractors = _is_synthetic(recipe), []
    fits = is_synthetic and recipe.model.resolutions[-1] >= LOWEST_CLASSIFIED_RESOLUTION
    if inception:
        extractors = [inception_extractor(device=device)]
    elif fit_classifier is None and not fits:
        extractors = backbone_extractors(evaluators, recipe)
    if fit_classifier is False or (extractors and not is_synthetic):
        # A class classifier would serve only as an extractor.
        return EvaluationNetworks(extractors)
    networks = load_evaluation_networks(folder, recipe, splits, fits if fit_classifier is None else fit_classifier)
    return networks._replace(extractors=extractors) if extractors else networks


def load_evaluation_networks(folder: RunFolder, recipe: Recipe, splits: Splits, fit: bool) -> EvaluationNetworks:
    """Load the evaluation networks from the folder of a run; with `fit`, train and save missing ones if possible."""
    path = folder.path / "classifiers" / ("attributes.safetensors" if _is_synthetic(recipe) else "classes.safetensors")
    if not fit and not path.exists():
        return EvaluationNetworks()
    try:
        if _is_synthetic(recipe):
            classifier = fit_attribute_classifier(path, recipe.model.resolutions[-1])
            return EvaluationNetworks([attribute_extractor(classifier)], classifier)
        resolution = recipe.model.resolutions[-1]
        return EvaluationNetworks([fit_class_extractor(path, splits.training, resolution, recipe.seed)])
    except TrainingError as error:
        return EvaluationNetworks(missing=str(error))


def _place_metrics(unseen: Unseen, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Overlap of drawn flowers with the boxes of their captions' images, where boxes were measured."""
    if unseen.boxes is None or "boxes" not in results["real"]:
        return {}
    overlaps = {}
    for name, each in results.items():
        overlap = box_overlap(each["boxes"], unseen.boxes)
        error = float(overlap.std() / len(overlap) ** 0.5)
        overlaps[name] = {"mean": float(overlap.mean()), "standard_error": error}
    return {"box_overlap": overlaps}


def _is_synthetic(recipe: Recipe) -> bool:
    return recipe.data.source == "synthetic-flowers"


def _network_metrics(
    networks: EvaluationNetworks,
    model: TextToImage,
    splits: Splits,
    unseen: Unseen,
    results: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Metrics of what the evaluation networks have computed, and of measured attributes."""
    metrics: dict[str, Any] = {}
    if "attributes" in results["real"]:
        metrics["attributes"] = {
            name: measure_attributes(each["attributes"], unseen.captions) for name, each in results.items()
        }
    if networks.missing:
        metrics["not_measured"] = networks.missing
    if networks.extractors:
        same_caption = _images_of_the_same_caption(model, unseen, seed)
        first, *further = (
            {
                "extractor": extractor.name,
                "features": _feature_metrics(
                    extractor,
                    splits.training.images,
                    {name: results[name]["extracted"][i] for name in ("generated", "real")},
                    same_caption,
                    seed,
                ),
            }
            for i, extractor in enumerate(networks.extractors)
        )
        metrics |= {**first, **({"further_extractors": further} if further else {})}
    return metrics


def _feature_metrics(
    extractor: Extractor,
    training: Tensor | MappedImages,
    extracted: Mapping[str, Mapping[str, Tensor]],
    same_caption: Tensor,
    seed: int,
) -> dict[str, dict[str, float]]:
    """FID and KID with the validation images as reference, and Inception Score, for generated and for real images.

    `extracted` has what `_extract` returns of generated and of real images. The metrics of generated images include the
    diversity of the images `same_caption`, from `_images_of_the_same_caption`.

    The real baseline compares validation images with training images held out from the extractor, resized to match.
    Distances are biased upward for few images, so both sides of the comparison use the same number of them.
    """
    random = torch.Generator().manual_seed(seed)
    reference = extracted["real"]["features"]
    real_rows = torch.arange(len(training))[extractor.held_out]
    real_rows = real_rows[torch.randperm(len(real_rows), generator=random)[: len(reference)]]
    generated_rows = torch.randperm(len(reference), generator=random)[: len(real_rows)]
    resolution = same_caption.shape[2]

    def real_features(rows: Tensor) -> Tensor:
        return extractor.features(to_float(at_resolution(training[rows], resolution)))

    compared = {
        "generated": extracted["generated"]["features"][generated_rows],
        "real": in_chunks(real_features, real_rows, size=CHUNK),
    }
    metrics: dict[str, dict[str, float]] = {}
    for name, features in compared.items():
        # The complete sets: their unbiased estimate has the smallest error, and the jackknife estimates it.
        kernel = kernel_distance(features, reference, subset_size=None)
        metrics[name] = {
            "distance_images": len(features),
            "frechet_distance": frechet_distance(features, reference),
            "kernel_distance": kernel.mean,
            **({} if kernel.standard_error is None else {"kernel_distance_standard_error": kernel.standard_error}),
        }
        if (logits := extracted[name].get("logits")) is not None:
            random = torch.Generator().manual_seed(seed)
            score = inception_score(logits, splits=min(SCORE_SPLITS, len(logits) // 2), generator=random)
            metrics[name] |= {"inception_score": score.mean, "inception_score_deviation": score.standard_deviation}
    spread = diversity(extractor.features(same_caption).unflatten(0, (-1, IMAGES_PER_CAPTION)))
    metrics["generated"] |= {"diversity": spread.mean, "diversity_standard_error": spread.standard_error}
    return metrics


def _images_of_the_same_caption(model: TextToImage, unseen: Unseen, seed: int) -> Tensor:
    """Images of some captions, IMAGES_PER_CAPTION of each with different noise, one caption after the other."""
    sample = unseen.spread(DIVERSE_CAPTIONS)
    tokens, word_mask = (
        tensor.repeat_interleave(IMAGES_PER_CAPTION, dim=0) for tensor in (sample.tokens, sample.word_mask)
    )
    location = sample.location(model)
    if location is not None:
        location = location.repeat_interleave(IMAGES_PER_CAPTION, dim=0)
    return generate_images(model, tokens, word_mask, seed, location)


def _cases(precision: Tensor, unseen: Unseen, generated: Callable[[Unseen, Tensor], Tensor]) -> dict[str, list[Case]]:
    """The captions whose images have the highest and the lowest expected top-1 precision; `generated` makes them."""
    order = precision.argsort(descending=True, stable=True).tolist()
    count = min(CASES, len(order) // 2)
    cases = {}
    for name, rows in {"best": order[:count], "worst": order[::-1][:count]}.items():
        part = unseen.select(rows)
        columns = part.captions, generated(part, torch.tensor(rows)), to_float(part.images), precision[rows].tolist()
        cases[name] = [Case(*each) for each in zip(*columns)]
    return cases


def _showcase(model: TextToImage, unseen: Unseen, recipe: Recipe, cases: dict[str, list[Case]]) -> Showcase:
    sample = unseen.spread(recipe.evaluation.report_images)
    real = to_float(sample.images)
    with warnings.catch_warnings():
        # The captions come from the data set, where rare words are expected; the warning is meant for user input.
        warnings.filterwarnings("ignore", message="unknown words")
        generated = model.generate_stages(
            sample.captions, seed=recipe.seed, location=sample.location(model), need_weights=True
        )
    return Showcase(
        captions=sample.captions,
        words=token_words(model.vocabulary, sample.tokens, sample.word_mask),
        real=real,
        generated=generated,
        real_descriptions=model.describe(real),
        generated_descriptions=model.describe(generated.images[-1]),
        cases=cases,
    )


def _speed(folder: RunFolder) -> dict[str, dict[str, float]]:
    if not folder.log.exists():
        return {}
    # Validation lines have no `waited` field; take the last training line of each phase.
    last = {entry["phase"]: entry for entry in read_log(folder.log) if "waited" in entry}
    seconds = {phase: max(entry["seconds"], 1e-9) for phase, entry in last.items()}
    return {
        "seconds": seconds,
        "images_per_second": {phase: round(entry["images"] / seconds[phase], 1) for phase, entry in last.items()},
        "waited_for_data": {phase: round(entry["waited"] / seconds[phase], 4) for phase, entry in last.items()},
    }
