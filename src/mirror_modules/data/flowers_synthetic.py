"""The embedded data set: synthetic flowers that know what they are."""

from __future__ import annotations

import numpy as np

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.synthetic_attributes import ATTRIBUTES, class_id_of
from mirror_modules.data.synthetic_captions import write_captions
from mirror_modules.data.synthetic_drawing import SMALLEST, draw_flower

_SPLITS = ("train", "validation")


class SyntheticFlowers:
    """Flowers with captions, drawn when they are asked for.

    A sample is a function of (seed, split, index) alone. The flower does not change with the resolution, nor its first
    captions with `captions_per_image`. The splits draw from separate random streams.

    Args:
        size: Number of samples.
        resolution: Height and width in pixels, at least 8.
        seed: Whole number from 0 to 2**32 - 1.
        split: "train" or "validation".
        captions_per_image: Sentences for each image.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self, size: int, *, resolution: int = 64, seed: int = 0, split: str = "train", captions_per_image: int = 5
    ) -> None:
        check_positive("SyntheticFlowers", size=size, resolution=resolution, captions_per_image=captions_per_image)
        check_choice("SyntheticFlowers", "split", split, _SPLITS)
        if not 0 <= seed < 2**32:
            raise ValueError(f"SyntheticFlowers: seed must be from 0 to 2**32 - 1, but it is {seed}.")
        if resolution < SMALLEST:
            raise ValueError(f"SyntheticFlowers: resolution must be at least {SMALLEST}, but it is {resolution}.")
        self.size = size
        self.resolution = resolution
        self.seed = seed
        self.split = split
        self.captions_per_image = captions_per_image

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> CaptionedImage:
        if not -self.size <= index < self.size:
            raise IndexError(f"SyntheticFlowers: index {index} is outside the {self.size} samples.")
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), index % self.size))
        attributes = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        image = draw_flower(attributes, self.resolution, rng)
        captions = write_captions(attributes, rng, self.captions_per_image)
        return CaptionedImage(image, tuple(captions), class_id_of(attributes), attributes)
