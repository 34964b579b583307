"""What the captioner needs of each kind of models, and what the kinds share.

Shapes: N images, B captions, L tokens, V token ids.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mirror_modules._checks import shape_of


class Family(Protocol):
    """What differs between the kinds of models.

    The model is an argument, not an attribute, so that replacing or replicating that of the captioner takes effect.
    """

    end: list[int]
    """Token ids that end a caption."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None) -> None: ...

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        """What depends on the images alone."""
        ...

    def logits(self, model: Any, encoded: Tensor, tokens: Tensor, word_mask: Tensor, answer: Tensor | None) -> Tensor:
        """Logits (B, L, V) of tokens (B, L), of which row k belongs to image k mod N."""
        ...

    def question(self, text: str) -> list[int]:
        """Token ids of a question about the image."""
        ...


def positions_of(model: Any) -> int | None:
    """The number of positions of the text decoder, or None if its configuration has none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_length(ids: Tensor, tokens: Tensor, positions: int | None) -> None:
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"HuggingFaceCaptioner: tokens are {shape_of(tokens)} and need {ids.shape[1]} positions with the prompt, "
            f"but the model has {positions}; shorten the captions."
        )


def repeated(encoded: Tensor, tokens: Tensor) -> Tensor:
    """N encoded images for a multiple of N captions: row k belongs to image k mod N."""
    images, captions = encoded.shape[0], tokens.shape[0]
    if images == captions:
        return encoded
    if images == 0 or captions % images:
        raise ValueError(
            f"HuggingFaceCaptioner: {captions} captions for {images} images; the number must be the same, or a "
            f"multiple."
        )
    return encoded.repeat(captions // images, *[1] * (encoded.ndim - 1))
