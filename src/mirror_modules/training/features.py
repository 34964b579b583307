"""What frozen encoders say of captions and images: once for each, and not once per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirror_modules.data import CaptionBatch, InMemoryCaptions, to_float
from mirror_modules.stem import TextEncoder, TextFeatures

FrozenFeatures = Callable[[CaptionBatch], TextFeatures]
"""From a batch to the features of its captions."""

# Captions or images encoded at a time.
CHUNK = 256


class Cache(NamedTuple):
    """Whether features are kept, and what that takes."""

    fits: bool
    mebibytes: float
    """Their size."""

    @classmethod
    def plan(cls, count: int, features: int, limit_mib: float) -> Cache:
        """Can `count` times `features` numbers be kept?"""
        mebibytes = count * features * 4 / 2**20
        return cls(mebibytes <= limit_mib, mebibytes)


def frozen_text(encoder: TextEncoder) -> FrozenFeatures:
    """Encode the captions of each batch anew."""

    @torch.no_grad()
    def encode(batch: CaptionBatch) -> TextFeatures:
        return encoder(batch.tokens, batch.word_mask)

    return encode


@torch.no_grad()
def cached_text(encoder: TextEncoder, captions: InMemoryCaptions, device: torch.device) -> FrozenFeatures:
    """Encode all captions now, and look them up for each batch."""
    parts = [
        encoder(tokens.to(device), word_mask.to(device))
        for tokens, word_mask in zip(captions.tokens.split(CHUNK), captions.word_mask.split(CHUNK))
    ]
    words, sentences = torch.cat([part.words for part in parts]), torch.cat([part.sentence for part in parts])

    def look_up(batch: CaptionBatch) -> TextFeatures:
        rows = batch.caption_rows.to(device, non_blocking=True)
        return TextFeatures(words[rows, : batch.tokens.shape[1]], sentences[rows])

    return look_up


@torch.no_grad()
def cached_images(encoder: nn.Module, captions: InMemoryCaptions, device: torch.device) -> Tensor:
    """The global feature of every image of a data set, (N, F), by an encoder in evaluation mode."""
    return torch.cat([encoder(to_float(images.to(device))).image for images in captions.images.split(CHUNK)])
