"""The photographs of Oxford-102 flowers with ten human captions each, read from a folder on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mirror_modules.data.damage import DamagedSample
from mirror_modules.data.files import CaptionedFiles, Entry, clean_captions, read_lines

_CLASS_LISTS = {"train": "trainclasses.txt", "validation": "valclasses.txt"}


class OxfordFlowers(CaptionedFiles):
    """Square photographs with their captions. The splits have no class in common.

    The captions are read at once, a photograph when it is asked for: its shorter side is resized (antialiased) and the
    middle square kept. Ask for a somewhat larger `resolution` than the model's to leave room for random crops.

    Args:
        root: The folder that holds jpg/, text_c10/, trainclasses.txt and valclasses.txt.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        strict: Whether a photograph without captions is an error; otherwise it is left out.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    layout: ClassVar[str] = "jpg/, text_c10/class_XXXXX/image_XXXXX.txt, trainclasses.txt and valclasses.txt"

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        resolution: int = 64,
        strict: bool = True,
        on_error: str = "stop",
    ) -> None:
        self.strict = strict
        super().__init__(root, split, resolution, on_error)

    def _whence(self) -> str:
        return f"the classes in {self.root / _CLASS_LISTS[self.split]} have"

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
                f"{self._owner}: {min(in_both)} is in both {' and '.join(map(str, lists.values()))}; images that are "
                "trained on say nothing in validation: take it out of one of them."
            )
        seen: set[Path] = set()
        for name in dict.fromkeys(names):
            folder = self.root / "text_c10" / name
            if not folder.is_dir():
                raise FileNotFoundError(f"{self._owner}: {class_list} lists {name}, but there is no folder {folder}.")
            for text in sorted(folder.glob("image_*.txt")):
                for entry in self._read_entry(text, int(name.removeprefix("class_"))):
                    if entry.image in seen:
                        self._leave_out(text, f"describes {entry.image}, which another class has already")
                    else:
                        seen.add(entry.image)
                        yield entry

    def _read_entry(self, text: Path, class_id: int) -> Iterator[Entry]:
        try:
            lines = read_lines(self._owner, text)
        except DamagedSample as error:
            self._leave_out(*error.skipped)
            return
        image = self.root / "jpg" / f"{text.stem}.jpg"
        if clean_captions(lines) or not image.is_file():
            yield from self._entry(image, lines, text, class_id)
        elif self.strict:
            remedy = "add one, or pass strict=False to leave the image out"
            self.report.add(self._owner, text, "holds no caption", remedy=remedy)
