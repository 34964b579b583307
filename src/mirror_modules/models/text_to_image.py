"""What all text-to-image systems share: captions -> words, sentence -> conditions -> images, and back to captions."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules._checks import check_choice, check_number, check_positive
from mirror_modules._typing import TypedCall
from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.data.seeding import seeded
from mirror_modules.glam import GeneratedImages
from mirror_modules.models.config import ModelConfig
from mirror_modules.models.pixels import OUTPUTS, from_model, to_model
from mirror_modules.models.pretrained import CONFIG_FILE, load_weights, read_model_folder, save_model
from mirror_modules.stem import Condition, ImageEncoder, TextEncoder, Vocabulary
from mirror_modules.stream import Captioner, append_end, redescription_loss

if TYPE_CHECKING:
    from PIL.Image import Image

# Children of every system that phase `glam` does not train.
FROZEN_PARTS = ("text_encoder", "captioner")

System = TypeVar("System", bound="type[TextToImage]")
_SYSTEMS: dict[str, type[TextToImage]] = {}


def register_system(system: System) -> System:
    """Register a system by the name in its configuration, so that recipes, files and the command line know it.

    Use it as a decorator of the class.

    Args:
        system: The class, whose `config_type.system` is the name.

    Returns:
        The class itself.

    Raises:
        ValueError: The configuration has no name, or the name belongs to another system.

    Examples:
        >>> from dataclasses import dataclass
        >>> from mirror_modules.models import AttnGAN, AttnGANConfig, get_system, register_system
        >>> @dataclass(frozen=True)
        ... class TwinConfig(AttnGANConfig):
        ...     system = "twin"
        >>> @register_system
        ... class Twin(AttnGAN):
        ...     config_type = TwinConfig
        >>> get_system("twin").__name__
        'Twin'
    """
    name = system.config_type.system
    if not name:
        raise ValueError(f"register_system: {system.config_type.__name__}.system is empty; give the system a name.")
    # A class that is defined again, as in a notebook, replaces the earlier one.
    if name in _SYSTEMS and _SYSTEMS[name].__qualname__ != system.__qualname__:
        raise ValueError(
            f"register_system: {name!r} is the name of {_SYSTEMS[name].__name__}; give {system.__name__} another "
            f"one, in {system.config_type.__name__}.system."
        )
    _SYSTEMS[name] = system
    return system


def get_system(name: str) -> type[TextToImage]:
    """A registered system.

    Args:
        name: "mirrorgan", "attngan" or another name in config.json.

    Raises:
        ValueError: No system of this name is registered.

    Examples:
        >>> from mirror_modules.models import get_system
        >>> get_system("attngan").__name__
        'AttnGAN'
    """
    if name not in _SYSTEMS:
        close = get_close_matches(name, _SYSTEMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " Import the module that registers it."
        raise ValueError(f"unknown system {name!r}; there are {', '.join(_SYSTEMS)}.{hint}")
    return _SYSTEMS[name]


def build_model(config: ModelConfig, vocabulary: Vocabulary, *, pretrained: bool = True) -> TextToImage:
    """Build the system of a configuration.

    Args:
        config: Sizes and options; its type determines the system.
        vocabulary: See `TextToImage`.
        pretrained: See `TextToImage`.

    Raises:
        ValueError: The system is not registered, or as in `TextToImage`.
        FileNotFoundError: As in `TextToImage`.
        ImportError: As in `TextToImage`.

    Examples:
        >>> from mirror_modules import MirrorGANConfig, Vocabulary
        >>> from mirror_modules.models import build_model
        >>> config = MirrorGANConfig(channels=4, resolutions=(8,), captioner_backbone="conv")
        >>> type(build_model(config, Vocabulary.build(["a flower"]))).__name__
        'MirrorGAN'
    """
    return get_system(config.system)(config, vocabulary, pretrained=pretrained)


class TextToImage(TypedCall, nn.Module):
    """Text encoder, conditions, generator and captioner, with the vocabulary they share: the base of all systems.

        words, sentence = text_encoder(caption),    s = conditions(sentence, noise'),    I = images(noise, s, words)

    A system defines `build`, `conditions` and `images`; where it differs from MirrorGAN, also `discriminators`,
    `discriminator_text` and `locate`. Generation, captioning, files, training, evaluation and the command line follow
    from these. Phase `glam` trains all parts but the text encoder and the captioner, which phases `stem` and `stream`
    have trained.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.
        only: "images" leaves out the captioner, unless images are generated with it (`config.samples_with_captioner`);
            "captions" leaves out all parts but the captioner. None builds all parts.

    Raises:
        ValueError: The config holds sizes that do not fit together, an unknown option, or is that of another system; or
            the weights of the captioner's backbone do not fit it.
        FileNotFoundError: The file of these weights does not exist.
        ImportError: The package of the backbone or of its weights is not installed.

    Examples:
        A generator that reads the sentence alone, with a single condition:

        >>> from dataclasses import dataclass
        >>> from mirror_modules import DeconvolutionGenerator, SentenceProjection, Vocabulary
        >>> from mirror_modules.models import ModelConfig, TextToImage, register_system
        >>> @dataclass(frozen=True)
        ... class MyConfig(ModelConfig):
        ...     system = "mine"
        ...     attends = False
        >>> @register_system
        ... class MySystem(TextToImage):
        ...     config_type = MyConfig
        ...     def build(self, config):
        ...         self.conditioning = SentenceProjection(config.word_dim, config.condition_dim)
        ...         sizes = {"channels": config.channels, "resolution": config.resolutions[0]}
        ...         self.generator = DeconvolutionGenerator(config.noise_dim, config.condition_dim, **sizes)
        ...     def conditions(self, sentence, noise):
        ...         return [self.conditioning(sentence)]
        ...     def images(self, noise, samples, words, word_mask=None, location=None, *, need_weights=False):
        ...         return self.generator(noise, samples[0])
        >>> config = MyConfig(channels=4, resolutions=(16,), captioner_backbone="conv")
        >>> model = MySystem(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> model.generate("a red flower", seed=0).shape
        torch.Size([1, 3, 16, 16])
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
            location: Where the subject shall be, (B, ...), in systems that take it.
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
            location: Where the subject shall be, (B, ...), in systems that take it.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.
        """
        self._check_location(location)
        words, sentence = self.text_encoder(tokens, word_mask)

        def sample(features: int) -> Tensor:
            return torch.randn(len(tokens), features, device=words.device, dtype=words.dtype)

        condition_noise = sample(self.config.condition_noise_dim) if condition_noise is None else condition_noise
        conditions = self.conditions(sentence, condition_noise)
        noise = sample(self.config.noise_dim) if noise is None else noise
        return self.images(noise, samples_of(conditions), words, word_mask, location, need_weights=need_weights)

    def _check_location(self, location: Tensor | None) -> None:
        if location is not None and not self.config.takes_location:
            raise ValueError(f"{type(self).__name__}: location has no effect on this system; leave it out.")

    @overload
    def generate(
        self,
        captions: str | Sequence[str],
        *,
        images_per_caption: int = ...,
        seed: int | Sequence[int] | None = ...,
        truncation: float | None = ...,
        location: Tensor | None = ...,
        best_of: int = ...,
        output: Literal["pt"] = ...,
        resolution: int | None = ...,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        captions: str | Sequence[str],
        *,
        images_per_caption: int = ...,
        seed: int | Sequence[int] | None = ...,
        truncation: float | None = ...,
        location: Tensor | None = ...,
        best_of: int = ...,
        output: Literal["np"],
        resolution: int | None = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def generate(
        self,
        captions: str | Sequence[str],
        *,
        images_per_caption: int = ...,
        seed: int | Sequence[int] | None = ...,
        truncation: float | None = ...,
        location: Tensor | None = ...,
        best_of: int = ...,
        output: Literal["pil"],
        resolution: int | None = ...,
    ) -> list[Image]: ...

    def generate(
        self,
        captions: str | Sequence[str],
        *,
        images_per_caption: int = 1,
        seed: int | Sequence[int] | None = None,
        truncation: float | None = None,
        location: Tensor | None = None,
        best_of: int = 1,
        output: Literal["pt", "np", "pil"] = "pt",
        resolution: int | None = None,
    ) -> Tensor | NDArray[np.float32] | list[Image]:
        """Generate images from captions, in evaluation mode.

        Args:
            captions: One string or several; words outside the vocabulary are encoded as unknown, with a warning that
                names them.
            images_per_caption: Number of images of each caption, adjacent in the result.
            seed: Makes the images reproducible. With a whole number s, image i has the seed s + i; a sequence gives
                each image its seed. An image depends only on its caption and its seed. None samples new noise.
            truncation: Draw the noise from a standard normal truncated to [-truncation, truncation]: smaller values
                give more typical and less diverse images. None does not truncate.
            location: Where the subject shall be, one per caption, in systems that take it.
            best_of: Candidates for each image, of which the one is returned from which the model's captioner most
                likely recovers the caption. The seeds are then those of `best_seeds`.
            output: "pt" for a tensor, "np" for an array, "pil" for a list of Pillow images.
            resolution: Height and width of the images, one of `config.resolutions`; None takes the finest.

        Returns:
            "pt": floats in [-1, 1], (N, 3, H, W), on the model's device. "np": floats in [0, 1], (N, H, W, 3).
            "pil": N RGB images.

        Raises:
            ValueError: A caption has no word, an argument is out of range, or the model was loaded without the parts
                for it.
        """
        stage = self._stage_of(f"{type(self).__name__}.generate", output, resolution)
        check_positive(f"{type(self).__name__}.generate", best_of=best_of)
        if best_of > 1:
            seed = self.best_seeds(
                captions,
                best_of,
                images_per_caption=images_per_caption,
                seed=seed,
                truncation=truncation,
                location=location,
            )
        generated = self.generate_stages(
            captions, images_per_caption=images_per_caption, seed=seed, truncation=truncation, location=location
        )
        return from_model(generated.images[stage], output)

    @torch.no_grad()
    def best_seeds(
        self,
        captions: str | Sequence[str],
        best_of: int,
        *,
        images_per_caption: int = 1,
        seed: int | Sequence[int] | None = None,
        truncation: float | None = None,
        location: Tensor | None = None,
    ) -> list[int]:
        """Find the seeds of the images from which the captioner is most likely to recover their captions.

        Each image is chosen among `best_of` candidates by the likelihood of its caption, end token included. With a
        whole number s as seed, those of image i have the seeds s + i n, ..., s + i n + n - 1, where n is `best_of`.

        Args:
            captions: As in `generate`.
            best_of: Candidates for each image.
            images_per_caption: As in `generate`.
            seed: A whole number s, or the seed of the first candidate of each image. None draws s.
            truncation: As in `generate`.
            location: As in `generate`.

        Returns:
            A seed for each image, for `generate`.

        Raises:
            ValueError: As in `generate`.
        """
        owner = f"{type(self).__name__}.best_seeds"
        self._require(owner, "images", "captions")
        check_positive(owner, best_of=best_of, images_per_caption=images_per_caption)
        listed = _as_list(owner, captions)
        rows = [caption for caption in listed for _ in range(images_per_caption)]
        places = None if location is None else location.repeat_interleave(images_per_caption, dim=0)
        tokens, word_mask = append_end(*self.vocabulary.encode(rows, max_words=self.config.max_words))
        tokens, word_mask = tokens.to(self.device), word_mask.to(self.device)
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        if isinstance(seed, Sequence):
            first = _seeds_of(owner, len(rows), seed)
        else:
            first = _seeds_of(owner, len(rows) * best_of, seed)[::best_of]
        best = torch.full((len(rows),), -torch.inf, device=self.device)
        chosen = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        for candidate in range(best_of):
            seeds = [each + candidate for each in first]
            with warnings.catch_warnings():
                # Unknown words were named above.
                warnings.filterwarnings("ignore", message="unknown words")
                images = self.generate(rows, seed=seeds, truncation=truncation, location=places)
            with evaluating(self):
                likelihood = -redescription_loss(self.captioner(images, tokens), tokens, word_mask, reduction="none")
            is_better = likelihood > best
            best, chosen = likelihood.where(is_better, best), chosen.where(~is_better, candidate)
        return [each + candidate for each, candidate in zip(first, chosen.tolist())]

    @torch.no_grad()
    def generate_stages(
        self,
        captions: str | Sequence[str],
        *,
        images_per_caption: int = 1,
        seed: int | Sequence[int] | None = None,
        truncation: float | None = None,
        location: Tensor | None = None,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate images from captions at every resolution, in evaluation mode.

        Args:
            captions: As in `generate`.
            images_per_caption: As in `generate`.
            seed: As in `generate`.
            truncation: As in `generate`.
            location: As in `generate`.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.

        Raises:
            ValueError: A caption has no word, an argument is out of range, or the model was loaded without the parts
                for it.
        """
        owner = f"{type(self).__name__}.generate"
        self._require(owner, "images")
        check_positive(owner, images_per_caption=images_per_caption)
        captions = _as_list(owner, captions)
        tokens, word_mask = self.vocabulary.encode(captions, max_words=self.config.max_words)
        noise, condition_noise = self._sample_noise(owner, len(tokens) * images_per_caption, seed, truncation)
        if location is not None:
            location = location.repeat_interleave(images_per_caption, dim=0).to(noise)
        with evaluating(self):
            return self(
                tokens.repeat_interleave(images_per_caption, dim=0).to(self.device),
                word_mask.repeat_interleave(images_per_caption, dim=0).to(self.device),
                noise=noise,
                condition_noise=condition_noise,
                location=location,
                need_weights=need_weights,
            )

    @overload
    def interpolate(
        self,
        first: str,
        last: str,
        *,
        steps: int = ...,
        seed: int | None = ...,
        truncation: float | None = ...,
        location: Tensor | None = ...,
        output: Literal["pt"] = ...,
        resolution: int | None = ...,
    ) -> Tensor: ...

    @overload
    def interpolate(
        self,
        first: str,
        last: str,
        *,
        steps: int = ...,
        seed: int | None = ...,
        truncation: float | None = ...,
        location: Tensor | None = ...,
        output: Literal["np"],
        resolution: int | None = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def interpolate(
        self,
        first: str,
        last: str,
        *,
        steps: int = ...,
        seed: int | None = ...,
        truncation: float | None = ...,
        location: Tensor | None = ...,
        output: Literal["pil"],
        resolution: int | None = ...,
    ) -> list[Image]: ...

    @torch.no_grad()
    def interpolate(
        self,
        first: str,
        last: str,
        *,
        steps: int = 8,
        seed: int | None = None,
        truncation: float | None = None,
        location: Tensor | None = None,
        output: Literal["pt", "np", "pil"] = "pt",
        resolution: int | None = None,
    ) -> Tensor | NDArray[np.float32] | list[Image]:
        """Generate images on the way from one caption to another, with the same noise, in evaluation mode.

            s_t = (1 - t) s_first + t s_last,    w_t = (1 - t) w_first + t w_last,    t = 0, ..., 1

        for the conditions s, of which there may be several, and the words w. Each word of a caption is repeated until
        both captions have the same number of words, the least common multiple; even repetition does not change the
        attention.

        Args:
            first: The caption of the first image, which equals that of `generate`.
            last: The caption of the last image, which equals that of `generate`.
            steps: Number of images, at least 2.
            seed: Seed of the noise of all images; None samples new noise.
            truncation: As in `generate`.
            location: Where the subject of all images shall be, (1, ...), in systems that take it.
            output: As in `generate`.
            resolution: As in `generate`.

        Returns:
            `steps` images, as `generate` returns them.

        Raises:
            ValueError: A caption has no word, an argument is out of range, or the model was loaded without the parts
                for it.
        """
        owner = f"{type(self).__name__}.interpolate"
        self._require(owner, "images")
        check_positive(owner, steps=steps)
        if steps < 2:
            raise ValueError(f"{owner}: steps must be at least 2, the images of both captions, but it is {steps}.")
        stage = self._stage_of(owner, output, resolution)
        self._check_location(location)
        tokens, word_mask = self.vocabulary.encode([first, last], max_words=self.config.max_words)
        noise, condition_noise = self._sample_noise(owner, 1, None if seed is None else [seed], truncation)
        with evaluating(self):
            encoded = self.text_encoder(tokens.to(self.device), word_mask.to(self.device))
            samples = samples_of(self.conditions(encoded.sentence, condition_noise.expand(2, -1)))
            lengths = word_mask.sum(dim=1).tolist()
            common = math.lcm(*lengths)
            words = torch.stack(
                [row[:length].repeat_interleave(common // length, dim=0) for row, length in zip(encoded.words, lengths)]
            )
            share = torch.linspace(0, 1, steps, device=words.device, dtype=words.dtype)
            generated = self.images(
                noise.expand(steps, -1),
                [torch.lerp(sample[:1], sample[1:], share[:, None]) for sample in samples],
                torch.lerp(words[:1], words[1:], share[:, None, None]),
                location=None if location is None else location.to(noise).expand(steps, *location.shape[1:]),
            )
        return from_model(generated.images[stage], output)

    def _stage_of(self, owner: str, output: str, resolution: int | None) -> int:
        """The stage that generates a resolution; also checks `output`, before the images are generated."""
        check_choice(owner, "output", output, OUTPUTS)
        resolutions = self.config.resolutions
        if resolution is not None and resolution not in resolutions:
            raise ValueError(
                f"{owner}: resolution must be one of {', '.join(map(str, resolutions))}, the stages of this model, but "
                f"it is {resolution!r}."
            )
        return -1 if resolution is None else resolutions.index(resolution)

    def _sample_noise(
        self, owner: str, count: int, seed: int | Sequence[int] | None, truncation: float | None
    ) -> tuple[Tensor, Tensor]:
        sizes = [self.config.noise_dim, self.config.condition_noise_dim]
        if seed is None:
            fresh = torch.Generator()
            fresh.seed()
            rows = torch.randn(count, sum(sizes), generator=fresh)
        else:
            seeds = _seeds_of(owner, count, seed)
            rows = torch.stack([torch.randn(sum(sizes), generator=seeded(each)) for each in seeds])
        if truncation is not None:
            rows = _truncated(owner, rows, truncation)
        noise, condition_noise = rows.to(self.text_encoder.embedding.weight).split(sizes, dim=1)
        return noise, condition_noise

    @torch.no_grad()
    def describe(
        self,
        images: Tensor | NDArray[Any] | Image | str | Path | Sequence[Image | str | Path],
        *,
        beam_width: int = 3,
    ) -> list[str]:
        """Caption images, in evaluation mode.

        Args:
            images: Floats in [-1, 1], (B, 3, H, W), or bytes, (B, 3, H, W) or (B, H, W, 3); an array of floats in
                [0, 1] or of bytes, (B, H, W, 3) or (H, W, 3); or Pillow images or paths of image files, one or several.
                Of Pillow images and files, the center square is captioned, at the model's finest resolution.
            beam_width: Number of beams; 1 is greedy decoding.

        Returns:
            One caption per image.

        Raises:
            ValueError: `images` are none of the above or out of range, a file cannot be read as an image, or
                `beam_width` is not positive, or the model was loaded with only="images".
        """
        owner = f"{type(self).__name__}.describe"
        self._require(owner, "captions")
        pixels = to_model(owner, images, self.config.resolutions[-1])
        with evaluating(self):
            tokens = self.captioner.describe(
                pixels.to(self.device, self.captioner.output.weight.dtype),
                beam_width=beam_width,
                max_words=self.config.max_words + 1,
            )
        return self.vocabulary.decode(tokens)

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
        load_weights(model, saved.weights, parts=None if only is None else tuple(dict(model.named_children())))
        return model.to(device).eval()


def samples_of(conditions: Sequence[Condition | Tensor]) -> list[Tensor]:
    """The sample of each condition."""
    return [each.sample if isinstance(each, Condition) else each for each in conditions]


def means_of(conditions: Sequence[Condition | Tensor]) -> list[Tensor]:
    """The mean of each condition; one that is not drawn is its own mean."""
    return [each.mean if isinstance(each, Condition) else each for each in conditions]


def _as_list(owner: str, captions: Any) -> list[str]:
    listed = [captions] if isinstance(captions, str) else captions
    if not isinstance(listed, Sequence) or not all(isinstance(caption, str) for caption in listed):
        raise ValueError(f"{owner}: captions must be one string or a list of strings, but they are {captions!r}.")
    return list(listed)


def _seeds_of(owner: str, count: int, seed: int | Sequence[int]) -> list[int]:
    """The seed of each image."""
    if hasattr(seed, "__index__"):
        first = _check_seed(owner, seed)
        return [first + i for i in range(count)]
    if isinstance(seed, str) or not hasattr(seed, "__len__") or len(seed) != count:
        raise ValueError(
            f"{owner}: seed must be a whole number from 0 to 2**63 - 1, or one for each of the {count} images, but it "
            f"is {seed!r}."
        )
    return [_check_seed(owner, each) for each in seed]


def _check_seed(owner: str, seed: Any) -> int:
    """The seed as an int, from a whole number of any type."""
    if not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < 2**63:
        raise ValueError(f"{owner}: seed must be a whole number from 0 to 2**63 - 1, but it is {seed!r}.")
    return operator.index(seed)


def _truncated(owner: str, normal: Tensor, bound: float) -> Tensor:
    """Map standard normal values to a standard normal truncated to [-bound, bound], by their quantiles.

    The map is monotonic and tends to the identity for large bounds, so that a seed keeps its image.
    """
    check_number(owner, truncation=bound)
    if bound <= 0:
        raise ValueError(f"{owner}: truncation must be above 0, but it is {bound!r}.")
    low = torch.special.ndtr(torch.tensor(-float(bound), dtype=torch.float64))
    quantiles = low + torch.special.ndtr(normal.double()) * (1 - 2 * low)
    return torch.special.ndtri(quantiles).clamp(-bound, bound).to(normal.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of each submodule on exit, so that frozen ones stay frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
