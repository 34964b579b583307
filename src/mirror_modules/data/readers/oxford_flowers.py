"""Oxford-102 flowers: photographs with ten human captions each, read from a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.files import CaptionedFiles, Entry, read_lines
from mirror_modules.data.readers.names import is_hidden

_CLASS_LISTS = {"train": "trainclasses.txt", "validation": "valclasses.txt"}


class OxfordFlowers(CaptionedFiles):
    """Oxford-102: square photographs with captions. The splits have no class in common.

    Captions are read when the data set is opened, an image on access: its shorter side is resized (antialiased) and the
    center square is kept. A `resolution` somewhat above the model's leaves room for random crops.

    Args:
        root: Folder with jpg/, text_c10/, trainclasses.txt and valclasses.txt.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file has invalid content; the message names the file.
        ImportError: Pillow is missing.

    Examples:
        >>> from mirror_modules.data import OxfordFlowers
        >>> flowers = OxfordFlowers("data/oxford_flowers", resolution=76, on_error="skip")  # doctest: +SKIP
        >>> flowers[0].image.shape, len(flowers[0].captions)  # doctest: +SKIP
        ((76, 76, 3), 10)
        >>> OxfordFlowers.layout
        'jpg/, text_c10/class_XXXXX/image_XXXXX.txt, trainclasses.txt and valclasses.txt'
    """

    layout: ClassVar[str] = "jpg/, text_c10/class_XXXXX/image_XXXXX.txt, trainclasses.txt and valclasses.txt"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _source(self) -> str:
        return f"the classes of {self.root / _CLASS_LISTS[self.split]}"

    def _read_entries(self) -> Iterator[Entry]:
        self._require("jpg", "text_c10", *_CLASS_LISTS.values())
        lists = {split: self.root / name for split, name in _CLASS_LISTS.items()}
        class_list, names = lists[self.split], read_lines(self._owner, lists[self.split])
        for name in names:
            if not re.fullmatch(r"class_\d{1,9}", name, re.ASCII):
                raise ValueError(f"{self._owner}: {class_list} lists {name!r}; each line must be a folder class_XXXXX.")
        in_both = set.intersection(*(set(read_lines(self._owner, each)) for each in lists.values()))
        if in_both:
            raise ValueError(
                f"{self._owner}: {min(in_both)} is in both {' and '.join(map(str, lists.values()))}; validating on "
                "training images is meaningless: remove the class from one of them."
            )
        seen: set[Path] = set()
        for name in dict.fromkeys(names):
            folder = self.root / "text_c10" / name
            if not folder.is_dir():
                raise FileNotFoundError(f"{self._owner}: {class_list} lists {name}, but there is no folder {folder}.")
            texts = (path for path in folder.iterdir() if path.suffix.lower() == ".txt" and not is_hidden(path.name))
            for text in sorted(texts):
                if not text.name.startswith("image_"):
                    self.report.ignore(text, "is not named image_XXXXX.txt")
                    continue
                for entry in self._read_entry(text, int(name.removeprefix("class_"))):
                    if entry.image in seen:
                        self._skip(text, f"describes {entry.image}, which already belongs to another class")
                    else:
                        seen.add(entry.image)
                        yield entry

    def _read_entry(self, text: Path, class_id: int) -> Iterator[Entry]:
        try:
            lines = read_lines(self._owner, text)
        except DamagedSample as error:
            self._skip(*error.skipped)
        else:
            if image := self._find(text, self.root / "jpg", f"{text.stem}.jpg"):
                yield from self._entry(image, lines, text, class_id)
