"""The phases before the generator: encoders by matching (`stem`, and again as `judge`), the captioner (`stream`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mirror_modules.data.batching import CaptionBatch
from mirror_modules.models import MirrorGANConfig
from mirror_modules.stem import ImageEncoder, TextEncoder
from mirror_modules.stem.matching import contrastive_terms, image_sentence_similarity, word_region_similarity
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


def train_encoders(pair: EncoderPair, batches: Iterator[CaptionBatch], recipe: MatchingRecipe, log: PhaseLog) -> None:
    """Phases `stem` and `judge`: make the features of an image and of its caption meet (Sec. 3.1)."""
    optimizer, schedule = _optimizer(pair, recipe.learning_rate, recipe.steps)
    pair.train()
    for _ in range(recipe.steps):
        batch = next(batches)
        image, text = pair.image_encoder(batch.images), pair.text_encoder(batch.tokens, batch.word_mask)
        by_sentence = contrastive_terms(
            image_sentence_similarity(image.image, text.sentence), batch.class_ids, gamma_loss=recipe.gamma_loss
        )
        losses = dict(zip(("caption_by_sentence", "image_by_sentence"), by_sentence))
        total = torch.stack(by_sentence).sum()
        if recipe.word_weight > 0:
            some = slice(recipe.word_pairs)
            similarity = word_region_similarity(image.regions[some], text.words[some], batch.word_mask[some])
            by_words = contrastive_terms(similarity, batch.class_ids[some], gamma_loss=recipe.gamma_loss)
            losses |= zip(("caption_by_words", "image_by_words"), by_words)
            total = total + recipe.word_weight * torch.stack(by_words).sum()
        _descend(pair, total, optimizer, schedule)
        log.step(len(batch.images), losses)
    pair.eval()


def train_captioner(
    captioner: Captioner, batches: Iterator[CaptionBatch], recipe: CaptionerRecipe, log: PhaseLog
) -> None:
    """Phase `stream`: read the caption, and its end, off real images (Sec. 3.3)."""
    captioner.train()
    if not recipe.train_backbone:
        captioner.image_encoder.requires_grad_(False).eval()
    optimizer, schedule = _optimizer(captioner, recipe.learning_rate, recipe.steps)
    for _ in range(recipe.steps):
        batch = next(batches)
        tokens, word_mask = append_end(batch.tokens, batch.word_mask)
        loss = redescription_loss(captioner(batch.images, tokens, word_mask), tokens, word_mask)
        _descend(captioner, loss, optimizer, schedule)
        log.step(len(batch.images), {"cross_entropy": loss})
    captioner.eval()


def _optimizer(
    module: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    # One cycle: short runs gain most from a large step size that ends small. It rises for a fifth of the steps, and for
    # one at least: a rise of no steps would divide by zero.
    total = steps + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=total, pct_start=max(0.2, 2 / total)
    )
    return optimizer, schedule


def _descend(
    module: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), LARGEST_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
