"""A sheet of samples of all cells of a grid: the same captions and noise, side by side."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirror_modules._files import write_whole
from mirror_modules.data import to_bytes, to_float
from mirror_modules.models import TextToImage
from mirror_modules.pictures.grids import CAPTION_WIDTH, captioned_grid, write_png
from mirror_modules.training.batches import Splits
from mirror_modules.training.validation import generate_images, unseen_pairs

# Captions on the sheet.
SHEET_ROWS = 6


def write_samples(path: Path, splits: Splits, max_words: int, model: TextToImage | None, seed: int) -> None:
    """Write images of a model for a few captions, or the real images of these captions.

    Args:
        path: File to write.
        splits: The data; the captions are those of validation images, the same ones for all runs.
        max_words: Longer captions are truncated to this many words.
        model: In evaluation mode; None writes the real images.
        seed: The noise of image i is drawn with seed + i.
    """
    unseen = unseen_pairs(splits, max_words).spread(SHEET_ROWS)
    images = torch.from_numpy(np.asarray(unseen.images))
    if model is not None:
        images = to_bytes(generate_images(model, unseen.tokens, unseen.word_mask, seed, unseen.location(model)))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, images=images.numpy(), captions=np.array(unseen.captions))

    write_whole(path, write)


def draw_samples(files: Sequence[Path], names: Sequence[str], path: Path) -> None:
    """A row per caption: the real image above its caption, and the image of each cell above its name.

    Args:
        files: Samples of the real images, and of each cell.
        names: Names of the cells.
        path: File to write.

    Raises:
        ValueError: A file is damaged.
    """
    samples = [_read_samples(file) for file in files]
    captions = samples[0][1]
    images = torch.stack([to_float(torch.from_numpy(each)) for each, _ in samples], dim=1).flatten(0, 1)
    texts = [text for caption in captions for text in (caption, *names)]
    scale = max(1, CAPTION_WIDTH // images.shape[3])
    write_png(captioned_grid(images, texts, columns=len(samples), scale=scale), path)


def _read_samples(path: Path) -> tuple[np.ndarray[Any, Any], list[str]]:
    """The images (N, H, W, 3) and captions that `write_samples` wrote.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with np.load(path) as content:
            return content["images"], content["captions"].tolist()
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it and repeat the command, which generates these samples again."
        ) from error
