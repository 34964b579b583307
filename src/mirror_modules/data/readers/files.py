"""The common base of the data sets on disk: a list of image files with captions, decoded on access."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.readers.damage import DamagedSample, ErrorReport, one_line, printable
from mirror_modules.data.readers.images import Box, View, decode_square, image_size, import_pillow, read_view
from mirror_modules.data.readers.names import FileFinder
from mirror_modules.data.sample import CaptionedImage, KeyPoint, SubjectBox

SPLITS = ("train", "validation")
# Control characters and lone surrogates; JSON can produce the latter, and UTF-8 cannot encode them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_WORD = re.compile(r"[^\W_]")


class Part(NamedTuple):
    """A byte range of a larger file."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the bytes through a file handle of their own, so that processes share no file position."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Entry(NamedTuple):
    """An image file with its captions and class."""

    image: Path
    captions: tuple[str, ...]
    class_id: int
    box: Box | None = None
    """Bounding box to crop around; None uses the whole image."""
    part: Part | None = None
    """Byte range of the image, if `image` only names a member of an archive."""
    points: tuple[tuple[float, float] | None, ...] | None = None
    """x and y of the key points in pixels, None for one that is not visible; None if the data set has no key points."""


class Location(NamedTuple):
    """Where the subject is in an image as it is returned."""

    box: SubjectBox | None = None
    points: tuple[KeyPoint, ...] | None = None


