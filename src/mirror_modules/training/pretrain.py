"""Steps of the phases before the generator: encoders by matching (`stem`, again as `judge`), captioner (`stream`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirror_modules.data import CaptionBatch
from mirror_modules.models import MirrorGANConfig
from mirror_modules.stem import ImageEncoder, ImageFeatures, TextEncoder, TextFeatures
from mirror_modules.stem.matching import contrastive_terms, image_sentence_similarity, word_region_similarity
from mirror_modules.stream import Captioner, append_end, redescription_loss
from mirror_modules.training.recipes import CaptionerRecipe, EngineRecipe, MatchingRecipe
from mirror_modules.training.trainee import Outcome, Trainee, autocast, enroll, untouched_unless
from mirror_modules.training.world import World


class EncoderPair(nn.Module):
    """A text encoder and an image encoder that agree: what `stem` trains, and what judges."""

    def __init__(self, config: MirrorGANConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(
            vocabulary_size,
            embedding_dim=config.embedding_dim,
            feature_dim=config.word_dim,
            dropout=config.text_dropout,
        )
        self.image_encoder = ImageEncoder(config.image_backbone, config.word_dim)

    def forward(self, images: Tensor, tokens: Tensor, word_mask: Tensor) -> tuple[ImageFeatures, TextFeatures]:
        """Encode both sides of a batch."""
        return self.image_encoder(images), self.text_encoder(tokens, word_mask)


class Reader(nn.Module):
    """A captioner that starts from an image, or from what its frozen image encoder has seen of it before."""

    def __init__(self, captioner: Captioner, seen: Tensor | None = None) -> None:
        super().__init__()
        self.captioner = captioner
        # Not a buffer: it is no part of the state.
        self.seen = seen

    def forward(self, images: Tensor, image_rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) of the words of captions."""
        if self.seen is None:
            return self.captioner(images, tokens)
        feature = self.seen[image_rows.to(self.seen.device, non_blocking=True)]
        return self.captioner.decode(self.captioner.project(feature), tokens)


@dataclass
class PretrainingState:
    """The network and its optimizer of phase `stem`, `judge` or `stream`."""

    trainee: Trainee
    world: World
    engine: EngineRecipe

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"trainee": self.trainee.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.trainee.load_state_dict(state["trainee"])


def start_pretraining(
    module: nn.Module, recipe: MatchingRecipe | CaptionerRecipe, engine: EngineRecipe, world: World
) -> PretrainingState:
    """Set up a phase before the generator."""
    if not (isinstance(recipe, MatchingRecipe) and recipe.word_weight > 0):
        for part in module.modules():
            if isinstance(part, ImageEncoder):
                # Nothing asks for regions: no loss reaches their projection, and ranks would wait for its gradient.
                part.region_projection.requires_grad_(False)
    trainee = enroll(
        module,
        world,
        engine,
        learning_rate=recipe.learning_rate,
        largest_gradient_norm=recipe.largest_gradient_norm,
        cycle=recipe.steps,
    )
    return PretrainingState(trainee, world, engine)


def matching_step(state: PretrainingState, batch: CaptionBatch, recipe: MatchingRecipe) -> Outcome:
    """Phases `stem` and `judge`: make the features of an image and of its caption meet (Sec. 3.1).

    Every image meets every caption, of all ranks: captions are gathered, and images meet them where they are.
    """
    trainee, world = state.trainee, state.world
    class_ids = world.gather(batch.class_ids).to(world.device, non_blocking=True)
    with untouched_unless([trainee.module]) as finite:
        trainee.optimizer.zero_grad()
        with autocast(state.engine, world.device):
            image, text = trainee.parallel(batch.images, batch.tokens, batch.word_mask)
            similarity = image_sentence_similarity(image.image, world.gather(text.sentence))
            by_sentence = contrastive_terms(world.gather(similarity), class_ids, gamma_loss=recipe.gamma_loss)
            losses = dict(zip(("caption_by_sentence", "image_by_sentence"), by_sentence))
            total = torch.stack(by_sentence).sum()
            if recipe.word_weight > 0:
                # The first pairs of each rank, so that all have equally much to do.
                some = slice(max(1, recipe.word_pairs // world.size))
                ids = world.gather(batch.class_ids[some]).to(world.device, non_blocking=True)
                words, word_mask = world.gather(text.words[some]), world.gather(batch.word_mask[some])
                similarity = word_region_similarity(image.regions[some], words, word_mask)
                by_words = contrastive_terms(world.gather(similarity), ids, gamma_loss=recipe.gamma_loss)
                losses |= zip(("caption_by_words", "image_by_words"), by_words)
                total = total + recipe.word_weight * torch.stack(by_words).sum()
        trainee.backward(total)
        losses["gradient_norm"], good = trainee.descend(total)
        finite.append(good)
    return Outcome({name: loss.detach() for name, loss in losses.items()}, good)


def captioning_step(state: PretrainingState, batch: CaptionBatch, recipe: CaptionerRecipe) -> Outcome:
    """Phase `stream`: read the caption, and its end, off real images (Sec. 3.3)."""
    trainee, world = state.trainee, state.world
    tokens, word_mask = append_end(batch.tokens, batch.word_mask)
    parts = list(zip(*(rows.chunk(recipe.accumulate) for rows in (batch.images, batch.image_rows, tokens, word_mask))))
    # A mean over words, of which the parts of a batch have different numbers.
    shares = world.shares(torch.stack([part_mask.sum() for *_, part_mask in parts]))
    mean = torch.zeros((), device=world.device)
    with untouched_unless([trainee.module]) as finite:
        trainee.optimizer.zero_grad()
        for j, (images, image_rows, part_tokens, part_mask) in enumerate(parts):
            with trainee.part(last=j == len(parts) - 1):
                with autocast(state.engine, world.device):
                    logits = trainee.parallel(images, image_rows, part_tokens)
                    loss = shares[j] * redescription_loss(logits, part_tokens, part_mask) / len(parts)
                trainee.backward(loss)
            mean += loss.detach()
        norm, good = trainee.descend(mean)
        finite.append(good)
    return Outcome({"cross_entropy": mean, "gradient_norm": norm}, good)
