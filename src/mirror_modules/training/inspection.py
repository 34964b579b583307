"""A look at data before anything is trained on them: figures, damaged files, and a sheet of images with captions."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

import torch

from mirror_modules._checks import check_positive
from mirror_modules.data import open_captions, to_float
from mirror_modules.data.damage import printable
from mirror_modules.data.files import SPLITS
from mirror_modules.data.inspection import describe_splits, inspect_split
from mirror_modules.data.sources import recognize
from mirror_modules.training.pictures import Picture, captioned_grid

RESOLUTION = 64
LONGEST_CAPTION = 160
COLUMNS = 4


class Inspection(NamedTuple):
    """What a data set holds."""

    text: str
    """Several lines: the format, the figures, the damaged files."""
    sheet: Picture | None
    """Some images of both splits with one caption each, for `write_png`; None if no image can be read."""


def inspect_folder(
    path: str | Path,
    *,
    source: str = "auto",
    resolution: int | None = None,
    max_words: int = 18,
    min_count: int = 1,
) -> Inspection:
    """Read every file of a data set.

    Args:
        path: Folder of the data set.
        source: Its format, as for `open_captions`.
        resolution: Height and width of the images in the sheet; None takes 64, or less if the folder was prepared at
            less.
        max_words: Captions of more words are counted as long.
        min_count: Occurrences that a word needs to enter the vocabulary.

    Raises:
        FileNotFoundError: The folder, or a part of its layout, is missing.
        ValueError: It has none of the formats, a list in it is damaged, or a number is below 1.
    """
    from tqdm import tqdm

    sizes = {} if resolution is None else {"resolution": resolution}
    check_positive("inspect_folder", **sizes, max_words=max_words, min_count=min_count)
    name = recognize(path) if source == "auto" else source
    if resolution is None:
        resolution = RESOLUTION
        if name == "prepared":
            resolution = min(resolution, *open_captions(path, SPLITS[0], 1, name).stored_size(0))
    facts = []
    for split in SPLITS:
        dataset = open_captions(path, split, resolution, name, on_error="list")
        with tqdm(total=len(dataset), desc=f"{split} images", unit=" images", dynamic_ncols=True, disable=None) as bar:
            facts.append(inspect_split(dataset, max_words=max_words, progress=bar.update))
    text = f"{printable(path)} is read as {name!r}\n"
    text += describe_splits(*facts, max_words=max_words, min_count=min_count)
    shown = [sample for each in facts for sample in each.pictures]
    if not shown:
        return Inspection(text, None)
    # The width in which a caption can be read.
    scale = max(1, 128 // resolution)
    captions = [textwrap.shorten(sample.captions[0], LONGEST_CAPTION, placeholder=" ...") for sample in shown]
    images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in shown]))
    return Inspection(text, captioned_grid(images, captions, columns=COLUMNS, scale=scale))
