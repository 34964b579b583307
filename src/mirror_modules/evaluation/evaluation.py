"""Evaluation of a trained run with networks that no generator was trained against (MirrorGAN, Sec. 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules._files import write_json
from mirror_modules.data.flowers.colors import measured_box
from mirror_modules.data.transforms import to_bytes, to_float
from mirror_modules.evaluation.attributes import predict_attributes
from mirror_modules.evaluation.networks import (
    EvaluationNetworks,
    choose_networks,
    extract,
    is_synthetic,
    network_metrics,
)
from mirror_modules.evaluation.report import Case, Showcase, write_report
from mirror_modules.evaluation.retrieval import (
    Evaluator,
    RankedSplit,
    load_clip_evaluator,
    load_evaluators,
    measure_retrieval,
    ranked_splits,
)
from mirror_modules.metrics import box_overlap, expected_hits, redescription_quality
from mirror_modules.models import TextToImage
from mirror_modules.pictures.attention import token_words
from mirror_modules.training.batches import Splits, announce_candidates, load_splits, usable_candidates
from mirror_modules.training.distributed import ProcessGroup, cpu_threads, resolve_device
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

# Best and worst images in the report, of each.
CASES = 8


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
    training and with candidates of other classes only, beside that of an oracle that knows the class alone and that of
    the other captions of each image. Where these show that an evaluator cannot rank images, `cannot_rank` is true, with
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
        0.991
        >>> sorted(metrics["r_precision"])  # doctest: +SKIP
        ['generated', 'real', 'shuffled']
        >>> metrics["cannot_rank"]  # doctest: +SKIP
        True
        >>> metrics["evaluators"]["evaluator"]["validation"]["all_captions"]["text_ceiling"]["top1"]  # doctest: +SKIP
        0.959
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


@dataclass(frozen=True)
class _Run:
    """A trained run, and the networks that evaluate it."""

    folder: RunFolder
    recipe: Recipe
    model: TextToImage
    splits: Splits
    ranked: list[RankedSplit]
    """Validation images first, then the held-out ones, if there are any."""
    evaluators: list[Evaluator]
    """The first one ranks the captions of the standard metrics."""
    networks: EvaluationNetworks

    @property
    def unseen(self) -> Unseen:
        """The validation images and captions."""
        return self.ranked[0].unseen

    def generate(self, part: Unseen, rows: Tensor) -> Tensor:
        """The images (B, 3, H, W) that the model generates from captions.

        Raises:
            ValueError: A value is not finite.
        """
        location = part.location(self.model)
        images = generate_images(self.model, part.tokens, part.word_mask, self.recipe.seed, location, rows)
        if not bool(images.isfinite().all()):
            raise ValueError(
                f"the generator in {self.folder.model} generates images with NaN or infinite values, which cannot be "
                "evaluated: its training has diverged. Train phase 'glam' again, for instance with a lower learning "
                "rate."
            )
        return images

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images by each evaluator."""
        return {each.phase: image_features(each.pair, images) for each in self.evaluators}


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
    splits = _load_splits(folder, recipe, model)
    candidates = usable_candidates(recipe.evaluation.candidates, splits)
    announce_candidates(recipe.evaluation.candidates, candidates)
    evaluators = load_evaluators(folder, recipe, splits, device)
    networks = choose_networks(folder, recipe, splits, evaluators, device, fit_classifier, inception)
    ranked = ranked_splits(splits, recipe.model.max_words)
    run = _Run(folder, recipe, model, splits, ranked, [*evaluators, *pretrained], networks)

    rotation = Rotation(run.unseen, recipe.seed)
    results = _compute_validation(run, rotation)
    predicted = {name: each.pop("predicted") for name, each in results.items()}
    results = _with_shuffled(results, rotation.image_of[1])
    encoded = {name: each["encoded"] for name, each in results.items()}
    retrieval = _retrieval_metrics(run, {"validation": encoded, **_encode_held_out(run)})
    evaluation = {
        **_standard_metrics(retrieval[evaluators[0].phase]["validation"]["all_captions"]),
        **_captioner_metrics(rotation, predicted),
        "redescription": {
            name: redescription_quality(each["descriptions"], run.unseen.captions)._asdict()
            for name, each in results.items()
        },
        "images": len(run.unseen.captions),
        "candidates": candidates,
        "evaluator": evaluators[0].description,
        "evaluators": retrieval,
        "skipped": dict(splits.skipped),
        **network_metrics(networks, model, splits, run.unseen, results, recipe.seed),
        **_place_metrics(run.unseen, results),
        **speed,
    }
    showcase = _showcase(run, encoded["generated"][evaluators[0].phase], candidates)
    write_json(folder.evaluation, evaluation)
    write_report(folder, recipe, showcase, evaluation)
    return evaluation


def _load_splits(folder: RunFolder, recipe: Recipe, model: TextToImage) -> Splits:
    """The data of a run.

    Raises:
        ValueError: The training captions have changed since.
    """
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    folder.check_vocabulary(splits.vocabulary)
    if splits.vocabulary != model.vocabulary:
        raise ValueError(
            f"{folder.model} has a different vocabulary than the current training captions, so its token ids would "
            "stand for other words: restore the data set that it was trained on, or train again."
        )
    return splits


