"""The reference model: text in, image out, text back (MirrorGAN, Fig. 2)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mirror_modules.glam import CascadedGenerator, GeneratedImages, GlobalLocalAttention
from mirror_modules.glam.generator import AttentionFactory
from mirror_modules.models.config import MirrorGANConfig
from mirror_modules.models.pretrained import CONFIG_FILE, load_weights, read_model_folder, save_model
from mirror_modules.stem import ConditioningAugmentation, ImageEncoder, TextEncoder, Vocabulary
from mirror_modules.stem.image_encoder import build_backbone
from mirror_modules.stream import Captioner


class MirrorGAN(nn.Module):
    """Text encoder, conditioning augmentation, cascaded generator and captioner, with the vocabulary they share.

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.

    Raises:
        ValueError: The config holds sizes that do not fit together, or an unknown option.

    Examples:
        >>> from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
        >>> config = MirrorGANConfig(channels=4, resolutions=(8, 16), captioner_backbone="conv")
        >>> model = MirrorGAN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> generated = model.generate(["a red flower"], seed=0)
        >>> [tuple(images.shape) for images in generated.images]
        [(1, 3, 8, 8), (1, 3, 16, 16)]
        >>> len(model.describe(generated.images[-1]))
        1
    """

    def __init__(self, config: MirrorGANConfig, vocabulary: Vocabulary) -> None:
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
        backbone = build_backbone(config.captioner_backbone)
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

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], *, seed: int | None = None, need_weights: bool = False
    ) -> GeneratedImages:
        """Generate one image per caption, in evaluation mode.

        Args:
            captions: Strings; words outside the vocabulary are encoded as unknown, with a warning that names them.
            seed: Makes the images reproducible: image i depends only on its caption, the seed and i. None samples new
                noise.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if requested.

        Raises:
            ValueError: A caption has no word, or `seed` is out of range.
        """
        tokens, word_mask = self.vocabulary.encode(captions, max_words=self.config.max_words)
        noise, condition_noise = self._sample_noise(len(tokens), seed)
        with evaluating(self):
            return self(
                tokens.to(self.device),
                word_mask.to(self.device),
                noise=noise,
                condition_noise=condition_noise,
                need_weights=need_weights,
            )

    def _sample_noise(self, count: int, seed: int | None) -> tuple[Tensor, Tensor]:
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(_check_seed(seed))
        # Row by row: in a single call, the first rows would depend on the number of rows, and images on their batch.
        sizes = [self.config.noise_dim, self.config.condition_dim]
        rows = [torch.randn(sum(sizes), generator=generator) for _ in range(count)]
        noise, condition_noise = torch.stack(rows).to(self.text_encoder.embedding.weight).split(sizes, dim=1)
        return noise, condition_noise

    @torch.no_grad()
    def describe(self, images: Tensor, *, beam_width: int = 3) -> list[str]:
        """Caption images, in evaluation mode.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            beam_width: Number of beams; 1 is greedy decoding.

        Returns:
            One caption per image.

        Raises:
            ValueError: `images` are not (B, 3, H, W), or `beam_width` is not positive.
        """
        with evaluating(self):
            dtype = self.captioner.output.weight.dtype if images.is_floating_point() else None
            tokens = self.captioner.describe(
                images.to(self.device, dtype), beam_width=beam_width, max_words=self.config.max_words + 1
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
            model = cls(saved.config, saved.vocabulary)
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


def _check_seed(seed: int) -> int:
    """The seed as an int, from a whole number of any type."""
    if not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < 2**63:
        raise ValueError(f"MirrorGAN.generate: seed must be a whole number from 0 to 2**63 - 1, but it is {seed!r}.")
    return operator.index(seed)


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
