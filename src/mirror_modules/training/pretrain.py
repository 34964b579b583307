"""Training steps of encoders (`stem`, `evaluator`), captioner (`stream`) and key-point generator (`keypoints`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules._freezing import freeze
from mirror_modules.adversarial import PairedLogits, discriminator_loss, generator_loss, mismatch
from mirror_modules.data import CaptionBatch
from mirror_modules.glam import KeypointGenerator
from mirror_modules.models import GAWWN, EncoderPair
from mirror_modules.stem import ImageEncoder, ImageFeatures, TextFeatures
from mirror_modules.stem.matching import contrastive_terms, image_sentence_similarity, word_region_similarity
from mirror_modules.stream import Captioner, append_end, redescription_loss
from mirror_modules.training.distributed import ProcessGroup
from mirror_modules.training.features import CachedImages, FrozenFeatures, frozen_text
from mirror_modules.training.network import StepResult, TrainedNetwork, autocast, frozen, prepare, restoring_buffers
from mirror_modules.training.recipes import EngineRecipe, KeypointRecipe, MatchingRecipe, PretrainingRecipe

# In the published code, each key point is left out with this probability in each step.
MISSING_SHARE = 0.9


class CachedCaptioner(nn.Module):
    """A captioner whose frozen image encoder is run once per image instead of once per step.

    Args:
        captioner: The captioner.
        features: Features of all training images; None encodes the images of each batch.
    """

    def __init__(self, captioner: Captioner, features: CachedImages | None = None) -> None:
        super().__init__()
        self.captioner = captioner
        # A plain attribute and not a buffer, so that it stays out of the state_dict.
        self.features = features

    def forward(self, images: Tensor, image_rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) of the captions' words."""
        if self.features is None:
            return self.captioner(images, tokens)
        features = self.features.look_up(image_rows, tokens.device, regions=0)
        return self.captioner.decode(self.captioner.project(features.image), tokens)


class CachedPair(nn.Module):
    """An encoder pair whose frozen backbone is run once per image instead of once per step.

    Args:
        pair: The pair.
        features: Features of all training images by the backbone; None encodes the images of each batch.
        regions: Number of images of a batch whose regions are needed, its first; None for all.
    """

    def __init__(self, pair: EncoderPair, features: CachedImages | None = None, regions: int | None = None) -> None:
        super().__init__()
        self.pair = pair
        # A plain attribute and not a buffer, so that it stays out of the state_dict.
        self.features, self.regions = features, regions

    def forward(
        self, images: Tensor, image_rows: Tensor, tokens: Tensor, word_mask: Tensor
    ) -> tuple[ImageFeatures, TextFeatures]:
        """Image and text features of a batch; regions of the first images only if they are cached."""
        if self.features is None:
            return self.pair(images, tokens, word_mask)
        features = self.features.look_up(image_rows, tokens.device, self.regions)
        text = self.pair.text_encoder(tokens, word_mask)
        encoder = self.pair.image_encoder
        if self.features.regions is None:
            # Their projection is not trained either.
            return ImageFeatures(features.regions, encoder.image_projection(features.image)), text
        return encoder.project(features), text


@dataclass
class PretrainingState:
    """The network of phase `stem`, `evaluator` or `stream`, with its optimizer."""

    network: TrainedNetwork
    group: ProcessGroup
    engine: EngineRecipe

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.network.load_state_dict(state["network"])


def start_pretraining(
    module: nn.Module, recipe: MatchingRecipe | PretrainingRecipe, engine: EngineRecipe, group: ProcessGroup
) -> PretrainingState:
    """Set up phase `stem`, `evaluator` or `stream`."""
    if not (isinstance(recipe, MatchingRecipe) and recipe.word_weight > 0):
        for part in module.modules():
            if isinstance(part, ImageEncoder):
                # The region projection gets no gradient, and DistributedDataParallel would wait for one.
                part.region_projection.requires_grad_(False)
    network = prepare(
        module,
        group,
        engine,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        cycle=recipe.steps,
    )
    return PretrainingState(network, group, engine)


