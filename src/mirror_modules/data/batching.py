"""A whole data set in memory, and endless repeatable batches out of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.damage import DamagedSample, ErrorReport
from mirror_modules.data.prepared import PreparedCaptions
from mirror_modules.data.sample import CaptionedImage, CaptionedImages
from mirror_modules.data.transforms import Crops, crop_flip, draw_crops
from mirror_modules.stem.vocabulary import Vocabulary

# A mirror image would make a lie of these words. Only English ones are known.
_SIDES = re.compile(r"(?<![^\W_])(left|right)(most|wards?|hand(ed)?)?(?![^\W_])", re.IGNORECASE)


class CaptionBatch(NamedTuple):
    """Images, each with one of its captions."""

    images: Tensor
    """Bytes (B, H, W, 3) as the data set has them; `transforms.to_float` makes the model's input of them."""
    tokens: Tensor
    """Token ids, (B, L)."""
    word_mask: Tensor
    """True for a real word, (B, L); L is the longest caption of the batch."""
    class_ids: Tensor
    """(B,)"""
    captions: tuple[str, ...]
    """The captions as they were written, not cut."""
    image_rows: Tensor
    """Which images of the data set these are, (B,)."""
    caption_rows: Tensor
    """Which captions of the data set these are, counted over all images, (B,)."""


