"""Sizes and options of a system and of its backbones, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import Self

from mirror_modules._checks import check_positive
from mirror_modules.adversarial.losses import Weighting as Weighting
from mirror_modules.interop.backbones import build_backbone, checksum


@dataclass(frozen=True)
class BackboneConfig:
    """Name, weights and input of an image backbone; see `interop.build_backbone`.

    Raises:
        ValueError: The name is empty, or a field has another type or is out of its range.

    Examples:
        >>> from mirror_modules import BackboneConfig, MirrorGANConfig
        >>> lite0 = BackboneConfig("efficientnet_lite0", weights="package")
        >>> lite0.is_trainable
        False
        >>> MirrorGANConfig(image_backbone=lite0, captioner_backbone="conv").captioner_backbone
        BackboneConfig(name='conv', weights=None, input_size=None, layer=None, trainable=None, sha256=None)
        >>> BackboneConfig("conv").build().image_dim
        512
    """

    name: str
    """"conv", a classifier of torchvision, "timm:" and a network of timm, or "efficientnet_lite0" to "2"."""
    weights: str | None = None
    """None starts at random; "DEFAULT" downloads those of torchvision or timm, and the name of other weights of
    torchvision those; "package" takes those of the extra `pretrained`; any other string is the path of a file."""
    input_size: int | None = None
    """Height and width to which images are resized; None takes the network's own."""
    layer: int | None = None
    """Of a timm network, the layer whose map gives the regions, from -1 backwards; None takes the last map."""
    trainable: bool | None = None
    """Whether training changes the backbone; None freezes it if it has pretrained weights."""
    sha256: str | None = field(default=None, compare=False)
    """`interop.checksum` of the loaded weights: recorded when they are loaded, and checked if given."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"BackboneConfig: name must be that of a backbone, such as 'conv', not {self.name!r}.")
        for name in ("weights", "sha256"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"BackboneConfig: {name} must be a string or None, but it is {value!r}.")
        if self.input_size is not None:
            check_positive("BackboneConfig", input_size=self.input_size)
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise ValueError(f"BackboneConfig: layer must be a whole number or None, but it is {self.layer!r}.")
        if self.trainable is not None and not isinstance(self.trainable, bool):
            raise ValueError(f"BackboneConfig: trainable must be True, False or None, but it is {self.trainable!r}.")

    @classmethod
    def of(cls, value: BackboneConfig | str | dict[str, Any]) -> BackboneConfig:
        """A config from itself, from the name of a backbone, or from the fields of `dataclasses.asdict`.

        Raises:
            ValueError: It is none of these, or a field is unknown.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(
                f"BackboneConfig: expected the name of a backbone, or its fields with 'name' among them, not {value!r}."
            )
        _check_fields("BackboneConfig", value, cls)
        return cls(**value)

    @property
    def is_trainable(self) -> bool:
        """Whether training changes the backbone."""
        return self.weights is None if self.trainable is None else self.trainable

    def build(self, *, load: bool = True) -> nn.Module:
        """Build the backbone; `load=False` does not read the weights, for a state_dict that is loaded afterwards.

        Raises:
            ValueError: As in `interop.build_backbone`, or the weights have another checksum than `sha256`.
            FileNotFoundError: The file of the weights does not exist.
            ImportError: The package of the network or of its weights is not installed.
        """
        backbone = build_backbone(
            self.name,
            self.weights,
            input_size=self.input_size,
            layer=self.layer,
            trainable=self.trainable,
            load=load,
        )
        if not load or self.weights is None or self.sha256 is None or _is_empty(backbone):
            return backbone
        if (found := checksum(backbone)) != self.sha256:
            raise ValueError(
                f"BackboneConfig: the weights {self.weights!r} of {self.name!r} have the checksum {found}, but sha256 "
                f"is {self.sha256}; restore the weights, or set sha256 to None to accept others."
            )
        return backbone

    def recorded(self, backbone: nn.Module | None = None) -> BackboneConfig:
        """A copy with the checksum of the weights; itself if there are none.

        Args:
            backbone: What `build` returned, before any training; None loads the weights for it.

        Raises:
            ValueError: As in `build`.
        """
        if self.weights is None:
            return self
        backbone = self.build() if backbone is None else backbone
        return self if _is_empty(backbone) else dataclasses.replace(self, sha256=checksum(backbone))


