"""Metrics on validation images, computed by networks in evaluation mode, during training and for evaluation."""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._freezing import evaluating
from mirror_modules._tiles import in_chunks
from mirror_modules.data import to_float
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
    images: Tensor
    """Bytes (N, H, W, 3)."""
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

    def spread(self, count: int) -> Unseen:
        """At most `count` of the pairs, evenly spaced: neighbors in a data set often share a class."""
        total = len(self.captions)
        count = min(count, total)
        rows = [i * total // count for i in range(count)]
        tensors = (None if tensor is None else tensor[rows] for tensor in self[1:])
        return Unseen([self.captions[i] for i in rows], *tensors)  # type: ignore[arg-type]

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
        split.images[images],
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
    model: TextToImage, tokens: Tensor, word_mask: Tensor, seed: int, location: Tensor | None = None
) -> Tensor:
    """The finest images (N, 3, H, W) of captions, on the CPU.

    Image n has the seed `seed + n`: `model.generate(caption, seed=seed + n)` generates it alone.
    """
    sizes = [model.config.noise_dim, model.config.condition_noise_dim]

    def generate(tokens: Tensor, word_mask: Tensor, rows: Tensor) -> Tensor:
        place = None if location is None else location[rows].to(model.device)
        drawn = torch.stack([torch.randn(sum(sizes), generator=seeded(seed + row)) for row in rows.tolist()])
        noise, condition_noise = drawn.to(model.device).split(sizes, dim=1)
        generated = model(
            tokens.to(model.device),
            word_mask.to(model.device),
            noise=noise,
            condition_noise=condition_noise,
            location=place,
        )
        return generated.images[-1].cpu()

    return in_chunks(generate, tokens, word_mask, torch.arange(len(tokens)), size=CHUNK)


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


@torch.no_grad()
def word_accuracy(captioner: Captioner, images: Tensor, tokens: Tensor, word_mask: Tensor) -> WordAccuracy:
    """Accuracy and cross entropy of a captioner's next-token predictions."""
    device = captioner.embedding.weight.device
    tokens, word_mask = append_end(tokens, word_mask)
    correct, losses = 0.0, []
    for image_chunk, token_chunk, mask_chunk in zip(*(rows.split(CHUNK) for rows in (images, tokens, word_mask))):
        logits = captioner(_as_floats(image_chunk).to(device), token_chunk.to(device), mask_chunk.to(device)).cpu()
        correct += float(((logits.argmax(dim=2) == token_chunk) & mask_chunk).sum())
        losses.append(redescription_loss(logits, token_chunk, mask_chunk, reduction="none"))
    of_caption, count = torch.cat(losses), word_mask.sum(dim=1)
    entropy = float((of_caption * count).sum() / count.sum())
    return WordAccuracy(correct / float(count.sum()), entropy, -of_caption, count)


def measure_image_information(
    captioner: Captioner, images: Tensor, tokens: Tensor, word_mask: Tensor, own: WordAccuracy, seed: int
) -> float:
    """The mean over all tokens of `functional.image_information`, with another image of the split for each caption.

    Args:
        captioner: In evaluation mode.
        images: At least two images.
        tokens: Their captions, (N, L).
        word_mask: True for a real word, (N, L).
        own: Likelihoods given their own images, from `word_accuracy`.
        seed: Seed of the assignment of other images to captions.
    """
    # The inverse permutation: images in the order of this seed's derangement must not meet their own captions again.
    others = derangement(len(images), seed).argsort()
    prior = torch.empty_like(own.log_likelihood)
    prior[others] = word_accuracy(captioner, images, tokens[others], word_mask[others]).log_likelihood
    information = image_information(own.log_likelihood, prior)
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
        result = _precision(pair, unseen.images, unseen, candidates, seed)
    return {"r_precision": result.top1}


def measure_captioner(captioner: Captioner, unseen: Unseen, seed: int) -> dict[str, float]:
    """Cross entropy, word accuracy and image information of a captioner on real images."""
    pairs = unseen.images, unseen.tokens, unseen.word_mask
    with evaluating(captioner):
        own = word_accuracy(captioner, *pairs)
        information = measure_image_information(captioner, *pairs, own, seed)
    return {"cross_entropy": own.cross_entropy, "word_accuracy": own.accuracy, "image_information": information}


def measure_generator(
    state: AdversarialState, pair: EncoderPair, unseen: Unseen, candidates: int, seed: int
) -> dict[str, float]:
    """R-precision of the averaged generator's images by phase `stem`'s encoders, and their redescription loss.

    The encoders of phase `evaluator` are not used here: they must not select the model that they evaluate.
    """
    model = averaged_model(state)
    with evaluating(model):
        images = generate_images(model, unseen.tokens, unseen.word_mask, seed, unseen.location(model))
        if images.shape[2] != (size := model.config.resolutions[-1]):
            # Of a first stage; the networks have learned from images of the full size.
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        result = _precision(pair, images, unseen, candidates, seed)
        entropy = word_accuracy(model.captioner, images, unseen.tokens, unseen.word_mask).cross_entropy
    return {"r_precision": result.top1, "redescription": entropy}


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


def _precision(pair: EncoderPair, images: Tensor, unseen: Unseen, candidates: int, seed: int) -> RPrecision:
    return r_precision(
        image_features(pair, images),
        sentence_features(pair, unseen.tokens, unseen.word_mask),
        candidates=candidates,
        generator=torch.Generator().manual_seed(seed),
    )
