"""Features of frozen encoders, computed once per caption or image instead of once per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirror_modules._tiles import in_chunks
from mirror_modules.data import CaptionBatch, InMemoryCaptions, to_float
from mirror_modules.stem import TextEncoder, TextFeatures

FrozenFeatures = Callable[[CaptionBatch], TextFeatures]
"""Maps a batch to the features of its captions."""

CHUNK = 256


class Cache(NamedTuple):
    """Whether features are cached, and their size."""

    fits: bool
    mebibytes: float

    @classmethod
    def plan(cls, count: int, features: int, limit_mib: float) -> Cache:
        """Whether count * features float32 numbers fit into the limit."""
        mebibytes = count * features * 4 / 2**20
        return cls(mebibytes <= limit_mib, mebibytes)


def frozen_text(encoder: TextEncoder) -> FrozenFeatures:
    """Encode the captions of each batch, without a cache."""

    @torch.no_grad()
    def encode(batch: CaptionBatch) -> TextFeatures:
        return encoder(batch.tokens, batch.word_mask)

    return encode


@torch.no_grad()
def cached_text(encoder: TextEncoder, captions: InMemoryCaptions, device: torch.device) -> FrozenFeatures:
    """Encode all captions once, and index the features for each batch."""

    def encode(tokens: Tensor, word_mask: Tensor) -> Tensor:
        features = encoder(tokens.to(device), word_mask.to(device))
        return torch.cat([features.words, features.sentence.unsqueeze(1)], dim=1)

    features = in_chunks(encode, captions.tokens, captions.word_mask, size=CHUNK)
    words, sentences = features[:, :-1], features[:, -1]

    def look_up(batch: CaptionBatch) -> TextFeatures:
        rows = batch.caption_rows.to(device, non_blocking=True)
        return TextFeatures(words[rows, : batch.tokens.shape[1]], sentences[rows])

    return look_up


@torch.no_grad()
def cached_images(encoder: nn.Module, captions: InMemoryCaptions, device: torch.device) -> Tensor:
    """Global features (N, F) of all images of a data set, by an encoder in evaluation mode."""
    return in_chunks(lambda images: encoder(to_float(images.to(device))).image, captions.images, size=CHUNK)
