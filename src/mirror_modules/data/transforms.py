"""Batches of images between the data set and the model: floats, random crops, pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import check_images, check_positive, shape_of


def to_float(images: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) become floats (B, 3, H, W): x / 127.5 - 1, from 0..255 to [-1, 1].

    Raises:
        ValueError: The images are not uint8 (B, H, W, 3).
    """
    check_bytes("to_float", images)
    # One copy, and the rest in place: this is a good part of what a small network's loader does.
    floats = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """Floats (B, 3, H, W) in [-1, 1] become bytes (B, H, W, 3): the way back from `to_float`, rounded and clipped.

    Raises:
        ValueError: The images are not floats (B, 3, H, W).
    """
    check_images("to_bytes", images)
    values = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def random_crop_flip(
    images: Tensor, resolution: int, generator: torch.Generator | None = None, *, flip: bool = True
) -> Tensor:
    """Cut a square at a random place out of each image and mirror every second one, left to right.

    Do not flip where captions tell left from right. The places are drawn on the CPU, so a seeded CPU generator gives
    the same crops on every device.

    Args:
        images: Bytes (B, H, W, 3), H and W at least `resolution`.
        resolution: Height and width of the result.
        generator: Source of the places and flips; None is torch's global one.
        flip: Whether to mirror.

    Returns:
        Bytes (B, resolution, resolution, 3).

    Raises:
        ValueError: The images are not uint8 (B, H, W, 3), or smaller than `resolution`.
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
    """Where a square is cut out of each image, on the CPU."""

    top: Tensor
    """First row, (B, 1)."""
    left: Tensor
    """First column, (B, 1)."""
    mirrored: Tensor
    """Whether left and right change places, (B, 1)."""


def draw_crops(batch: int, height: int, width: int, resolution: int, generator: torch.Generator | None = None) -> Crops:
    """Random places of squares in `batch` images of one size, every second one mirrored."""
    return Crops(
        top=torch.randint(height - resolution + 1, (batch, 1), generator=generator),
        left=torch.randint(width - resolution + 1, (batch, 1), generator=generator),
        mirrored=torch.rand(batch, 1, generator=generator) < 0.5,
    )


def crop_flip(images: Tensor, rows: Tensor, resolution: int, crops: Crops) -> Tensor:
    """Cut a square out of each of the images (N, H, W, 3) in `rows` (B,): bytes (B, resolution, resolution, 3)."""
    squares = images.new_empty(len(rows), resolution, resolution, 3)
    # One by one: to gather whole images first, and then their pixels, takes several times as long.
    for i, (row, top, left, mirrored) in enumerate(zip(rows.tolist(), *(part[:, 0].tolist() for part in crops))):
        square = images[row, top : top + resolution, left : left + resolution]
        squares[i] = square.flip(1) if mirrored else square
    return squares


def image_pyramid(images: Tensor, resolutions: Sequence[int]) -> list[Tensor]:
    """The same images at several resolutions, each pixel the mean of the area it covers.

    Args:
        images: Floats (B, 3, H, W).
        resolutions: Heights (= widths) wanted, none above H or W, commonly coarse to fine.

    Returns:
        One (B, 3, r, r) for each resolution r, in the order asked for.

    Raises:
        ValueError: The images are not floats (B, 3, H, W), or a resolution is above their size.
    """
    check_images("image_pyramid", images)
    check_positive("image_pyramid", **{f"resolutions[{i}]": r for i, r in enumerate(resolutions)})
    if max(resolutions, default=0) > min(images.shape[2:]):
        raise ValueError(
            f"image_pyramid: resolutions {tuple(resolutions)} exceed the images {shape_of(images)}; "
            "give larger images or ask for less."
        )
    return [F.adaptive_avg_pool2d(images, resolution) for resolution in resolutions]


def check_bytes(owner: str, images: Tensor) -> None:
    """Require uint8 images (B, H, W, 3)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{owner}: images must be uint8 (B, H, W, 3), but they are {images.dtype} {shape_of(images)}.")
