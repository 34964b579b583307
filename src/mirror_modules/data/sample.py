"""What every data set of captioned images hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class CaptionedImage(NamedTuple):
    """One image and everything that is said of it."""

    image: NDArray[np.uint8]
    """Red, green, blue. (H, W, 3)"""
    captions: tuple[str, ...]
    """At least one sentence, each of which describes the image alone."""
    class_id: int
    """Images of one class may share a description: they are not each other's mismatches."""
    attributes: Mapping[str, str]
    """What is known of the image, for example {"petal_color": "red"}; empty where nothing is."""


class CaptionedImages(Protocol):
    """A data set: anything with a length that gives a `CaptionedImage` for an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CaptionedImage: ...
