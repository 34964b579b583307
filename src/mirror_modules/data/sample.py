"""The sample type that every data set of captioned images returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

SubjectBox = tuple[float, float, float, float]
"""Left, top, width and height (x, y, w, h), as shares of the image's width and height."""
KeyPoint = tuple[float, float, float]
"""x and y, as shares of the image's width and height, and visibility: 1, or 0 with x and y of 0."""


class CaptionedImage(NamedTuple):
    """An RGB image with its captions, class and attributes, and where its subject is.

    Examples:
        >>> import numpy as np
        >>> from mirror_modules.data import CaptionedImage, InMemoryCaptions
        >>> black = CaptionedImage(np.zeros((5, 7, 3), np.uint8), ("a black wall", "a wall"), class_id=0, attributes={})
        >>> data = InMemoryCaptions([black], max_words=18)  # a list of samples is a data set
        >>> data.images.shape, data.tokens.shape
        (torch.Size([1, 5, 7, 3]), torch.Size([2, 3]))
    """

    image: NDArray[np.uint8]
    """RGB, (H, W, 3)."""
    captions: tuple[str, ...]
    """At least one caption. Each describes the whole image on its own."""
    class_id: int
    """Images of one class may share captions, so they never serve as each other's mismatched pairs."""
    attributes: Mapping[str, str]
    """Labels such as {"petal_color": "red"}; empty if the data set has none."""
    box: SubjectBox | None = None
    """Bounding box of the subject: x, y, w, h as shares of the image. It may extend beyond it; None if unknown."""
    points: tuple[KeyPoint, ...] | None = None
    """Key points of the subject: x, y and visibility of each, (K, 3); None if unknown."""
    point_names: tuple[str, ...] = ()
    """Name of each key point, such as "left eye"; the same for all images of a data set."""


class CaptionedImages(Protocol):
    """A map-style data set: any object with a length that returns a `CaptionedImage` for an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CaptionedImage: ...
