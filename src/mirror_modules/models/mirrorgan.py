"""The reference model: text in, image out, text back (MirrorGAN, Fig. 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mirror_modules.glam import CascadedGenerator, GeneratedImages
from mirror_modules.models.config import MirrorGANConfig
from mirror_modules.stem import ConditioningAugmentation, ImageEncoder, TextEncoder, Vocabulary
from mirror_modules.stem.image_encoder import build_backbone
from mirror_modules.stream import Captioner


class MirrorGAN(nn.Module):
    """Text encoder, conditioning augmentation, cascaded generator and captioner, with the vocabulary they share.

    Args:
        config: Sizes and choices.
        vocabulary: What the text encoder reads and the captioner writes.
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
            attention=config.attention,
            sentence_bias=config.sentence_bias,
            score_projection=config.score_projection,
            sentence_axis=config.sentence_axis,
        )
        eye = build_backbone(config.captioner_backbone)
        self.captioner = Captioner(
            ImageEncoder(eye, config.word_dim) if config.captioner_projection else eye,
            len(vocabulary),
            embedding_dim=config.captioner_embedding_dim,
            hidden_dim=config.captioner_hidden_dim,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
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
        """Generate from token ids.

        Args:
            tokens: (B, L), as `Vocabulary.encode` gives them.
            word_mask: True for a real word, (B, L); None if all are.
            noise: Standard normal, (B, Z); None draws anew.
            condition_noise: Draw of the conditioning augmentation, (B, E); None draws anew.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if asked for.
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
        """Draw one image per caption, in evaluation mode.

        Args:
            captions: Strings; words that the vocabulary lacks are read as unknown, with a warning that names them.
            seed: Makes the images repeatable: image i depends on its caption, on the seed and on i. None draws anew.
            need_weights: Also return the attention maps.

        Returns:
            Images in [-1, 1], coarse to fine, and the attention maps if asked for.

        Raises:
            ValueError: A caption holds no word, or `seed` is out of range.
        """
        tokens, word_mask = self.vocabulary.encode(captions, max_words=self.config.max_words)
        noise, condition_noise = self._draw_noise(len(tokens), seed)
        with evaluating(self):
            return self(
                tokens.to(self.device),
                word_mask.to(self.device),
                noise=noise,
                condition_noise=condition_noise,
                need_weights=need_weights,
            )

    def _draw_noise(self, count: int, seed: int | None) -> tuple[Tensor, Tensor]:
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"MirrorGAN.generate: seed must be from 0 to 2**63 - 1, but it is {seed}.")
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        # Row by row: one large draw has other numbers for its first rows than a small one.
        sizes = [self.config.noise_dim, self.config.condition_dim]
        rows = [torch.randn(sum(sizes), generator=generator) for _ in range(count)]
        noise, condition_noise = torch.stack(rows).to(self.text_encoder.embedding.weight).split(sizes, dim=1)
        return noise, condition_noise

    @torch.no_grad()
    def describe(self, images: Tensor, *, beam_width: int = 3) -> list[str]:
        """Read captions off images, in evaluation mode.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            beam_width: How many captions are followed at a time; 1 is greedy.

        Returns:
            One caption per image.
        """
        with evaluating(self):
            tokens = self.captioner.describe(
                images.to(self.device), beam_width=beam_width, max_words=self.config.max_words + 1
            )
        return self.vocabulary.decode(tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, vocabulary.json and model.safetensors into a folder, made if need be."""
        from mirror_modules.models.pretrained import save_model

        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> MirrorGAN:
        """Read a model that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: The folder, or one of its files, is missing.
            ValueError: A file is damaged, or the weights do not fit the configuration or the vocabulary.
        """
        from mirror_modules.models.pretrained import load_model

        return load_model(folder).to(device).eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each part has its own mode again, so that a frozen one stays frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
