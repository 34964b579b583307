"""The birds of CUB-200-2011 with ten human captions each, in the layout that text-to-image code shares."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from mirror_modules.data.damage import DamagedSample
from mirror_modules.data.files import CaptionedFiles, Entry, is_inside, read_lines
from mirror_modules.data.images import Box
from mirror_modules.data.safe_pickle import read_pickle

_FOLDERS = {"train": "train", "validation": "test"}
_CAPTIONS_EACH = 10
_END = "<end>"


class CubBirds(CaptionedFiles):
    """Birds with their captions, cut out around their bounding boxes. The splits have no class in common.

    A square is kept around the middle of the box, one and a half times as wide as the box's longer side, cut off at the
    image's borders. Captions come from captions.pickle where there is one, else from the text files. Pickles are read
    without running what else they may ask for.

    Args:
        root: The folder that holds CUB_200_2011/, text/, train/ and test/.
        split: "train", or "validation" for the classes in test/.
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    layout: ClassVar[str] = (
        "CUB_200_2011/ with images/, images.txt and bounding_boxes.txt, train/ and test/ with filenames.pickle and "
        "class_info.pickle, and captions.pickle or text/"
    )

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        images, folder = Path("CUB_200_2011"), _FOLDERS[self.split]
        lists = [f"{each}/{name}.pickle" for each in _FOLDERS.values() for name in ("filenames", "class_info")]
        self._require(*map(str, (images / "images", images / "images.txt", images / "bounding_boxes.txt")), *lists)
        names_file, classes_file = (self.root / folder / f"{name}.pickle" for name in ("filenames", "class_info"))
        names = [_text(name) for name in _read_list(names_file)]
        classes = _read_list(classes_file)
        if len(classes) != len(names):
            raise ValueError(
                f"{self._owner}: {classes_file} has {len(classes)} classes, but {names_file} has {len(names)} images; "
                "they must belong together."
            )
        of_splits = [_read_list(self.root / each / "class_info.pickle") for each in _FOLDERS.values()]
        in_both = set.intersection(*({number for number in each if _is_class(number)} for each in of_splits))
        if in_both:
            raise ValueError(
                f"{self._owner}: class {min(in_both)} is in class_info.pickle of both train and test in {self.root}; "
                f"images that are trained on say nothing in validation: take it out of one of them."
            )
        boxes = self._read_boxes(self.root / images)
        pickled = self._read_pickled_captions(names)
        if pickled is None:
            self._require("text")
        seen = set()
        for i, (name, class_id) in enumerate(zip(names, classes)):
            source = f"{names_file} entry {i}"
            if name is None or not is_inside(name):
                self._leave_out(source, f"is {_shown(name)}; expected the name of an image, such as 001.Wren/Wren_0001")
            elif not _is_class(class_id):
                self._leave_out(
                    f"{classes_file} entry {i}", f"is {_shown(class_id)}; expected the number of a class, below 2**31"
                )
            elif name in seen:
                self._leave_out(source, f"names {name} a second time")
            else:
                seen.add(name)
                yield from self._read_entry(name, class_id, boxes, None if pickled is None else pickled[i])

    def _read_entry(
        self, name: str, class_id: int, boxes: dict[str, Box | None], captions: list[str] | None
    ) -> Iterator[Entry]:
        image = self.root / "CUB_200_2011" / "images" / f"{name}.jpg"
        box = boxes.get(name)
        if box is None:
            self._leave_out(image, "has no bounding box in bounding_boxes.txt with a width and a height")
            return
        source = self.root / "captions.pickle"
        if captions is None:
            source = self.root / "text" / f"{name}.txt"
            try:
                captions = read_lines(self._owner, source)
            except DamagedSample as error:
                self._leave_out(*error.skipped, missing=not os.path.exists(source))
                return
        yield from self._entry(image, captions, source, class_id, box)

    def _read_boxes(self, folder: Path) -> dict[str, Box | None]:
        """From names without .jpg to bounding boxes; None for one that is no box."""
        names = {}
        for fields in _read_table(self._owner, folder / "images.txt", 2):
            names[fields[0]] = fields[1].removesuffix(".jpg")
        boxes = {}
        for number, *numbers in _read_table(self._owner, folder / "bounding_boxes.txt", 5):
            if number in names:
                boxes[names[number]] = _box(numbers)
        return boxes

    def _read_pickled_captions(self, names: list[str | None]) -> list[list[str]] | None:
        """Ten captions for each image, or None without captions.pickle."""
        path = self.root / "captions.pickle"
        if not path.exists():
            return None
        content = read_pickle(path)
        if not isinstance(content, list | tuple) or len(content) < 3 or not isinstance(content[2], dict):
            raise ValueError(
                f"{self._owner}: {path} must be a list of training captions, test captions, words by number, and "
                "numbers by word."
            )
        captions, words = content[0 if self.split == "train" else 1], content[2]
        if not isinstance(captions, list | tuple) or len(captions) != _CAPTIONS_EACH * len(names):
            count = len(captions) if isinstance(captions, list | tuple) else f"no list ({type(captions).__name__})"
            raise ValueError(
                f"{self._owner}: {path} has {count} captions of split {self.split!r}; expected {_CAPTIONS_EACH} for "
                f"each of the {len(names)} images. Remove it to read the text files."
            )
        # A word that is not listed is read as nothing, as one that is no text.
        listed = {number: _text(word) or "" for number, word in words.items()}
        spoken = [_spoken(caption, listed) for caption in captions]
        return [spoken[i : i + _CAPTIONS_EACH] for i in range(0, len(spoken), _CAPTIONS_EACH)]


def _is_class(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def _shown(value: Any) -> str:
    """What a message says of something out of a pickle: a number or a list may be endless."""
    return repr(value) if value is None or isinstance(value, str) else f"of type {type(value).__name__}"


def _read_list(path: Path) -> list[Any]:
    content = read_pickle(path)
    if not isinstance(content, list | tuple):
        raise ValueError(f"CubBirds: {path} must hold a list, but it holds a {type(content).__name__}.")
    return list(content)


def _read_table(owner: str, path: Path, columns: int) -> Iterator[list[str]]:
    for i, line in enumerate(read_lines(owner, path)):
        # Names may hold spaces, numbers may not.
        fields = line.split(maxsplit=columns - 1)
        if len(fields) != columns:
            raise ValueError(f"{owner}: {path} line {i + 1} is {line!r}; expected {columns} columns.")
        yield fields


def _box(numbers: Iterable[str]) -> Box | None:
    try:
        box = Box(*map(float, numbers))
    except ValueError:
        return None
    # Anything larger would overflow, and no image is.
    fits = all(math.isfinite(number) and abs(number) < 2**31 for number in box)
    return box if fits and box.width > 0 and box.height > 0 else None


def _spoken(caption: Any, words: dict[Any, str]) -> str:
    numbers = caption if isinstance(caption, list | tuple) else []
    spoken = [words.get(number, "") for number in numbers if isinstance(number, int)]
    return " ".join(word for word in spoken if word not in ("", _END))


def _text(value: Any) -> str | None:
    """Text as it is, or out of bytes; None for anything else."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    return value if isinstance(value, str) else None
