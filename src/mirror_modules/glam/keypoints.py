"""Key points of which some are missing, completed from a text (GAWWN, Reed et al., NIPS 2016, Sec. 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_features, check_positive, check_precision, check_tensors, shape_of
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules._placing import check_shares
from mirror_modules._typing import TypedCall


def complete_keypoints(given: Tensor, proposed: Tensor) -> Tensor:
    """Keep the key points that are given, and take the others from a proposal (GAWWN, Sec. 4.3).

        completed_k = v_k given_k + (1 - v_k) proposed_k    v_k is the visibility in `given`

    Args:
        given: x, y and visibility of K points, each from 0 to 1, (B, K, 3). Points of visibility 0 are missing.
        proposed: Proposed points, (B, K, 3).

    Returns:
        (B, K, 3).

    Raises:
        ValueError: Shapes disagree, or a value of `given` is not from 0 to 1, which is checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import complete_keypoints
        >>> given = torch.tensor([[[0.25, 0.5, 1.0], [0.0, 0.0, 0.0]]])  # the second is missing
        >>> complete_keypoints(given, torch.full((1, 2, 3), 0.75)).tolist()
        [[[0.25, 0.5, 1.0], [0.75, 0.75, 0.75]]]
    """
    check_tensors("complete_keypoints", given=given, proposed=proposed)
    for name, points in (("given", given), ("proposed", proposed)):
        if points.ndim != 3 or points.shape[2] != 3 or not points.is_floating_point():
            raise ValueError(
                f"complete_keypoints: {name} must be floats (B, K, 3), x, y and visibility of each point, but they are "
                f"{points.dtype} {shape_of(points)}."
            )
    if given.shape != proposed.shape:
        raise ValueError(
            f"complete_keypoints: given {shape_of(given)} and proposed {shape_of(proposed)} must have the same shape."
        )
    # With another visibility, such as 2 for a visible point in COCO, the result would be no mean of the two.
    check_shares("complete_keypoints", "given", given)
    visibility = given[..., 2:]
    return visibility * given + (1 - visibility) * proposed


class KeypointGenerator(TypedCall, nn.Module):
    """Noise, sentence and some key points -> all key points (GAWWN, Sec. 4.3).

        proposed = sigmoid(MLP(ReLU(W z), ReLU(V s), MLP(given))),    points = complete_keypoints(given, proposed)

    Points that are given are kept; the others, which have visibility 0, are generated with a visibility of their own.
    It is trained against `KeypointDiscriminator`.

    Args:
        point_count: Key points K.
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition: the sentence itself in the published code.
        hidden_dim: Features of the inner layers, an even number.

    Raises:
        ValueError: A size is not a whole number of at least 1, or `hidden_dim` is odd.

    Examples:
        >>> import torch
        >>> from mirror_modules import KeypointGenerator
        >>> generator = KeypointGenerator(point_count=7, noise_dim=5, condition_dim=6, hidden_dim=8)
        >>> given = torch.zeros(2, 7, 3)
        >>> given[:, 0] = torch.tensor([0.5, 0.25, 1.0])  # x, y and visibility of the only point that is known
        >>> points = generator(torch.randn(2, 5), torch.randn(2, 6), given)
        >>> points.shape, points[0, 0].tolist()
        (torch.Size([2, 7, 3]), [0.5, 0.25, 1.0])
    """

    def __init__(
        self, point_count: int = 15, noise_dim: int = 100, condition_dim: int = 1024, *, hidden_dim: int = 512
    ) -> None:
        super().__init__()
        owner = "KeypointGenerator"
        check_positive(
            owner, point_count=point_count, noise_dim=noise_dim, condition_dim=condition_dim, hidden_dim=hidden_dim
        )
        if hidden_dim % 2:
            raise ValueError(
                f"{owner}: hidden_dim must be even, because some layers have half of it, not {hidden_dim}."
            )
        self.point_count, self.noise_dim, self.condition_dim = point_count, noise_dim, condition_dim
        half = hidden_dim // 2
        self.noise_path = nn.Sequential(nn.Linear(noise_dim, hidden_dim), nn.ReLU())
        self.text_path = nn.Sequential(nn.Linear(condition_dim, hidden_dim), nn.ReLU())
        self.points_path = nn.Sequential(*_layers(3 * point_count, hidden_dim), *_layers(hidden_dim, half))
        self.joint = nn.Sequential(
            *_layers(2 * hidden_dim + half, 2 * hidden_dim),
            *_layers(2 * hidden_dim, hidden_dim),
            *_layers(hidden_dim, half),
            nn.Linear(half, 3 * point_count),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor, condition: Tensor, given: Tensor) -> Tensor:
        """Complete a batch of key points.

        Args:
            noise: Standard normal, (B, Z).
            condition: Features of the sentence, (B, E).
            given: x, y and visibility of K points, each from 0 to 1, (B, K, 3); zeros where a point is missing.

        Returns:
            x, y and visibility of all points, each from 0 to 1, (B, K, 3).

        Raises:
            ValueError: Sizes disagree, or a value of `given` is not from 0 to 1, which is checked on a CPU only.
        """
        owner = "KeypointGenerator"
        check_features(owner, "noise", noise, "(B, D)", self.noise_dim, "noise_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_tensors(owner, given=given)
        if given.ndim != 3 or given.shape[1:] != (self.point_count, 3):
            raise ValueError(
                f"{owner}: given must be (B, {self.point_count}, 3), x, y and visibility of each point, but it is "
                f"{shape_of(given)}."
            )
        check_batch(owner, noise=noise, condition=condition, given=given)
        check_precision(owner, self.joint, noise=noise, condition=condition, given=given)
        paths = (self.noise_path(noise), self.text_path(condition), self.points_path(given.flatten(1)))
        proposed = self.joint(torch.cat(paths, dim=1)).unflatten(1, (self.point_count, 3))
        return complete_keypoints(given, proposed.to(given.dtype))


def _layers(in_features: int, out_features: int) -> list[nn.Module]:
    # Batch norm subtracts any bias of the layer before it.
    return [nn.Linear(in_features, out_features, bias=False), FeatureBatchNorm(out_features), nn.ReLU()]
