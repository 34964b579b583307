"""Attention maps as pictures: the weight of each word, and of the sentence, at each position of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules.data.transforms import image_pyramid, to_bytes, to_float
from mirror_modules.glam import GeneratedImages
from mirror_modules.models import TextToImage
from mirror_modules.pictures.grids import Picture, captioned_grid, heat_overlay
from mirror_modules.stem import Vocabulary

# Each attention map is a separate picture in the report: limit the number of captions and the resolution.
ATTENTION_CAPTIONS, ATTENTION_RESOLUTION = 4, 128
# Tiles of the overview are enlarged up to this many pixels.
ATTENTION_TILE = 128


class AttentionMap(NamedTuple):
    """The attention weights of one word, or of the sentence, over an image."""

    name: str
    """The word, or "sentence"."""
    note: str
    """The largest weight of the word, or the range of the sentence's strongest weight."""
    picture: Picture
    """The map laid over the image in gray, (H, W, 3)."""


class CaptionAttention(NamedTuple):
    """The attention maps of one caption, and the image generated from it."""

    caption: str
    image: Picture
    maps: list[AttentionMap]


def attention_maps(
    captions: Sequence[str], words: Sequence[Sequence[str]], generated: GeneratedImages
) -> list[CaptionAttention]:
    """Overlay the attention of the finest stage for the first captions.

    The map of a word shows its weight at each position, from 0 to its maximum. Sentence weights sum to 1 over channels
    at each position; their map shows the maximum over channels, from its minimum to its maximum over positions.

    Args:
        captions: N captions.
        words: The words of each caption, one per token.
        generated: N images on the CPU, with attention weights if the model has attention.

    Returns:
        One entry per caption, for at most four captions; empty without attention weights.

    Raises:
        ValueError: Captions, words and images differ in number.

    Examples:
        >>> import torch
        >>> from mirror_modules import GeneratedImages
        >>> from mirror_modules.pictures.attention import attention_maps
        >>> red = torch.tensor([[0.25, 0.5], [0.0, 0.0]])
        >>> weights = torch.stack([red, 1 - red]).unsqueeze(0)  # (B, L, H, W), sums to 1 over L
        >>> generated = GeneratedImages([torch.zeros(1, 3, 4, 4)], [weights], [])
        >>> maps = attention_maps(["red flower"], [["red", "flower"]], generated)[0].maps
        >>> [(each.name, each.note, each.picture.shape) for each in maps]
        [('red', '50%', (4, 4, 3)), ('flower', '100%', (4, 4, 3))]
    """
    if not generated.word_weights:
        return []
    if not len(captions) == len(words) == len(generated.images[-1]):
        raise ValueError(
            f"attention_maps: {len(captions)} captions and the words of {len(words)} for {len(generated.images[-1])} "
            "images; give both for each image."
        )
    shown = []
    finest = generated.images[-1][:ATTENTION_CAPTIONS]
    images = image_pyramid(finest, [min(finest.shape[2], ATTENTION_RESOLUTION)])[0]
    for i, image in enumerate(images):
        maps = []
        for word, weights in zip(words[i], generated.word_weights[-1][i]):
            maps.append(AttentionMap(word, f"{weights.max():.0%}", heat_overlay(image, weights)))
        if generated.sentence_weights:
            strongest = generated.sentence_weights[-1][i].amax(dim=0)
            low, high = float(strongest.min()), float(strongest.max())
            overlay = heat_overlay(image, strongest - low)
            maps.append(AttentionMap("sentence", f"{low:.0%} to {high:.0%}", overlay))
        shown.append(CaptionAttention(captions[i], to_bytes(image.unsqueeze(0))[0].numpy(), maps))
    return shown


def attention_sheet(model: TextToImage, captions: Sequence[str], generated: GeneratedImages) -> Picture | None:
    """Draw the attention maps of the first captions as one picture; None if the model has no attention."""
    encoded = model.vocabulary.encode(captions, max_words=model.config.max_words, warn_unknown=False)
    maps = attention_maps(captions, token_words(model.vocabulary, *encoded), generated)
    return draw_attention(maps) if maps else None


def token_words(vocabulary: Vocabulary, tokens: Tensor, word_mask: Tensor) -> list[list[str]]:
    """Decode tokens (B, L) into one word per real token; unknown words become "<unknown>"."""
    return [[vocabulary.words[token] for token in row[mask].tolist()] for row, mask in zip(tokens, word_mask)]


def draw_attention(attention: Sequence[CaptionAttention]) -> Picture:
    """Draw one row per caption, of at least one: its image, then its maps, padded with white tiles."""
    columns = 1 + max(len(entry.maps) for entry in attention)
    pictures, labels = [], []
    for entry in attention:
        blanks = columns - 1 - len(entry.maps)
        tiles = [entry.image, *(each.picture for each in entry.maps)] + [entry.image * 0 + 255] * blanks
        pictures += [torch.from_numpy(tile) for tile in tiles]
        labels += ["generated", *(each.name for each in entry.maps)] + [""] * blanks
    scale = max(1, ATTENTION_TILE // pictures[0].shape[0])
    return captioned_grid(to_float(torch.stack(pictures)), labels, columns, scale)
