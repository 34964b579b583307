"""What all data sets on disk share: a list of image files with captions, decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.damage import DamagedSample, ErrorReport, printable
from mirror_modules.data.images import Box, decode_square, image_size, import_pillow, read_square
from mirror_modules.data.sample import CaptionedImage

SPLITS = ("train", "validation")
# Control characters and halves of surrogate pairs; the latter come out of JSON and can be written nowhere.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_WORD = re.compile(r"[^\W_]")


class Part(NamedTuple):
    """Bytes of a larger file."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. The file is opened for them alone, so that processes share no position in it."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Entry(NamedTuple):
    """One image file and everything that is said of it."""

    image: Path
    captions: tuple[str, ...]
    class_id: int
    box: Box | None = None
    """What is cut out of the image; None takes all of it."""
    part: Part | None = None
    """Where its bytes are, if `image` only names a file in an archive."""


class CaptionedFiles:
    """Square photographs with their captions: the common part of the data sets on disk.

    The captions are read at once, a photograph when it is asked for: its shorter side is resized (antialiased) and the
    middle square kept. Ask for a somewhat larger `resolution` than the model's to leave room for random crops.
    """

    layout: ClassVar[str]
    """What the folder must hold, in words."""
    entries: tuple[Entry, ...]
    """The samples: their files, captions, and classes."""
    report: ErrorReport
    """What was left out. Hand it to `InMemoryCaptions`, and it goes on in it."""

    def __init__(self, root: str | Path, split: str, resolution: int, on_error: str) -> None:
        check_choice(self._owner, "split", split, SPLITS)
        check_positive(self._owner, resolution=resolution)
        import_pillow()
        self.root = Path(root)
        self.split = split
        self.resolution = resolution
        self.report = ErrorReport(on_error)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self._owner}: there is no folder {self.root}; it must hold {self.layout}.")
        self.entries = tuple(self._read_entries())
        count, total = len(self.report.skipped), len(self.entries) + len(self.report.skipped)
        self.report.check(self._owner, count, total)
        self.report.share_at_opening = count / max(total, 1)
        if not self.entries and on_error != "list":
            raise ValueError(f"{self._owner}: {self._whence()} no photograph; {self._expected()}.")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> CaptionedImage:
        """The sample at `index`.

        Raises:
            IndexError: There is no such sample.
            ValueError: The photograph cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._owner}: index {index} is outside the {len(self)} samples.")
        entry = self.entries[index]
        return CaptionedImage(self._read_image(index % len(self)), entry.captions, entry.class_id, {})

    def stored_size(self, index: int) -> tuple[int, int]:
        """Width and height of an image that can be read, as it is stored."""
        entry = self.entries[index]
        return image_size(entry.image if entry.part is None else BytesIO(entry.part.read()))

    def _read_image(self, index: int) -> NDArray[np.uint8]:
        entry = self.entries[index]
        if entry.part is None:
            return read_square(entry.image, self.resolution, entry.box)
        try:
            content = entry.part.read()
        except OSError as error:
            raise DamagedSample(self._owner, entry.image, f"cannot be read ({error.strerror})") from error
        return decode_square(content, str(entry.image), self.resolution)

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _whence(self) -> str:
        return f"the {self.split} split of {self.root} has"

    def _expected(self) -> str:
        return f"the folder must hold {self.layout}"

    def _read_entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def _require(self, *parts: str) -> None:
        for part in parts:
            if not (self.root / part).exists():
                raise FileNotFoundError(
                    f"{self._owner}: {self.root} has no {part}; the folder must hold {self.layout}."
                )

    def _leave_out(self, file: str | Path, reason: str, *, missing: bool = False) -> None:
        self.report.add(self._owner, file, reason, missing=missing)

    def _entry(
        self, image: Path, lines: Iterable[str], source: str | Path, class_id: int, box: Box | None = None
    ) -> Iterator[Entry]:
        """The sample, unless it has to be left out: its file is missing, or no line says anything."""
        # Not is_file, which refuses names that are too long with an error of its own.
        if not os.path.isfile(image):
            self._leave_out(source, f"describes {image}, which does not exist", missing=True)
        elif captions := clean_captions(lines):
            yield Entry(image, captions, class_id, box)
        else:
            self._leave_out(source, f"holds no caption of {image.name}")


def check_apart(owner: str, *splits: CaptionedFiles) -> None:
    """Require that no image is in more than one of the splits.

    Raises:
        ValueError: One is.
    """
    shared = set.intersection(*({entry.image for entry in dataset.entries} for dataset in splits))
    if shared:
        raise ValueError(
            f"{owner}: {len(shared)} images are in both splits, such as {printable(min(shared))}; what is trained on "
            "says nothing in validation: take them out of one of them."
        )


def clean_captions(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines that hold a word, without control characters and the space around them."""
    captions = (_UNPRINTABLE.sub(" ", line).strip() for line in lines)
    return tuple(caption for caption in captions if _WORD.search(caption))


def class_of(name: str) -> int:
    """The class of this name: the same in every process, and in both splits."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:8], "big") // 2


def read_lines(owner: str, path: Path) -> list[str]:
    """The lines of a text file that are not blank, without the space around them.

    Raises:
        ValueError: It cannot be read, or is not UTF-8.
    """
    try:
        # A pipe among the files would be waited for without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedSample(owner, path, "is no regular file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedSample(owner, path, f"is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DamagedSample(owner, path, f"cannot be read ({error.strerror})") from error
    # Not splitlines, which takes control characters for the ends of lines.
    return [line.strip() for line in text.split("\n") if line.strip()]


def is_inside(name: str) -> bool:
    """Is this the name of a file in a folder, and not of one elsewhere?"""
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
