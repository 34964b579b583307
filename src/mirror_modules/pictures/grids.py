"""Image grids, captions under images, heat maps over images, PNG files.

Images are floats (N, 3, H, W) in [-1, 1]; pictures are bytes (H, W, 3). Images are enlarged by repeating pixels:
interpolation would add blur that the model did not generate.
"""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules._checks import check_images, check_positive, shape_of
from mirror_modules._files import write_whole
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.transforms import to_bytes, to_float

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("Pictures need more packages: pip install 'mirror-modules[train]'") from error

Picture = NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

WHITE, TEXT_COLOR = 255, (40, 43, 48)
CAPTION_GAP = 12
# Sample sheets: number of columns, maximum characters per caption, and minimum image width for a legible caption.
SHEET_COLUMNS, LONGEST_CAPTION, CAPTION_WIDTH = 4, 160, 128
# Color map from weight 0 to the largest weight. Lightness increases along with hue, because images have every hue.
HEAT = np.array([[22, 18, 54], [122, 30, 110], [228, 84, 66], [252, 176, 70], [255, 246, 190]], dtype=np.float32)
HEAT_SHARE = 0.72


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Picture:
    """Lay out images row by row on a white background.

    Args:
        images: Floats in [-1, 1], (N, 3, H, W).
        columns: Maximum number of images per row; fewer images make a narrower grid.
        scale: Factor by which each image is enlarged.
        gap: Pixels between adjacent images.

    Returns:
        The picture, (rows * (H * scale + gap) - gap, columns * (W * scale + gap) - gap, 3).

    Raises:
        ValueError: `images` are not floats (N, 3, H, W), or a number is out of range.

    Examples:
        >>> import torch
        >>> from mirror_modules.pictures.grids import grid
        >>> images = torch.zeros(5, 3, 4, 6)
        >>> grid(images, columns=3, scale=2, gap=1).shape  # two rows of at most three images
        (17, 38, 3)
    """
    tiles = _enlarged("grid", images, columns, scale)
    if gap < 0:
        raise ValueError(f"grid: gap must be 0 or more, but it is {gap}.")
    return _lay_out(tiles, columns, gap)


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int, scale: int = 1) -> Picture:
    """Lay out images row by row, each with its caption below, wrapped to the width of the image.

    Args:
        images: Floats in [-1, 1], (N, 3, H, W).
        captions: One per image; may be empty strings.
        columns: Maximum number of images per row.
        scale: Factor by which each image is enlarged.

    Returns:
        The picture, (height, width, 3); the longest caption of a row determines the height of the row.

    Raises:
        ValueError: `images` are not floats (N, 3, H, W), captions are not strings or differ from the images in number,
            or a number is out of range.

    Examples:
        >>> import torch
        >>> from mirror_modules.pictures.grids import captioned_grid
        >>> picture = captioned_grid(torch.zeros(2, 3, 32, 32), ["a red flower", "a leaf"], columns=2, scale=2)
        >>> picture.shape[1], picture.shape[0] > 64
        (140, True)
    """
    tiles = _enlarged("captioned_grid", images, columns, scale)
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captioned_grid: captions must be a list of strings, one for each image; wrap a single one.")
    if len(captions) != len(tiles):
        raise ValueError(f"captioned_grid: {len(captions)} captions for {len(tiles)} images; give one for each image.")
    width = tiles.shape[2]
    size = min(max(width // 15, 10), 18)
    font, line_height = ImageFont.load_default(size), round(size * 1.35)
    rows = []
    for start in range(0, len(tiles), columns):
        wrapped = [wrap(caption, width, font) for caption in captions[start : start + columns]]
        band = np.full((len(wrapped), max(map(len, wrapped)) * line_height + CAPTION_GAP, width, 3), WHITE, np.uint8)
        for cell, lines in zip(band, wrapped):
            cell[:] = _draw_text(lines, cell, font, line_height)
        rows.append(_lay_out(np.concatenate([tiles[start : start + columns], band], axis=1), columns, CAPTION_GAP))
    width = rows[0].shape[1]
    return np.concatenate([_pad_to_width(row, width) for row in rows])


def sample_sheet(samples: Sequence[CaptionedImage]) -> Picture:
    """Lay out samples of a data set, each with the beginning of its first caption below.

    Args:
        samples: At least one; all images of the same size.

    Returns:
        The picture, (height, width, 3); small images are enlarged to about 128 pixels to keep captions legible.

    Raises:
        ValueError: There is no sample, a sample has no caption, or sizes differ.

    Examples:
        >>> from mirror_modules.data import SyntheticFlowers
        >>> from mirror_modules.pictures.grids import sample_sheet
        >>> flowers = SyntheticFlowers(3, resolution=64)
        >>> sample_sheet([flowers[i] for i in range(3)]).shape[1]  # three images of 128 pixels and two gaps of 12
        408
    """
    samples = list(samples)
    if not samples:
        raise ValueError("sample_sheet: there is no sample; give at least one.")
    for i, sample in enumerate(samples):
        if not sample.captions:
            raise ValueError(f"sample_sheet: sample {i} has no caption; give it one, or remove it.")
        if sample.image.shape != samples[0].image.shape:
            raise ValueError(
                f"sample_sheet: sample {i} is {sample.image.shape}, but sample 0 is {samples[0].image.shape}; open the "
                "data set with one resolution."
            )
    captions = [textwrap.shorten(sample.captions[0], LONGEST_CAPTION, placeholder=" ...") for sample in samples]
    images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in samples]))
    scale = max(1, CAPTION_WIDTH // images.shape[3])
    return captioned_grid(images, captions, columns=SHEET_COLUMNS, scale=scale)


def heat_overlay(image: Tensor, weights: Tensor) -> Picture:
    """Lay an attention map over a grayscale image: dark where the weight is 0, light where it is largest.

    Args:
        image: Floats in [-1, 1], (3, H, W).
        weights: Non-negative, of any resolution, (h, w); divided by their maximum and interpolated bilinearly.

    Returns:
        The picture, (H, W, 3).

    Raises:
        ValueError: A shape is wrong, there are no weights, or a weight is negative or not finite.

    Examples:
        >>> import torch
        >>> from mirror_modules.pictures.grids import heat_overlay
        >>> overlay = heat_overlay(torch.zeros(3, 2, 2), torch.tensor([[0.0, 0.0], [0.0, 0.5]]))
        >>> overlay.shape, bool(overlay[1, 1].sum() > overlay[0, 0].sum())
        ((2, 2, 3), True)
    """
    if image.ndim != 3:
        raise ValueError(f"heat_overlay: image must be (3, H, W), but it is {shape_of(image)}.")
    check_images("heat_overlay", image.unsqueeze(0))
    if weights.ndim != 2 or weights.numel() == 0:
        raise ValueError(f"heat_overlay: weights must be (h, w), at least one, but they are {shape_of(weights)}.")
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
    """Enlarge batches of images (N, 3, h, w) to the size of the largest by repeating pixels: (batches, N, 3, H, W).

    Raises:
        ValueError: There is no batch, or they differ in their number of images.
    """
    if len({len(batch) for batch in batches}) != 1:
        listed = ", ".join(shape_of(batch) for batch in batches) or "none"
        raise ValueError(f"same_size: there must be one or more batches with the same number of images ({listed}).")
    largest = max((batch.shape[2:] for batch in batches), key=max)
    return torch.stack([F.interpolate(batch, largest, mode="nearest") for batch in batches])


def write_png(picture: Picture, path: str | Path) -> None:
    """Write a picture (H, W, 3) atomically: a failed write leaves an existing file unchanged."""
    image = Image.fromarray(picture)
    write_whole(Path(path), lambda temporary: image.save(temporary, format="PNG"))


def as_data_url(kind: str, content: bytes) -> str:
    """Encode content of a media type, such as "image/png", as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def wrap(text: str, width: int, font: Font) -> list[str]:
    """Break text into lines of at most `width` pixels, within a word only if the word is wider than a line."""
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
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), WHITE, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = tile
    return picture


def _draw_text(lines: Sequence[str], background: Picture, font: Font, line_height: int) -> Picture:
    picture = Image.fromarray(background)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, 3 + i * line_height), line, fill=TEXT_COLOR, font=font)
    return np.asarray(picture)


def _pad_to_width(row: Picture, width: int) -> Picture:
    return np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=WHITE)
