"""A cache of decoded, resized images, read out of memory maps: no JPEG is decoded twice."""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules.data.damage import printable
from mirror_modules.data.files import CaptionedFiles, Entry, clean_captions
from mirror_modules.data.images import shrink

PREPARED = "prepared.json"
FORMAT = 1
AGAIN = "remove the folder and write it again with `mirror-modules data prepare`"


class PreparedCaptions(CaptionedFiles):
    """Square images with their captions, out of a folder that `prepare_captions` wrote.

    Captions are read at once; images stay on disk, mapped into memory, until they are asked for. At the resolution of
    the folder they are handed out as they are, at a smaller one they are resized once more.

    Args:
        root: The folder.
        split: "train" or "validation".
        resolution: Height and width in pixels, at most that of the folder.
        on_error: As for other data sets; the folder holds no damaged samples, and one that is damaged itself is always
            refused.

    Raises:
        FileNotFoundError: `root`, or a file in it, is missing.
        ValueError: `resolution` exceeds the folder's, or a file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    layout: ClassVar[str] = f"{PREPARED}, and train.jsonl, validation.jsonl and the .npy files that it names"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def stored_images(self) -> Tensor | None:
        """All images as they lie on disk, (N, H, W, 3), mapped and not copied. Nothing may be written into them.

        Returns:
            None if they have to be resized, or lie in several files.
        """
        if len(self._shards) > 1 or self._stored_resolution != self.resolution:
            return None
        with warnings.catch_warnings():
            # That it cannot be written to. A map that can would have to fit into memory.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self._shards[0])

    def stored_size(self, index: int) -> tuple[int, int]:
        """Width and height of the images in the folder."""
        return self._stored_resolution, self._stored_resolution

    def __reduce__(self) -> tuple[Any, ...]:
        # A map would be pickled as all of its bytes; a process that gets this opens the files itself.
        opened = partial(type(self), split=self.split, resolution=self.resolution, on_error=self.report.on_error)
        return opened, (self.root,)

    def _read_image(self, index: int) -> NDArray[np.uint8]:
        shard = bisect_right(self._ends, index)
        stored = self._shards[shard][index - self._ends[shard]]  # counted from the end of the file
        return np.array(stored) if self.resolution == self._stored_resolution else shrink(stored, self.resolution)

    def _read_entries(self) -> Iterator[Entry]:
        self._require(PREPARED)
        self._stored_resolution, counts = self._read_facts()
        if self.resolution > self._stored_resolution:
            raise ValueError(
                f"{self._owner}: resolution={self.resolution}, but the images in {self.root} were prepared at "
                f"{self._stored_resolution}; ask for at most that, or prepare the originals at {self.resolution}."
            )
        self._shards = [self._map(name, count) for name, count in counts.items()]
        self._ends = list(accumulate(counts.values()))
        path = self.root / f"{self.split}.jsonl"
        self._require(path.name)
        lines = self._read_text(path).split("\n")[:-1]
        total = sum(counts.values())
        if len(lines) != total:
            raise self._damaged(path, f"has {len(lines)} whole lines, but {PREPARED} counts {total} images")
        for number, line in enumerate(lines, start=1):
            yield self._read_line(f"{path} line {number}", line)

    def _read_facts(self) -> tuple[int, dict[str, int]]:
        """The resolution, and how many images each file of the split has."""
        path = self.root / PREPARED
        try:
            facts = json.loads(self._read_text(path))
            version = facts["format"]
            if version == FORMAT:
                resolution, split = facts["resolution"], facts["splits"][self.split]
                total, counts = split["images"], dict(split["shards"])
                is_sound = all(type(number) is int and number > 0 for number in (resolution, total, *counts.values()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(path, f"does not hold what it should ({type(error).__name__}: {error})") from error
        if version != FORMAT:
            raise self._damaged(path, f"is of format {version!r}; this version reads {FORMAT}")
        # Names come from a file, and must not lead out of the folder.
        if not is_sound or not all(re.fullmatch(rf"{self.split}-\d{{5,}}\.npy", name) for name in counts):
            raise self._damaged(path, f"names other files or numbers of images than {self.split}-00000.npy and so on")
        if sum(counts.values()) != total:
            raise self._damaged(path, f"counts {total} images, but {sum(counts.values())} in its files")
        return resolution, counts

    def _map(self, name: str, count: int) -> NDArray[np.uint8]:
        self._require(name)
        path, expected = self.root / name, (count, self._stored_resolution, self._stored_resolution, 3)
        try:
            images: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        except OSError:
            raise
        # A header is a program, which fails in many ways when it is damaged.
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise self._damaged(path, f"cannot be read; it was cut short or is no array ({why})") from error
        if not isinstance(images, np.memmap) or images.dtype != np.uint8 or images.shape != expected:
            found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise self._damaged(path, f"holds {found}, but {PREPARED} says uint8 {expected}")
        if path.stat().st_size != images.offset + images.nbytes:
            raise self._damaged(path, "holds more than its images")
        # Not a memmap, each of whose rows would be one, at ten times the cost of a plain view.
        return np.asarray(images)

    def _read_line(self, place: str, line: str) -> Entry:
        try:
            row = json.loads(line)
            file, captions, class_id = row["file"], row["captions"], row["class_id"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(place, f"does not hold what it should ({type(error).__name__}: {error})") from error
        is_sound = (
            isinstance(file, str) and type(class_id) is int and 0 <= class_id < 2**63 and isinstance(captions, list)
        )
        captions = clean_captions(captions) if is_sound and all(isinstance(each, str) for each in captions) else ()
        if not captions:
            raise self._damaged(place, "needs a file, captions and a class_id from 0, below 2**63")
        return Entry(Path(file), captions, class_id)

    def _read_text(self, path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(path, f"is not UTF-8 text ({error})") from error

    def _damaged(self, place: str | Path, what: str) -> ValueError:
        return ValueError(f"{self._owner}: {printable(place)} {what}; {AGAIN}.")
