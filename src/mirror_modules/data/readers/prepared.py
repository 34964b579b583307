"""Decoded, resized images in memory-mapped files, written by `prepare_captions`."""

from __future__ import annotations

import json
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules.data.mapped_images import MappedImages
from mirror_modules.data.readers.damage import printable
from mirror_modules.data.readers.files import CaptionedFiles, Entry, Location, clean_captions
from mirror_modules.data.readers.images import shrink

PREPARED = "prepared.json"
FORMAT = 1
# Of a folder with boxes or key points, which earlier versions would ignore.
LOCATED_FORMAT = 2
REMEDY = "remove the folder and prepare it again with `mirror-modules data prepare`"


class PreparedCaptions(CaptionedFiles):
    """Square images with captions, from a folder written by `prepare_captions`.

    Captions are read when the data set is opened; images stay on disk, memory-mapped, until accessed. At the folder's
    resolution they are returned unchanged, at a lower one they are resized once more.

    Args:
        root: The folder.
        split: "train" or "validation".
        resolution: Height and width in pixels, at most the folder's.
        on_error: As for other data sets, but without effect: the folder holds no damaged samples, and a damaged folder
            always raises.

    Raises:
        FileNotFoundError: `root`, or a file in it, is missing.
        ValueError: `resolution` exceeds the folder's, or a file has invalid content; the message names the file.
        ImportError: Pillow is missing.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.data import PreparedCaptions, prepare_captions
        >>> root = Path(tempfile.mkdtemp())
        >>> for split in ("train", "validation"):
        ...     (root / split).mkdir()
        ...     Image.new("RGB", (40, 30)).save(root / split / "black.png")
        ...     _ = (root / split / "black.txt").write_text("a black square")
        >>> prepared = prepare_captions(root, root / "cache", resolution=16)
        >>> PreparedCaptions(prepared.folder, resolution=16)[0].captions
        ('a black square',)
    """

    layout: ClassVar[str] = f"{PREPARED}, and train.jsonl, validation.jsonl and the .npy files that it names"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def stored_images(self, rows: Sequence[int] | None = None) -> Tensor | MappedImages | None:
        """Images as stored on disk, (N, H, W, 3): memory-mapped, not copied, and read-only.

        Args:
            rows: The images; None for all.

        Returns:
            A tensor if all images are in a single file; None if they must be resized.
        """
        if self._stored_resolution != self.resolution:
            return None
        with warnings.catch_warnings():
            # torch warns that the array is read-only. A writable (copy-on-write) map would have to fit into memory.
            warnings.simplefilter("ignore", UserWarning)
            files = [torch.from_numpy(shard) for shard in self._shards]
        return files[0] if rows is None and len(files) == 1 else MappedImages(files, rows)

    def stored_size(self, index: int) -> tuple[int, int]:
        """Width and height of the images in the folder."""
        return self._stored_resolution, self._stored_resolution

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map pickles as all of its bytes; the receiving process opens the files itself.
        opened = partial(type(self), split=self.split, resolution=self.resolution, on_error=self.report.on_error)
        return opened, (self.root,)

    @property
    def is_located(self) -> bool:
        """Whether any image has a box or key points."""
        return any(location != Location() for location in self._locations)

    def location(self, index: int) -> Location:
        """Box and key points of an image, which is not read."""
        return self._locations[index]

    def _read_image(self, index: int) -> tuple[NDArray[np.uint8], Location]:
        shard = bisect_right(self._ends, index)
        stored = self._shards[shard][index - self._ends[shard]]  # a negative index, from the end of the shard
        image = np.array(stored) if self.resolution == self._stored_resolution else shrink(stored, self.resolution)
        return image, self._locations[index]

    def _read_entries(self) -> Iterator[Entry]:
        self._require(PREPARED)
        self._stored_resolution, counts = self._read_facts()
        if self.resolution > self._stored_resolution:
            raise ValueError(
                f"{self._owner}: resolution={self.resolution}, but the images in {self.root} were prepared at "
                f"{self._stored_resolution}; pass at most that, or prepare the originals at {self.resolution}."
            )
        self._shards = [self._map(name, count) for name, count in counts.items()]
        self._ends = list(accumulate(counts.values()))
        path = self.root / f"{self.split}.jsonl"
        self._require(path.name)
        lines = self._read_text(path).split("\n")[:-1]
        total = sum(counts.values())
        if len(lines) != total:
            raise self._damaged(path, f"has {len(lines)} complete lines, but {PREPARED} counts {total} images")
        self._locations: list[Location] = []
        for number, line in enumerate(lines, start=1):
            entry, location = self._read_line(f"{path} line {number}", line)
            self._locations.append(location)
            yield entry

    def _read_facts(self) -> tuple[int, dict[str, int]]:
        """The resolution, and the number of images in each file of the split."""
        path = self.root / PREPARED
        try:
            facts = json.loads(self._read_text(path))
            version = facts["format"]
            if version in (FORMAT, LOCATED_FORMAT):
                names = facts["point_names"] if version == LOCATED_FORMAT else []
                resolution, split = facts["resolution"], facts["splits"][self.split]
                total, counts = split["images"], dict(split["shards"])
                is_valid = all(type(number) is int and number > 0 for number in (resolution, total, *counts.values()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(path, f"has invalid content ({type(error).__name__}: {error})") from error
        if version not in (FORMAT, LOCATED_FORMAT):
            raise self._damaged(path, f"has format {version!r}; this version reads {FORMAT} and {LOCATED_FORMAT}")
        # File names are input too, and must not lead out of the folder.
        if not is_valid or not all(re.fullmatch(rf"{self.split}-\d{{5,}}\.npy", name) for name in counts):
            raise self._damaged(path, f"has invalid image counts, or file names other than {self.split}-00000.npy etc.")
        if sum(counts.values()) != total:
            raise self._damaged(path, f"counts {total} images, but {sum(counts.values())} in its files")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._damaged(path, f"names the key points {printable(str(names))}; expected a list of strings")
        self.point_names = tuple(names)
        return resolution, counts

    def _map(self, name: str, count: int) -> NDArray[np.uint8]:
        self._require(name)
        path, expected = self.root / name, (count, self._stored_resolution, self._stored_resolution, 3)
        try:
            images: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        except OSError:
            raise
        # A .npy header is a Python expression; a damaged one raises errors of many types.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._damaged(path, f"cannot be read: it is truncated or not an array ({reason})") from error
        if not isinstance(images, np.memmap) or images.dtype != np.uint8 or images.shape != expected:
            found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise self._damaged(path, f"holds {found}, but {PREPARED} gives uint8 {expected}")
        if path.stat().st_size != images.offset + images.nbytes:
            raise self._damaged(path, "holds data after its images")
        # A plain view: indexing a memmap creates a memmap per image, at ten times the cost.
        return np.asarray(images)

    def _read_line(self, place: str, line: str) -> tuple[Entry, Location]:
        try:
            row = json.loads(line)
            file, captions, class_id = row["file"], row["captions"], row["class_id"]
            box, points = row.get("box"), row.get("points")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(place, f"has invalid content ({type(error).__name__}: {error})") from error
        is_valid = (
            isinstance(file, str) and type(class_id) is int and 0 <= class_id < 2**63 and isinstance(captions, list)
        )
        captions = clean_captions(captions) if is_valid and all(isinstance(each, str) for each in captions) else ()
        if not captions:
            raise self._damaged(place, "needs a file, captions and a class_id from 0 to 2**63 - 1")
        has_box = _is_numbers(box, 4) and box[2] > 0 and box[3] > 0
        has_points = isinstance(points, list) and len(points) == len(self.point_names)
        has_points = has_points and all(_is_numbers(point, 3) for point in points)
        if not (has_box or box is None) or not (has_points or points is None):
            raise self._damaged(
                place,
                f"needs a box of x, y, width and height, or null, and {len(self.point_names)} points of x, y and "
                "visibility, or null",
            )
        location = Location(tuple(box) if has_box else None, tuple(map(tuple, points)) if has_points else None)
        return Entry(Path(file), captions, class_id), location

    def _read_text(self, path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(path, f"is not UTF-8 text ({error})") from error

    def _damaged(self, place: str | Path, reason: str) -> ValueError:
        return ValueError(f"{self._owner}: {printable(place)} {reason}; {REMEDY}.")


def _is_numbers(value: Any, count: int) -> bool:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(type(number) in (int, float) and math.isfinite(number) for number in value)
