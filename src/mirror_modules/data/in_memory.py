"""A whole data set in memory: images as bytes, captions encoded once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.mapped_images import MappedImages
from mirror_modules.data.readers.damage import DamagedSample, ErrorReport
from mirror_modules.data.readers.prepared import PreparedCaptions
from mirror_modules.data.sample import CaptionedImage, CaptionedImages, KeyPoint, SubjectBox
from mirror_modules.stem.vocabulary import Vocabulary

# Words that a horizontal flip makes wrong; English only.
_SIDES = re.compile(r"(?<![^\W_])(left|right)(most|wards?|hand(ed)?)?(?![^\W_])", re.IGNORECASE)


class CaptionBatch(NamedTuple):
    """A batch of images, each with one of its captions."""

    images: Tensor
    """Bytes (B, H, W, 3), unscaled; `to_float` converts them to the model's input."""
    tokens: Tensor
    """Token ids, (B, L)."""
    word_mask: Tensor
    """True for a real word, (B, L); L is the length of the longest caption in the batch."""
    class_ids: Tensor
    """Class of each image, (B,)."""
    captions: tuple[str, ...]
    """The original captions, not truncated."""
    image_rows: Tensor
    """Index of each image in the data set, (B,)."""
    caption_rows: Tensor
    """Index of each caption among all captions of the data set, (B,)."""
    caption_ids: Tensor
    """A number for each caption, the same for equal tokens in the batch and for no others, (B,)."""
    boxes: Tensor | None = None
    """x, y, width and height of each subject as shares of the image, (B, 4), NaN where unknown; None without boxes."""
    points: Tensor | None = None
    """x, y and visibility of the key points of each subject, (B, K, 3); None without key points."""