class InMemoryCaptions:
    """Draws or decodes each sample once, encodes each caption once, and keeps them.

    Images of `PreparedCaptions` that lie in one file, at the resolution asked for, are not copied: they stay on disk,
    mapped into memory, and nothing may be written into `images`.

    Args:
        dataset: The samples, with images of one size and at least one caption each.
        vocabulary: Encodes the captions; None builds one out of them. Words that it lacks become unknown tokens.
        max_words: Longer captions are shortened to so many words.
        long_captions: "cut" keeps the first words of longer captions, "subsample" lets each batch of
            `RepeatableBatches` keep other ones at random, in their order.
        min_count: Occurrences that a word needs to enter the vocabulary, where one is built.
        progress: Called with (samples done, samples in all) after each sample.
        report: Where damaged samples are left out and listed, such as the `report` of a data set on disk; None stops at
            the first one.

    Raises:
        ValueError: The data set is empty, its images differ in size, a sample has no caption, or is no
            `CaptionedImage` of bytes, text and a class from 0, or samples are damaged and `report` is None, or refuses
            the first one or so many.
    """

    images: Tensor
    """Bytes, (N, H, W, 3)."""
    class_ids: Tensor
    """(N,)"""
    attributes: list[Mapping[str, str]]
    """What is known of each image."""
    captions: list[tuple[str, ...]]
    """All captions of each image."""
    vocabulary: Vocabulary
    """What encodes the captions."""
    tokens: Tensor
    """All captions of all images, one after the other, encoded. (M, L)"""
    word_mask: Tensor
    """True for a real word of them. (M, L)"""
    caption_counts: Tensor
    """How many captions each image has. (N,)"""
    tells_sides: Tensor
    """Whether a caption says left or right. (M,)"""
    long_tokens: dict[int, Tensor]
    """All words of each caption that batches take a random part of, by its row; empty where captions are cut."""

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
        self._read(dataset, progress, ErrorReport() if report is None else report)
        flat = [caption for captions in self.captions for caption in captions]
        self.vocabulary = Vocabulary.build(flat, min_count) if vocabulary is None else vocabulary
        self.tokens, self.word_mask = self.vocabulary.encode(flat, max_words=max_words, warn_unknown=False)
        self.long_tokens = self._encode_long(flat, max_words) if long_captions == "subsample" else {}
        self.tells_sides = torch.tensor([_SIDES.search(caption) is not None for caption in flat])
        self.caption_counts = torch.tensor([len(captions) for captions in self.captions])
        self._first = self.caption_counts.cumsum(0) - self.caption_counts

    def _read(self, dataset: CaptionedImages, progress: Callable[[int, int], None] | None, report: ErrorReport) -> None:
        """Take every sample out of the data set; damaged ones leave no hole."""
        owner, size, damaged = "InMemoryCaptions", len(dataset), 0
        if size == 0:
            raise ValueError(f"{owner}: the data set is empty; it needs at least one sample.")
        if isinstance(dataset, PreparedCaptions) and (stored := dataset.stored_images()) is not None:
            self._map(dataset, stored, progress)
            return
        class_ids = []
        self.attributes, self.captions = [], []
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
                    self.images = torch.empty((size, *sample.image.shape), dtype=torch.uint8)
                if sample.image.shape != self.images.shape[1:]:
                    raise ValueError(
                        f"{owner}: image {i} is {sample.image.shape}, but the first is "
                        f"{tuple(self.images.shape[1:])}; all must have one size."
                    )
                # A copy of what is mirrored or turned, which torch does not take.
                self.images[kept] = torch.from_numpy(np.ascontiguousarray(sample.image))
                class_ids.append(int(sample.class_id))
                self.attributes.append(sample.attributes)
                self.captions.append(tuple(sample.captions))
            report.check(owner, damaged, size)
            if progress is not None:
                progress(i + 1, size)
        if not self.captions:
            raise ValueError(f"{owner}: none of the {size} samples can be read: {report.listing()}.")
        self.images = self.images[: len(self.captions)]
        self.class_ids = torch.tensor(class_ids)

    def _map(self, dataset: PreparedCaptions, images: Tensor, progress: Callable[[int, int], None] | None) -> None:
        """Take the captions, and leave the images where they lie."""
        self.images = images
        self.class_ids = torch.tensor([entry.class_id for entry in dataset.entries])
        self.captions = [entry.captions for entry in dataset.entries]
        self.attributes = [{} for _ in dataset.entries]
        for i in range(len(dataset)):
            if progress is not None:
                progress(i + 1, len(dataset))

    def _encode_long(self, captions: list[str], max_words: int) -> dict[int, Tensor]:
        if self.word_mask.shape[1] < max_words:
            return {}
        rows = self.word_mask[:, -1].nonzero()[:, 0].tolist()
        # One by one: a single endless caption would pad all others to its length.
        whole = {row: self.vocabulary.encode([captions[row]], warn_unknown=False)[0][0] for row in rows}
        return {row: tokens for row, tokens in whole.items() if len(tokens) > max_words}

    def __len__(self) -> int:
        return len(self.captions)

    def batch(
        self, indices: Tensor, choices: Tensor, *, words: int | None = None, with_images: bool = True
    ) -> CaptionBatch:
        """The images at `indices` (B,), each with its caption number `choices` (B,), counted from 0.

        Args:
            indices: Which images, (B,).
            choices: Which caption of each, (B,).
            words: Length L of the batch; None is that of its longest caption.
            with_images: Whether the images are wanted; otherwise the batch's are empty, (B, 0, 0, 3).

        Raises:
            IndexError: There is no such image, or it has no such caption.
        """
        rows = self.caption_rows(indices, choices)
        word_mask = self.word_mask[rows]
        longest = int(word_mask.sum(dim=1).max()) if words is None else words
        return CaptionBatch(
            images=self.images[indices] if with_images else self.images[indices, :0, :0],
            tokens=self.tokens[rows, :longest],
            word_mask=word_mask[:, :longest],
            class_ids=self.class_ids[indices],
            captions=tuple(self.captions[i][j] for i, j in zip(indices.tolist(), choices.tolist())),
            image_rows=indices,
            caption_rows=rows,
        )

    def caption_rows(self, indices: Tensor, choices: Tensor) -> Tensor:
        """Rows of `tokens` that hold the chosen captions of the images at `indices`.

        Raises:
            IndexError: There is no such image, or it has no such caption.
        """
        if bool(((choices < 0) | (choices >= self.caption_counts[indices])).any()):
            raise IndexError("InMemoryCaptions: choices names a caption that its image does not have.")
        return self._first[indices] + choices


