"""One door to all data sets on disk: which format a folder has is seen from what lies in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mirror_modules._checks import check_choice
from mirror_modules.data.caption_folder import IMAGE_SUFFIXES, LISTS, CaptionFolder
from mirror_modules.data.coco_captions import CocoCaptions
from mirror_modules.data.cub_birds import CubBirds
from mirror_modules.data.files import SPLITS, CaptionedFiles
from mirror_modules.data.oxford_flowers import OxfordFlowers
from mirror_modules.data.prepared import PREPARED, PreparedCaptions
from mirror_modules.data.shard_folder import ShardFolder
from mirror_modules.data.shards import find_shards


class Format(NamedTuple):
    """A way in which captioned images lie in a folder."""

    reader: Callable[..., CaptionedFiles]
    sign: str
    """What tells it from the others, in words."""
    fits: Callable[[Path], bool]
    """Does a folder show the sign?"""


def _is_caption_folder(root: Path) -> bool:
    parts = [root / split for split in SPLITS if (root / split).is_dir()] or [root]
    return any(
        any((part / name).is_file() for name in LISTS)
        or any(path.suffix.lower() in IMAGE_SUFFIXES and path.with_suffix(".txt").is_file() for path in part.iterdir())
        for part in parts
    )


FORMATS: dict[str, Format] = {
    "oxford-flowers": Format(
        OxfordFlowers,
        "text_c10/ and trainclasses.txt",
        lambda root: (root / "text_c10").is_dir() and (root / "trainclasses.txt").is_file(),
    ),
    "birds": Format(CubBirds, "CUB_200_2011/", lambda root: (root / "CUB_200_2011").is_dir()),
    "coco": Format(
        CocoCaptions,
        "annotations/captions_*.json",
        lambda root: any((root / "annotations").glob("captions_*.json")),
    ),
    "folder": Format(
        CaptionFolder,
        "captions.jsonl, captions.csv, or an image with a .txt of its name, here or in train/ and validation/",
        _is_caption_folder,
    ),
    "webdataset": Format(
        ShardFolder,
        "train-*.tar or validation-*.tar",
        lambda root: any(find_shards(root, split) for split in SPLITS),
    ),
    "prepared": Format(PreparedCaptions, PREPARED, lambda root: (root / PREPARED).is_file()),
}
"""What `open_captions` reads, by name."""


def recognize(path: str | Path) -> str:
    """The name of a folder's format.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has none of the formats; the message says what was looked for.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"open_captions: there is no folder {root}; give the one that holds the data set.")
    name = _recognized(root)
    if name is None:
        looked_for = "; ".join(f"{name}: {each.sign}" for name, each in FORMATS.items())
        below = next((child for child in sorted(root.iterdir()) if child.is_dir() and _recognized(child)), None)
        hint = f" Did you mean {below}?" if below else ""
        raise ValueError(
            f"open_captions: {root} has no format that is known. Looked for {looked_for}.{hint} "
            "A format that is named as source says what it misses."
        )
    return name


def open_captions(
    path: str | Path,
    split: str = "train",
    resolution: int = 64,
    source: str = "auto",
    *,
    on_error: str = "stop",
) -> CaptionedFiles:
    """Open a data set on disk.

    Args:
        path: Its folder.
        split: "train" or "validation".
        resolution: Height and width of its images in pixels.
        source: "oxford-flowers", "birds", "coco", "folder", "webdataset" for shards, or "prepared" for what
            `prepare_captions` wrote; "auto" sees it from the folder.
        on_error: "stop" raises an error for the first damaged sample, "skip" leaves it out as long as few are damaged
            (5 %), "list" leaves out any number; `report` of the result holds them.

    Raises:
        FileNotFoundError: The folder, or a part of its layout, is missing.
        ValueError: An argument is unknown, the folder has none of the formats, or a file does not hold what it should.
        ImportError: Pillow is missing.
    """
    check_choice("open_captions", "source", source, ("auto", *FORMATS))
    name = recognize(path) if source == "auto" else source
    return FORMATS[name].reader(path, split=split, resolution=resolution, on_error=on_error)


def _recognized(root: Path) -> str | None:
    return next((name for name, each in FORMATS.items() if each.fits(root)), None)