class InMemoryCaptions:
    """A data set held in memory: each image is decoded or drawn once, each caption encoded once.

    Images of `PreparedCaptions`, or of a `torch.utils.data.Subset` of it, that are stored at the requested resolution
    are not copied: they stay on disk, memory-mapped, and `images` is then read-only. It is a tensor if it has all
    images of a single file; otherwise, its rows are read when `images` is indexed.

    Args:
        dataset: The samples; all images must have one size, and each needs at least one caption.
        vocabulary: Vocabulary that encodes the captions, with words outside it as unknown tokens; None builds one from
            the captions.
        max_words: Length to which longer captions are shortened.
        long_captions: How they are shortened: "cut" keeps the first words; "subsample" draws a new random subset of
            words, in order, for each batch of `RepeatableBatches`.
        min_count: Minimum number of occurrences of a word in a vocabulary built here.
        progress: Called with (samples done, samples in total) after each sample.
        report: Report to which damaged samples are added, usually the `report` of a data set on disk; None raises at
            the first one.

    Raises:
        ValueError: The data set is empty, its images differ in size, a sample is not a valid `CaptionedImage` (bytes,
            at least one caption, a class from 0, a box of positive size), key points of two images differ in their
            names, or more samples are damaged than `report` permits; None permits none.

    Examples:
        >>> import torch
        >>> from mirror_modules.data import InMemoryCaptions, SyntheticFlowers
        >>> data = InMemoryCaptions(SyntheticFlowers(5, resolution=16), max_words=18)
        >>> data.images.shape, data.caption_counts.tolist()
        (torch.Size([5, 16, 16, 3]), [5, 5, 5, 5, 5])
        >>> batch = data.batch(torch.tensor([4, 0]), torch.tensor([1, 2]))  # caption 1 of image 4, caption 2 of image 0
        >>> batch.image_rows.tolist(), batch.caption_rows.tolist()
        ([4, 0], [21, 2])
    """

    images: Tensor | MappedImages
    """Bytes, (N, H, W, 3)."""
    class_ids: Tensor
    """Class of each image, (N,)."""
    attributes: list[Mapping[str, str]]
    """Attributes of each image."""
    captions: list[tuple[str, ...]]
    """All captions of each image."""
    vocabulary: Vocabulary
    """The vocabulary that encoded the captions."""
    tokens: Tensor
    """Token ids of all captions of all images, in order, (M, L)."""
    word_mask: Tensor
    """True for a real word of `tokens`, (M, L)."""
    caption_counts: Tensor
    """Number of captions of each image, (N,)."""
    mentions_side: Tensor
    """True for a caption that mentions left or right, (M,)."""
    boxes: Tensor | None
    """Box of each image, (N, 4), NaN where unknown; None if no image has one."""
    points: Tensor | None
    """Key points of each image, (N, K, 3), all 0 where they are unknown; None if no image has any."""
    point_names: tuple[str, ...]
    """Names of the key points; empty without any."""
    long_tokens: dict[int, Tensor]
    """All token ids of each caption to subsample, by its row in `tokens`; empty if long captions are cut."""

    def __init__(
        self,
        dataset: CaptionedImages,
        vocabulary: Vocabulary | None = None,
        *,
        max_words: int,
        min_count: int = 1,
        long_captions: str = "cut",
        progress: Callable[[int, int], None] | None = None,
        report: ErrorReport | None = None,
    ) -> None:
        owner = "InMemoryCaptions"
        check_positive(owner, max_words=max_words, min_count=min_count)
        check_choice(owner, "long_captions", long_captions, ("cut", "subsample"))
        self._load(dataset, progress, ErrorReport() if report is None else report)
        flat = [caption for captions in self.captions for caption in captions]
        self.vocabulary = Vocabulary.build(flat, min_count) if vocabulary is None else vocabulary
        self.tokens, self.word_mask = self.vocabulary.encode(flat, max_words=max_words, warn_unknown=False)
        self.long_tokens = self._encode_long(flat, max_words) if long_captions == "subsample" else {}
        self.mentions_side = torch.tensor([_SIDES.search(caption) is not None for caption in flat])
        self.caption_counts = torch.tensor([len(captions) for captions in self.captions])
        self._first = self.caption_counts.cumsum(0) - self.caption_counts

    def _load(self, dataset: CaptionedImages, progress: Callable[[int, int], None] | None, report: ErrorReport) -> None:
        """Load all samples; damaged ones are skipped, and the rows stay contiguous."""
        owner, size, damaged = "InMemoryCaptions", len(dataset), 0
        # The data set whose images are memory-mapped, and the rows of it; None for all.
        self._mapped: tuple[PreparedCaptions, Sequence[int] | None] | None = None
        if size == 0:
            raise ValueError(f"{owner}: the data set is empty; it needs at least one sample.")
        whole, rows = (dataset.dataset, dataset.indices) if isinstance(dataset, Subset) else (dataset, None)
        if isinstance(whole, PreparedCaptions) and (stored := whole.stored_images(rows)) is not None:
            self._map(whole, rows, stored, progress)
            return
        class_ids: list[int] = []
        locations: list[tuple[SubjectBox | None, tuple[KeyPoint, ...] | None]] = []
        self.attributes, self.captions, self.point_names = [], [], ()
        for i in range(size):
            try:
                sample = dataset[i]
            except DamagedSample as error:
                report.add(owner, *error.skipped)
                damaged += 1
            else:
                _check_sample(owner, i, sample)
                kept = len(self.captions)
                if kept == 0:
                    images = torch.empty((size, *sample.image.shape), dtype=torch.uint8)
                if sample.image.shape != images.shape[1:]:
                    raise ValueError(
                        f"{owner}: image {i} is {sample.image.shape}, but the first is {tuple(images.shape[1:])}; all "
                        "must have the same size."
                    )
                # torch rejects the negative strides of a flipped array.
                images[kept] = torch.from_numpy(np.ascontiguousarray(sample.image))
                class_ids.append(int(sample.class_id))
                self.attributes.append(sample.attributes)
                self.captions.append(tuple(sample.captions))
                locations.append((sample.box, sample.points))
                if sample.points is not None:
                    self._check_point_names(i, sample)
            report.check(owner, damaged, size)
            if progress is not None:
                progress(i + 1, size)
        if not self.captions:
            raise ValueError(f"{owner}: none of the {size} samples can be read: {report.listing()}.")
        self.images = images[: len(self.captions)]
        self.class_ids = torch.tensor(class_ids)
        self._locate(locations)

    def _check_point_names(self, i: int, sample: CaptionedImage) -> None:
        """Require the same names of key points in all images that have any."""
        names = tuple(sample.point_names)
        if self.point_names not in ((), names):
            raise ValueError(
                f"InMemoryCaptions: the key points of image {i} are {names}, but those of an earlier one are "
                f"{self.point_names}; all must have the same names, and those that are not visible a visibility of 0."
            )
        self.point_names = names

    def _locate(self, locations: Sequence[tuple[SubjectBox | None, tuple[KeyPoint, ...] | None]]) -> None:
        """Collect boxes and key points, each None if no image has them."""
        self.boxes = self.points = None
        if any(box is not None for box, _ in locations):
            self.boxes = torch.tensor([(torch.nan,) * 4 if box is None else tuple(box) for box, _ in locations])
        if any(points is not None for _, points in locations):
            hidden = ((0.0, 0.0, 0.0),) * len(self.point_names)
            rows = [hidden if points is None else tuple(map(tuple, points)) for _, points in locations]
            self.points = torch.tensor(rows, dtype=torch.float32)

    def _map(
        self,
        dataset: PreparedCaptions,
        rows: Sequence[int] | None,
        images: Tensor | MappedImages,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Load the captions; the images stay memory-mapped."""
        self.images, self._mapped = images, (dataset, rows)
        rows = range(len(dataset)) if rows is None else rows
        self.class_ids = torch.tensor([dataset.entries[i].class_id for i in rows])
        self.captions = [dataset.entries[i].captions for i in rows]
        self.attributes = [{} for _ in rows]
        self.point_names = dataset.point_names
        self._locate([dataset.location(i) for i in rows])
        for i in range(len(rows)):
            if progress is not None:
                progress(i + 1, len(rows))

    def _encode_long(self, captions: list[str], max_words: int) -> dict[int, Tensor]:
        """All tokens of the captions of more than `max_words` words, by row."""
        if self.word_mask.shape[1] < max_words:
            return {}
        rows = self.word_mask[:, -1].nonzero()[:, 0].tolist()
        # One at a time: encoded together, all would be padded to the longest.
        full = {row: self.vocabulary.encode([captions[row]], warn_unknown=False)[0][0] for row in rows}
        return {row: tokens for row, tokens in full.items() if len(tokens) > max_words}

    def __len__(self) -> int:
        return len(self.captions)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling would copy memory-mapped images; the receiving process maps them itself.
        return {name: value for name, value in vars(self).items() if name != "images" or self._mapped is None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        dataset, rows = (None, None) if self._mapped is None else self._mapped
        if dataset is not None and (images := dataset.stored_images(rows)) is not None:
            self.images = images

    def batch(
        self, indices: Tensor, choices: Tensor, *, words: int | None = None, with_images: bool = True
    ) -> CaptionBatch:
        """Collect images by index, each with one of its captions.

        Args:
            indices: Index of each image, (B,).
            choices: Index of a caption within each image, from 0, (B,).
            words: Length L of the batch; None takes the longest caption in it.
            with_images: Whether to load the images; if False, those of the batch are empty, (B, 0, 0, 3).

        Raises:
            IndexError: An image or caption index is out of range.
        """
        rows = self.caption_rows(indices, choices)
        word_mask = self.word_mask[rows]
        longest = int(word_mask.sum(dim=1).max()) if words is None else words
        tokens = self.tokens[rows, :longest]
        return CaptionBatch(
            images=self.images[indices] if with_images else torch.empty(len(indices), 0, 0, 3, dtype=torch.uint8),
            tokens=tokens,
            word_mask=word_mask[:, :longest],
            class_ids=self.class_ids[indices],
            captions=tuple(self.captions[i][j] for i, j in zip(indices.tolist(), choices.tolist())),
            image_rows=indices,
            caption_rows=rows,
            caption_ids=tokens.unique(dim=0, return_inverse=True)[1],
            boxes=None if self.boxes is None else self.boxes[indices],
            points=None if self.points is None else self.points[indices],
        )

    def caption_rows(self, indices: Tensor, choices: Tensor) -> Tensor:
        """Rows of `tokens` for the captions `choices` of the images at `indices`.

        Raises:
            IndexError: An image or caption index is out of range.
        """
        if bool(((indices < 0) | (indices >= len(self))).any()):
            raise IndexError(f"InMemoryCaptions: an index in indices is out of range for {len(self)} images.")
        if bool(((choices < 0) | (choices >= self.caption_counts[indices])).any()):
            raise IndexError("InMemoryCaptions: a caption index in choices is out of range for its image.")
        return self._first[indices] + choices


def _check_sample(owner: str, i: int, sample: CaptionedImage) -> None:
    image, captions, class_id = sample.image, sample.captions, sample.class_id
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"of type {type(image).__name__}"
        raise ValueError(f"{owner}: image {i} is {found}; expected a numpy array, uint8 (H, W, 3).")
    if not isinstance(captions, tuple | list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{owner}: sample {i} has the captions {captions!r}; expected a tuple of strings.")
    if not captions:
        raise ValueError(f"{owner}: sample {i} has no caption; each sample needs at least one.")
    is_integer = isinstance(class_id, int | np.integer) and not isinstance(class_id, bool)
    if not is_integer or not 0 <= class_id < 2**63:
        raise ValueError(f"{owner}: sample {i} has the class {class_id!r}; expected an integer from 0 to 2**63 - 1.")
    if sample.box is not None and not (_is_numbers(sample.box, 4) and min(sample.box[2:]) > 0):
        raise ValueError(
            f"{owner}: sample {i} has the box {sample.box!r}; expected x, y, width and height as shares of the image, "
            "of positive size, or None."
        )
    if sample.points is not None and not (
        len(sample.points) == len(sample.point_names) and all(_is_numbers(point, 3) for point in sample.points)
    ):
        raise ValueError(
            f"{owner}: sample {i} has the points {sample.points!r} with the names {sample.point_names!r}; expected x, "
            "y and visibility for each name."
        )


def _is_numbers(values: Any, count: int) -> bool:
    return len(values) == count and all(math.isfinite(value) for value in values)
