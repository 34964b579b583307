"""A user's own folder of images, with captions in text files beside them or in one list."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.files import SPLITS, CaptionedFiles, Entry, class_of, is_inside, read_lines

LISTS = ("captions.jsonl", "captions.csv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
# Share of the validation split, in folders without train/ and validation/.
VALIDATION_SHARE = 0.1


class CaptionFolder(CaptionedFiles):
    """Square images with captions, from a folder of your own.

    Either each image has a text file of the same name beside it, one caption per line, or one list holds all captions:
    captions.jsonl with an object {"file": ..., "caption": ..., "class": ...} per line, or captions.csv with the columns
    file, caption and, optionally, class. A file listed on several lines has several captions. Images of one class are
    never each other's mismatched pairs; an image without a class is its own class.

    The folder is either divided into train/ and validation/, each with this content, or undivided: then a tenth of the
    images, chosen by a hash of their names, is the validation split, and images added later do not move the others.

    Args:
        root: The folder.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        seed: Seed of the hash that chooses the validation images of an undivided folder.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file has invalid content; the message names the file.
        ImportError: Pillow is missing.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.data import CaptionFolder
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30), "red").save(root / "red.png")
        >>> _ = (root / "red.txt").write_text("a red sheet of paper")
        >>> sample = CaptionFolder(root, resolution=16)[0]
        >>> sample.image.shape, sample.captions
        ((16, 16, 3), ('a red sheet of paper',))
    """

    layout: ClassVar[str] = (
        "images, each with a text file of the same name beside it, or captions.jsonl or captions.csv, in train/ and "
        "validation/ or directly in the folder"
    )

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        resolution: int = 64,
        seed: int = 0,
        on_error: str = "stop",
    ) -> None:
        self.seed = seed
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        divided = [name for name in SPLITS if (self.root / name).is_dir()]
        if divided:
            self._require(*SPLITS)
        folder = self.root / self.split if divided else self.root
        self._in_other_split = 0
        lists = [name for name in LISTS if (folder / name).is_file()]
        if len(lists) > 1:
            raise ValueError(f"{self._owner}: {folder} has both {' and '.join(lists)}; keep one of them.")
        if lists:
            yield from self._read_list(folder / lists[0], bool(divided))
        else:
            yield from self._read_pairs(folder, bool(divided))

    def _read_pairs(self, folder: Path, divided: bool) -> Iterator[Entry]:
        """Images with text files beside them; each image is its own class."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        texts: dict[str, Path] = {}
        for path in files:
            if path.suffix.lower() != ".txt":
                continue
            first = texts.setdefault(path.stem, path)
            if first != path and (divided or self._is_in_split(path.stem)):
                self._skip(path, f"shares its name with {first.name}; put all captions into one of them")
        described: dict[str, Path] = {}
        for class_id, image in enumerate(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES):
            first = described.setdefault(image.stem, image)
            if not divided and not self._is_in_split(image.stem):
                continue
            if first != image:
                self._skip(image, f"shares its name and captions with {first.name}; rename one of them")
            elif image.stem not in texts:
                self._skip(image, f"has no captions beside it in {image.stem}.txt", missing=True)
            else:
                yield from self._read_pair(image, texts[image.stem], class_id)
        for stem, text in texts.items():
            if stem not in described and (divided or self._is_in_split(stem)):
                self._skip(text, "has no image of the same name beside it", missing=True)

    def _read_pair(self, image: Path, text: Path, class_id: int) -> Iterator[Entry]:
        try:
            yield from self._entry(image, read_lines(self._owner, text), text, class_id)
        except DamagedSample as error:
            self._skip(*error.skipped)

    def _read_list(self, path: Path, divided: bool) -> Iterator[Entry]:
        images: dict[str, _Listed] = {}
        rows = _json_rows(self._owner, path) if path.suffix == ".jsonl" else _csv_rows(self._owner, path)
        for number, row in rows:
            if isinstance(row, str):
                # An invalid line names no image; it is assigned to one split, like an image, and reported there only.
                if divided or self._is_in_split(f"line {number}"):
                    self._skip(f"{path} line {number}", row)
                continue
            own_class = f"file {path.parent.relative_to(self.root) / row.file}"
            class_id = class_of(own_class if row.class_name is None else f"class {row.class_name}")
            listed = images.setdefault(row.file, _Listed(number, class_id, []))
            listed.captions.append(row.caption if listed.class_id == class_id else None)
        for file, listed in images.items():
            if not divided and not self._is_in_split(file):
                continue
            source = f"{path} line {listed.line}"
            captions = [caption for caption in listed.captions if caption is not None]
            if len(captions) < len(listed.captions):
                self._skip(source, f"gives {file} another class than a later line")
            else:
                yield from self._entry(path.parent / file, captions, source, listed.class_id)

    def _is_in_split(self, name: str) -> bool:
        """Whether an item of this name belongs to the split, in an undivided folder; counts those that do not."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "backslashreplace")).digest()
        is_validation = int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64
        is_in_split = is_validation == (self.split == "validation")
        self._in_other_split += not is_in_split
        return is_in_split

    def _expected(self) -> str:
        if self._in_other_split:
            return (
                f"a tenth, chosen by a hash of the names, is the validation split, and all {self._in_other_split} fell "
                "into the other split: add images, or divide them into train/ and validation/"
            )
        return super()._expected()


class _Listed(NamedTuple):
    """All lines of a list about one image."""

    line: int
    """Number of the first."""
    class_id: int
    captions: list[str | None]
    """None for a line that gives another class."""


class _Row(NamedTuple):
    """One line of a list."""

    file: str
    caption: str
    class_name: str | None


def _parse_row(row: Any) -> _Row | str:
    """Parse a line of a list, or return what is wrong with it."""
    if not isinstance(row, dict):
        return 'must be an object {"file": ..., "caption": ...}'
    file, caption, class_name = row.get("file"), row.get("caption"), row.get("class")
    if not isinstance(file, str) or not isinstance(caption, str):
        return "needs a file and a caption, both strings"
    if not is_inside(file):
        return f"names the file {file!r}, which is not in this folder"
    if class_name is not None and not isinstance(class_name, str | int):
        return f"has the class {class_name!r}; expected a name or a number"
    return _Row(str(PurePosixPath(file)), caption, None if class_name in (None, "") else str(class_name))


def _json_rows(owner: str, path: Path) -> Iterator[tuple[int, _Row | str]]:
    """Yield the number of each line with its content, or with what is wrong with it."""
    for number, line in enumerate(_read_text(owner, path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, _parse_row(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({error})"


def _csv_rows(owner: str, path: Path) -> Iterator[tuple[int, _Row | str]]:
    """Yield the number of the first line of each row with its content, or with what is wrong with it."""
    lines = list(StringIO(_read_text(owner, path), newline=""))
    done, header = 0, list[str]()

    def remaining() -> Iterator[str]:
        nonlocal done
        while done < len(lines):
            done += 1
            yield lines[done - 1]

    reader = csv.reader(remaining(), strict=True)
    while True:
        first = done + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield first, f"is not CSV ({error}); double any quotation mark inside a caption"
            # Restart after the first line: the lines swallowed by an unclosed quotation mark are rows of their own.
            done = first
            reader = csv.reader(remaining(), strict=True)
            continue
        if not header:
            header = [name.strip() for name in row or []]
            if header.count("file") != 1 or header.count("caption") != 1 or header.count("class") > 1:
                raise ValueError(
                    f"{owner}: {path} begins with {header}; the first line must name the columns file and caption, "
                    "once each and separated by commas."
                )
        elif row is None:
            return
        elif len(row) == len(header):
            yield first, _parse_row(dict(zip(header, row)))
        elif row:
            yield first, f"has {len(row)} columns instead of {len(header)}; quote captions that contain commas"


def _read_text(owner: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{owner}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error
