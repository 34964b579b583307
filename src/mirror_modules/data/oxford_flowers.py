"""The photographs of Oxford-102 flowers with ten human captions each, read from a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.sample import CaptionedImage

_CLASS_LISTS = {"train": "trainclasses.txt", "validation": "valclasses.txt"}
_LAYOUT = "jpg/, text_c10/class_XXXXX/image_XXXXX.txt, trainclasses.txt and valclasses.txt"


class _Entry(NamedTuple):
    image: Path
    captions: tuple[str, ...]
    class_id: int


class OxfordFlowers:
    """Square photographs with their captions. The splits have no class in common.

    The captions are read at once, a photograph when it is asked for: its shorter side is resized (antialiased) and the
    middle square kept. Ask for a somewhat larger `resolution` than the model's to leave room for random crops.

    Args:
        root: The folder that holds jpg/, text_c10/, trainclasses.txt and valclasses.txt.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        strict: Whether a photograph without captions is an error; otherwise it is left out.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, strict: bool = True) -> None:
        check_choice("OxfordFlowers", "split", split, tuple(_CLASS_LISTS))
        check_positive("OxfordFlowers", resolution=resolution)
        _import_pillow()
        self.root = Path(root)
        self.split = split
        self.resolution = resolution
        if not self.root.is_dir():
            raise FileNotFoundError(f"OxfordFlowers: there is no folder {self.root}; it must hold {_LAYOUT}.")
        for part in ("jpg", "text_c10", _CLASS_LISTS[split]):
            if not (self.root / part).exists():
                raise FileNotFoundError(f"OxfordFlowers: {self.root} has no {part}; the folder must hold {_LAYOUT}.")
        self._entries = self._read_entries(strict)
        if not self._entries:
            raise ValueError(f"OxfordFlowers: the classes in {self.root / _CLASS_LISTS[split]} have no photograph.")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> CaptionedImage:
        """The sample at `index`.

        Raises:
            IndexError: There is no such sample.
            ValueError: The photograph cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"OxfordFlowers: index {index} is outside the {len(self)} samples.")
        entry = self._entries[index]
        return CaptionedImage(read_square(entry.image, self.resolution), entry.captions, entry.class_id, {})

    def _read_entries(self, strict: bool) -> list[_Entry]:
        entries = []
        class_list = self.root / _CLASS_LISTS[self.split]
        for name in _read_lines(class_list):
            if not re.fullmatch(r"class_\d+", name):
                raise ValueError(f"OxfordFlowers: {class_list} lists {name!r}; each line must be a folder class_XXXXX.")
            folder = self.root / "text_c10" / name
            if not folder.is_dir():
                raise FileNotFoundError(f"OxfordFlowers: {class_list} lists {name}, but there is no folder {folder}.")
            for text in sorted(folder.glob("image_*.txt")):
                image = self.root / "jpg" / f"{text.stem}.jpg"
                if not image.is_file():
                    raise FileNotFoundError(f"OxfordFlowers: {text} describes {image}, which does not exist.")
                captions = tuple(line for line in _read_lines(text) if re.search(r"[^\W_]", line))
                if captions:
                    entries.append(_Entry(image, captions, int(name.removeprefix("class_"))))
                elif strict:
                    raise ValueError(
                        f"OxfordFlowers: {text} holds no caption; add one, or pass strict=False to leave the image out."
                    )
        return entries


def read_square(path: Path, resolution: int) -> NDArray[np.uint8]:
    """Read an image, resize its shorter side to `resolution` (antialiased) and keep the middle, (H, W, 3).

    Raises:
        ValueError: The file cannot be read as an image; the message names it and says why.
        ImportError: Pillow is missing.
    """
    _import_pillow()
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    # Pillow reports some broken files as a SyntaxError, and images of absurd size as a bomb.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"read_square: {path} cannot be read as an image ({error}).") from error
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without the space around them."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"OxfordFlowers: {path} is not UTF-8 text ({error}).") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _import_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("Reading images needs Pillow: pip install 'mirror-modules[train]'.") from error
