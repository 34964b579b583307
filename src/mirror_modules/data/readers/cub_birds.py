"""CUB-200-2011 birds with ten human captions each, in the layout common to text-to-image code."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.files import CaptionedFiles, Entry, is_inside, read_lines
from mirror_modules.data.readers.images import Box
from mirror_modules.data.readers.safe_pickle import read_pickle

_FOLDERS = {"train": "train", "validation": "test"}
_CAPTIONS_PER_IMAGE = 10
_END = "<end>"


class CubBirds(CaptionedFiles):
    """CUB-200-2011: birds with captions, cropped around their bounding boxes. The splits have no class in common.

    The crop is a square centered on the bounding box, 1.5 times as wide as the box's longer side, clipped to the image.
    Captions come from captions.pickle if it exists, else from the text files. Pickles are read by a restricted
    unpickler, which runs no code that they name.

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
                "both must describe the same images."
            )
        split_classes = [_read_list(self.root / each / "class_info.pickle") for each in _FOLDERS.values()]
        in_both = set.intersection(*({number for number in each if _is_class(number)} for each in split_classes))
        if in_both:
            raise ValueError(
                f"{self._owner}: class {min(in_both)} is in class_info.pickle of both train and test in {self.root}; "
                "validating on training images is meaningless: remove the class from one of them."
            )
        boxes = self._read_boxes(self.root / images)
        pickled = self._read_pickled_captions(names)
        if pickled is None:
            self._require("text")
        seen = set()
        for i, (name, class_id) in enumerate(zip(names, classes)):
            source = f"{names_file} entry {i}"
            if name is None or not is_inside(name):
                self._skip(source, f"is {_describe(name)}; expected an image name such as 001.Wren/Wren_0001")
            elif not _is_class(class_id):
                self._skip(
                    f"{classes_file} entry {i}", f"is {_describe(class_id)}; expected a class number below 2**31"
                )
            elif name in seen:
                self._skip(source, f"names {name} a second time")
            else:
                seen.add(name)
                yield from self._read_entry(name, class_id, boxes, None if pickled is None else pickled[i])

    def _read_entry(
        self, name: str, class_id: int, boxes: dict[str, Box | None], captions: list[str] | None
    ) -> Iterator[Entry]:
        image = self.root / "CUB_200_2011" / "images" / f"{name}.jpg"
        box = boxes.get(name)
        if box is None:
            self._skip(image, "has no bounding box of positive size in bounding_boxes.txt")
            return
        source = self.root / "captions.pickle"
        if captions is None:
            source = self.root / "text" / f"{name}.txt"
            try:
                captions = read_lines(self._owner, source)
            except DamagedSample as error:
                self._skip(*error.skipped, missing=not os.path.exists(source))
                return
        yield from self._entry(image, captions, source, class_id, box)

    def _read_boxes(self, folder: Path) -> dict[str, Box | None]:
        """Bounding boxes by image name without .jpg; None for an invalid box."""
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
        if not isinstance(captions, list | tuple) or len(captions) != _CAPTIONS_PER_IMAGE * len(names):
            is_list = isinstance(captions, list | tuple)
            found = f"{len(captions)} captions" if is_list else f"no list of captions ({type(captions).__name__})"
            raise ValueError(
                f"{self._owner}: {path} has {found} for split {self.split!r}; expected {_CAPTIONS_PER_IMAGE} for each "
                f"of the {len(names)} images. Remove the file to read the text files instead."
            )
        # Numbers without a word, and words that are not text, are dropped.
        vocabulary = {number: _text(word) or "" for number, word in words.items()}
        decoded = [_decode(caption, vocabulary) for caption in captions]
        return [decoded[i : i + _CAPTIONS_PER_IMAGE] for i in range(0, len(decoded), _CAPTIONS_PER_IMAGE)]


def _is_class(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def _describe(value: Any) -> str:
    """An object from a pickle, for a message: its type alone if its repr may be arbitrarily long."""
    return repr(value) if value is None or isinstance(value, str) else f"of type {type(value).__name__}"


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


def _decode(caption: Any, vocabulary: dict[Any, str]) -> str:
    numbers = caption if isinstance(caption, list | tuple) else []
    words = [vocabulary.get(number, "") for number in numbers if isinstance(number, int)]
    return " ".join(word for word in words if word not in ("", _END))


def _text(value: Any) -> str | None:
    """Text, decoded as Latin-1 if it is bytes; None for any other type."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    return value if isinstance(value, str) else None
