"""The sizes and choices of a MirrorGAN, as one frozen record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal


@dataclass(frozen=True)
class MirrorGANConfig:
    """Sizes and choices of a `MirrorGAN`; the defaults are the paper's sizes with our choices.

    `paper` and `release` are presets; the page "Differences" of the documentation lists what each changes.
    """

    embedding_dim: int = 300
    """Features of a word embedding in the text encoder."""
    word_dim: int = 256
    """Features D of a word and of the sentence."""
    text_dropout: float = 0.5
    """Dropout of the word embeddings while the text encoder is trained."""
    max_words: int = 18
    """Longer captions are cut after so many words."""
    noise_dim: int = 100
    """Features Z of the noise."""
    condition_dim: int = 100
    """Features E of the augmented condition."""
    channels: int = 32
    """Channels C of each stage of the generator."""
    resolutions: tuple[int, ...] = (64, 128, 256)
    """Image sizes in pixels, coarse to fine."""
    residual_blocks: int = 2
    """Residual blocks of each refinement stage."""
    attention: Literal["global-local", "word", "none"] = "global-local"
    """What a refinement stage attends to."""
    sentence_bias: bool = False
    """Bias of the sentence projection V; in the published code, not in the paper."""
    score_projection: bool = False
    """1x1 convolution before the sentence attention's softmax; in the published code, not in the paper."""
    sentence_axis: Literal["channels", "positions"] = "channels"
    """Axis of the sentence attention's softmax."""
    discriminator_channels: int = 64
    """Channels after the first convolution of each discriminator."""
    discriminator_normalization: Literal["batch", "spectral", "none"] = "batch"
    """Batch norms in the discriminators as published, spectral norms of their convolutions instead, or neither."""
    image_backbone: str = "inception_v3"
    """Backbone of the image encoder that trains the text encoder: "conv", "inception_v3" or a torchvision ResNet."""
    captioner_backbone: str = "resnet152"
    """Backbone of the captioner: "conv", "inception_v3" or a torchvision ResNet."""
    captioner_projection: bool = False
    """Show the captioner the image encoder's projected feature, and not the bare backbone's."""
    captioner_embedding_dim: int = 256
    """Features of a word embedding in the captioner."""
    captioner_hidden_dim: int = 512
    """Features of the captioner's LSTM."""

    def __post_init__(self) -> None:
        # JSON has lists only.
        object.__setattr__(self, "resolutions", tuple(self.resolutions))
        if not self.resolutions:
            raise ValueError("MirrorGANConfig: resolutions must be one or more, coarse to fine, but there is none.")

    @classmethod
    def paper(cls, **changes: Any) -> MirrorGANConfig:
        """The model as the paper's equations have it. `changes` override single fields."""
        return cls(**changes)

    @classmethod
    def release(cls, **changes: Any) -> MirrorGANConfig:
        """The model as the published code has it, so that its weights fit. `changes` override single fields."""
        return cls(**{"sentence_bias": True, "score_projection": True, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**dataclasses.asdict(self), "resolutions": list(self.resolutions)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MirrorGANConfig:
        """Build from the fields of `to_dict`.

        Raises:
            ValueError: A field is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise ValueError(f"MirrorGANConfig: unknown field {name!r}{hint}")
        return cls(**fields)
