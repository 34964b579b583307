"""A look at data before anything is trained on them: figures, damaged files, and a sheet of images with captions."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from mirror_modules._checks import check_positive
from mirror_modules.data import open_captions, to_float
from mirror_modules.data.files import SPLITS
from mirror_modules.data.inspection import describe_splits, inspect_split
from mirror_modules.data.sources import recognize
from mirror_modules.training.pictures import captioned_grid, write_png

LONGEST_CAPTION = 160
COLUMNS = 4


def inspect_folder(
    path: str | Path,
    out: str | Path,
    *,
    source: str = "auto",
    resolution: int = 64,
    max_words: int = 18,
    min_count: int = 1,
) -> str:
    """Read every file of a data set, and write a sheet of some images of both splits with one caption each.

    Args:
        path: Folder of the data set.
        out: PNG file to write; without an image that can be read, there is none.
        source: Its format, as for `open_captions`.
        resolution: Height and width of the images in the sheet.
        max_words: Captions of more words are counted as long.
        min_count: Occurrences that a word needs to enter the vocabulary.

    Returns:
        Several lines: the format, the figures, the damaged files.

    Raises:
        FileNotFoundError: The folder, or a part of its layout, is missing.
        ValueError: It has none of the formats, a list in it is damaged, or a number is below 1.
    """
    from tqdm import tqdm

    check_positive("inspect_folder", resolution=resolution, max_words=max_words, min_count=min_count)
    name = recognize(path) if source == "auto" else source
    facts = []
    for split in SPLITS:
        dataset = open_captions(path, split, resolution, name, on_error="list")
        with tqdm(total=len(dataset), desc=f"{split} images", unit=" images", dynamic_ncols=True, disable=None) as bar:
            facts.append(inspect_split(dataset, max_words=max_words, progress=bar.update))
    shown = [sample for each in facts for sample in each.pictures]
    if shown:
        # The width in which a caption can be read.
        scale = max(1, 128 // resolution)
        captions = [textwrap.shorten(sample.captions[0], LONGEST_CAPTION, placeholder=" ...") for sample in shown]
        images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in shown]))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_png(captioned_grid(images, captions, columns=COLUMNS, scale=scale), out)
    return f"{path} is read as {name!r}\n" + describe_splits(*facts, max_words=max_words, min_count=min_count)
