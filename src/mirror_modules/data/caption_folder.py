"""A folder of your own images: captions in text files beside them, or in one list."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from mirror_modules.data.damage import DamagedSample
from mirror_modules.data.files import SPLITS, CaptionedFiles, Entry, class_of, is_inside, read_lines

LISTS = ("captions.jsonl", "captions.csv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
# Of the images that are not divided into train/ and validation/.
VALIDATION_SHARE = 0.1


class CaptionFolder(CaptionedFiles):
    """Square images with their captions, out of a folder of your own.

    Either each image has a text file of its name beside it, with one caption a line, or there is one list:
    captions.jsonl with an object {"file": ..., "caption": ..., "class": ...} on each line, or captions.csv with the
    columns file, caption and, if you like, class. A file on several lines has several captions. Images of one class are
    not taken for each other's mismatches; one without a class is a class of its own.

    The folder holds all of this in train/ and again in validation/, or once: then a tenth of the images, chosen by
    their names, is for validation. Images that are added later change nothing for those that are there.

    Args:
        root: The folder.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        seed: Chooses the images for validation, where the folder does not.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    layout: ClassVar[str] = (
        "images, each with a text file of its name beside it, or captions.jsonl or captions.csv; all of it in train/ "
        "and validation/, or once"
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
        self._others = 0
        lists = [name for name in LISTS if (folder / name).is_file()]
        if len(lists) > 1:
            raise ValueError(f"{self._owner}: {folder} has both {' and '.join(lists)}; keep one of them.")
        if lists:
            yield from self._read_list(folder / lists[0], bool(divided))
        else:
            yield from self._read_pairs(folder, bool(divided))

    def _read_pairs(self, folder: Path, divided: bool) -> Iterator[Entry]:
        """Images with text files beside them; each image is a class of its own."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        texts: dict[str, Path] = {}
        for path in files:
            if path.suffix.lower() != ".txt":
                continue
            first = texts.setdefault(path.stem, path)
            if first != path and (divided or self._is_mine(path.stem)):
                self._leave_out(path, f"has the name of {first.name}; put all captions into one of them")
        described: dict[str, Path] = {}
        for class_id, image in enumerate(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES):
            first = described.setdefault(image.stem, image)
            if not divided and not self._is_mine(image.stem):
                continue
            if first != image:
                self._leave_out(image, f"has the name of {first.name}, and the same captions; rename one of them")
            elif image.stem not in texts:
                self._leave_out(image, f"has no captions beside it in {image.stem}.txt", missing=True)
            else:
                yield from self._read_pair(image, texts[image.stem], class_id)
        for stem, text in texts.items():
            if stem not in described and (divided or self._is_mine(stem)):
                self._leave_out(text, "has no image of its name beside it", missing=True)

    def _read_pair(self, image: Path, text: Path, class_id: int) -> Iterator[Entry]:
        try:
            yield from self._entry(image, read_lines(self._owner, text), text, class_id)
        except DamagedSample as error:
            self._leave_out(*error.skipped)

    def _read_list(self, path: Path, divided: bool) -> Iterator[Entry]:
        images: dict[str, _Listed] = {}
        rows = _json_rows(self._owner, path) if path.suffix == ".jsonl" else _csv_rows(self._owner, path)
        for number, said in rows:
            if isinstance(said, str):
                place = f"{path} line {number}"
                # A line of nothing belongs to one split only, as an image does.
                if divided or self._is_mine(f"line {number}"):
                    self._leave_out(place, said)
                continue
            own = f"file {path.parent.relative_to(self.root) / said.file}"
            class_id = class_of(own if said.group is None else f"class {said.group}")
            listed = images.setdefault(said.file, _Listed(number, class_id, []))
            listed.captions.append(said.caption if listed.class_id == class_id else None)
        for file, listed in images.items():
            if not divided and not self._is_mine(file):
                continue
            source = f"{path} line {listed.line}"
            captions = [caption for caption in listed.captions if caption is not None]
            if len(captions) < len(listed.captions):
                self._leave_out(source, f"gives {file} another class than a later line does")
            else:
                yield from self._entry(path.parent / file, captions, source, listed.class_id)

    def _is_mine(self, name: str) -> bool:
        """Does what has this name belong to the split?"""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "backslashreplace")).digest()
        is_validation = int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64
        is_mine = is_validation == (self.split == "validation")
        self._others += not is_mine
        return is_mine

    def _expected(self) -> str:
        if self._others:
            return (
                f"a tenth, chosen by their names, is for validation, and all {self._others} went to the other split: "
                "add images, or divide them into train/ and validation/"
            )
        return super()._expected()


class _Listed(NamedTuple):
    """What a list says of one image."""

    line: int
    class_id: int
    captions: list[str | None]
    """None for a line that gives another class."""


class _Said(NamedTuple):
    """What one line says."""

    file: str
    caption: str
    group: str | None


def _said(row: Any) -> _Said | str:
    """What a line says, or what is wrong with it."""
    if not isinstance(row, dict):
        return 'must be an object {"file": ..., "caption": ...}'
    file, caption, group = row.get("file"), row.get("caption"), row.get("class")
    if not isinstance(file, str) or not isinstance(caption, str):
        return "needs a file and a caption, both of them text"
    if not is_inside(file):
        return f"names the file {file!r}, which is not in this folder"
    if group is not None and not isinstance(group, str | int):
        return f"has the class {group!r}; expected a name or a number"
    return _Said(str(PurePosixPath(file)), caption, None if group in (None, "") else str(group))


def _json_rows(owner: str, path: Path) -> Iterator[tuple[int, _Said | str]]:
    """Number and content of each line, or what is wrong with it."""
    for number, line in enumerate(_read_text(owner, path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, _said(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({error})"


def _csv_rows(owner: str, path: Path) -> Iterator[tuple[int, _Said | str]]:
    """Number of its first line and content of each row, or what is wrong with it."""
    lines = list(StringIO(_read_text(owner, path), newline=""))
    done, header = 0, list[str]()

    def following() -> Iterator[str]:
        nonlocal done
        while done < len(lines):
            done += 1
            yield lines[done - 1]

    reader = csv.reader(following(), strict=True)
    while True:
        first = done + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield first, f"is not CSV ({error}); double a quotation mark that is part of a caption"
            # The lines that an open quotation mark has swallowed are rows of their own.
            done = first
            reader = csv.reader(following(), strict=True)
            continue
        if not header:
            header = [name.strip() for name in row or []]
            if header.count("file") != 1 or header.count("caption") != 1 or header.count("class") > 1:
                raise ValueError(
                    f"{owner}: {path} begins with {header}; the first line must name the columns file and caption, "
                    "once each and with commas between them."
                )
        elif row is None:
            return
        elif len(row) == len(header):
            yield first, _said(dict(zip(header, row)))
        elif row:
            yield first, f"has {len(row)} columns instead of {len(header)}; put captions with commas into double quotes"


def _read_text(owner: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{owner}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error
