"""Images for people: grids, captions under images, attention maps laid over them, PNG files.

Images come as floats (N, 3, H, W) in [-1, 1]; pictures are bytes (H, W, 3). Enlarging repeats pixels: a small image
shows its pixels rather than a blur that nobody generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules._checks import check_images, check_positive, shape_of
from mirror_modules.data.transforms import to_bytes
from mirror_modules.models.pretrained import write_whole

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("Pictures need more packages: pip install 'mirror-modules[train]'") from error

Picture = NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK = 255, (40, 43, 48)
CAPTION_GAP = 12
# From no attention to full attention. Petals have every color, so the map goes from dark to light as well.
HEAT = np.array([[22, 18, 54], [122, 30, 110], [228, 84, 66], [252, 176, 70], [255, 246, 190]], dtype=np.float32)
HEAT_SHARE = 0.72


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Picture:
    """Lay images out row by row on white.

    Args:
        images: Floats in [-1, 1], (N, 3, H, W).
        columns: Images in a row, at most; fewer images make a narrower grid.
        scale: Pixels of the picture for each pixel of an image, each way.
        gap: Pixels of the picture between two images.

    Returns:
        The picture, (rows * (H * scale + gap) - gap, columns * (W * scale + gap) - gap, 3).

    Raises:
        ValueError: `images` are not floats (N, 3, H, W), or a number is out of its range.
    """
    tiles = _enlarged("grid", images, columns, scale)
    if gap < 0:
        raise ValueError(f"grid: gap must be 0 or more, but it is {gap}.")
    return _lay_out(tiles, columns, gap)


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int, scale: int = 1) -> Picture:
    """Lay images out row by row, each with its caption below, wrapped at the image's width.

    Args:
        images: Floats in [-1, 1], (N, 3, H, W).
        captions: One for each image; it may be empty.
        columns: Images in a row, at most.
        scale: Pixels of the picture for each pixel of an image, each way.

    Returns:
        The picture, (height, width, 3); a row is as high as its longest caption asks for.

    Raises:
        ValueError: `images` are not floats (N, 3, H, W), captions and images differ in number, or a number is out of
            range.
    """
    tiles = _enlarged("captioned_grid", images, columns, scale)
    if len(captions) != len(tiles):
        raise ValueError(f"captioned_grid: {len(captions)} captions for {len(tiles)} images; give one for each image.")
    width = tiles.shape[2]
    size = min(max(width // 15, 10), 18)
    font, line_height = ImageFont.load_default(size), round(size * 1.35)
    rows = []
    for start in range(0, len(tiles), columns):
        wrapped = [wrap(caption, width, font) for caption in captions[start : start + columns]]
        band = np.full((len(wrapped), max(map(len, wrapped)) * line_height + CAPTION_GAP, width, 3), PAPER, np.uint8)
        for place, lines in zip(band, wrapped):
            place[:] = _written(lines, place, font, line_height)
        rows.append(_lay_out(np.concatenate([tiles[start : start + columns], band], axis=1), columns, CAPTION_GAP))
    widest = rows[0].shape[1]
    return np.concatenate([_widened(row, widest) for row in rows])


def heat_overlay(image: Tensor, weights: Tensor) -> Picture:
    """Lay an attention map over an image turned gray: dark where no weight is, light where the largest is.

    Args:
        image: Floats in [-1, 1], (3, H, W).
        weights: At least 0, of any resolution, (h, w); drawn in proportion to the largest, bilinear in between.

    Returns:
        The picture, (H, W, 3).

    Raises:
        ValueError: A shape is not as above, or a weight is negative or not finite.
    """
    if image.ndim != 3:
        raise ValueError(f"heat_overlay: image must be (3, H, W), but it is {shape_of(image)}.")
    check_images("heat_overlay", image.unsqueeze(0))
    if weights.ndim != 2:
        raise ValueError(f"heat_overlay: weights must be (h, w), but they are {shape_of(weights)}.")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("heat_overlay: weights must be finite and at least 0, but some are not.")
    weights = weights.detach().float().cpu()
    share = F.interpolate((weights / weights.max().clamp(min=1e-12))[None, None], image.shape[1:], mode="bilinear")
    heat = share[0, 0].numpy() * (len(HEAT) - 1)
    lower = np.minimum(heat.astype(np.int64), len(HEAT) - 2)
    color = HEAT[lower] + (heat - lower)[..., None] * (HEAT[lower + 1] - HEAT[lower])
    gray = to_bytes(image.unsqueeze(0))[0].cpu().numpy() @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.rint(HEAT_SHARE * color + (1 - HEAT_SHARE) * gray[..., None]).astype(np.uint8)


def same_size(batches: Sequence[Tensor]) -> Tensor:
    """Enlarge batches of images (N, 3, h, w) to the largest among them by repeating pixels: (batches, N, 3, H, W)."""
    largest = max((batch.shape[2:] for batch in batches), key=max)
    return torch.stack([F.interpolate(batch, largest, mode="nearest") for batch in batches])


def write_png(picture: Picture, path: str | Path) -> None:
    """Write a picture (H, W, 3), whole or not at all."""
    image = Image.fromarray(picture)
    write_whole(Path(path), lambda temporary: image.save(temporary, format="PNG"))


def wrap(text: str, width: int, font: Font) -> list[str]:
    """Break a text into lines of at most `width` pixels, within a word only where it is longer than a line."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".lstrip()
            while font.getlength(line) > width and len(line) > 1:
                fits = next(n for n in range(1, len(line)) if font.getlength(line[: n + 1]) > width)
                lines.append(line[:fits])
                line = line[fits:]
        lines += [line] if line else []
    return lines


def _enlarged(owner: str, images: Tensor, columns: int, scale: int) -> Picture:
    check_images(owner, images)
    check_positive(owner, images=len(images), columns=columns, scale=scale)
    return to_bytes(images).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)


def _lay_out(tiles: Picture, columns: int, gap: int) -> Picture:
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = tile
    return picture


def _written(lines: Sequence[str], paper: Picture, font: Font, line_height: int) -> Picture:
    picture = Image.fromarray(paper)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, 3 + i * line_height), line, fill=INK, font=font)
    return np.asarray(picture)


def _widened(row: Picture, width: int) -> Picture:
    return np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=PAPER)
