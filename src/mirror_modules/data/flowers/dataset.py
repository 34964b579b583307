"""The built-in data set: drawn flowers with captions and ground-truth attributes."""

from __future__ import annotations

import numpy as np

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.flowers.attributes import ATTRIBUTES, class_id_of
from mirror_modules.data.flowers.captions import write_captions
from mirror_modules.data.flowers.drawing import MIN_RESOLUTION, POINT_NAMES, draw_located_flower
from mirror_modules.data.sample import CaptionedImage

_SPLITS = ("train", "validation")


class SyntheticFlowers:
    """Drawn flowers with captions, each rendered on access.

    A sample is a pure function of (seed, split, index): the flower does not depend on the resolution, nor the image on
    `captions_per_image`. The splits use separate random streams. Samples have the box of the flower, and its center and
    petal tips as key points.

    Args:
        size: Number of samples.
        resolution: Height and width in pixels, at least 8.
        seed: Seed, from 0 to 2**32 - 1.
        split: "train" or "validation".
        captions_per_image: Number of captions for each image.
        scatter: Whether the flowers have sizes of their own, from 0.45 to 1 of the usual one, and are anywhere in the
            image; otherwise, each is in the middle.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> from mirror_modules.data import SyntheticFlowers
        >>> flowers = SyntheticFlowers(1000, resolution=32, seed=0)
        >>> sample = flowers[7]
        >>> sample.image.shape, len(sample.captions), sorted(sample.attributes)[:3]
        ((32, 32, 3), 5, ['background', 'center_color', 'petal_color'])
        >>> SyntheticFlowers(8, resolution=64)[7].captions == sample.captions
        True
    """

    def __init__(
        self,
        size: int,
        *,
        resolution: int = 64,
        seed: int = 0,
        split: str = "train",
        captions_per_image: int = 5,
        scatter: bool = False,
    ) -> None:
        check_positive("SyntheticFlowers", size=size, resolution=resolution, captions_per_image=captions_per_image)
        check_choice("SyntheticFlowers", "split", split, _SPLITS)
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ValueError(f"SyntheticFlowers: seed must be a whole number from 0 to 2**32 - 1, but it is {seed!r}.")
        if resolution < MIN_RESOLUTION:
            raise ValueError(f"SyntheticFlowers: resolution must be at least {MIN_RESOLUTION}, but it is {resolution}.")
        self.size = size
        self.resolution = resolution
        self.seed = seed
        self.split = split
        self.captions_per_image = captions_per_image
        self.scatter = scatter

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> CaptionedImage:
        if not -self.size <= index < self.size:
            raise IndexError(f"SyntheticFlowers: index {index} is out of range for {self.size} samples.")
        stream = (self.seed, _SPLITS.index(self.split), index % self.size)
        rng = np.random.default_rng(stream)
        attributes = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        scale, place = 1.0, [0.0, 0.0]
        if self.scatter:
            # A stream of its own, so that captions and everything else of a flower are as without it.
            scale, *place = np.random.default_rng((*stream, 1)).uniform((0.45, -1, -1), 1).tolist()
        image, box, points = draw_located_flower(
            attributes, self.resolution, rng, scale=scale, place=(place[0], place[1])
        )
        captions = tuple(write_captions(attributes, rng, self.captions_per_image))
        return CaptionedImage(image, captions, class_id_of(attributes), attributes, box, points, POINT_NAMES)
