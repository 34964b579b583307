"""The data of a recipe."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from mirror_modules._checks import check_positive
from mirror_modules.training.recipes.fields import check_has_effect, check_not_negative, harmless

NOT_READ_FOR_DRAWN_FLOWERS = ("path", "on_error", "held_out_share")
"""Fields of `DataRecipe` that apply to files only."""
READ_FOR_DRAWN_FLOWERS_ALONE = ("scatter",)
"""Fields of `DataRecipe` that do not apply to files."""


@dataclass(frozen=True)
class DataRecipe:
    """The captioned images."""

    source: Literal[
        "synthetic-flowers", "oxford-flowers", "birds", "coco", "folder", "webdataset", "prepared", "auto"
    ] = "synthetic-flowers"
    """Drawn flowers, or the format of the folder `path`, which auto recognizes; prepared is the cache written by
    `mirror-modules data prepare`."""
    path: str | None = harmless(None)
    """Folder of the photographs; None for drawn flowers."""
    training_images: int | None = 4096
    """Number of training images; None takes all, or draws 4096 flowers."""
    validation_images: int | None = 1000
    """Number of validation images; None takes all, or draws 1000 flowers."""
    min_count: int = 1
    """Minimum number of occurrences in the training captions; rarer words become unknown."""
    augment: bool = False
    """Random crops and horizontal flips in training; images whose caption mentions left or right are not flipped."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a damaged file ends the run, or is skipped and listed as long as at most 5 % are damaged."""
    long_captions: Literal["cut", "subsample"] = "cut"
    """Training keeps the first words of captions longer than the model's max_words, or random ones in their order."""
    scatter: bool = False
    """Draw flowers of more sizes, anywhere in the image, for systems that place them."""
    held_out_share: float = 0.1
    """Share of the training images kept from all training, to evaluate on training classes too, where validation has
    other classes; 0 trains on all images."""

    def __post_init__(self) -> None:
        limits = {"training_images": self.training_images, "validation_images": self.validation_images}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        check_positive("DataRecipe", min_count=self.min_count, **given)
        check_not_negative("DataRecipe", self, "held_out_share")
        if self.held_out_share > 0.5:
            raise ValueError(f"DataRecipe: held_out_share must be at most 0.5, but it is {self.held_out_share!r}.")
        if not self.is_drawn:
            for name in READ_FOR_DRAWN_FLOWERS_ALONE:
                check_has_effect("DataRecipe", self, name, f"source={self.source!r}")
            return
        if self.path is not None:
            raise ValueError(
                f"DataRecipe: source='synthetic-flowers' draws its images and does not read path={self.path!r}; to "
                f"train on that folder, use `mirror-modules train photos-64 --data {shlex.quote(self.path)}`."
            )
        for name in NOT_READ_FOR_DRAWN_FLOWERS:
            check_has_effect("DataRecipe", self, name, "source='synthetic-flowers'")

    @property
    def is_drawn(self) -> bool:
        """Whether the images are drawn flowers rather than photographs."""
        return self.source == "synthetic-flowers"
