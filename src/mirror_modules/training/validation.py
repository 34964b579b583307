"""Metrics on validation images, computed by networks in evaluation mode, during training and for evaluation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._freezing import evaluating
from mirror_modules._tiles import Rows, in_chunks
from mirror_modules.data import to_float
from mirror_modules.data.mapped_images import MappedImages
from mirror_modules.data.seeding import seeded
from mirror_modules.glam import GeneratedImages
from mirror_modules.interop.clip import ClipEncoders
from mirror_modules.metrics import r_precision
from mirror_modules.metrics.r_precision import RPrecision
from mirror_modules.models import EncoderPair, TextToImage
from mirror_modules.stream import Captioner, append_end, image_information, redescription_loss
from mirror_modules.training.batches import Splits, unseen_captions
from mirror_modules.training.state import AdversarialState

Encoders = EncoderPair | ClipEncoders
"""Encoders of images and captions with a common feature space."""
# Images processed at a time.
CHUNK = 100
# Number of images on a sheet of samples.
SAMPLES = 16


class Unseen(NamedTuple):
    """Images of a split, each with a caption that no training image has."""

    captions: list[str]
    split_images: Tensor | MappedImages
    """Bytes of all images of the split, (M, H, W, 3): not copied, and memory-mapped if they are in the split."""
    tokens: Tensor
    word_mask: Tensor
    class_ids: Tensor
    """Class of each image, (N,)."""
    image_rows: Tensor
    """Index of each image in the split, (N,)."""
    caption_rows: Tensor
    """Index of each caption among all captions of the split, (N,)."""
    boxes: Tensor | None = None
    """Box of each image, (N, 4); None if the split has none."""
    points: Tensor | None = None
    """Key points of each image, (N, K, 3); None if the split has none."""

    @property
    def images(self) -> Tensor:
        """Bytes (N, H, W, 3): a copy, so where there are many, use `in_chunks`."""
        return self.split_images[self.image_rows]

    def select(self, rows: Sequence[int]) -> Unseen:
        """The pairs of these rows."""
        captions, images, *tensors = self
        selected = (None if tensor is None else tensor[rows] for tensor in tensors)
        return Unseen([captions[i] for i in rows], images, *selected)  # type: ignore[arg-type]

    def spread(self, count: int) -> Unseen:
        """At most `count` of the pairs, evenly spaced: neighbors in a data set often share a class."""
        total = len(self.captions)
        count = min(count, total)
        return self.select([i * total // count for i in range(count)])

    def in_chunks(self, function: Callable[[Unseen, Tensor], Rows]) -> Rows:
        """Apply a function to consecutive chunks of the pairs, so that images of a single chunk are in memory.

        Args:
            function: Takes pairs and their rows (B,), and returns what `in_chunks` concatenates.
        """

        def apply(rows: Tensor) -> Rows:
            return function(self.select(rows.tolist()), rows)

        return in_chunks(apply, torch.arange(len(self.captions)), size=CHUNK)

    def location(self, model: TextToImage) -> Tensor | None:
        """Where the subjects are, as the model takes it; None if it does not."""
        return model.locate(self.boxes, self.points, len(self.captions))


def unseen_pairs(splits: Splits, max_words: int, *, held_out: bool = False) -> Unseen:
    """The validation images with unseen captions, or the held-out ones, encoded.

    Raises:
        ValueError: There are no held-out images.
    """
    split = splits.held_out if held_out else splits.validation
    if split is None:
        raise ValueError("unseen_pairs: these splits have no held-out images; see DataRecipe.held_out_share.")
    unseen = unseen_captions(splits, split)
    captions = [entry.caption for entry in unseen]
    tokens, word_mask = splits.vocabulary.encode(captions, max_words=max_words, warn_unknown=False)
    images = torch.tensor([entry.image for entry in unseen])
    choices = torch.tensor([split.captions[image].index(caption) for image, caption in unseen])
    return Unseen(
        captions,
        split.images,
        tokens,
        word_mask,
        split.class_ids[images],
        images,
        split.caption_rows(images, choices),
        None if split.boxes is None else split.boxes[images],
        None if split.points is None else split.points[images],
    )


@torch.no_grad()
def image_features(pair: Encoders, images: Tensor) -> Tensor:
    """Global features (N, D) of images, on the CPU: floats (N, 3, H, W) in [-1, 1], or bytes (N, H, W, 3)."""
    device = next(pair.text_encoder.parameters()).device
    return in_chunks(lambda chunk: pair.image_encoder(_as_floats(chunk).to(device)).image.cpu(), images, size=CHUNK)


@torch.no_grad()
def sentence_features(pair: Encoders, tokens: Tensor, word_mask: Tensor) -> Tensor:
    """Sentence features (N, D) of captions, encoded as `pair` takes them, on the CPU."""
    device = next(pair.text_encoder.parameters()).device

    def encode(tokens: Tensor, word_mask: Tensor) -> Tensor:
        return pair.text_encoder(tokens.to(device), word_mask.to(device)).sentence.cpu()

    return in_chunks(encode, tokens, word_mask, size=CHUNK)


@torch.no_grad()
def generate_images(
    model: TextToImage,
    tokens: Tensor,
    word_mask: Tensor,
    seed: int,
    location: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The finest images (N, 3, H, W) of captions, on the CPU.

    Image n has the seed `seed + n`: `model.generate(caption, seed=seed + n)` generates it alone. `rows` holds the n of
    each caption, (N,); None counts from 0.
    """
    sizes = [model.config.noise_dim, model.config.condition_noise_dim]

    def generate(tokens: Tensor, word_mask: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        drawn = torch.stack([torch.randn(sum(sizes), generator=seeded(seed + row)) for row in rows.tolist()])
        noise, condition_noise = drawn.to(model.device).split(sizes, dim=1)
        generated = model(
            tokens.to(model.device),
            word_mask.to(model.device),
            noise=noise,
            condition_noise=condition_noise,
            location=None if location is None else location[places].to(model.device),
        )
        return generated.images[-1].cpu()

    places = torch.arange(len(tokens))
    return in_chunks(generate, tokens, word_mask, places if rows is None else rows, places, size=CHUNK)


class WordAccuracy(NamedTuple):
    """How well a captioner predicts the tokens of captions, end tokens included."""

    accuracy: float
    """Share of tokens with the largest logit, in [0, 1]."""
    cross_entropy: float
    """Nats per token."""
    log_likelihood: Tensor
    """Of each caption given its image, nats per token, (N,)."""
    word_count: Tensor
    """Tokens of each caption, (N,)."""

    @classmethod
    def of(cls, predicted: Tensor) -> WordAccuracy:
        """Summarize the results (N, 3) of `predict_words`."""
        correct, log_likelihood, count = predicted.unbind(dim=1)
        entropy = -float((log_likelihood * count).sum() / count.sum())
        return cls(float(correct.sum()) / float(count.sum()), entropy, log_likelihood, count)


@torch.no_grad()
def predict_words(captioner: Captioner, images: Tensor, tokens: Tensor, word_mask: Tensor) -> Tensor:
    """For each caption: tokens predicted correctly, log-likelihood in nats per token, number of tokens, (N, 3)."""
    device = captioner.embedding.weight.device

    def predict(images: Tensor, tokens: Tensor, word_mask: Tensor) -> Tensor:
        logits = captioner(_as_floats(images).to(device), tokens.to(device), word_mask.to(device)).cpu()
        correct = ((logits.argmax(dim=2) == tokens) & word_mask).sum(dim=1)
        loss = redescription_loss(logits, tokens, word_mask, reduction="none")
        return torch.stack((correct.to(loss), -loss, word_mask.sum(dim=1).to(loss)), dim=1)

    return in_chunks(predict, images, *append_end(tokens, word_mask), size=CHUNK)


class Rotation:
    """Pairs every caption with images of other captions, the next and the next but one in a random cycle of all.

    `image_of[d]` has the image of each caption at distance d, (N,): at 0 its own. `caption_of[d]` is its inverse, for
    images that are processed in chunks.

    Args:
        unseen: At least two pairs.
        seed: Seed of the cycle.
    """

    def __init__(self, unseen: Unseen, seed: int) -> None:
        following = derangement(len(unseen.captions), seed)
        self.tokens, self.word_mask = unseen.tokens, unseen.word_mask
        self.image_of = (torch.arange(len(following)), following, following[following])
        self.caption_of = tuple(order.argsort() for order in self.image_of)

    def predict(self, captioner: Captioner, images: Tensor, rows: Tensor, distances: int = 3) -> Tensor:
        """`predict_words` of images and their captions at distances 0, 1, ...: (B, distances, 3).

        Args:
            captioner: In evaluation mode.
            images: Floats (B, 3, H, W) in [-1, 1], or bytes (B, H, W, 3).
            rows: Their rows, (B,).
            distances: Number of captions for each image, at most 3.
        """
        captions = [caption_of[rows] for caption_of in self.caption_of[:distances]]
        predicted = [predict_words(captioner, images, self.tokens[each], self.word_mask[each]) for each in captions]
        return torch.stack(predicted, dim=1)

    def accuracy(self, predicted: Tensor, distance: int) -> WordAccuracy:
        """The captions with the images at a distance, from the results of `predict` for all images, (N, D, 3)."""
        return WordAccuracy.of(predicted[self.image_of[distance], distance])


def mean_image_information(own: WordAccuracy, other: WordAccuracy) -> float:
    """The mean over all tokens of `functional.image_information`.

    Args:
        own: Captions given their own images.
        other: The same captions, each given another image.
    """
    information = image_information(own.log_likelihood, other.log_likelihood)
    return float((information * own.word_count).sum() / own.word_count.sum())


def derangement(count: int, seed: int) -> Tensor:
    """A random permutation of two or more rows without a fixed point."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def measure_pair(pair: EncoderPair, unseen: Unseen, candidates: int, seed: int) -> dict[str, float]:
    """R-precision of real images by the encoder pair in training."""
    with evaluating(pair):
        features = unseen.in_chunks(lambda part, rows: image_features(pair, part.images))
        result = _precision(pair, features, unseen, candidates, seed)
    return {"r_precision": result.top1}


def measure_captioner(captioner: Captioner, unseen: Unseen, seed: int) -> dict[str, float]:
    """Cross entropy, word accuracy and image information of a captioner on real images."""
    rotation = Rotation(unseen, seed)
    with evaluating(captioner):
        predicted = unseen.in_chunks(lambda part, rows: rotation.predict(captioner, part.images, rows, distances=2))
    own, other = rotation.accuracy(predicted, 0), rotation.accuracy(predicted, 1)
    information = mean_image_information(own, other)
    return {"cross_entropy": own.cross_entropy, "word_accuracy": own.accuracy, "image_information": information}


def measure_generator(
    state: AdversarialState, pair: EncoderPair, unseen: Unseen, candidates: int, seed: int
) -> dict[str, float]:
    """R-precision of the averaged generator's images by phase `stem`'s encoders, and their redescription loss.

    The encoders of phase `evaluator` are not used here: they must not select the model that they evaluate.
    """
    model = averaged_model(state)

    def measure(part: Unseen, rows: Tensor) -> dict[str, Tensor]:
        images = generate_images(model, part.tokens, part.word_mask, seed, part.location(model), rows)
        if images.shape[2] != (size := model.config.resolutions[-1]):
            # Of a first stage; the networks have learned from images of the full size.
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        predicted = predict_words(model.captioner, images, part.tokens, part.word_mask)
        return {"features": image_features(pair, images), "predicted": predicted}

    with evaluating(model):
        measured = unseen.in_chunks(measure)
        result = _precision(pair, measured["features"], unseen, candidates, seed)
    return {"r_precision": result.top1, "redescription": WordAccuracy.of(measured["predicted"]).cross_entropy}


def averaged_model(state: AdversarialState) -> TextToImage:
    """The model with the averaged generator, as it would be saved now; all weights are shared with the state."""
    model = copy.copy(state.model)
    model._modules = dict(state.model._modules)
    model._modules |= state.average.module._modules
    return model


def draw_samples(state: AdversarialState, unseen: Unseen, seed: int, need_weights: bool) -> GeneratedImages:
    """Images of fixed captions and noise."""
    with warnings.catch_warnings():
        # Unknown words are expected: these captions may contain words too rare for the vocabulary.
        warnings.filterwarnings("ignore", message="unknown words")
        model = averaged_model(state)
        location = unseen.location(model)
        generated = model.generate_stages(
            unseen.captions[:SAMPLES],
            seed=seed,
            location=None if location is None else location[:SAMPLES],
            need_weights=need_weights,
        )
    return GeneratedImages(*([tensor.float().cpu() for tensor in tensors] for tensors in generated))


def _as_floats(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images


def _precision(pair: EncoderPair, features: Tensor, unseen: Unseen, candidates: int, seed: int) -> RPrecision:
    return r_precision(
        features,
        sentence_features(pair, unseen.tokens, unseen.word_mask),
        candidates=candidates,
        generator=torch.Generator().manual_seed(seed),
    )
