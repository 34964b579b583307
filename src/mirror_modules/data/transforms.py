"""Transforms of image batches between data set and model: floats and bytes, random crops, pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_images, check_positive, shape_of

if TYPE_CHECKING:
    from mirror_modules.data.mapped_images import MappedImages


def to_float(images: Tensor) -> Tensor:
    """Convert bytes (B, H, W, 3) to the model's floats (B, 3, H, W): x / 127.5 - 1, from 0..255 to [-1, 1].

    Args:
        images: Bytes (B, H, W, 3).

    Returns:
        Floats in [-1, 1], (B, 3, H, W), contiguous.

    Raises:
        ValueError: The images are not uint8 (B, H, W, 3).

    Examples:
        >>> import torch
        >>> from mirror_modules.data import to_float
        >>> to_float(torch.tensor([[[[0, 255, 255]]]], dtype=torch.uint8)).flatten().tolist()
        [-1.0, 1.0, 1.0]
        >>> to_float(torch.zeros(2, 5, 7, 3, dtype=torch.uint8)).shape
        torch.Size([2, 3, 5, 7])
    """
    check_bytes("to_float", images)
    # One copy, the rest in place: this takes a good share of the time to load a batch for a small network.
    floats = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """Convert floats (B, 3, H, W) in [-1, 1] to bytes (B, H, W, 3), rounded and clipped: the inverse of `to_float`.

    Args:
        images: Floats (B, 3, H, W); values outside [-1, 1] are clipped.

    Returns:
        Bytes (B, H, W, 3), detached.

    Raises:
        ValueError: The images are not floats (B, 3, H, W).

    Examples:
        >>> import torch
        >>> from mirror_modules.data import to_bytes
        >>> to_bytes(torch.tensor([-1.0, 0.5, 7.0]).reshape(1, 3, 1, 1)).flatten().tolist()
        [0, 191, 255]
        >>> to_bytes(torch.zeros(2, 3, 5, 7)).shape
        torch.Size([2, 5, 7, 3])
    """
    check_images("to_bytes", images)
    values = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def random_crop_flip(
    images: Tensor, resolution: int, generator: torch.Generator | None = None, *, flip: bool = True
) -> Tensor:
    """Crop a random square from each image and flip it horizontally with probability 1/2.

    Do not flip images whose captions distinguish left from right. Positions and flips are drawn on the CPU, so a seeded
    CPU generator gives the same crops on every device.

    Args:
        images: Bytes (B, H, W, 3), H and W at least `resolution`.
        resolution: Height and width of the crops.
        generator: Generator of positions and flips; None uses torch's global one.
        flip: Whether to flip at all.

    Returns:
        Bytes (B, resolution, resolution, 3).

    Raises:
        ValueError: The images are not uint8 (B, H, W, 3), or smaller than `resolution`.

    Examples:
        >>> import torch
        >>> from mirror_modules.data import random_crop_flip
        >>> images = torch.arange(2 * 5 * 7 * 3, dtype=torch.uint8).reshape(2, 5, 7, 3)
        >>> first, again = (random_crop_flip(images, 4, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> first.shape, torch.equal(first, again)
        (torch.Size([2, 4, 4, 3]), True)
    """
    check_bytes("random_crop_flip", images)
    check_positive("random_crop_flip", resolution=resolution)
    batch, height, width, _ = images.shape
    if min(height, width) < resolution:
        raise ValueError(f"random_crop_flip: images are {shape_of(images)}, smaller than resolution={resolution}.")
    crops = draw_crops(batch, height, width, resolution, generator)
    if not flip:
        crops = crops._replace(mirrored=torch.zeros_like(crops.mirrored))
    return crop_flip(images, torch.arange(batch), resolution, crops)


class Crops(NamedTuple):
    """Position and flip of one square crop per image, on the CPU."""

    top: Tensor
    """First row, (B, 1)."""
    left: Tensor
    """First column, (B, 1)."""
    mirrored: Tensor
    """True for a horizontally flipped crop, (B, 1)."""


def draw_crops(batch: int, height: int, width: int, resolution: int, generator: torch.Generator | None = None) -> Crops:
    """Draw uniform positions and fair flips of square crops from `batch` images of one size."""
    return Crops(
        top=torch.randint(height - resolution + 1, (batch, 1), generator=generator),
        left=torch.randint(width - resolution + 1, (batch, 1), generator=generator),
        mirrored=torch.rand(batch, 1, generator=generator) < 0.5,
    )


def crop_flip(images: Tensor | MappedImages, rows: Tensor, resolution: int, crops: Crops) -> Tensor:
    """Crop one square from each of the images (N, H, W, 3) at `rows` (B,): bytes (B, resolution, resolution, 3)."""
    squares = images[:0].new_empty(len(rows), resolution, resolution, 3)
    # A loop over images: gathering whole images first and their pixels second takes several times as long.
    for i, (row, top, left, mirrored) in enumerate(zip(rows.tolist(), *(part[:, 0].tolist() for part in crops))):
        square = images[row][top : top + resolution, left : left + resolution]
        squares[i] = square.flip(1) if mirrored else square
    return squares


def image_pyramid(images: Tensor, resolutions: Sequence[int]) -> list[Tensor]:
    """Resize images to several resolutions; each pixel is the mean of the area that it covers.

    At a ratio that is not a whole number, pixels on the border of an area count by the share of them inside.

    Args:
        images: Floats (B, 3, H, W).
        resolutions: Height and width of each level, at most H and W; usually coarse to fine.

    Returns:
        One (B, 3, r, r) per resolution r, in the given order.

    Raises:
        ValueError: The images are not floats (B, 3, H, W), or a resolution exceeds their size.

    Examples:
        >>> import torch
        >>> from mirror_modules.data import image_pyramid
        >>> images = torch.arange(-8.0, 8.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
        >>> coarse, fine = image_pyramid(images, (2, 4))
        >>> coarse[0, 0].tolist(), torch.equal(fine, images)
        ([[-5.5, -3.5], [2.5, 4.5]], True)
    """
    check_images("image_pyramid", images)
    check_positive("image_pyramid", **{f"resolutions[{i}]": r for i, r in enumerate(resolutions)})
    if max(resolutions, default=0) > min(images.shape[2:]):
        raise ValueError(
            f"image_pyramid: resolutions {tuple(resolutions)} exceed the images {shape_of(images)}; "
            "pass larger images or lower resolutions."
        )
    return [_area_mean(images, resolution) for resolution in resolutions]


def _area_mean(images: Tensor, resolution: int) -> Tensor:
    """The mean over the area of each pixel, (B, 3, resolution, resolution)."""
    if not any(size % resolution for size in images.shape[2:]):
        return F.adaptive_avg_pool2d(images, resolution)
    means = at_least_float32(images)
    for axis in (2, 3):
        rows, weights = _areas(images.shape[axis], resolution)
        # (..., r, K, ...): the K pixels under each of the r areas. Not a matrix product, which autocast would round.
        covered = means.index_select(axis, rows.flatten().to(images.device)).unflatten(axis, rows.shape)
        weights = weights.to(images.device, means.dtype).reshape(*weights.shape, *[1] * (3 - axis))
        means = (covered * weights).sum(dim=axis + 1)
    return means.to(images.dtype)


def _areas(size: int, resolution: int) -> tuple[Tensor, Tensor]:
    """Divide `size` pixels into r = `resolution` equal areas.

    Area i reaches from i * size / r to (i + 1) * size / r, and overlaps at most K pixels.

    Returns:
        The pixels, (r, K), and the share of the area that each covers, (r, K), float64, which is 0 for one outside.
    """
    # In units of 1 / r pixel, all borders are whole numbers.
    starts = torch.arange(resolution).unsqueeze(1) * size
    pixels = starts // resolution + torch.arange(-(-size // resolution) + 1)
    overlap = (pixels * resolution + resolution).minimum(starts + size) - (pixels * resolution).maximum(starts)
    return pixels.clamp(max=size - 1), overlap.clamp(min=0).double() / size


def check_bytes(owner: str, images: Tensor) -> None:
    """Require uint8 images (B, H, W, 3)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{owner}: images must be uint8 (B, H, W, 3), but they are {images.dtype} {shape_of(images)}.")