def region_rows(recipe: MatchingRecipe, group: ProcessGroup) -> int:
    """Images of each rank's part of a batch that enter the word-region terms: its first."""
    return max(1, recipe.word_pairs // group.world_size)


def matching_terms(
    image: ImageFeatures,
    text: TextFeatures,
    word_mask: Tensor,
    class_ids: Tensor,
    recipe: MatchingRecipe,
    group: ProcessGroup,
    pairs: slice = slice(None),
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of the matching loss of images and captions, and their weighted sum (DAMSM; Sec. 3.1).

    Each rank compares its images with the captions of all ranks; the rows of similarities are then gathered.

    Args:
        image: Features of this rank's images.
        text: Features of their captions.
        word_mask: True for a real word, (B, L).
        class_ids: Class of each image, (B,), on the CPU.
        recipe: Temperature, and weight of the word-region terms.
        group: The process group.
        pairs: The pairs of each rank in the word-region terms.
    """
    all_classes = group.all_gather(class_ids)
    similarity = image_sentence_similarity(image.image, group.all_gather(text.sentence))
    classes = all_classes.to(group.device, non_blocking=True)
    by_sentence = contrastive_terms(group.all_gather(similarity), classes, gamma_loss=recipe.gamma_loss)
    losses = dict(zip(("caption_by_sentence", "image_by_sentence"), by_sentence))
    total = torch.stack(by_sentence).sum()
    if recipe.word_weight > 0:
        words, mask = group.all_gather(text.words[pairs]), group.all_gather(word_mask[pairs])
        similarity = word_region_similarity(image.regions[pairs], words, mask)
        # Of each rank the classes of the same rows; ranks have equally many.
        classes = all_classes.unflatten(0, (group.world_size, -1))[:, pairs].flatten()
        classes = classes.to(group.device, non_blocking=True)
        by_words = contrastive_terms(group.all_gather(similarity), classes, gamma_loss=recipe.gamma_loss)
        losses |= zip(("caption_by_words", "image_by_words"), by_words)
        total = total + recipe.word_weight * torch.stack(by_words).sum()
    return losses, total


class GeneratedMatching(nn.Module):
    """The matching loss of phase `stem` for generated images, whose encoders stay frozen (AttnGAN, eq. 14).

    Args:
        image_encoder: The image encoder of phase `stem`; it is modified in place, and `train()` does not unfreeze it.
        recipe: The recipe of phase `stem`.
        group: The process group.
    """

    def __init__(self, image_encoder: ImageEncoder, recipe: MatchingRecipe, group: ProcessGroup) -> None:
        super().__init__()
        self.image_encoder, self.recipe, self.group = image_encoder, recipe, group
        freeze(image_encoder)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the encoder stays frozen."""
        super().train(mode)
        freeze(self.image_encoder)
        return self

    def forward(self, images: Tensor, text: TextFeatures, word_mask: Tensor, class_ids: Tensor) -> Tensor:
        """The loss of generated images (B, 3, H, W) with their captions; all ranks' pairs are negatives."""
        return matching_terms(self.image_encoder(images), text, word_mask, class_ids, self.recipe, self.group)[1]


def matching_step(state: PretrainingState, batch: CaptionBatch, recipe: MatchingRecipe) -> StepResult:
    """Phases `stem` and `evaluator`: contrastive loss between images and captions (DAMSM; Sec. 3.1)."""
    network, group = state.network, state.group
    # The first pairs of each rank, so that all ranks do equal work.
    pairs = slice(region_rows(recipe, group))
    with restoring_buffers([network.module]) as finite:
        network.optimizer.zero_grad()
        with autocast(state.engine, group.device):
            image, text = network.parallel(batch.images, batch.image_rows, batch.tokens, batch.word_mask)
            losses, total = matching_terms(image, text, batch.word_mask, batch.class_ids, recipe, group, pairs)
        network.backward(total)
        losses["gradient_norm"], is_finite = network.optimizer_step(total)
        finite.append(is_finite)
    return StepResult({name: loss.detach() for name, loss in losses.items()}, is_finite)


def captioning_step(state: PretrainingState, batch: CaptionBatch, recipe: PretrainingRecipe) -> StepResult:
    """Phases `stream` and `pretraining`: cross entropy of the captions, end token included, given images (Sec. 3.3)."""
    network, group = state.network, state.group
    tokens, word_mask = append_end(batch.tokens, batch.word_mask)
    parts = list(zip(*(rows.chunk(recipe.accumulate) for rows in (batch.images, batch.image_rows, tokens, word_mask))))
    # The parts of a batch have different numbers of words to average over.
    weights = group.mean_weights(torch.stack([part_mask.sum() for *_, part_mask in parts]))
    mean = torch.zeros((), device=group.device)
    with restoring_buffers([network.module]) as finite:
        network.optimizer.zero_grad()
        for j, (images, image_rows, part_tokens, part_mask) in enumerate(parts):
            with network.accumulation(last=j == len(parts) - 1):
                with autocast(state.engine, group.device):
                    logits = network.parallel(images, image_rows, part_tokens)
                    loss = weights[j] * redescription_loss(logits, part_tokens, part_mask) / len(parts)
                network.backward(loss)
            mean += loss.detach()
        norm, is_finite = network.optimizer_step(mean)
        finite.append(is_finite)
    return StepResult({"cross_entropy": mean, "gradient_norm": norm}, is_finite)


class KeypointLogits(NamedTuple):
    """Logits of real, generated and mismatched pairs of key points and sentence."""

    real: PairedLogits
    fake: PairedLogits
    mismatched: Tensor
    """Of the real points of each row with another sentence, (B,)."""


class KeypointDiscriminatorPass(nn.Module):
    """All logits that the discriminator's loss needs in a single forward, as DistributedDataParallel requires."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor, sentence: Tensor, other_sentence: Tensor) -> KeypointLogits:
        """Compute the logits of real and generated points with their sentences, and of real ones with others."""
        mismatched = self.discriminator(real, other_sentence).consistency
        return KeypointLogits(self.discriminator(real, sentence), self.discriminator(fake, sentence), mismatched)


@dataclass
class KeypointState:
    """Networks, optimizers and random generator of phase `keypoints`."""

    generator: TrainedNetwork
    """A `KeypointGenerator`."""
    discriminator: TrainedNetwork
    """A `KeypointDiscriminatorPass`."""
    text: FrozenFeatures
    random: torch.Generator
    """Equal on all ranks: each draw is made for the whole batch."""
    group: ProcessGroup
    engine: EngineRecipe

    def networks(self) -> dict[str, TrainedNetwork]:
        """All trained networks by name."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def draw(self, sample: Callable[..., Tensor], rows: int, features: int) -> Tensor:
        """Random numbers (rows, features) for this rank's rows of the batch."""
        whole = sample(rows * self.group.world_size, features, generator=self.random)
        return self.group.local_rows(whole).to(self.group.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on except the frozen text encoder."""
        networks = {name: network.state_dict() for name, network in self.networks().items()}
        return {"networks": networks, "random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        for name, network in self.networks().items():
            network.load_state_dict(state["networks"][name])
        self.random.set_state(state["random"])


def start_keypoints(
    model: GAWWN,
    recipe: KeypointRecipe,
    engine: EngineRecipe,
    random: torch.Generator,
    group: ProcessGroup,
    text: FrozenFeatures | None = None,
) -> KeypointState:
    """Set up phase `keypoints` for a model whose text encoder is trained.

    Args:
        model: The model, with key points; its key-point generator is trained in place.
        recipe: Learning rates.
        engine: Precision.
        random: Generator of noise, missing points and mismatched pairs, equally seeded on all ranks.
        group: The process group.
        text: Cached features of the training captions; None encodes captions in each step.
    """
    model.text_encoder.requires_grad_(False).eval()
    discriminator = KeypointDiscriminatorPass(model.keypoint_discriminator())
    rates = recipe.generator_learning_rate, recipe.discriminator_learning_rate
    generator, opponent = (
        prepare(network.train(), group, engine, learning_rate=rate, betas=(0.5, 0.999))
        for network, rate in zip((model.keypoint_generator, discriminator), rates)
    )
    return KeypointState(generator, opponent, text or frozen_text(model.text_encoder), random, group, engine)


def keypoint_step(state: KeypointState, batch: CaptionBatch) -> StepResult:
    """Phase `keypoints`: complete real points of which most are left out, against a discriminator (GAWWN, Sec. 4.3)."""
    generator, discriminator, group = state.generator, state.discriminator, state.group
    real, sentence = torch.as_tensor(batch.points, device=group.device), state.text(batch).sentence
    noise = state.draw(torch.randn, len(real), cast(KeypointGenerator, generator.module).noise_dim)
    given = real * (state.draw(torch.rand, *real.shape[:2]) >= MISSING_SHARE).unsqueeze(2)
    ids = group.all_gather(torch.stack((batch.class_ids, batch.caption_ids), dim=1))
    partner, valid = mismatch(*ids.unbind(dim=1), generator=state.random)
    other_sentence = group.all_gather(sentence)[group.local_rows(partner).to(group.device)]
    pair_rows = group.local_rows(valid).nonzero().flatten().to(group.device)
    pair_weight = group.mean_weights(torch.tensor([len(pair_rows)]), valid.sum())[0]
    options: dict[str, Any] = {"weighting": "gan-int-cls"}
    with restoring_buffers([generator.module, discriminator.module]) as finite:
        discriminator.optimizer.zero_grad()
        with autocast(state.engine, group.device):
            completed = generator.parallel(noise, sentence, given)
            logits = discriminator.parallel(real, completed.detach(), sentence, other_sentence)
            mismatched = logits.mismatched[pair_rows]
            loss = discriminator_loss(logits.real, logits.fake, mismatched, mismatched_weight=pair_weight, **options)
        discriminator.backward(loss)
        losses = {"discriminator": loss.detach()}
        losses["discriminator_gradient_norm"], is_finite = discriminator.optimizer_step(loss)
        finite.append(is_finite)
        generator.optimizer.zero_grad()
        with frozen([discriminator]):
            with autocast(state.engine, group.device):
                score = cast(KeypointDiscriminatorPass, discriminator.module).discriminator
                loss = generator_loss(score(completed, sentence), **options)
            generator.backward(loss)
        losses["generator"] = loss.detach()
        losses["generator_gradient_norm"], is_finite = generator.optimizer_step(loss, finite)
        finite.append(is_finite)
    return StepResult(losses, torch.stack(finite).all())
