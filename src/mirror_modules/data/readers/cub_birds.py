"""CUB-200-2011 birds with ten human captions each, in the layout common to text-to-image code."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules.data.readers.damage import DamagedSample, excerpt
from mirror_modules.data.readers.files import CaptionedFiles, Entry, read_lines
from mirror_modules.data.readers.images import Box
from mirror_modules.data.readers.names import NameIndex, is_inside, with_slashes
from mirror_modules.data.readers.safe_pickle import PickledDict, read_pickle

_FOLDERS = {"train": "train", "validation": "test"}
_CAPTIONS_PER_IMAGE = 10
_END = "<end>"
_JPG = re.compile(r"\.jpe?g$", re.IGNORECASE)
# Two bytes of a pickle refer to a text of any length, so a text that is copied must be short. File systems limit the
# names of a folder and a file to 255 bytes each.
_NAME_LENGTH = 511
_WORD_LENGTH = 100
_CAPTION_WORDS = 1000
_VOCABULARY_SIZE = 2**20


class CubBirds(CaptionedFiles):
    """CUB-200-2011: birds with captions, cropped around their bounding boxes. The splits have no class in common.

    The crop is a square centered on the bounding box, 1.5 times as wide as the box's longer side, clipped to the image.
    Samples have the box within the crop, and the key points of parts/ where that folder is present. Captions come from
    captions.pickle if it exists, else from the text files. Pickles are read by a restricted unpickler, which runs no
    code that they name.

    Args:
        root: Folder with CUB_200_2011/, text/, train/ and test/.
        split: "train", or "validation" for the classes in test/.
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file has invalid content; the message names the file.
        ImportError: Pillow is missing.

    Examples:
        >>> from mirror_modules.data import CubBirds
        >>> birds = CubBirds("data/birds", resolution=76)  # doctest: +SKIP
        >>> birds[0].image.shape, len(birds[0].captions)  # doctest: +SKIP
        ((76, 76, 3), 10)
        >>> "bounding_boxes.txt" in CubBirds.layout
        True
    """

    layout: ClassVar[str] = (
        "CUB_200_2011/ with images/, images.txt and bounding_boxes.txt, train/ and test/ with filenames.pickle and "
        "class_info.pickle, captions.pickle or text/, and optionally parts/ with parts.txt and part_locs.txt"
    )

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        images, folder = Path("CUB_200_2011"), _FOLDERS[self.split]
        lists = [f"{each}/{name}.pickle" for each in _FOLDERS.values() for name in ("filenames", "class_info")]
        self._require(*map(str, (images / "images", images / "images.txt", images / "bounding_boxes.txt")), *lists)
        names_file, classes_file = (self.root / folder / f"{name}.pickle" for name in ("filenames", "class_info"))
        names, classes = _read_list(names_file), _read_list(classes_file)
        if len(classes) != len(names):
            raise ValueError(
                f"{self._owner}: {classes_file} has {len(classes)} classes, but {names_file} has {len(names)} images; "
                "both must describe the same images."
            )
        in_both = _shared_classes(*(_read_list(self.root / each / "class_info.pickle") for each in _FOLDERS.values()))
        if in_both.size:
            raise ValueError(
                f"{self._owner}: class {in_both.min()} is in class_info.pickle of both train and test in {self.root}; "
                "validating on training images is meaningless: remove the class from one of them."
            )
        listed = self._read_images(self.root / images)
        index = NameIndex(listed)
        pickled = self._read_pickled_captions(len(names))
        if pickled is None:
            self._require("text")
        captions_of: Iterable[list[str] | None] = repeat(None) if pickled is None else pickled
        seen = set()
        for i, (value, class_id, captions) in enumerate(zip(names, classes, captions_of)):
            source, name = f"{names_file} entry {i}", with_slashes(_text(value, _NAME_LENGTH) or "")
            if not is_inside(name):
                self._skip(
                    source,
                    f"is {_describe(value)}; expected an image name such as 001.Wren/Wren_0001, of at most "
                    f"{_NAME_LENGTH} characters",
                )
            elif not _is_class(class_id):
                self._skip(
                    f"{classes_file} entry {i}", f"is {_describe(class_id)}; expected a class number below 2**31"
                )
            elif name in seen:
                self._skip(source, f"names {name} a second time")
            elif (found := index.find(name)) is None:
                self._skip(source, f"names {name}, which is not in images.txt{index.similar(name)}")
            else:
                seen.add(name)
                yield from self._read_entry(name, class_id, listed[found], captions)

    def _read_entry(self, name: str, class_id: int, listed: _Listed, captions: list[str] | None) -> Iterator[Entry]:
        images = self.root / "CUB_200_2011" / "images"
        if listed.box is None:
            self._skip(images / listed.file, "has no bounding box of positive size in bounding_boxes.txt")
            return
        source = self.root / "captions.pickle"
        if captions is None:
            file = f"{name}.txt"
            source = self._finder.find(self.root / "text", file) or self.root / "text" / file
            try:
                captions = read_lines(self._owner, source)
            except DamagedSample as error:
                self._skip(*error.skipped, missing=not os.path.exists(source))
                return
        if image := self._find(source, images, listed.file):
            yield from self._entry(image, captions, source, class_id, listed.box, listed.points)

    def _read_images(self, folder: Path) -> dict[str, _Listed]:
        """Files, bounding boxes and key points of images.txt, by name without .jpg."""
        files = {}
        for number, name in _read_table(self._owner, folder / "images.txt", 2):
            files[number] = with_slashes(name)
        boxes = {}
        for number, *numbers in _read_table(self._owner, folder / "bounding_boxes.txt", 5):
            boxes[number] = _box(numbers)
        points = self._read_points(folder / "parts")
        hidden = (None,) * len(self.point_names) or None
        return {
            _JPG.sub("", file): _Listed(file, boxes.get(number), points.get(number, hidden))
            for number, file in files.items()
        }

    def _read_points(self, folder: Path) -> dict[str, _Points]:
        """The key points of each image by its number, without parts/ none; their names become `point_names`."""
        names_file, locations = folder / "parts.txt", folder / "part_locs.txt"
        if not (names_file.is_file() and locations.is_file()):
            return {}
        names = dict(_read_table(self._owner, names_file, 2))
        self.point_names = tuple(names.values())
        rows = {number: i for i, number in enumerate(names)}
        points: dict[str, list[tuple[float, float] | None]] = {}
        for image, number, *values in _read_table(self._owner, locations, 5):
            if number not in rows:
                raise ValueError(f"{self._owner}: {locations} has part {number!r}, which is not in {names_file}.")
            if (point := _point(values)) is not None:
                points.setdefault(image, [None] * len(names))[rows[number]] = point
        return {image: tuple(each) for image, each in points.items()}

    def _read_pickled_captions(self, images: int) -> Iterator[list[str]] | None:
        """Ten captions for each image, or None without captions.pickle."""
        path = self.root / "captions.pickle"
        if not path.exists():
            return None
        content = read_pickle(path)
        if not isinstance(content, list | tuple) or len(content) < 3 or not isinstance(content[2], PickledDict):
            raise ValueError(
                f"{self._owner}: {path} must be a list of training captions, test captions, words by number, and "
                "numbers by word."
            )
        captions, words = content[0 if self.split == "train" else 1], content[2]
        if not isinstance(captions, list | tuple) or len(captions) != _CAPTIONS_PER_IMAGE * images:
            is_list = isinstance(captions, list | tuple)
            found = f"{len(captions)} captions" if is_list else f"no list of captions ({type(captions).__name__})"
            raise ValueError(
                f"{self._owner}: {path} has {found} for split {self.split!r}; expected {_CAPTIONS_PER_IMAGE} for each "
                f"of the {images} images. Remove the file to read the text files instead."
            )
        # Captions and words that are too long, words that are not text, and numbers without a word are dropped.
        vocabulary = [""] * _VOCABULARY_SIZE
        for number, word in words.items():
            if isinstance(number, int) and 0 <= number < _VOCABULARY_SIZE:
                vocabulary[number] = _text(word, _WORD_LENGTH) or ""
        # One image at a time: decoded captions may take hundreds of times as much memory as the file.
        return (
            [_decode(caption, vocabulary) for caption in captions[i : i + _CAPTIONS_PER_IMAGE]]
            for i in range(0, len(captions), _CAPTIONS_PER_IMAGE)
        )


_Points = tuple[tuple[float, float] | None, ...]


class _Listed(NamedTuple):
    """An image of images.txt."""

    file: str
    box: Box | None
    """None without a valid one."""
    points: _Points | None
    """None without parts/."""


def _is_class(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def _shared_classes(training: list[Any], validation: list[Any]) -> NDArray[np.int64]:
    """The class numbers in both lists.

    Sorted: numbers can be chosen such that every lookup in a set of them visits all of them.
    """
    first, second = (np.sort(np.array(list(filter(_is_class, each)), np.int64)) for each in (training, validation))
    return second[np.searchsorted(first, second, "left") < np.searchsorted(first, second, "right")]


def _describe(value: Any) -> str:
    """An object from a pickle, for a message: its type alone unless it is text."""
    if isinstance(value, str | bytes):
        return excerpt(repr(value[:_NAME_LENGTH]))
    return "None" if value is None else f"of type {type(value).__name__}"


def _read_list(path: Path) -> list[Any]:
    content = read_pickle(path)
    if not isinstance(content, list | tuple):
        raise ValueError(f"CubBirds: {path} must hold a list, but it holds a {type(content).__name__}.")
    return list(content)


def _read_table(owner: str, path: Path, columns: int) -> Iterator[list[str]]:
    for i, line in enumerate(read_lines(owner, path)):
        # The last column is a file name, which may contain spaces.
        fields = line.split(maxsplit=columns - 1)
        if len(fields) != columns:
            raise ValueError(f"{owner}: {path} line {i + 1} is {line!r}; expected {columns} columns.")
        yield fields


def _box(numbers: Iterable[str]) -> Box | None:
    try:
        box = Box(*map(float, numbers))
    except ValueError:
        return None
    # Larger numbers overflow later, and no image is that large.
    fits = all(math.isfinite(number) and abs(number) < 2**31 for number in box)
    return box if fits and box.width > 0 and box.height > 0 else None


def _point(numbers: Iterable[str]) -> tuple[float, float] | None:
    """The place of a key point; None if it is not visible, or the numbers are invalid."""
    try:
        x, y, visible = map(float, numbers)
    except ValueError:
        return None
    fits = math.isfinite(x) and math.isfinite(y) and max(abs(x), abs(y)) < 2**31
    return (x, y) if fits and visible == 1 else None


def _decode(caption: Any, vocabulary: list[str]) -> str:
    numbers = caption if isinstance(caption, list | tuple) and len(caption) <= _CAPTION_WORDS else []
    words = [vocabulary[number] for number in numbers if isinstance(number, int) and 0 <= number < len(vocabulary)]
    return " ".join(word for word in words if word not in ("", _END))


def _text(value: Any, max_length: int) -> str | None:
    """Text, decoded as Latin-1 if it is bytes; None if it is longer, and for any other type."""
    if not isinstance(value, str | bytes) or len(value) > max_length:
        return None
    return value.decode("latin1") if isinstance(value, bytes) else value