def _compute_validation(run: _Run, rotation: Rotation) -> dict[str, dict[str, Any]]:
    """What the networks compute of the generated and of the real validation images.

    Every image is read or generated once, for all networks, and only what they compute is kept.
    """

    def compute(images: Tensor, part: Unseen, rows: Tensor, distances: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "encoded": run.encode(images),
            "predicted": rotation.predict(run.model.captioner, images, rows, distances),
            "descriptions": run.model.describe(images),
            "extracted": {i: extract(extractor, images) for i, extractor in enumerate(run.networks.extractors)},
            **_measure_boxes(images, part, run.recipe),
        }
        if run.splits.validation.attributes[0]:
            boxes = found["boxes"] if run.recipe.data.scatter else None
            found["attributes"] = predict_attributes(images, run.networks.classifier, boxes)
        return found

    unseen = run.unseen
    return {
        # Those of shuffled images need one distance more; see `_captioner_metrics`.
        "generated": unseen.in_chunks(lambda part, rows: compute(run.generate(part, rows), part, rows, 3)),
        "real": unseen.in_chunks(lambda part, rows: compute(to_float(part.images), part, rows, 2)),
    }


def _encode_held_out(run: _Run) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Features of the generated, real and shuffled images of each split but validation, by each evaluator."""
    encoded = {}
    for split in run.ranked[1:]:
        of_split = {
            "generated": split.unseen.in_chunks(lambda part, rows: run.encode(run.generate(part, rows))),
            "real": split.unseen.in_chunks(lambda part, rows: run.encode(to_float(part.images))),
        }
        encoded[split.name] = _with_shuffled(of_split, derangement(len(split.unseen.captions), run.recipe.seed))
    return encoded


def _retrieval_metrics(
    run: _Run, encoded: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, dict[str, Any]]:
    """R-precision by each evaluator on each split; `encoded` has the features by split, source and evaluator."""
    metrics: dict[str, dict[str, Any]] = {}
    for evaluator in run.evaluators:
        metrics[evaluator.phase] = {"description": evaluator.description}
        for split in run.ranked:
            features = {source: each[evaluator.phase] for source, each in encoded[split.name].items()}
            metrics[evaluator.phase][split.name] = measure_retrieval(
                evaluator, split, features, run.recipe.evaluation.candidates, run.recipe.seed
            )
    return metrics


def _standard_metrics(retrieval: Mapping[str, Any]) -> dict[str, Any]:
    """R-precision among all captions of the validation split, which `measure_retrieval` returned."""
    precision = {source: retrieval[source] for source in ("generated", "real", "shuffled")}
    return {"r_precision": precision, **{name: retrieval[name] for name in ("chance", "cannot_rank", "reasons")}}


def _captioner_metrics(rotation: Rotation, predicted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Word accuracy and image information, from what `rotation.predict` returned of generated and of real images."""
    # Shuffled images are at distance 1 of their captions; the other image of each caption is one step further.
    distances = {"generated": ("generated", 0), "real": ("real", 0), "shuffled": ("generated", 1)}
    words = {
        name: [rotation.accuracy(predicted[source], distance + step) for step in (0, 1)]
        for name, (source, distance) in distances.items()
    }
    return {
        "word_accuracy": {name: own.accuracy for name, (own, _) in words.items()},
        "image_information": {name: mean_image_information(own, other) for name, (own, other) in words.items()},
    }


def _measure_boxes(images: Tensor, part: Unseen, recipe: Recipe) -> dict[str, Tensor]:
    """The boxes of drawn flowers, where boxes differ or a system takes them."""
    takes_place = recipe.data.scatter or recipe.model.takes_location
    if not is_synthetic(recipe) or part.boxes is None or not takes_place:
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


def _showcase(run: _Run, features: Tensor, candidates: int) -> Showcase:
    """The pictures of the report; `features` are those of the generated images by the first evaluator."""
    sentences = sentence_features(run.evaluators[0].pair, run.unseen.tokens, run.unseen.word_mask)
    precision = expected_hits(features, sentences, candidates=candidates)
    sample, model = run.unseen.spread(run.recipe.evaluation.report_images), run.model
    real = to_float(sample.images)
    with warnings.catch_warnings():
        # The captions come from the data set, where rare words are expected; the warning is meant for user input.
        warnings.filterwarnings("ignore", message="unknown words")
        generated = model.generate_stages(
            sample.captions, seed=run.recipe.seed, location=sample.location(model), need_weights=True
        )
    return Showcase(
        captions=sample.captions,
        words=token_words(model.vocabulary, sample.tokens, sample.word_mask),
        real=real,
        generated=generated,
        real_descriptions=model.describe(real),
        generated_descriptions=model.describe(generated.images[-1]),
        cases=_cases(precision, run.unseen, run.generate),
    )


def _cases(precision: Tensor, unseen: Unseen, generate: Callable[[Unseen, Tensor], Tensor]) -> dict[str, list[Case]]:
    """The captions whose images have the highest and the lowest expected top-1 precision; `generate` makes them."""
    order = precision.argsort(descending=True, stable=True).tolist()
    count = min(CASES, len(order) // 2)
    cases = {}
    for name, rows in {"best": order[:count], "worst": order[::-1][:count]}.items():
        part = unseen.select(rows)
        columns = part.captions, generate(part, torch.tensor(rows)), to_float(part.images), precision[rows].tolist()
        cases[name] = [Case(*each) for each in zip(*columns)]
    return cases


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
