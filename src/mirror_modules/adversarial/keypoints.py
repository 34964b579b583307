"""The discriminator of key points: do they belong to this sentence? (GAWWN, Sec. 4.3)"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_features, check_positive, check_precision, check_tensors, shape_of
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules._typing import TypedCall
from mirror_modules.adversarial.discriminator import PairedLogits


class KeypointDiscriminator(TypedCall, nn.Module):
    """Discriminate key points paired with a sentence (GAWWN, Sec. 4.3), to train `KeypointGenerator`.

        consistency = MLP(MLP(points), MLP(s))

    Args:
        point_count: Key points K.
        text_dim: Features D of the sentence.
        hidden_dim: Features of the first layers; later ones have half of them.

    Raises:
        ValueError: A size is not a whole number of at least 1, or `hidden_dim` is odd.

    Examples:
        >>> import torch
        >>> from mirror_modules import KeypointDiscriminator
        >>> discriminator = KeypointDiscriminator(point_count=7, text_dim=5, hidden_dim=8)
        >>> discriminator(torch.rand(3, 7, 3), torch.randn(3, 5)).consistency.shape
        torch.Size([3])
    """

    def __init__(self, point_count: int = 15, text_dim: int = 1024, *, hidden_dim: int = 512) -> None:
        super().__init__()
        owner = "KeypointDiscriminator"
        check_positive(owner, point_count=point_count, text_dim=text_dim, hidden_dim=hidden_dim)
        if hidden_dim % 2:
            raise ValueError(
                f"{owner}: hidden_dim must be even, because later layers have half of it, not {hidden_dim}."
            )
        self.point_count, self.text_dim = point_count, text_dim
        half = hidden_dim // 2
        self.points_path = nn.Sequential(*_layers(3 * point_count, hidden_dim), *_layers(hidden_dim, half))
        self.text_path = nn.Sequential(*_layers(text_dim, hidden_dim), *_layers(hidden_dim, half))
        self.joint = nn.Sequential(*_layers(hidden_dim, half), nn.Linear(half, 1))

    def forward(self, points: Tensor, sentence: Tensor) -> PairedLogits:
        """Compute the logits of key points with sentences.

        Args:
            points: x, y and visibility of K points, each from 0 to 1, (B, K, 3).
            sentence: Sentence features, (B, D).

        Returns:
            Logits of consistency, (B,), and no realism.

        Raises:
            ValueError: Sizes disagree.
        """
        owner = "KeypointDiscriminator"
        check_tensors(owner, points=points)
        if points.ndim != 3 or points.shape[1:] != (self.point_count, 3):
            raise ValueError(
                f"{owner}: points must be (B, {self.point_count}, 3), x, y and visibility of each, but they are "
                f"{shape_of(points)}."
            )
        check_features(owner, "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        check_batch(owner, points=points, sentence=sentence)
        check_precision(owner, self.joint, points=points, sentence=sentence)
        joint = torch.cat((self.points_path(points.flatten(1)), self.text_path(sentence)), dim=1)
        return PairedLogits(None, self.joint(joint).flatten())


def _layers(in_features: int, out_features: int) -> list[nn.Module]:
    # Batch norm subtracts any bias of the layer before it.
    return [nn.Linear(in_features, out_features, bias=False), FeatureBatchNorm(out_features), nn.LeakyReLU(0.2)]
