"""A user's own folder of images, with captions in text files beside them or in one list."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from io import StringIO
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.fields import CAPTION_FIELDS, FILE_FIELDS, captions_in, class_in
from mirror_modules.data.readers.files import (
    SPLITS,
    CaptionedFiles,
    Entry,
    class_named,
    class_of,
    read_lines,
    split_lines,
)
from mirror_modules.data.readers.names import NameIndex, is_hidden, is_inside

LISTS = ("captions.jsonl", "captions.csv")
# Lists of Hugging Face's image folders, read only if no text file belongs to an image: they may hold other metadata.
METADATA_LISTS = ("metadata.jsonl", "metadata.csv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
# In order of preference.
TEXT_SUFFIXES = (".txt", ".caption")
# Share of the validation split in folders without train/ and validation/, and its lowest number of images, which holds
# where as many are left for training.
VALIDATION_SHARE, VALIDATION_IMAGES = 0.1, 2
_FIELDS = (*FILE_FIELDS, *CAPTION_FIELDS, "class", "label")


class CaptionFolder(CaptionedFiles):
    """Square images with captions, from a folder of your own.

    Either each image has a text file of the same name beside it, one caption per line, or one list holds all captions:
    captions.jsonl with an object {"file": ..., "caption": ..., "class": ...} per line, or captions.csv with the columns
    file, caption and, optionally, class. A file listed on several lines has several captions. The lists of Hugging
    Face's image folders, metadata.jsonl and metadata.csv with file_name and text, are read as well. Images of one class
    are never each other's mismatched pairs; an image without a class is its own class.

    Names are compared up to Unicode form and case where no file has exactly the listed name. Hidden files are ignored;
    so are text files without an image, which are listed in `report.ignored` and in a warning.

    The folder is either divided into train/ and validation/, each with this content, or undivided: then a tenth of the
    images, chosen by a hash of their names, is the validation split, and at least two of four or more. Images added
    later do not move the others, except in a folder so small that two are more than the tenth.

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
        self._bound = int(VALIDATION_SHARE * 2**64)
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        divided = [name for name in SPLITS if (self.root / name).is_dir()]
        if divided:
            self._require(*SPLITS)
        folder = self.root / self.split if divided else self.root
        self._in_other_split = 0
        content = scan_folder(folder)
        if len(content.lists) > 1:
            names = " and ".join(path.name for path in content.lists)
            raise ValueError(f"{self._owner}: {folder} has both {names}; keep one of them.")
        if content.lists:
            yield from self._read_list(content.lists[0], bool(divided))
        else:
            yield from self._read_pairs(content, bool(divided))

    def _read_pairs(self, content: FolderContent, divided: bool) -> Iterator[Entry]:
        """Images with text files beside them; each image is its own class."""
        self._raise_bound({image.stem for image in content.texts})
        unused = NameIndex(text.name for text in content.unused_texts)
        for path, first in content.repeated_texts:
            if divided or self._is_in_split(path.stem):
                self._skip(path, f"shares its name with {first.name}; put all captions into one of them")
        described: dict[str, Path] = {}
        for class_id, image in enumerate(content.images):
            text = content.texts.get(image)
            first = described.setdefault(image.stem if text is None else text.stem, image)
            if not divided and not self._is_in_split(image.stem):
                self._in_other_split += 1
            elif first != image:
                self._skip(image, f"shares its name and captions with {first.name}; rename one of them")
            elif text is None:
                expected = f"{image.stem}.txt"
                self._skip(image, f"has no captions beside it in {expected}{unused.similar(expected)}", missing=True)
            else:
                yield from self._read_pair(image, text, class_id)
        for text in content.unused_texts:
            if divided or self._is_in_split(text.stem):
                self.report.ignore(text, "has no image of the same name beside it")

    def _read_pair(self, image: Path, text: Path, class_id: int) -> Iterator[Entry]:
        try:
            yield from self._entry(image, read_lines(self._owner, text), text, class_id)
        except DamagedSample as error:
            self._skip(*error.skipped)

    def _read_list(self, path: Path, divided: bool) -> Iterator[Entry]:
        images: dict[str, _Listed] = {}
        names: dict[str, str] = {}
        rows = _json_rows(self._owner, path) if path.suffix.lower() == ".jsonl" else _csv_rows(self._owner, path)
        for number, row in rows:
            if isinstance(row, str):
                # An invalid line names no image; it is assigned to one split, like an image, and reported there only.
                if divided or self._is_in_split(f"line {number}"):
                    self._skip(f"{path} line {number}", row)
                continue
            if row.file not in names:
                found = self._finder.find(path.parent, row.file)
                names[row.file] = row.file if found is None else found.relative_to(path.parent).as_posix()
            file = names[row.file]
            own_class = f"file {path.parent.relative_to(self.root) / file}"
            class_id = class_of(own_class) if row.class_name is None else class_named(row.class_name)
            listed = images.setdefault(file, _Listed(number, class_id, []))
            listed.captions.append(row.captions if listed.class_id == class_id else None)
        self._raise_bound(images)
        for file, listed in images.items():
            if not divided and not self._is_in_split(file):
                self._in_other_split += 1
                continue
            source = f"{path} line {listed.line}"
            captions = [captions for captions in listed.captions if captions is not None]
            if len(captions) < len(listed.captions):
                self._skip(source, f"gives {file} another class than a later line")
            elif image := self._find(source, path.parent, file):
                yield from self._entry(image, chain.from_iterable(captions), source, listed.class_id)

    def _is_in_split(self, name: str) -> bool:
        """Whether an item of this name belongs to the split, in an undivided folder."""
        return (self._hash(name) < self._bound) == (self.split == "validation")

    def _raise_bound(self, names: Collection[str]) -> None:
        """Raise the bound below which hashes are validation, if too few of the names are."""
        if len(names) >= 2 * VALIDATION_IMAGES:
            self._bound = max(self._bound, sorted(map(self._hash, names))[VALIDATION_IMAGES - 1] + 1)

    def _hash(self, name: str) -> int:
        """A number below 2^64."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "backslashreplace")).digest()
        return int.from_bytes(digest[:8], "big")

    def _expected(self) -> str:
        if self._in_other_split:
            return (
                f"a tenth, chosen by a hash of the names, is the validation split, and all {self._in_other_split} fell "
                "into the other split: add images, or divide them into train/ and validation/"
            )
        return super()._expected()


class FolderContent(NamedTuple):
    """The files of a folder by their role."""

    lists: list[Path]
    """Lists of captions."""
    images: list[Path]
    texts: dict[Path, Path]
    """The text file of each image that has one."""
    unused_texts: list[Path]
    """Text files of no image."""
    repeated_texts: list[tuple[Path, Path]]
    """Text files whose name up to the suffix is that of another one, and the latter."""


def scan_folder(folder: Path) -> FolderContent:
    """Sort the files of a folder by their role, without hidden ones."""
    with os.scandir(folder) as found:
        files = sorted(folder / file.name for file in found if not is_hidden(file.name) and file.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    texts: dict[str, Path] = {}
    repeated = []
    for suffix in TEXT_SUFFIXES:
        for path in files:
            if path.suffix.lower() == suffix:
                first = texts.setdefault(path.stem, path)
                if first != path and first.suffix.lower() == suffix:
                    repeated.append((path, first))
    # A text whose image has exactly its name belongs to no other image.
    others = NameIndex(texts.keys() - {image.stem for image in images})
    stems = {image: image.stem if image.stem in texts else others.find(image.stem) for image in images}
    text_of = {image: texts[stem] for image, stem in stems.items() if stem is not None}
    used = set(text_of.values())
    lists = [path for name in LISTS for path in files if path.name.lower() == name]
    if not lists and not text_of:
        lists = [path for name in METADATA_LISTS for path in files if path.name.lower() == name]
    return FolderContent(lists, images, text_of, [text for text in texts.values() if text not in used], repeated)


def is_caption_folder(root: Path) -> bool:
    """Whether `CaptionFolder` finds captions in a folder."""
    parts = [root / split for split in SPLITS if (root / split).is_dir()] or [root]
    contents = [scan_folder(part) for part in parts]
    return any(content.lists or content.texts for content in contents)


class _Listed(NamedTuple):
    """All lines of a list about one image."""

    line: int
    """Number of the first."""
    class_id: int
    captions: list[tuple[str, ...] | None]
    """None for a line that gives another class."""


class _Row(NamedTuple):
    """One line of a list."""

    file: str
    captions: tuple[str, ...]
    class_name: str | None


def _parse_row(row: Any) -> _Row | str:
    """Parse a line of a list, or return what is wrong with it."""
    if not isinstance(row, dict):
        return 'must be an object {"file": ..., "caption": ...}'
    file, captions = next((row[name] for name in FILE_FIELDS if name in row), None), captions_in(row)
    if not isinstance(file, str) or captions is None:
        return "needs a file and a caption, both strings"
    if not is_inside(file):
        return f"names the file {file!r}, which is not in this folder"
    try:
        class_name = class_in(row)
    except ValueError as error:
        return f"has a class that cannot be read ({error})"
    return _Row(str(PurePosixPath(file)), captions, None if class_name is None else str(class_name))


def _json_rows(owner: str, path: Path) -> Iterator[tuple[int, _Row | str]]:
    """Yield the number of each line with its content, or with what is wrong with it."""
    for number, line in enumerate(split_lines(_read_text(owner, path)), start=1):
        if line.strip():
            try:
                yield number, _parse_row(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({error})"


def _csv_rows(owner: str, path: Path) -> Iterator[tuple[int, _Row | str]]:
    """Yield the number of the first line of each row with its content, or with what is wrong with it."""
    lines = list(StringIO(_read_text(owner, path), newline=""))
    done, header, columns = 0, list[str](), list[str]()

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
            columns = [name.lower() for name in header]
            has_fields = all(any(name in columns for name in names) for names in (FILE_FIELDS, CAPTION_FIELDS))
            if not has_fields or any(columns.count(name) > 1 for name in _FIELDS):
                raise ValueError(
                    f"{owner}: {path} begins with {header}; the first line must name the columns file and caption, "
                    "once each and separated by commas."
                )
        elif row is None:
            return
        elif len(row) == len(header):
            yield first, _parse_row(dict(zip(columns, row)))
        elif row:
            yield first, f"has {len(row)} columns instead of {len(header)}; quote captions that contain commas"


def _read_text(owner: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{owner}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error