class CaptionedFiles:
    """Square images with captions, read from disk: the base class of the readers.

    Captions are read when the data set is opened, an image on access: its shorter side is resized (antialiased) and the
    center square is kept. A `resolution` somewhat above the model's leaves room for random crops.
    """

    layout: ClassVar[str]
    """Description of the files that the folder must hold, for error messages."""
    entries: tuple[Entry, ...]
    """Files, captions and class of each sample."""
    report: ErrorReport
    """The skipped samples. Pass it to `InMemoryCaptions`, which adds those that it skips."""
    point_names: tuple[str, ...] = ()
    """Names of the key points; empty if the data set has none."""

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
        self._finder = FileFinder()
        self.entries = tuple(self._read_entries())
        # Its file names would be copied to every worker process.
        del self._finder
        count, total = len(self.report.skipped), len(self.entries) + len(self.report.skipped)
        self.report.check(self._owner, count, total)
        self.report.share_at_opening = count / max(total, 1)
        if not self.entries and on_error != "list":
            raise ValueError(f"{self._owner}: there is no image in {self._source()}; {self._expected()}.")
        if self.report.ignored and on_error != "list":
            warnings.warn(f"{self._owner}: {one_line(self.report.ignored)}; ignored.", stacklevel=3)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> CaptionedImage:
        """The sample at `index`, which may be negative.

        Raises:
            IndexError: The index is out of range.
            ValueError: The image cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._owner}: index {index} is out of range for {len(self)} samples.")
        entry = self.entries[index]
        image, location = self._read_image(index % len(self))
        names = self.point_names if location.points is not None else ()
        return CaptionedImage(image, entry.captions, entry.class_id, {}, location.box, location.points, names)

    @property
    def is_located(self) -> bool:
        """Whether any image has a box or key points."""
        return any(entry.box is not None or entry.points is not None for entry in self.entries)

    def stored_size(self, index: int) -> tuple[int, int]:
        """Width and height of an intact image as stored, before resizing."""
        entry = self.entries[index]
        return image_size(entry.image if entry.part is None else BytesIO(entry.part.read()))

    def _read_image(self, index: int) -> tuple[NDArray[np.uint8], Location]:
        entry = self.entries[index]

        def ignore(reason: str) -> None:
            self.report.ignore(entry.image, reason)

        if entry.part is None:
            image, view = read_view(entry.image, self.resolution, entry.box, ignore=ignore)
            return image, _location(entry, view)
        try:
            content = entry.part.read()
        except OSError as error:
            raise DamagedSample(self._owner, entry.image, f"cannot be read ({error.strerror})") from error
        return decode_square(content, str(entry.image), self.resolution, ignore=ignore), Location()

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _source(self) -> str:
        """Where the images of the split are listed, for error messages."""
        return f"the {self.split} split of {self.root}"

    def _expected(self) -> str:
        """What a split without images lacks, for error messages."""
        return f"the folder must hold {self.layout}"

    def _read_entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def _require(self, *parts: str) -> None:
        for part in parts:
            if not (self.root / part).exists():
                raise FileNotFoundError(
                    f"{self._owner}: {self.root} has no {part}; the folder must hold {self.layout}."
                )

    def _skip(self, file: str | Path, reason: str, *, missing: bool = False) -> None:
        self.report.add(self._owner, file, reason, missing=missing)

    def _find(self, source: str | Path, folder: Path, name: str) -> Path | None:
        """The file `name` in `folder`; if it does not exist, its sample is skipped, blaming `source`."""
        found = self._finder.find(folder, name)
        if found is None:
            similar = self._finder.similar(folder, name)
            self._skip(source, f"describes {folder / name}, which does not exist{similar}", missing=True)
        return found

    def _entry(
        self,
        image: Path,
        lines: Iterable[str],
        source: str | Path,
        class_id: int,
        box: Box | None = None,
        points: tuple[tuple[float, float] | None, ...] | None = None,
    ) -> Iterator[Entry]:
        """Yield the entry of one image; skip it, blaming `source`, if no line has a word."""
        if captions := clean_captions(lines):
            yield Entry(image, captions, class_id, box, points=points)
        else:
            self._skip(source, f"holds no caption of {image.name}")


def check_apart(owner: str, *splits: CaptionedFiles) -> None:
    """Require that the splits have no image in common, under one name or through links.

    Raises:
        ValueError: An image is in all of them.
    """
    places = [{_place(entry): entry.image for entry in dataset.entries} for dataset in splits]
    shared = set.intersection(*map(set, places))
    if shared:
        first = min(places[-1][place] for place in shared)
        raise ValueError(
            f"{owner}: {len(shared)} images are in both splits, such as {printable(first)}; validating on "
            "training images is meaningless: remove them from one split."
        )


def _location(entry: Entry, view: View) -> Location:
    """Box and key points of an entry in the square that is kept of its image."""
    box, points = None, None
    if entry.box is not None:
        left, top, width, height = entry.box
        one, other = view.place(left, top), view.place(left + width, top + height)
        # A turned image has other corners at the top left.
        (left, right), (top, bottom) = sorted((one[0], other[0])), sorted((one[1], other[1]))
        box = (left, top, right - left, bottom - top)
    if entry.points is not None:
        places = [None if point is None else view.place(*point) for point in entry.points]
        points = tuple(
            (place[0], place[1], 1.0) if place is not None and min(place) >= 0 and max(place) <= 1 else (0.0, 0.0, 0.0)
            for place in places
        )
    return Location(box, points)


def _place(entry: Entry) -> object:
    """Where the bytes of an image are stored: device, file number and offset; its name if the file is not there."""
    file, offset = (entry.image, 0) if entry.part is None else (entry.part.file, entry.part.offset)
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return entry.image
    # Some file systems number no files.
    return (status.st_dev, status.st_ino, offset) if status.st_ino else entry.image


def clean_captions(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines that contain a word, stripped, with control characters replaced by spaces."""
    captions = (_UNPRINTABLE.sub(" ", line).strip() for line in lines)
    return tuple(caption for caption in captions if _WORD.search(caption))


def split_lines(text: str) -> list[str]:
    """The lines of a text, which end in LF, CR LF or CR."""
    # str.splitlines would also break lines at control characters.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def class_of(name: str) -> int:
    """Class id of a class name: a hash, equal in every process and in both splits."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:8], "big") // 2


def class_named(name: str) -> int:
    """Class id of a user's class name, up to its Unicode form and surrounding spaces."""
    return class_of(f"class {unicodedata.normalize('NFC', name).strip()}")


def read_lines(owner: str, path: Path) -> list[str]:
    """The non-blank lines of a text file, stripped.

    Raises:
        ValueError: The file cannot be read, or is not UTF-8.
    """
    try:
        # Reading a named pipe would block forever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedSample(owner, path, "is not a regular file")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedSample(owner, path, f"is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DamagedSample(owner, path, f"cannot be read ({error.strerror})") from error
    return [line.strip() for line in split_lines(text) if line.strip()]