def _is_size(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_empty(backbone: nn.Module) -> bool:
    """Whether a backbone is on the meta device, where nothing can be loaded."""
    return any(parameter.is_meta for parameter in backbone.parameters())


def _check_fields(owner: str, fields: dict[str, Any], record: type) -> None:
    """Require known names of fields."""
    known = [each.name for each in dataclasses.fields(record)]
    for name in fields:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{owner}: unknown field {name!r}{hint}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes that all systems have; a dataclass with this base is the configuration of one system.

    Class attributes describe the system, for its training:

        system                   name of the system in config.json
        adversarial_phases       phases that train the generator, in order
        attends                  whether the generator reads the words, or only the sentence
        takes_location           whether generator and discriminators read a location of the subject
        samples_with_captioner   whether images are generated with the captioner

    Raises:
        ValueError: `resolutions` are no image sizes, or `max_words` is below 1.

    Examples:
        >>> from dataclasses import dataclass
        >>> from mirror_modules.models import ModelConfig
        >>> @dataclass(frozen=True)
        ... class MyConfig(ModelConfig):
        ...     system = "mine"
        ...     depth: int = 3
        >>> MyConfig(resolutions=[16, 32], image_backbone="conv").resolutions
        (16, 32)
    """

    system: ClassVar[str] = ""
    adversarial_phases: ClassVar[tuple[str, ...]] = ("glam",)
    attends: ClassVar[bool] = True
    takes_location: ClassVar[bool] = False
    samples_with_captioner: ClassVar[bool] = False

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
    """Features E of the condition."""
    channels: int = 32
    """Channels C of the generator."""
    resolutions: tuple[int, ...] = (64, 128, 256)
    """Image sizes in pixels, coarse to fine."""
    discriminator_channels: int = 64
    """Channels after the first convolution of each discriminator."""
    discriminator_normalization: Literal["batch", "spectral", "none"] = "batch"
    """Normalization of the discriminators: batch norm as published, spectral norm of the convolutions, or none."""
    image_backbone: BackboneConfig = BackboneConfig("inception_v3")
    """Backbone of the image encoder that trains the text encoder; a string is its name."""
    captioner_backbone: BackboneConfig = BackboneConfig("resnet152")
    """Backbone of the captioner; a string is its name."""
    captioner_projection: bool = False
    """Feed the captioner the projected feature of an image encoder instead of the bare backbone's."""
    captioner_embedding_dim: int = 256
    """Features of a word embedding in the captioner."""
    captioner_hidden_dim: int = 512
    """Features of the captioner's LSTM."""
    captioner_image_skip: bool = False
    """Connect the image to the captioner's output at every step; the paper does not."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.resolutions, tuple | list) or not all(map(_is_size, self.resolutions)):
            raise ValueError(
                f"{owner}: resolutions must be a list of image sizes in pixels, coarse to fine, such as (64, 128), but "
                f"it is {self.resolutions!r}."
            )
        # JSON stores tuples as lists.
        object.__setattr__(self, "resolutions", tuple(self.resolutions))
        for name in ("image_backbone", "captioner_backbone"):
            object.__setattr__(self, name, BackboneConfig.of(getattr(self, name)))
        if not self.resolutions:
            raise ValueError(f"{owner}: resolutions is empty; give at least one image size, coarse to fine.")
        # The other sizes are checked by the parts that have them.
        check_positive(owner, max_words=self.max_words)

    @property
    def condition_noise_dim(self) -> int:
        """Features of the noise of the conditions; 0 if nothing is drawn for them."""
        return self.condition_dim

    @property
    def completes_points(self) -> bool:
        """Whether the model has a generator of missing key points, which phase `keypoints` trains."""
        return False

    def trained_resolutions(self, phase: str) -> tuple[int, ...]:
        """Image sizes of the discriminators of one of `adversarial_phases`."""
        return self.resolutions

    def weighting(self, phase: str) -> Weighting:
        """Weights of the adversarial terms in one of `adversarial_phases`, unless the recipe sets others."""
        return "paper"

    def without_effect(self) -> list[tuple[str, str]]:
        """Fields that are not read, each with the reason, such as ("sentence_axis", "attention='word'")."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can store them."""
        return {**dataclasses.asdict(self), "resolutions": list(self.resolutions)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Build from the fields of `to_dict`.

        Raises:
            ValueError: A field is unknown.
        """
        _check_fields(cls.__name__, fields, cls)
        return cls(**fields)


@dataclass(frozen=True)
class NarrowingConfig(ModelConfig):
    """Sizes of a cascade that narrows as it grows: each stage has half of the channels of the one before (StackGAN++).

    Raises:
        ValueError: `resolutions` are no image sizes, or `channels` cannot be halved from stage to stage.
    """

    channels: int = 64
    """Channels C of the first stage of the generator; each further stage has half of them."""
    residual_blocks: int = 2
    """Residual blocks of each refinement stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        owner, stages = type(self).__name__, len(self.resolutions)
        check_positive(owner, channels=self.channels)
        if self.channels % 2 ** (stages - 1):
            raise ValueError(
                f"{owner}: channels={self.channels} cannot be halved from stage to stage, of which there are {stages}; "
                f"use a multiple of {2 ** (stages - 1)}."
            )

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage of the generator."""
        return tuple(self.channels // 2**stage for stage in range(len(self.resolutions)))
