"""Text encoder and image encoder with a common feature space, as phases `stem` and `evaluator` train them."""

from __future__ import annotations

from torch import Tensor, nn

from mirror_modules._typing import TypedCall
from mirror_modules.models.config import BackboneConfig, ModelConfig
from mirror_modules.stem import ImageEncoder, ImageFeatures, TextEncoder, TextFeatures


class EncoderPair(TypedCall, nn.Module):
    """A text encoder and an image encoder whose features are close for matching pairs (DAMSM; MirrorGAN, Sec. 3.1).

    Args:
        config: Sizes; only those of the text encoder and `image_backbone` are used.
        vocabulary_size: Number of token ids.
        backbone: Config of another image backbone than `config.image_backbone`, or any Module as `ImageEncoder` takes
            it.
        pretrained: Load the weights that the config of the backbone names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: `config` is none, a size is not a whole number of at least 1, or the backbone is unsuitable.

    Examples:
        >>> import torch
        >>> from mirror_modules import MirrorGANConfig
        >>> from mirror_modules.models import EncoderPair
        >>> pair = EncoderPair(MirrorGANConfig(word_dim=16, image_backbone="conv"), vocabulary_size=11)
        >>> tokens = torch.tensor([[3, 4, 5], [6, 0, 0]])
        >>> image_features, text_features = pair(torch.zeros(2, 3, 64, 64), tokens, tokens != 0)
        >>> tuple(image_features.image.shape), tuple(text_features.sentence.shape)
        ((2, 16), (2, 16))
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        *,
        backbone: BackboneConfig | nn.Module | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise ValueError(
                f"EncoderPair: config must be that of a system, such as MirrorGANConfig(), not {config!r}."
            )
        self.text_encoder = TextEncoder(
            vocabulary_size,
            embedding_dim=config.embedding_dim,
            feature_dim=config.word_dim,
            dropout=config.text_dropout,
        )
        chosen = config.image_backbone if backbone is None else backbone
        if isinstance(chosen, BackboneConfig):
            chosen = chosen.build(load=pretrained)
        self.image_encoder = ImageEncoder(chosen, config.word_dim)

    def forward(self, images: Tensor, tokens: Tensor, word_mask: Tensor) -> tuple[ImageFeatures, TextFeatures]:
        """Encode a batch of images and captions.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            tokens: Token ids, (B, L).
            word_mask: True for a real word, (B, L), real words first.

        Returns:
            Image features (regions (B, R, D), image (B, D)) and text features (words (B, L, D), sentence (B, D)).

        Raises:
            ValueError: A caption has no real word, or a token lies outside the vocabulary.
        """
        return self.image_encoder(images), self.text_encoder(tokens, word_mask)
