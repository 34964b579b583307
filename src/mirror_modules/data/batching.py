"""A whole data set in memory, and endless repeatable batches out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_positive
from mirror_modules.data.sample import CaptionedImages
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
        self._tokens, self._word_mask = self.vocabulary.encode(flat, max_words=max_words, warn_unknown=False)
        self._counts = torch.tensor([len(captions) for captions in self.captions])
        self._first = self._counts.cumsum(0) - self._counts

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor, choices: Tensor) -> CaptionBatch:
        """The images at `indices` (B,), each with its caption number `choices` (B,), counted from 0.

        Raises:
            IndexError: There is no such image, or it has no such caption.
        """
        if bool(((choices < 0) | (choices >= self._counts[indices])).any()):
            raise IndexError("InMemoryCaptions: choices names a caption that its image does not have.")
        rows = self._first[indices] + choices
        word_mask = self._word_mask[rows]
        longest = int(word_mask.sum(dim=1).max())
        return CaptionBatch(
            images=self.images[indices],
            tokens=self._tokens[rows, :longest],
            word_mask=word_mask[:, :longest],
            class_ids=self.class_ids[indices],
            captions=tuple(self.captions[i][j] for i, j in zip(indices.tolist(), choices.tolist())),
        )

    def batches(self, batch_size: int, generator: torch.Generator, *, skip: int = 0) -> Iterator[CaptionBatch]:
        """Shuffled epochs without end, a random caption for each image each time.

        Full batches only: what is left over at the end of an epoch waits for a later one. All that is random comes from
        `generator`, which nobody else should use meanwhile. A run that stopped after n batches goes on with the same
        batches from an equally seeded generator and skip=n.

        Raises:
            ValueError: `batch_size` is not from 1 to the number of samples, or `skip` is negative.
        """
        check_positive("InMemoryCaptions.batches", batch_size=batch_size)
        if batch_size > len(self):
            raise ValueError(f"InMemoryCaptions.batches: batch_size={batch_size} exceeds the {len(self)} samples.")
        if skip < 0:
            raise ValueError(f"InMemoryCaptions.batches: skip must be at least 0, but it is {skip}.")
        return self._batches(batch_size, generator, skip)

    def _batches(self, batch_size: int, generator: torch.Generator, skip: int) -> Iterator[CaptionBatch]:
        # Apart from `batches`, so that a wrong argument fails at the call and not at the first batch.
        per_epoch = len(self) // batch_size
        while True:
            order = torch.randperm(len(self), generator=generator)
            choices = torch.randint(2**62, (len(self),), generator=generator) % self._counts
            for start in range(skip, per_epoch):
                indices = order[start * batch_size : (start + 1) * batch_size]
                yield self.batch(indices, choices[indices])
            skip = max(skip - per_epoch, 0)
