"""Features at a place in the image, as layers: boxes and key points (GAWWN, Reed et al., NIPS 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from mirror_modules._checks import check_positive, check_tensors, shape_of
from mirror_modules._placing import check_size, keypoint_gate, keypoint_maps, place_in_box
from mirror_modules._typing import TypedCall


class TextPlacer(TypedCall, nn.Module):
    """Fill a box with the features of a text, and the rest of the map with zeros (GAWWN, Sec. 4.1).

        placed(u, v) = mean over boxes k of text_k where (u, v) is inside box k

    The slope at the border is that of `place_in_box`. Without parameters: a linear layer of yours projects the sentence
    to the channels.

    Args:
        size: Height and width M of the map, at least 2.

    Raises:
        ValueError: `size` is not a whole number of at least 2.

    Examples:
        >>> import torch
        >>> from mirror_modules import TextPlacer
        >>> placer, sentence = TextPlacer(size=16), torch.randn(3, 8)
        >>> placer(sentence, torch.tensor([0.25, 0.0, 0.5, 1.0]).expand(3, 4)).shape
        torch.Size([3, 8, 16, 16])
        >>> boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]).expand(3, 2, 4)
        >>> placer(torch.randn(3, 2, 8), boxes).shape  # two objects, each with a text of its own
        torch.Size([3, 8, 16, 16])
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        check_positive("TextPlacer", size=size)
        check_size("TextPlacer", (size, size))
        self.size = size

    def forward(self, text: Tensor, box: Tensor) -> Tensor:
        """Place a text.

        Args:
            text: Features (B, C); or (B, K, C) for one text per box.
            box: x, y, w and h as shares of the image, (B, 4) or (B, K, 4).

        Returns:
            (B, C, M, M), the mean over K boxes.

        Raises:
            ValueError: Sizes disagree, or a box is unsuitable; see `place_in_box`.
        """
        check_tensors("TextPlacer", text=text, box=box)
        if text.ndim not in (2, 3):
            raise ValueError(f"TextPlacer: text must be (B, C) or (B, K, C), but it is {shape_of(text)}.")
        placed = place_in_box(text, box, (self.size, self.size))
        return placed.mean(dim=1) if box.ndim == 3 else placed

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"size={self.size}"


class KeypointMaps(TypedCall, nn.Module):
    """Mark key points in maps, one per point: `keypoint_maps` as a layer (GAWWN, Sec. 4.2).

    Args:
        size: Height and width M of the maps.

    Raises:
        ValueError: `size` is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from mirror_modules import KeypointMaps
        >>> KeypointMaps(size=16)(torch.rand(3, 15, 2), torch.rand(3, 15) > 0.5).shape
        torch.Size([3, 15, 16, 16])
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        check_positive("KeypointMaps", size=size)
        self.size = size

    def forward(self, points: Tensor, visible: Tensor | None = None) -> Tensor:
        """Points (B, K, 2), visible (B, K) -> maps (B, K, M, M); see `keypoint_maps`."""
        return keypoint_maps(points, visible, size=self.size)

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"size={self.size}"


class KeypointGate(TypedCall, nn.Module):
    """Keep features where a key point is: `keypoint_gate` as a layer (GAWWN, Sec. 4.2).

    Examples:
        >>> import torch
        >>> from mirror_modules import KeypointGate, KeypointMaps
        >>> maps = KeypointMaps(size=16)(torch.rand(3, 15, 2))
        >>> KeypointGate()(torch.randn(3, 8), maps).shape
        torch.Size([3, 8, 16, 16])
    """

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:
        """Features (B, C) or (B, C, M, N), maps (B, K, M, N) -> (B, C, M, N); see `keypoint_gate`."""
        return keypoint_gate(features, maps)
