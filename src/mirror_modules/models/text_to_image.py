"""What the user of a text-to-image system calls: captions and seeds -> images, images -> captions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules._checks import check_choice, check_positive
from mirror_modules._freezing import evaluating
from mirror_modules.glam import GeneratedImages
from mirror_modules.models.noise import sample_noise, seeds_of
from mirror_modules.models.pixels import OUTPUTS, from_model, to_model
from mirror_modules.models.system import System, samples_of
from mirror_modules.stream import append_end, redescription_loss

if TYPE_CHECKING:
    from PIL.Image import Image


class TextToImage(System):
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
            location: Where to place the subject, one per caption, in systems that take it.
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
        self.check_location(owner, location, len(listed))
        rows = [caption for caption in listed for _ in range(images_per_caption)]
        places = None if location is None else location.repeat_interleave(images_per_caption, dim=0)
        tokens, word_mask = append_end(*self.vocabulary.encode(rows, max_words=self.config.max_words))
        tokens, word_mask = tokens.to(self.device), word_mask.to(self.device)
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        first = seeds_of(owner, len(rows), seed, step=best_of)
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
        self.check_location(owner, location, len(captions))
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
            location: Where to place the subject of all images, (1, ...), in systems that take it.
            output: As in `generate`.
            resolution: As in `generate`.

        Returns:
            `steps` images, as `generate` returns them.

        Raises:
            ValueError: A caption has no word, an argument is out of range, the model was loaded without the parts for
                it, or the system has no conditions (PPGN).
        """
        owner = f"{type(self).__name__}.interpolate"
        self._require(owner, "images")
        check_positive(owner, steps=steps)
        if steps < 2:
            raise ValueError(f"{owner}: steps must be at least 2, the images of both captions, but it is {steps}.")
        stage = self._stage_of(owner, output, resolution)
        self.check_location(owner, location, 1)
        if self.config.samples_with_captioner:
            raise ValueError(
                f"{owner}: the system {self.config.system!r} samples each image for one caption with its captioner and "
                "has no condition between two; generate images of each caption instead."
            )
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
            location = None if location is None else location.to(noise).expand(steps, *location.shape[1:])
            sentences = torch.lerp(encoded.sentence[:1], encoded.sentence[1:], share[:, None])
            generated = self.images(
                noise.expand(steps, -1),
                [torch.lerp(sample[:1], sample[1:], share[:, None]) for sample in samples],
                torch.lerp(words[:1], words[1:], share[:, None, None]),
                location=self.complete_location(location, sentences, condition_noise.expand(steps, -1)),
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
        rows = sample_noise(owner, count, sum(sizes), seed, truncation)
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


def _as_list(owner: str, captions: Any) -> list[str]:
    listed = [captions] if isinstance(captions, str) else captions
    if not isinstance(listed, Sequence) or not all(isinstance(caption, str) for caption in listed):
        raise ValueError(f"{owner}: captions must be one string or a list of strings, but they are {captions!r}.")
    return list(listed)
