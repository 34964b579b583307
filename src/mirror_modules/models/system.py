"""What a text-to-image system is made of, and how its parts meet: token ids -> conditions -> images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules._checks import check_choice, check_tensors, shape_of
from mirror_modules._typing import TypedCall
from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.glam import GeneratedImages
from mirror_modules.models.config import ModelConfig
from mirror_modules.models.pretrained import CONFIG_FILE, load_weights, read_model_folder, save_model
from mirror_modules.models.registry import get_system
from mirror_modules.stem import Condition, ImageEncoder, TextEncoder, Vocabulary
from mirror_modules.stream import Captioner

# Children of every system that phase `glam` does not train.
FROZEN_PARTS = ("text_encoder", "captioner")


class System(TypedCall, nn.Module):
    """The parts of a system, what it defines of its own, and its files.

    The base of `TextToImage`, which adds captions as strings, seeds and pictures; see there for arguments and errors.
    """

    config_type: ClassVar[type[ModelConfig]] = ModelConfig
    config: ModelConfig

    only: Literal["images", "captions"] | None = None
    """What the model was built for; None for all."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        *,
        pretrained: bool = True,
        only: Literal["images", "captions"] | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if only is not None:
            check_choice(owner, "only", only, ("images", "captions"))
        if not isinstance(config, self.config_type):
            raise ValueError(f"{owner}: config must be a {self.config_type.__name__}, but it is {config!r}.")
        if not isinstance(vocabulary, Vocabulary):
            raise ValueError(
                f"{owner}: vocabulary must be a Vocabulary, but it is a {type(vocabulary).__name__}; Vocabulary.build "
                "makes one of captions."
            )
        self.config, self.vocabulary, self.only = config, vocabulary, only
        if only != "captions":
            self._build_generator(config)
        if only != "images" or config.samples_with_captioner:
            self._build_captioner(config, pretrained)

    def _build_generator(self, config: ModelConfig) -> None:
        """Text encoder, conditions and generator."""
        self.text_encoder = TextEncoder(
            len(self.vocabulary),
            embedding_dim=config.embedding_dim,
            feature_dim=config.word_dim,
            dropout=config.text_dropout,
        )
        self.build(config)

    def _build_captioner(self, config: ModelConfig, pretrained: bool) -> None:
        backbone = config.captioner_backbone.build(load=pretrained)
        if pretrained:
            recorded = config.captioner_backbone.recorded(backbone)
            self.config = dataclasses.replace(config, captioner_backbone=recorded)
        self.captioner = Captioner(
            ImageEncoder(backbone, config.word_dim) if config.captioner_projection else backbone,
            len(self.vocabulary),
            embedding_dim=config.captioner_embedding_dim,
            hidden_dim=config.captioner_hidden_dim,
            image_skip=config.captioner_image_skip,
        )

    def build(self, config: Any) -> None:
        """Build the parts that are this system's own, as attributes.

        Args:
            config: The configuration.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(config).")

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """Compute the conditions of the generator from the sentence.

        Args:
            sentence: Sentence features, (B, D).
            noise: Standard normal, (B, config.condition_noise_dim).

        Returns:
            A `Condition` for each condition that is drawn from a distribution, whose KL divergence is trained; a tensor
            (B, E) for one that is not.
        """
        raise NotImplementedError(f"{type(self).__name__} must define conditions(sentence, noise).")

    def images(
        self,
        noise: Tensor,
        samples: Sequence[Tensor],
        words: Tensor,
        word_mask: Tensor | None = None,
        location: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate images from noise and conditions.

        Args:
            noise: Standard normal, (B, config.noise_dim).
            samples: A sample of each of `conditions`.
            words: Word features, (B, L, D).
            word_mask: True for a real word, (B, L); None if all are.
            location: Where to place the subject, (B, ...), in systems that take it.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.
        """
        raise NotImplementedError(f"{type(self).__name__} must define images(noise, samples, words, ...).")

    def discriminators(self, phase: str = "glam") -> list[nn.Module]:
        """New discriminators, coarse to fine, one for each of `config.trained_resolutions(phase)`.

        Each has the methods of a `PairedDiscriminator`.

        Args:
            phase: Phase that trains the generator: one of `config.adversarial_phases`.
        """
        return [
            PairedDiscriminator(
                resolution,
                self.config.word_dim,
                channels=self.config.discriminator_channels,
                normalization=self.config.discriminator_normalization,
            )
            for resolution in self.config.trained_resolutions(phase)
        ]

    def discriminator_text(self, sentence: Tensor, conditions: Sequence[Condition | Tensor]) -> Tensor:
        """The features of the captions that discriminators read, (B, T): the sentence itself.

        The generator's loss has a gradient with respect to them, unless they are detached.

        Args:
            sentence: Sentence features, (B, D).
            conditions: The conditions of these sentences.
        """
        return sentence

    def locate(self, boxes: Tensor | None, points: Tensor | None, count: int) -> Tensor | None:
        """Where the subjects of a batch are, as `images` and the discriminators take it; None if they do not.

        Args:
            boxes: x, y, width and height of each as shares of the image, (B, 4), NaN where unknown; None if all are.
            points: x, y and visibility of the key points of each, (B, K, 3); None if the data have none.
            count: Number of images B.
        """
        return None

    def complete_location(self, location: Tensor | None, sentence: Tensor, noise: Tensor) -> Tensor | None:
        """What a user gives as location, with what is missing in it drawn from the sentence, in systems that do so.

        Args:
            location: Where to place the subject, (B, ...); None if it is not given.
            sentence: Sentence features, (B, D).
            noise: Standard normal, (B, config.condition_noise_dim).
        """
        return location

    def trained_in(self, phase: str) -> Self:
        """The system as one of its phases trains it: itself, or a view that shares its parts and draws fewer images.

        Args:
            phase: One of `config.adversarial_phases`.
        """
        return self

    def generator_parts(self) -> dict[str, nn.Module]:
        """The parts that generate, by name: all but text encoder and captioner."""
        return {name: part for name, part in self.named_children() if name not in FROZEN_PARTS}

    def _require(self, owner: str, *uses: str) -> None:
        """Check that the parts for "images" or "captions" were built."""
        if self.only is not None and uses != (self.only,):
            raise ValueError(
                f"{owner}: it needs the parts for {' and '.join(uses)}, but the model was loaded with "
                f"only={self.only!r}; leave `only` out."
            )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def forward(
        self,
        tokens: Tensor,
        word_mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        condition_noise: Tensor | None = None,
        location: Tensor | None = None,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate images from token ids.

        Args:
            tokens: Token ids, (B, L), as `Vocabulary.encode` returns them.
            word_mask: True for a real word, (B, L); None if all are.
            noise: Standard normal, (B, Z); sampled if None.
            condition_noise: Standard normal noise of the conditions, (B, config.condition_noise_dim); sampled if None.
            location: Where to place the subject, (B, ...), in systems that take it.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.
        """
        self._require(type(self).__name__, "images")
        # Not len(tokens), which would fix the batch size of an exported graph.
        self.check_location(type(self).__name__, location, tokens.shape[0])
        words, sentence = self.text_encoder(tokens, word_mask)

        def sample(features: int) -> Tensor:
            return torch.randn(len(tokens), features, device=words.device, dtype=words.dtype)

        condition_noise = sample(self.config.condition_noise_dim) if condition_noise is None else condition_noise
        conditions = self.conditions(sentence, condition_noise)
        noise = sample(self.config.noise_dim) if noise is None else noise
        location = self.complete_location(location, sentence, condition_noise)
        return self.images(noise, samples_of(conditions), words, word_mask, location, need_weights=need_weights)

    def check_location(self, owner: str, location: Tensor | None, count: int) -> None:
        """Require a location for each of `count` captions, in a system that takes it; None is always valid.

        Raises:
            ValueError: The system takes no location, or this one is invalid.
        """
        if location is None:
            return
        if not self.config.takes_location:
            raise ValueError(f"{owner}: location has no effect on this system; leave it out.")
        check_tensors(owner, location=location)
        if location.ndim < 2 or location.shape[0] != count:
            raise ValueError(
                f"{owner}: location must have a row for each caption, ({count}, ...), but it is {shape_of(location)}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, vocabulary.json and model.safetensors into a folder, which is created if missing.

        Raises:
            ValueError: The model was loaded with `only`.
            OSError: A file cannot be written.
        """
        self._require(f"{type(self).__name__}.save_pretrained", "images", "captions")
        save_model(self, self.config, self.vocabulary, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        only: Literal["images", "captions"] | None = None,
    ) -> Self:
        """Load a model that `save_pretrained` wrote; the result is in evaluation mode.

        `TextToImage.from_pretrained` opens the folder of any registered system, that of a subclass only its own.

        Args:
            folder: A folder with config.json, vocabulary.json and model.safetensors.
            device: Device of the weights.
            only: "images" reads and builds what `generate` needs, which is all parts but the captioner in most systems;
                "captions" what `describe` needs, the captioner. None loads all parts.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: The folder holds another system or one that is not registered, a file is damaged, or the weights
                do not fit the configuration or the vocabulary.
        """
        if only is not None:
            check_choice(f"{cls.__name__}.from_pretrained", "only", only, ("images", "captions"))
        saved = read_model_folder(folder)
        path = Path(folder) / CONFIG_FILE
        try:
            system = get_system(saved.system)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not issubclass(system, cls):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder} holds a model of the system {saved.system!r}; use "
                f"{system.__name__}.from_pretrained, or TextToImage.from_pretrained for any system."
            )
        try:
            # The weights of the backbone are in the folder, too.
            options: dict[str, Any] = {"pretrained": False} if only is None else {"pretrained": False, "only": only}
            model = system(system.config_type.from_dict(saved.config), saved.vocabulary, **options)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid model configuration: {error}") from error
        parts = None if only is None else {name.partition(".")[0] for name in model.state_dict()}
        load_weights(model, saved.weights, parts=parts)
        return model.to(device).eval()


def samples_of(conditions: Sequence[Condition | Tensor]) -> list[Tensor]:
    """The sample of each condition."""
    return [each.sample if isinstance(each, Condition) else each for each in conditions]


def means_of(conditions: Sequence[Condition | Tensor]) -> list[Tensor]:
    """The mean of each condition; one that is not drawn is its own mean."""
    return [each.mean if isinstance(each, Condition) else each for each in conditions]
