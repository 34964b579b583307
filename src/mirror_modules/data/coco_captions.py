"""The photographs of COCO with five human captions each, in COCO's own format."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mirror_modules.data.files import CaptionedFiles, Entry, is_inside

_NAMES = {"train": "train", "validation": "val"}
_YEARS = ("2017", "2014")


class CocoCaptions(CaptionedFiles):
    """Square photographs with their captions. COCO has no classes: each image is a class of its own.

    Args:
        root: The folder that holds train2017/, val2017/ and annotations/ with captions_train2017.json and
            captions_val2017.json; or the same of 2014.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`.

    Raises:
        FileNotFoundError: `root`, or a part of the layout, is missing.
        ValueError: A file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    layout: ClassVar[str] = "train2017/, val2017/ and annotations/captions_{train,val}2017.json, or the same of 2014"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        name = _NAMES[self.split]
        # Of both splits, so that they are never of two years, which share images.
        year = max(_YEARS, key=lambda y: sum(self._annotations(each, y).is_file() for each in _NAMES.values()))
        path = self._annotations(name, year)
        self._require(str(path.relative_to(self.root)), f"{name}{year}")
        content = self._read_json(path)
        said = defaultdict(list)
        for annotation in content["annotations"]:
            if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
                said[str(annotation.get("image_id"))].append(annotation["caption"])
        ids, names = set(), set()
        for i, image in enumerate(content["images"]):
            source = f"{path} image {i}"
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
                self._leave_out(source, "must have an id and a file_name")
            elif not is_inside(image["file_name"]):
                self._leave_out(source, f"is {image['file_name']!r}, which is not in the folder {name}{year}")
            elif str(image["id"]) in ids or image["file_name"] in names:
                self._leave_out(source, f"has the id or the name of another one ({image['id']}, {image['file_name']})")
            else:
                ids.add(str(image["id"]))
                names.add(image["file_name"])
                file = self.root / f"{name}{year}" / image["file_name"]
                yield from self._entry(file, said[str(image["id"])], path, i)

    def _annotations(self, name: str, year: str) -> Path:
        return self.root / "annotations" / f"captions_{name}{year}.json"

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._owner}: {path} is damaged: it is not JSON ({error}).") from error
        for part in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(part), list):
                raise ValueError(f"{self._owner}: {path} has no list {part!r}; expected a file of COCO captions.")
        return content
