"""Boxes and key points of images through crops and mirroring.

Both are shares of the image's width and height: boxes (B, 4) are x, y, width and height, NaN where unknown; points
(B, K, 3) are x, y and visibility, all 0 for a point that is not visible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mirror_modules.data.transforms import Crops

_SIDE = re.compile(r"(?<![^\W_])(left|right)(?![^\W_])", re.IGNORECASE)


def mirror_order(names: Sequence[str]) -> list[int]:
    """Index of the key point that each becomes in a mirrored image: "left eye" becomes "right eye", "tail" stays.

    A name with a side that has no counterpart stays as well.

    Examples:
        >>> from mirror_modules.data.locations import mirror_order
        >>> mirror_order(("left eye", "tail", "right eye"))
        [2, 1, 0]
    """
    rows = {name: i for i, name in enumerate(names)}
    return [rows.get(_SIDE.sub(_other_side, name), i) for i, name in enumerate(names)]


def crop_boxes(boxes: Tensor, height: int, width: int, resolution: int, crops: Crops) -> Tensor:
    """Boxes within square crops of images: they may extend beyond the crop.

    Args:
        boxes: (B, 4), as shares of images of `height` and `width` pixels.
        height: Height of the images.
        width: Width of the images.
        resolution: Height and width of the crops.
        crops: Position and flip of each crop.

    Returns:
        (B, 4), NaN for a box that is unknown or of which nothing is in the crop.

    Examples:
        >>> import torch
        >>> from mirror_modules.data.locations import crop_boxes
        >>> from mirror_modules.data.transforms import Crops
        >>> crops = Crops(torch.tensor([[0]]), torch.tensor([[4]]), torch.tensor([[True]]))
        >>> crop_boxes(torch.tensor([[0.5, 0.25, 0.25, 0.5]]), 8, 8, 4, crops).tolist()
        [[0.5, 0.5, 0.5, 1.0]]
    """
    x, y, w, h = boxes.unbind(dim=1)
    left, top, mirrored = (part[:, 0] for part in (crops.left, crops.top, crops.mirrored))
    x, y = (x * width - left) / resolution, (y * height - top) / resolution
    w, h = w * width / resolution, h * height / resolution
    x = torch.where(mirrored, 1 - x - w, x)
    is_inside = (x < 1) & (y < 1) & (x + w > 0) & (y + h > 0)
    return torch.stack((x, y, w, h), dim=1).where(is_inside.unsqueeze(1), torch.nan)


def crop_points(points: Tensor, height: int, width: int, resolution: int, crops: Crops, order: Sequence[int]) -> Tensor:
    """Key points within square crops of images: those outside of it are not visible.

    Args:
        points: (B, K, 3), as shares of images of `height` and `width` pixels.
        height: Height of the images.
        width: Width of the images.
        resolution: Height and width of the crops.
        crops: Position and flip of each crop.
        order: The point that each becomes in a mirrored image, from `mirror_order`.

    Returns:
        (B, K, 3).

    Examples:
        >>> import torch
        >>> from mirror_modules.data.locations import crop_points
        >>> from mirror_modules.data.transforms import Crops
        >>> crops = Crops(torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([[True]]))
        >>> eyes = torch.tensor([[[0.25, 0.5, 1.0], [0.0, 0.0, 0.0]]])  # the left one is visible
        >>> crop_points(eyes, 4, 4, 4, crops, [1, 0]).tolist()
        [[[0.0, 0.0, 0.0], [0.75, 0.5, 1.0]]]
    """
    x, y, visible = points.unbind(dim=2)
    x, y = (x * width - crops.left) / resolution, (y * height - crops.top) / resolution
    x = torch.where(crops.mirrored, 1 - x, x)
    is_visible = (visible > 0) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    cropped = torch.stack((x, y, visible), dim=2) * is_visible.unsqueeze(2)
    swapped = cropped[:, torch.tensor(order, dtype=torch.long)]
    return torch.where(crops.mirrored.unsqueeze(2), swapped, cropped)


def _other_side(match: re.Match[str]) -> str:
    side = match[1]
    other = "right" if side.lower() == "left" else "left"
    return other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other
