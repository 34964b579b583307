"""The reference model: text in, image out, text back (MirrorGAN, Fig. 2)."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mirror_modules._checks import check_choice, check_number, check_positive
from mirror_modules._typing import TypedCall
from mirror_modules.data.seeding import seeded
from mirror_modules.glam import CascadedGenerator, GeneratedImages, GlobalLocalAttention
from mirror_modules.glam.generator import AttentionFactory
from mirror_modules.models.config import MirrorGANConfig
from mirror_modules.models.pixels import OUTPUTS, from_model, to_model
from mirror_modules.models.pretrained import CONFIG_FILE, load_weights, read_model_folder, save_model
from mirror_modules.stem import ConditioningAugmentation, ImageEncoder, TextEncoder, Vocabulary
from mirror_modules.stream import Captioner, append_end, redescription_loss

if TYPE_CHECKING:
    from PIL.Image import Image


class MirrorGAN(TypedCall, nn.Module):
    """Text encoder, conditioning augmentation, cascaded generator and captioner, with the vocabulary they share.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together, or an unknown option; or the weights of the
            captioner's backbone do not fit it.
        FileNotFoundError: The file of these weights does not exist.
        ImportError: The package of the backbone or of its weights is not installed.

    Examples:
        >>> from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
        >>> config = MirrorGANConfig(channels=4, resolutions=(8, 16), captioner_backbone="conv")
        >>> model = MirrorGAN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> images = model.generate("a red flower", images_per_caption=2, seed=0)
        >>> images.shape, len(model.describe(images))
        (torch.Size([2, 3, 16, 16]), 2)
        >>> model.generate("a red flower", output="pil")[0].size
        (16, 16)
    """

    def __init__(self, config: MirrorGANConfig, vocabulary: Vocabulary, *, pretrained: bool = True) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.text_encoder = TextEncoder(
            len(vocabulary),
            embedding_dim=config.embedding_dim,
            feature_dim=config.word_dim,
            dropout=config.text_dropout,
        )
        self.conditioning = ConditioningAugmentation(config.word_dim, config.condition_dim)
        self.generator = CascadedGenerator(
            config.noise_dim,
            config.condition_dim,
            config.word_dim,
            channels=config.channels,
            resolutions=config.resolutions,
            residual_blocks=config.residual_blocks,
            attention=_attention(config),
        )
        backbone = config.captioner_backbone.build(load=pretrained)
        if pretrained:
            recorded = config.captioner_backbone.recorded(backbone)
            self.config = dataclasses.replace(config, captioner_backbone=recorded)
        self.captioner = Captioner(
            ImageEncoder(backbone, config.word_dim) if config.captioner_projection else backbone,
            len(vocabulary),
            embedding_dim=config.captioner_embedding_dim,
            hidden_dim=config.captioner_hidden_dim,
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text_encoder.embedding.weight.device

    def forward(
        self,
        tokens: Tensor,
        word_mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        condition_noise: Tensor | None = None,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate images from token ids.

        Args:
            tokens: Token ids, (B, L), as `Vocabulary.encode` returns them.
            word_mask: True for a real word, (B, L); None if all are.
            noise: Standard normal, (B, Z); sampled if None.
            condition_noise: Standard normal noise of the conditioning augmentation, (B, E); sampled if None.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.
        """
        words, sentence = self.text_encoder(tokens, word_mask)
        condition = self.conditioning(sentence, noise=condition_noise)
        if noise is None:
            noise = torch.randn(len(tokens), self.config.noise_dim, device=words.device, dtype=words.dtype)
        return self.generator(noise, condition.sample, words, word_mask, need_weights=need_weights)

    @overload
    def generate(
        self,
        captions: str | Sequence[str],
        *,
        images_per_caption: int = ...,
        seed: int | Sequence[int] | None = ...,
        truncation: float | None = ...,
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
            best_of: Candidates for each image, of which the one is returned from which the model's captioner most
                likely recovers the caption. The seeds are then those of `best_seeds`.
            output: "pt" for a tensor, "np" for an array, "pil" for a list of Pillow images.
            resolution: Height and width of the images, one of `config.resolutions`; None takes the finest.

        Returns:
            "pt": floats in [-1, 1], (N, 3, H, W), on the model's device. "np": floats in [0, 1], (N, H, W, 3).
            "pil": N RGB images.

        Raises:
            ValueError: A caption has no word, or an argument is out of range.
        """
        stage = self._stage_of("MirrorGAN.generate", output, resolution)
        check_positive("MirrorGAN.generate", best_of=best_of)
        if best_of > 1:
            seed = self.best_seeds(
                captions, best_of, images_per_caption=images_per_caption, seed=seed, truncation=truncation
            )
        generated = self.generate_stages(
            captions, images_per_caption=images_per_caption, seed=seed, truncation=truncation
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

        Returns:
            A seed for each image, for `generate`.

        Raises:
            ValueError: As in `generate`.
        """
        owner = "MirrorGAN.best_seeds"
        check_positive(owner, best_of=best_of, images_per_caption=images_per_caption)
        listed = _as_list(owner, captions)
        rows = [caption for caption in listed for _ in range(images_per_caption)]
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
                images = self.generate(rows, seed=seeds, truncation=truncation)
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
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Generate images from captions at every resolution, in evaluation mode.

        Args:
            captions: As in `generate`.
            images_per_caption: As in `generate`.
            seed: As in `generate`.
            truncation: As in `generate`.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.

        Raises:
            ValueError: A caption has no word, or an argument is out of range.
        """
        owner = "MirrorGAN.generate"
        check_positive(owner, images_per_caption=images_per_caption)
        captions = _as_list(owner, captions)
        tokens, word_mask = self.vocabulary.encode(captions, max_words=self.config.max_words)
        noise, condition_noise = self._sample_noise(owner, len(tokens) * images_per_caption, seed, truncation)
        with evaluating(self):
            return self(
                tokens.repeat_interleave(images_per_caption, dim=0).to(self.device),
                word_mask.repeat_interleave(images_per_caption, dim=0).to(self.device),
                noise=noise,
                condition_noise=condition_noise,
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
        output: Literal["pt", "np", "pil"] = "pt",
        resolution: int | None = None,
    ) -> Tensor | NDArray[np.float32] | list[Image]:
        """Generate images on the way from one caption to another, with the same noise, in evaluation mode.

            s_t = (1 - t) s_first + t s_last,    w_t = (1 - t) w_first + t w_last,    t = 0, ..., 1

        for the augmented conditions s and the words w. Each word of a caption is repeated until both captions have the
        same number of words, the least common multiple; even repetition does not change the attention.

        Args:
            first: The caption of the first image, which equals that of `generate`.
            last: The caption of the last image, which equals that of `generate`.
            steps: Number of images, at least 2.
            seed: Seed of the noise of all images; None samples new noise.
            truncation: As in `generate`.
            output: As in `generate`.
            resolution: As in `generate`.

        Returns:
            `steps` images, as `generate` returns them.

        Raises:
            ValueError: A caption has no word, or an argument is out of range.
        """
        owner = "MirrorGAN.interpolate"
        check_positive(owner, steps=steps)
        if steps < 2:
            raise ValueError(f"{owner}: steps must be at least 2, the images of both captions, but it is {steps}.")
        stage = self._stage_of(owner, output, resolution)
        tokens, word_mask = self.vocabulary.encode([first, last], max_words=self.config.max_words)
        noise, condition_noise = self._sample_noise(owner, 1, None if seed is None else [seed], truncation)
        with evaluating(self):
            encoded = self.text_encoder(tokens.to(self.device), word_mask.to(self.device))
            condition = self.conditioning(encoded.sentence, noise=condition_noise.expand(2, -1)).sample
            lengths = word_mask.sum(dim=1).tolist()
            common = math.lcm(*lengths)
            words = torch.stack(
                [row[:length].repeat_interleave(common // length, dim=0) for row, length in zip(encoded.words, lengths)]
            )
            share = torch.linspace(0, 1, steps, device=words.device, dtype=words.dtype)
            generated = self.generator(
                noise.expand(steps, -1),
                torch.lerp(condition[:1], condition[1:], share[:, None]),
                torch.lerp(words[:1], words[1:], share[:, None, None]),
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
        sizes = [self.config.noise_dim, self.config.condition_dim]
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
                `beam_width` is not positive.
        """
        pixels = to_model("MirrorGAN.describe", images, self.config.resolutions[-1])
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
            OSError: A file cannot be written.
        """
        save_model(self, self.config, self.vocabulary, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> MirrorGAN:
        """Load a model that `save_pretrained` wrote; the result is in evaluation mode.

        Args:
            folder: A folder with config.json, vocabulary.json and model.safetensors.
            device: Device of the weights.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: A file is damaged, or the weights do not fit the configuration or the vocabulary.
        """
        saved = read_model_folder(folder)
        try:
            # The weights of the backbone are in the folder, too.
            model = cls(saved.config, saved.vocabulary, pretrained=False)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / CONFIG_FILE} is not a valid model configuration: {error}") from error
        load_weights(model, saved.weights)
        return model.to(device).eval()


def _attention(config: MirrorGANConfig) -> Literal["word", "none"] | AttentionFactory:
    """The `attention` argument of `CascadedGenerator`; the options of the config apply to "global-local" only."""
    if config.attention != "global-local":
        return config.attention
    return partial(
        GlobalLocalAttention,
        sentence_bias=config.sentence_bias,
        score_projection=config.score_projection,
        sentence_axis=config.sentence_axis,
    )


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
