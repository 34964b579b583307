"""R-precision by several evaluators, on unseen classes and on training classes, with the bounds that give it a meaning.

An R-precision is a property of the evaluator and of the captions as much as of the images. Each one is therefore
reported beside that of real images, of shuffled images, of an oracle that knows the class alone, and of other captions
of the same image, and with the reasons, if there are any, for which it cannot rank images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules.data import InMemoryCaptions
from mirror_modules.interop.clip import ClipEncoders, load_clip
from mirror_modules.interop.text_encoders import TextEncoderAdapter
from mirror_modules.metrics import class_oracle, clip_score, expected_hits, other_captions, r_precision_folds
from mirror_modules.training.batches import Splits, has_classes, unseen_captions
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import load_pair
from mirror_modules.training.recipes import Recipe
from mirror_modules.training.validation import Encoders, Unseen, sentence_features, unseen_pairs

FOLDS = 10
# A figure is within the error of another up to this many standard errors: about 95 %.
ERRORS = 2.0
# An evaluator must rank real images at this multiple of chance.
LEAST_ABOVE_CHANCE = 3.0


class Evaluator(NamedTuple):
    """Encoders that rank captions."""

    phase: str
    """The phase that trained them, "evaluator" or "second_evaluator"; or "clip", which no phase trained."""
    description: str
    """The encoders and what they were trained on."""
    pair: Encoders
    """In evaluation mode."""


class RankedSplit(NamedTuple):
    """Images of a split that rank captions, one unseen caption each."""

    name: str
    """"validation" or "held_out"."""
    captions: InMemoryCaptions
    """The split, with all captions of its images."""
    unseen: Unseen
    """The images and captions that are evaluated."""


class Candidates(NamedTuple):
    """The captions among which an image ranks its own."""

    name: str
    """"all_captions", drawn from all other captions as in the paper, or "other_classes"."""
    size: int
    """Captions that each image ranks, including its own."""
    class_ids: Tensor | None
    """The classes if candidates of the same class are excluded. (N,)"""


def load_evaluators(folder: RunFolder, recipe: Recipe, splits: Splits, device: str) -> list[Evaluator]:
    """Load the encoder pairs of all evaluator phases of a run, in order."""
    return [
        Evaluator(phase, _describe(recipe, phase), load_pair(folder, phase, recipe, splits).to(device))
        for phase in recipe.phases
        if phase.endswith("evaluator")
    ]


def _describe(recipe: Recipe, phase: str) -> str:
    return (
        f"an encoder pair with the image backbone {recipe.backbone(phase).name}, trained on the same training split "
        "with another seed; no other phase used it"
    )


def load_clip_evaluator(checkpoint: str, device: str) -> Evaluator:
    """Load a checkpoint of CLIP or SigLIP, a folder or a name, as an evaluator; for errors, see `load_clip`."""
    description = f"the pretrained encoders of {checkpoint}, with their own tokenizer; no phase trained them"
    return Evaluator("clip", description, load_clip(checkpoint, device=device))


def ranked_splits(splits: Splits, max_words: int) -> list[RankedSplit]:
    """The validation split, and the held-out images if there are at least two with an unseen caption."""
    ranked = [RankedSplit("validation", splits.validation, unseen_pairs(splits, max_words))]
    if splits.held_out is not None and len(unseen_captions(splits, splits.held_out)) >= 2:
        ranked.append(RankedSplit("held_out", splits.held_out, unseen_pairs(splits, max_words, held_out=True)))
    return ranked


def encoded_by(text_encoder: TextEncoderAdapter, split: RankedSplit) -> RankedSplit:
    """The split with its captions, as written, encoded by the tokenizer of another text encoder."""
    captions, unseen = copy.copy(split.captions), split.unseen
    captions.tokens, captions.word_mask = text_encoder.encode([each for listed in captions.captions for each in listed])
    tokens, word_mask = captions.tokens[unseen.caption_rows], captions.word_mask[unseen.caption_rows]
    return split._replace(captions=captions, unseen=unseen._replace(tokens=tokens, word_mask=word_mask))


def candidate_sets(class_ids: Tensor, requested: int) -> list[Candidates]:
    """All captions, and if the images have classes, those of other classes; of each as many as there are.

    Args:
        class_ids: Class of each image, (N,), of at least two images.
        requested: Captions that each image ranks, including its own.
    """
    count = len(class_ids)
    found = [Candidates("all_captions", min(requested, count), None)]
    if has_classes(class_ids):
        _, sizes = class_ids.unique(return_counts=True)
        found.append(Candidates("other_classes", min(requested, count - int(sizes.max()) + 1), class_ids))
    return found


def text_queries(pair: Encoders, split: RankedSplit) -> Tensor | None:
    """For each image the mean sentence feature of the captions that it has besides its own, (N, D).

    None if an image has a single caption.
    """
    unseen, captions = split.unseen, split.captions
    counts = captions.caption_counts[unseen.image_rows]
    if int(counts.min()) < 2:
        return None
    starts = captions.caption_rows(unseen.image_rows, torch.zeros_like(unseen.image_rows))
    rows = torch.cat([torch.arange(start, start + count) for start, count in zip(starts.tolist(), counts.tolist())])
    own = counts.cumsum(0) - counts + unseen.caption_rows - starts
    sentences = sentence_features(pair, captions.tokens[rows], captions.word_mask[rows])
    return other_captions(sentences, unseen.image_rows.repeat_interleave(counts))[own]


class OwnClass(NamedTuple):
    """How often images rank their own caption above another of their class; chance is a half."""

    share: float
    """Mean over the images of all classes with two or more, in [0, 1]."""
    standard_error: float
    """Over the images."""

    @property
    def is_above_chance(self) -> bool:
        """Whether the evaluator sees more than the class, beyond the error."""
        return self.share - 0.5 > ERRORS * self.standard_error


def own_class(features: Tensor, sentences: Tensor, class_ids: Tensor) -> OwnClass:
    """Compare the caption of each image with every other caption of its class.

        share = mean_i  mean over j != i of the class of i:  1 if cos(f_i, s_i) > cos(f_i, s_j), 1/2 if they are equal

    Args:
        features: Image features, (N, D).
        sentences: Sentence features of their captions, (N, D).
        class_ids: Classes, (N,), of which at least one has two images.
    """
    members = [class_ids == each for each in class_ids.unique()]
    shares = torch.cat(
        [expected_hits(features[rows], sentences[rows], candidates=2) for rows in members if int(rows.sum()) > 1]
    )
    return OwnClass(float(shares.mean()), float(shares.std(correction=1)) / len(shares) ** 0.5)


def cannot_rank(
    real: float,
    error: float,
    *,
    chance: float,
    class_oracle: float | None = None,
    own_class: OwnClass | None = None,
    generated: float | None = None,
) -> list[str]:
    """The reasons for which an evaluator cannot rank images by top-1 R-precision; none if it can.

    It cannot if real images are below three times chance; if the class explains all that it shows; or if real images
    are below generated ones by more than two standard errors. The class explains it if real images are not above one
    who knows the class alone by more than two standard errors, nor their captions preferred to others of their class.

    Args:
        real: Top-1 R-precision of real images, in [0, 1].
        error: Its standard error.
        chance: That of a random ranking.
        class_oracle: That of an oracle that knows the class alone; None where it has no meaning.
        own_class: Comparisons of the real images within their class; None if there are none.
        generated: R-precision of generated images; None if it was not measured.
    """
    reasons = []
    if real < LEAST_ABOVE_CHANCE * chance:
        reasons.append(f"real images, at {real:.1%}, are below three times chance, {LEAST_ABOVE_CHANCE * chance:.1%}")
    sees_more = own_class is not None and own_class.is_above_chance
    if class_oracle is not None and real - class_oracle <= ERRORS * error and not sees_more:
        within = ""
        if own_class is not None:
            within = (
                f", nor is their caption preferred to others of their class ({own_class.share:.1%} ± "
                f"{100 * own_class.standard_error:.1f} of the pairs)"
            )
        reasons.append(
            f"real images, at {real:.1%} ± {100 * error:.1f}, are not above an oracle that knows the class alone, at "
            f"{class_oracle:.1%}{within}"
        )
    if generated is not None and generated - real > ERRORS * error:
        reasons.append(f"real images, at {real:.1%} ± {100 * error:.1f}, are below generated ones, at {generated:.1%}")
    return reasons


def measure_retrieval(
    evaluator: Evaluator, split: RankedSplit, features: Mapping[str, Tensor], requested: int, seed: int
) -> dict[str, Any]:
    """R-precision of each source of images, with its bounds, for each set of candidates.

    Args:
        evaluator: Ranks the captions.
        split: The captions.
        features: The evaluator's features of the images of the captions by source: "generated", "real" and "shuffled",
            each (N, D).
        requested: Captions that each image ranks, including its own.
        seed: Seed of the candidates and folds, which are the same for all sources.

    Returns:
        "images", "classes" and "own_class" if there are any, "clip_score" of CLIP, and for each set of candidates its
        field of evaluation.json.
    """
    pair = evaluator.pair
    if isinstance(pair, ClipEncoders):
        split = encoded_by(pair.text_encoder, split)
    unseen = split.unseen
    sentences = sentence_features(pair, unseen.tokens, unseen.word_mask)
    queries = text_queries(pair, split)
    result: dict[str, Any] = {"images": len(unseen.captions)}
    if isinstance(pair, ClipEncoders):
        scores = {name: clip_score(each, sentences) for name, each in features.items()}
        result["clip_score"] = {
            name: {"mean": float(each.mean()), "standard_error": float(each.std(correction=1)) / len(each) ** 0.5}
            for name, each in scores.items()
        }
    within: dict[str, OwnClass] = {}
    if has_classes(unseen.class_ids):
        result["classes"] = len(unseen.class_ids.unique())
        rankings = features if queries is None else {**features, "text_ceiling": queries}
        within = {name: own_class(each, sentences.to(each), unseen.class_ids) for name, each in rankings.items()}
        result["own_class"] = {name: each._asdict() for name, each in within.items()}
    for candidates in candidate_sets(unseen.class_ids, requested):
        if candidates.size < 2:
            continue
        figures: dict[str, Any] = {"candidates": candidates.size, **bounds(split, candidates)}
        for name, each in features.items():
            figures[name] = _precision(each, sentences, candidates, seed)
        if queries is not None:
            figures["text_ceiling"] = _precision(queries, sentences.to(queries.dtype), candidates, seed)
        reasons = cannot_rank(
            figures["real"]["top1"],
            figures["real"]["standard_errors"][0],
            chance=figures["chance"],
            class_oracle=figures.get("class_oracle"),
            own_class=within.get("real"),
            generated=figures["generated"]["top1"],
        )
        result[candidates.name] = {**figures, "cannot_rank": bool(reasons), "reasons": reasons}
    return result


def bounds(split: RankedSplit, candidates: Candidates) -> dict[str, float]:
    """Top-1 R-precision of a random ranking, "chance", and of an oracle that knows the class alone, "class_oracle".

    The latter is missing where it says nothing: images without classes, or candidates of other classes only.
    """
    found = {"chance": 1 / candidates.size}
    if candidates.class_ids is None and has_classes(split.unseen.class_ids):
        found["class_oracle"] = float(class_oracle(split.unseen.class_ids, candidates=candidates.size).mean())
    return found


def expected_precision(features: Tensor, sentences: Tensor, candidates: Candidates) -> Tensor:
    """Expected top-1 precision of each image over all draws of the candidates, (N,)."""
    return expected_hits(features, sentences, candidates.class_ids, candidates=candidates.size)


def _precision(features: Tensor, sentences: Tensor, candidates: Candidates, seed: int) -> dict[str, Any]:
    result = r_precision_folds(
        features,
        sentences,
        candidates.class_ids,
        candidates=candidates.size,
        folds=max(2, min(FOLDS, len(features) // 2)),
        generator=torch.Generator().manual_seed(seed),
    )
    return {"top1": result.top1, "top2": result.top2, "top3": result.top3, "standard_errors": [*result.standard_errors]}
