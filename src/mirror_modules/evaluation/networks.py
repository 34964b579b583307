"""Evaluation networks other than the encoders: how they are chosen, and the metrics of what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules._tiles import in_chunks
from mirror_modules.data.mapped_images import MappedImages
from mirror_modules.data.transforms import to_float
from mirror_modules.evaluation.attributes import (
    CHUNK,
    LOWEST_CLASSIFIED_RESOLUTION,
    AttributeClassifier,
    fit_attribute_classifier,
    measure_attributes,
)
from mirror_modules.evaluation.extractors import (
    Extractor,
    attribute_extractor,
    backbone_extractors,
    fit_class_extractor,
    inception_extractor,
)
from mirror_modules.evaluation.retrieval import Evaluator
from mirror_modules.metrics import diversity, frechet_distance, inception_score, kernel_distance
from mirror_modules.models import TextToImage
from mirror_modules.training.batches import Splits, at_resolution
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import Recipe
from mirror_modules.training.validation import Unseen, generate_images

# Parts of the images over which the Inception Score is averaged.
SCORE_SPLITS = 10
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


def is_synthetic(recipe: Recipe) -> bool:
    """Whether the data are drawn flowers."""
    return recipe.data.is_drawn


def choose_networks(
    folder: RunFolder,
    recipe: Recipe,
    splits: Splits,
    evaluators: Sequence[Evaluator],
    device: str,
    fit_classifier: bool | None,
    inception: bool,
) -> EvaluationNetworks:
    """The networks asked for; by default the classifier of drawn flowers, or else the evaluators' backbones."""
    drawn, extractors = is_synthetic(recipe), []
    fits = drawn and recipe.model.resolutions[-1] >= LOWEST_CLASSIFIED_RESOLUTION
    if inception:
        extractors = [inception_extractor(device=device)]
    elif fit_classifier is None and not fits:
        extractors = backbone_extractors(evaluators, recipe)
    if fit_classifier is False or (extractors and not drawn):
        # A class classifier would serve only as an extractor.
        return EvaluationNetworks(extractors)
    networks = _load_networks(folder, recipe, splits, fits if fit_classifier is None else fit_classifier)
    return networks._replace(extractors=extractors) if extractors else networks


def _load_networks(folder: RunFolder, recipe: Recipe, splits: Splits, fit: bool) -> EvaluationNetworks:
    """Load the evaluation networks from the folder of a run; with `fit`, train and save missing ones if possible."""
    path = folder.path / "classifiers" / ("attributes.safetensors" if is_synthetic(recipe) else "classes.safetensors")
    if not fit and not path.exists():
        return EvaluationNetworks()
    try:
        if is_synthetic(recipe):
            classifier = fit_attribute_classifier(path, recipe.model.resolutions[-1])
            return EvaluationNetworks([attribute_extractor(classifier)], classifier)
        resolution = recipe.model.resolutions[-1]
        return EvaluationNetworks([fit_class_extractor(path, splits.training, resolution, recipe.seed)])
    except TrainingError as error:
        return EvaluationNetworks(missing=str(error))


def extract(extractor: Extractor, images: Tensor) -> dict[str, Tensor]:
    """Features of images, and class logits if the extractor has any."""
    logits = {} if extractor.logits is None else {"logits": extractor.logits(images)}
    return {"features": extractor.features(images), **logits}


def network_metrics(
    networks: EvaluationNetworks,
    model: TextToImage,
    splits: Splits,
    unseen: Unseen,
    results: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Metrics of what the evaluation networks have computed, and of measured attributes.

    Args:
        networks: The networks.
        model: Generates further images, for diversity.
        splits: The data; training images are the real baseline.
        unseen: The validation images and captions.
        results: By source, "generated", "real" and "shuffled": "extracted" has for each extractor what `extract`
            returned, and "attributes", if they were measured, what `predict_attributes` did.
        seed: Seed of the choice of images, and of the generated ones.
    """
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

    `extracted` has what `extract` returns of generated and of real images. The metrics of generated images include the
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
