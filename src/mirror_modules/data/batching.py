"""A whole data set in memory, and endless repeatable batches out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mirror_modules._checks import check_positive
from mirror_modules.data.sample import CaptionedImages
from mirror_modules.data.transforms import Crops, crop_flip, draw_crops
from mirror_modules.stem.vocabulary import Vocabulary


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

    Args:
        dataset: The samples, with images of one size and at least one caption each.
        vocabulary: Encodes the captions; None builds one out of them. Words that it lacks become unknown tokens.
        max_words: Longer captions are cut after so many words.
        min_count: Occurrences that a word needs to enter the vocabulary, where one is built.
        progress: Called with (samples done, samples in all) after each sample.

    Raises:
        ValueError: The data set is empty, its images differ in size, or a sample has no caption.
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

    def __init__(
        self,
        dataset: CaptionedImages,
        vocabulary: Vocabulary | None = None,
        *,
        max_words: int,
        min_count: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        check_positive("InMemoryCaptions", max_words=max_words, min_count=min_count)
        size = len(dataset)
        if size == 0:
            raise ValueError("InMemoryCaptions: the data set is empty; it needs at least one sample.")
        self.class_ids = torch.empty(size, dtype=torch.long)
        self.attributes, self.captions = [], []
        for i in range(size):
            sample = dataset[i]
            if i == 0:
                self.images = torch.empty((size, *sample.image.shape), dtype=torch.uint8)
            if sample.image.shape != self.images.shape[1:]:
                raise ValueError(
                    f"InMemoryCaptions: image {i} is {sample.image.shape}, but the first is "
                    f"{tuple(self.images.shape[1:])}; all must have one size."
                )
            if not sample.captions:
                raise ValueError(f"InMemoryCaptions: sample {i} has no caption; each needs at least one.")
            self.images[i] = torch.from_numpy(sample.image)
            self.class_ids[i] = sample.class_id
            self.attributes.append(sample.attributes)
            self.captions.append(tuple(sample.captions))
            if progress is not None:
                progress(i + 1, size)

        flat = [caption for captions in self.captions for caption in captions]
        self.vocabulary = Vocabulary.build(flat, min_count) if vocabulary is None else vocabulary
        self.tokens, self.word_mask = self.vocabulary.encode(flat, max_words=max_words, warn_unknown=False)
        self.caption_counts = torch.tensor([len(captions) for captions in self.captions])
        self._first = self.caption_counts.cumsum(0) - self.caption_counts

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor, choices: Tensor, *, words: int | None = None) -> CaptionBatch:
        """The images at `indices` (B,), each with its caption number `choices` (B,), counted from 0.

        Args:
            indices: Which images, (B,).
            choices: Which caption of each, (B,).
            words: Length L of the batch; None is that of its longest caption.

        Raises:
            IndexError: There is no such image, or it has no such caption.
        """
        rows = self.caption_rows(indices, choices)
        word_mask = self.word_mask[rows]
        longest = int(word_mask.sum(dim=1).max()) if words is None else words
        return CaptionBatch(
            images=self.images[indices],
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
        crop: Random squares of this size are cut out of the images, and every second one is mirrored; None takes the
            images as they are.
        rank: Which part of each batch is wanted, from 0.
        ranks: Into how many parts each batch is divided, row by row in order.

    Raises:
        ValueError: `batch_size` is not from 1 to the number of samples, or not a multiple of `ranks`.
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
    ) -> None:
        owner = "RepeatableBatches"
        check_positive(owner, batch_size=batch_size, ranks=ranks)
        if batch_size > len(captions):
            raise ValueError(f"{owner}: batch_size={batch_size} exceeds the {len(captions)} samples.")
        if batch_size % ranks:
            raise ValueError(f"{owner}: batch_size={batch_size} must be a multiple of ranks={ranks}.")
        self.captions, self.batch_size, self.seed, self.crop = captions, batch_size, seed, crop
        self.rank, self.ranks = rank, ranks
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
        longest = int(self.captions.word_mask[self.captions.caption_rows(indices, choices)].sum(dim=1).max())
        batch = self.captions.batch(self._mine(indices), self._mine(choices), words=longest)
        if self.crop is None:
            return batch
        _, height, width, _ = batch.images.shape
        crops = draw_crops(self.batch_size, height, width, self.crop, seeded(self.seed, 1, number))
        return batch._replace(images=crop_flip(batch.images, self.crop, Crops(*map(self._mine, crops))))

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
