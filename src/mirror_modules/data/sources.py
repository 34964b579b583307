"""Open any data set on disk, with its format recognized from the files in the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mirror_modules._checks import check_choice
from mirror_modules.data.readers.caption_folder import CaptionFolder, is_caption_folder
from mirror_modules.data.readers.coco_captions import CocoCaptions, is_coco
from mirror_modules.data.readers.cub_birds import CubBirds
from mirror_modules.data.readers.files import SPLITS, CaptionedFiles
from mirror_modules.data.readers.names import is_hidden
from mirror_modules.data.readers.oxford_flowers import OxfordFlowers
from mirror_modules.data.readers.prepared import PREPARED, PreparedCaptions
from mirror_modules.data.readers.shard_folder import ShardFolder
from mirror_modules.data.readers.shards import find_shards


class Format(NamedTuple):
    """A format of captioned images in a folder."""

    reader: Callable[..., CaptionedFiles]
    signature: str
    """The files that identify the format, for error messages."""
    matches: Callable[[Path], bool]
    """Whether a folder has these files."""


FORMATS: dict[str, Format] = {
    "oxford-flowers": Format(
        OxfordFlowers,
        "text_c10/ and trainclasses.txt",
        lambda root: (root / "text_c10").is_dir() and (root / "trainclasses.txt").is_file(),
    ),
    "birds": Format(CubBirds, "CUB_200_2011/", lambda root: (root / "CUB_200_2011").is_dir()),
    "coco": Format(
        CocoCaptions,
        "annotations/captions_{train,val}{2017,2014}.json",
        is_coco,
    ),
    "folder": Format(
        CaptionFolder,
        "captions.jsonl, captions.csv, metadata.jsonl, metadata.csv, or an image with a .txt or .caption of the same "
        "name, here or in train/ and validation/",
        is_caption_folder,
    ),
    "webdataset": Format(
        ShardFolder,
        "train-*.tar or validation-*.tar",
        lambda root: any(find_shards(root, split) for split in SPLITS),
    ),
    "prepared": Format(PreparedCaptions, PREPARED, lambda root: (root / PREPARED).is_file()),
}
"""The formats that `open_captions` reads, by name."""


def recognize(path: str | Path) -> str:
    """Recognize the format of a folder and return its name.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The folder matches no format; the message lists the files that identify each.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"open_captions: there is no folder {root}; pass the folder of the data set.")
    name = _recognize(root)
    if name is None:
        signatures = "; ".join(f"{name}: {each.signature}" for name, each in FORMATS.items())
        children = (path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name))
        below = next((child for child in children if _recognize(child)), None)
        hint = f" Did you mean {below}?" if below else ""
        raise ValueError(
            f"open_captions: {root} has no known format. Looked for {signatures}.{hint} "
            "Name a format as source to learn which files it lacks."
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
        path: Folder of the data set.
        split: "train" or "validation".
        resolution: Height and width of the images in pixels.
        source: Format of the data set: "oxford-flowers", "birds", "coco", "folder", "webdataset" (shards) or "prepared"
            (written by `prepare_captions`); "auto" recognizes it from the files in the folder.
        on_error: "stop" raises at the first damaged sample; "skip" skips damaged samples up to 5 % of the split; "list"
            skips any number of them. The `report` of the result lists them.

    Returns:
        The split of the data set.

    Raises:
        FileNotFoundError: The folder, or a part of its layout, is missing.
        ValueError: An argument is unknown, the folder has no known format, or a file has invalid content.
        ImportError: Pillow is missing.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.data import open_captions
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30), "red").save(root / "red.png")
        >>> _ = (root / "red.txt").write_text("a red sheet of paper")
        >>> captions = open_captions(root, resolution=16)
        >>> type(captions).__name__, captions[0].captions
        ('CaptionFolder', ('a red sheet of paper',))
    """
    check_choice("open_captions", "source", source, ("auto", *FORMATS))
    name = recognize(path) if source == "auto" else source
    return FORMATS[name].reader(path, split=split, resolution=resolution, on_error=on_error)


def _recognize(root: Path) -> str | None:
    """The format of a folder; None if it has none, or cannot be read."""
    try:
        return next((name for name, each in FORMATS.items() if each.matches(root)), None)
    except PermissionError:
        return None
