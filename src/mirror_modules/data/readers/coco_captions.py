"""COCO photographs with five human captions each, in COCO's own format."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mirror_modules.data.readers.files import CaptionedFiles, Entry
from mirror_modules.data.readers.names import is_inside

_NAMES = {"train": "train", "validation": "val"}
_YEARS = ("2017", "2014")


class CocoCaptions(CaptionedFiles):
    """COCO: square photographs with captions. COCO has no classes, so each image is its own class.

    Args:
        root: Folder with train2017/, val2017/ and annotations/ with captions_train2017.json and
            captions_val2017.json; or the same for 2014.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file has invalid content; the message names the file.
        ImportError: Pillow is missing.

    Examples:
        >>> from mirror_modules.data import CocoCaptions
        >>> coco = CocoCaptions("data/coco", split="validation", resolution=76)  # doctest: +SKIP
        >>> coco[0].image.shape, len(coco[0].captions)  # doctest: +SKIP
        ((76, 76, 3), 5)
        >>> CocoCaptions.layout
        'train2017/, val2017/ and annotations/captions_{train,val}2017.json, or the same for 2014'
    """

    layout: ClassVar[str] = "train2017/, val2017/ and annotations/captions_{train,val}2017.json, or the same for 2014"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        name = _NAMES[self.split]
        # One year for both splits: the splits of 2014 and 2017 share images.
        year = max(_YEARS, key=lambda y: sum(_annotations(self.root, each, y).is_file() for each in _NAMES.values()))
        path = _annotations(self.root, name, year)
        self._require(str(path.relative_to(self.root)), f"{name}{year}")
        content = self._read_json(path)
        captions = defaultdict(list)
        for annotation in content["annotations"]:
            if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
                captions[str(annotation.get("image_id"))].append(annotation["caption"])
        ids, names = set(), set()
        for i, image in enumerate(content["images"]):
            source = f"{path} image {i}"
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
                self._skip(source, "must have an id and a file_name")
            elif not is_inside(image["file_name"]):
                self._skip(source, f"is {image['file_name']!r}, which is not in the folder {name}{year}")
            elif str(image["id"]) in ids or image["file_name"] in names:
                self._skip(
                    source, f"repeats the id or file name of another image ({image['id']}, {image['file_name']})"
                )
            else:
                ids.add(str(image["id"]))
                names.add(image["file_name"])
                if file := self._find(path, self.root / f"{name}{year}", image["file_name"]):
                    yield from self._entry(file, captions[str(image["id"])], path, i)

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._owner}: {path} is damaged: it is not JSON ({error}).") from error
        for part in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(part), list):
                raise ValueError(f"{self._owner}: {path} has no list {part!r}; expected a file of COCO captions.")
        return content


def is_coco(root: Path) -> bool:
    """Whether a folder has annotations that `CocoCaptions` reads."""
    return any(_annotations(root, name, year).is_file() for name in _NAMES.values() for year in _YEARS)


def _annotations(root: Path, name: str, year: str) -> Path:
    return root / "annotations" / f"captions_{name}{year}.json"