def _check_sample(owner: str, i: int, sample: CaptionedImage) -> None:
    image, captions, class_id = sample.image, sample.captions, sample.class_id
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"of type {type(image).__name__}"
        raise ValueError(f"{owner}: image {i} is {found}; expected a numpy array, uint8 (H, W, 3).")
    if not isinstance(captions, tuple | list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{owner}: sample {i} has the captions {captions!r}; expected a tuple of texts.")
    if not captions:
        raise ValueError(f"{owner}: sample {i} has no caption; each needs at least one.")
    is_whole = isinstance(class_id, int | np.integer) and not isinstance(class_id, bool)
    if not is_whole or not 0 <= class_id < 2**63:
        raise ValueError(
            f"{owner}: sample {i} has the class {class_id!r}; expected a whole number from 0, below 2**63."
        )


class RepeatableBatches(Dataset[CaptionBatch]):
    """Shuffled epochs without end, a random caption for each image each time: `batches[n]` is batch number n.

    A batch depends on the seed and on its number alone, whichever were read before, in whatever process: a training
    that goes on after n batches goes on with `batches[n]`, and there is no state to keep. Full batches only: what is
    left over at the end of an epoch waits for a later one. For a `DataLoader`, pass `batch_size=None` and a range as
    `sampler`.

    Args:
        captions: The data set.
        batch_size: Images in a batch, of all ranks together.
        seed: Decides everything that is random.
        crop: Random squares of this size are cut out of the images, and every second one is mirrored, unless its
            caption says left or right; None takes the images as they are.
        rank: Which part of each batch is wanted, from 0.
        ranks: Into how many parts each batch is divided, row by row in order.
        with_images: Whether the images are wanted; see `InMemoryCaptions.batch`.

    Raises:
        ValueError: `batch_size` is not from 1 to the number of samples, or not a multiple of `ranks`, `rank` is none of
            them, or `crop` exceeds the images.
    """

    def __init__(
        self,
        captions: InMemoryCaptions,
        batch_size: int,
        seed: int,
        *,
        crop: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        with_images: bool = True,
    ) -> None:
        owner = "RepeatableBatches"
        check_positive(owner, batch_size=batch_size, ranks=ranks)
        if batch_size > len(captions):
            raise ValueError(f"{owner}: batch_size={batch_size} exceeds the {len(captions)} samples.")
        if batch_size % ranks:
            raise ValueError(f"{owner}: batch_size={batch_size} must be a multiple of ranks={ranks}.")
        if not isinstance(rank, int) or not 0 <= rank < ranks:
            raise ValueError(f"{owner}: rank must be from 0 to {ranks - 1} with ranks={ranks}, but it is {rank!r}.")
        if crop is not None:
            check_positive(owner, crop=crop)
            height, width = captions.images.shape[1:3]
            if crop > min(height, width):
                raise ValueError(f"{owner}: crop={crop} exceeds the images of {width} x {height} pixels.")
        self.captions, self.batch_size, self.seed, self.crop = captions, batch_size, seed, crop
        self.rank, self.ranks, self.with_images = rank, ranks, with_images
        self._epoch = -1

    def __getitem__(self, number: int) -> CaptionBatch:
        """Batch `number`, from 0."""
        if number < 0:
            raise IndexError(f"RepeatableBatches: batches are counted from 0, and {number} was asked for.")
        per_epoch = len(self.captions) // self.batch_size
        self._turn_to(number // per_epoch)
        start = number % per_epoch * self.batch_size
        indices = self._order[start : start + self.batch_size]
        choices = self._choices[indices]
        # As long as the longest caption of all ranks, so that their words can be put together.
        rows = self.captions.caption_rows(indices, choices)
        longest = int(self.captions.word_mask[rows].sum(dim=1).max())
        crop = self.crop if self.with_images else None
        batch = self.captions.batch(
            self._mine(indices), self._mine(choices), words=longest, with_images=self.with_images and crop is None
        )
        self._subsample(batch, number)
        if crop is None:
            return batch
        _, height, width, _ = self.captions.images.shape
        crops = draw_crops(self.batch_size, height, width, crop, seeded(self.seed, 1, number))
        crops = crops._replace(mirrored=crops.mirrored & ~self.captions.tells_sides[rows].unsqueeze(1))
        mine = Crops(*map(self._mine, crops))
        return batch._replace(images=crop_flip(self.captions.images, batch.image_rows, crop, mine))

    def _subsample(self, batch: CaptionBatch, number: int) -> None:
        """Let long captions keep random words, in place: which ones depends on the batch and the caption alone."""
        long = self.captions.long_tokens
        for i, row in enumerate(batch.caption_rows.tolist()):
            if row in long:
                order = torch.randperm(len(long[row]), generator=seeded(self.seed, 2, number, row))
                batch.tokens[i] = long[row][order[: batch.tokens.shape[1]].sort().values]

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.ranks)[self.rank]

    def _turn_to(self, epoch: int) -> None:
        if epoch != self._epoch:
            random = seeded(self.seed, 0, epoch)
            self._order = torch.randperm(len(self.captions), generator=random)
            self._choices = torch.randint(2**62, (len(self.captions),), generator=random) % self.captions.caption_counts
            self._epoch = epoch


def seeded(*numbers: int) -> torch.Generator:
    """A source of random numbers that depends on all of these numbers, and on their order."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)
