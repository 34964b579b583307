"""The phases before the generator: encoders by matching (`stem`, and again as `judge`), the captioner (`stream`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mirror_modules.data.batching import CaptionBatch
from mirror_modules.models import MirrorGANConfig
from mirror_modules.stem import ImageEncoder, MatchingLoss, TextEncoder
from mirror_modules.stream import Captioner, append_end, redescription_loss
from mirror_modules.training.log import PhaseLog
from mirror_modules.training.recipes import CaptionerRecipe, MatchingRecipe

LARGEST_GRADIENT_NORM = 1.0


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


def train_encoders(
    pair: EncoderPair, batches: Iterator[CaptionBatch], recipe: MatchingRecipe, log: PhaseLog
) -> None:
    """Phases `stem` and `judge`: make the features of an image and of its caption meet (Sec. 3.1)."""
    matching = MatchingLoss()
    optimizer, schedule = _optimizer(pair, recipe.learning_rate, recipe.steps)
    pair.train()
    for _ in range(recipe.steps):
        batch = next(batches)
        terms = matching(
            pair.image_encoder(batch.images),
            pair.text_encoder(batch.tokens, batch.word_mask),
            batch.word_mask,
            batch.class_ids,
        )
        optimizer.zero_grad()
        terms.total.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), LARGEST_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        log.step(len(batch.images), {name: term.detach() for name, term in terms._asdict().items()})
    pair.eval()


def train_captioner(
    captioner: Captioner, batches: Iterator[CaptionBatch], recipe: CaptionerRecipe, log: PhaseLog
) -> None:
    """Phase `stream`: read the caption, and its end, off real images (Sec. 3.3)."""
    optimizer, schedule = _optimizer(captioner, recipe.learning_rate, recipe.steps)
    captioner.train()
    for _ in range(recipe.steps):
        batch = next(batches)
        tokens, word_mask = append_end(batch.tokens, batch.word_mask)
        loss = redescription_loss(captioner(batch.images, tokens, word_mask), tokens, word_mask)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(captioner.parameters(), LARGEST_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        log.step(len(batch.images), {"cross_entropy": loss.detach()})
    captioner.eval()


def _optimizer(
    module: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    # One cycle: short runs gain most from a large step size that ends small.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.2)
    return optimizer, schedule
