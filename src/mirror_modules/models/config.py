"""Sizes and options of a MirrorGAN, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal


@dataclass(frozen=True)
class MirrorGANConfig:
    """Sizes and options of a `MirrorGAN`; the default sizes are the paper's.

    `paper` and `release` are presets; the documentation page "Differences" lists the options of each.

    Raises:
        ValueError: `resolutions` is empty.

    Examples:
        >>> from mirror_modules import MirrorGANConfig
        >>> config = MirrorGANConfig.release(channels=16)
        >>> config.channels, config.resolutions, config.score_projection
        (16, (64, 128, 256), True)
        >>> MirrorGANConfig.from_dict(config.to_dict()) == config
        True
    """

    embedding_dim: int = 300
    """Features of a word embedding in the text encoder."""
    word_dim: int = 256
    """Features D of a word and of the sentence."""
    text_dropout: float = 0.5
    """Dropout probability of the word embeddings during training of the text encoder."""
    max_words: int = 18
    """Longer captions are truncated to this many words."""
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
    """Attention of each refinement stage: MirrorGAN's, AttnGAN's (words alone) or none."""
    sentence_bias: bool = False
    """Bias of the sentence projection V: in the published code, not in the paper. "global-local" only."""
    score_projection: bool = False
    """1x1 convolution before the softmax of the sentence attention: in the published code, not in the paper.
    "global-local" only."""
    sentence_axis: Literal["channels", "positions"] = "channels"
    """Softmax axis of the sentence attention. "global-local" only."""
    discriminator_channels: int = 64
    """Channels after the first convolution of each discriminator."""
    discriminator_normalization: Literal["batch", "spectral", "none"] = "batch"
    """Normalization of the discriminators: batch norm as published, spectral norm of the convolutions, or none."""
    image_backbone: str = "inception_v3"
    """Backbone of the image encoder that trains the text encoder: "conv", "inception_v3" or a torchvision ResNet."""
    captioner_backbone: str = "resnet152"
    """Backbone of the captioner: "conv", "inception_v3" or a torchvision ResNet."""
    captioner_projection: bool = False
    """Feed the captioner the projected feature of an image encoder instead of the bare backbone's."""
    captioner_embedding_dim: int = 256
    """Features of a word embedding in the captioner."""
    captioner_hidden_dim: int = 512
    """Features of the captioner's LSTM."""

    def __post_init__(self) -> None:
        # JSON stores tuples as lists.
        object.__setattr__(self, "resolutions", tuple(self.resolutions))
        if not self.resolutions:
            raise ValueError("MirrorGANConfig: resolutions is empty; give at least one image size, coarse to fine.")

    @classmethod
    def paper(cls, **changes: Any) -> MirrorGANConfig:
        """Preset: the model of the paper's equations. `changes` override single fields."""
        return cls(**changes)

    @classmethod
    def release(cls, **changes: Any) -> MirrorGANConfig:
        """Preset: the model of the published code, compatible with its weights. `changes` override single fields."""
        return cls(**{"sentence_bias": True, "score_projection": True, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can store them."""
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
