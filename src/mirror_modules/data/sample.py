"""The sample type that every data set of captioned images returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class CaptionedImage(NamedTuple):
    """An RGB image with its captions, class and attributes.

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


class CaptionedImages(Protocol):
    """A map-style data set: any object with a length that returns a `CaptionedImage` for an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CaptionedImage: ...
