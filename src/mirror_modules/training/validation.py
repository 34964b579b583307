"""Measurements on images, by networks in evaluation mode: while a model trains, and when it is done."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules.data import to_float
from mirror_modules.glam import GeneratedImages
from mirror_modules.metrics import r_precision
from mirror_modules.metrics.r_precision import RPrecision
from mirror_modules.models import MirrorGAN
from mirror_modules.models.mirrorgan import evaluating
from mirror_modules.stream import Captioner, append_end, redescription_loss
from mirror_modules.training.batches import Splits, unseen_captions
from mirror_modules.training.pretrain import EncoderPair
from mirror_modules.training.state import AdversarialState

# Images made or read at a time.
CHUNK = 100
SAMPLES = 16


class Unseen(NamedTuple):
    """Validation images, each with a caption that no training image has."""

    captions: list[str]
    images: Tensor
    """Bytes (N, H, W, 3)."""
    tokens: Tensor
    word_mask: Tensor

    def spread(self, count: int) -> Unseen:
        """At most so many of them, evenly spaced: neighbors in a data set are often of one class."""
        every = len(self.captions)
        count = min(count, every)
        rows = [i * every // count for i in range(count)]
        return Unseen([self.captions[i] for i in rows], self.images[rows], self.tokens[rows], self.word_mask[rows])


def unseen_pairs(splits: Splits, max_words: int) -> Unseen:
    """What is measured on."""
    unseen = unseen_captions(splits)
    captions = [entry.caption for entry in unseen]
    tokens, word_mask = splits.vocabulary.encode(captions, max_words=max_words, warn_unknown=False)
    return Unseen(captions, splits.validation.images[[entry.image for entry in unseen]], tokens, word_mask)


@torch.no_grad()
def image_features(pair: EncoderPair, images: Tensor) -> Tensor:
    """Global features (N, D) of images, on the CPU: floats (N, 3, H, W) in [-1, 1], or bytes (N, H, W, 3)."""
    device = pair.text_encoder.embedding.weight.device
    return torch.cat([pair.image_encoder(_as_floats(chunk).to(device)).image.cpu() for chunk in chunks(images)])


@torch.no_grad()
def sentence_features(pair: EncoderPair, tokens: Tensor, word_mask: Tensor) -> Tensor:
    """Sentence features (N, D), on the CPU."""
    device = pair.text_encoder.embedding.weight.device
    return torch.cat(
        [pair.text_encoder(t.to(device), m.to(device)).sentence.cpu() for t, m in chunks(tokens, word_mask)]
    )


@torch.no_grad()
def generate_images(model: MirrorGAN, tokens: Tensor, word_mask: Tensor, seed: int) -> Tensor:
    """The finest images (N, 3, H, W) of captions, on the CPU."""
    random = torch.Generator().manual_seed(seed)
    images = []
    for some_tokens, some_mask in chunks(tokens, word_mask):
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


@torch.no_grad()
def word_accuracy(captioner: Captioner, images: Tensor, tokens: Tensor, word_mask: Tensor) -> tuple[float, float]:
    """The share of words and end tokens that a captioner predicts rightly, and their cross entropy."""
    device = captioner.embedding.weight.device
    tokens, word_mask = append_end(tokens, word_mask)
    right = entropy = 0.0
    for image, some_tokens, some_mask in chunks(images, tokens, word_mask):
        logits = captioner(_as_floats(image).to(device), some_tokens.to(device), some_mask.to(device)).cpu()
        right += float(((logits.argmax(dim=2) == some_tokens) & some_mask).sum())
        entropy += float(redescription_loss(logits, some_tokens, some_mask)) * float(some_mask.sum())
    return right / float(word_mask.sum()), entropy / float(word_mask.sum())


def image_information(
    captioner: Captioner, images: Tensor, tokens: Tensor, word_mask: Tensor, own: float, seed: int
) -> float:
    """Nats per word and end token by which a captioner predicts a caption better at its own image than at another.

    Near zero, what it sees does not tell this image from others, and a generator can learn little from it.

    Args:
        captioner: In evaluation mode.
        images: At least two of them.
        tokens: Their captions.
        word_mask: True for words.
        own: The cross entropy at their own images, from `word_accuracy`.
        seed: Decides which other image each caption meets.
    """
    # The inverse: of images in the order of this seed, it would put every caption back to its own.
    others = derangement(len(images), seed).argsort()
    return word_accuracy(captioner, images, tokens[others], word_mask[others])[1] - own


def derangement(count: int, seed: int) -> Tensor:
    """A random order of two or more in which nothing stays where it was."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def measure_pair(pair: EncoderPair, unseen: Unseen, candidates: int, seed: int) -> dict[str, float]:
    """R-precision of real images by the pair that is being trained."""
    with evaluating(pair):
        result = _precision(pair, unseen.images, unseen, candidates, seed)
    return {"r_precision": result.top1}


def measure_captioner(captioner: Captioner, unseen: Unseen, seed: int) -> dict[str, float]:
    """How well a captioner reads real images."""
    pairs = unseen.images, unseen.tokens, unseen.word_mask
    with evaluating(captioner):
        accuracy, entropy = word_accuracy(captioner, *pairs)
        information = image_information(captioner, *pairs, entropy, seed)
    return {"cross_entropy": entropy, "word_accuracy": accuracy, "image_information": information}


def measure_generator(
    state: AdversarialState, pair: EncoderPair, unseen: Unseen, candidates: int, seed: int
) -> dict[str, float]:
    """R-precision of the averaged generator's images by phase `stem`'s pair, and what the captioner makes of them.

    The judge of the evaluation is not asked: a step chosen by it would be measured by what chose it.
    """
    model = averaged_model(state)
    with evaluating(model):
        images = generate_images(model, unseen.tokens, unseen.word_mask, seed)
        result = _precision(pair, images, unseen, candidates, seed)
        _, entropy = word_accuracy(model.captioner, images, unseen.tokens, unseen.word_mask)
    return {"r_precision": result.top1, "redescription": entropy}


def averaged_model(state: AdversarialState) -> MirrorGAN:
    """The model as it would be kept now: with the averaged generator. It shares all weights with the state."""
    model = copy.copy(state.model)
    model._modules = dict(state.model._modules)
    average: Any = state.average.module
    model.conditioning, model.generator = average.conditioning, average.generator
    return model


def draw_samples(state: AdversarialState, unseen: Unseen, seed: int, need_weights: bool) -> GeneratedImages:
    """Images of the same captions and noise each time."""
    with warnings.catch_warnings():
        # Nobody wrote these captions just now: a rare word of the data set is no mistake.
        warnings.filterwarnings("ignore", message="unknown words")
        made = averaged_model(state).generate(unseen.captions[:SAMPLES], seed=seed, need_weights=need_weights)
    return GeneratedImages(*([tensor.float().cpu() for tensor in tensors] for tensors in made))


def _as_floats(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images


def chunks(*tensors: Tensor) -> Iterator[Any]:
    """Pieces of tensors of equal length, of `CHUNK` rows."""
    parts = zip(*(tensor.split(CHUNK) for tensor in tensors))
    return (part if len(part) > 1 else part[0] for part in parts)


def _precision(pair: EncoderPair, images: Tensor, unseen: Unseen, candidates: int, seed: int) -> RPrecision:
    return r_precision(
        image_features(pair, images),
        sentence_features(pair, unseen.tokens, unseen.word_mask),
        candidates=candidates,
        generator=torch.Generator().manual_seed(seed),
    )
