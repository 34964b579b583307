"""Endless, repeatable batches of a data set in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mirror_modules._checks import check_positive
from mirror_modules.data.in_memory import CaptionBatch, InMemoryCaptions
from mirror_modules.data.locations import crop_boxes, crop_points, mirror_order
from mirror_modules.data.seeding import seeded
from mirror_modules.data.transforms import Crops, crop_flip, draw_crops


class RepeatableBatches(Dataset[CaptionBatch]):
    """Shuffled epochs without end, with one random caption per image; `batches[n]` is batch number n.

    A batch is a pure function of the seed and its number, in any order of access and in any process: a run resumed
    after n batches continues with `batches[n]`, and there is no state to save. All batches are full; images that remain
    at the end of an epoch are not used in it. With a `DataLoader`, pass `batch_size=None` and a range as `sampler`.

    Args:
        captions: The data set.
        batch_size: Images per batch, over all ranks.
        seed: Seed of the order of images, the captions, the crops and the subsampled words.
        crop: Size of random square crops, which are flipped horizontally with probability 1/2 unless the caption
            mentions left or right; None returns whole images. Boxes and key points are cropped and flipped with them,
            where left and right parts change places.
        rank: Rank whose part of each batch is returned, from 0.
        ranks: Number of ranks; each gets an equal, contiguous part of the rows.
        with_images: Whether to load the images; see `InMemoryCaptions.batch`.

    Raises:
        ValueError: `batch_size` exceeds the number of samples or is not a multiple of `ranks`, `rank` is out of range,
            `seed` is negative, or `crop` exceeds the images.

    Examples:
        >>> from mirror_modules.data import InMemoryCaptions, RepeatableBatches, SyntheticFlowers
        >>> data = InMemoryCaptions(SyntheticFlowers(11, resolution=19), max_words=18)
        >>> batches = RepeatableBatches(data, batch_size=4, seed=0, crop=16)
        >>> batches[7].images.shape, len(batches[7].captions)
        (torch.Size([4, 16, 16, 3]), 4)
        >>> again = RepeatableBatches(data, batch_size=4, seed=0, crop=16)
        >>> again[7].captions == batches[7].captions
        True
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
        if seed < 0:
            raise ValueError(f"{owner}: seed must be at least 0, but it is {seed}.")
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
            raise IndexError(f"RepeatableBatches: batches are numbered from 0, but the index is {number}.")
        per_epoch = len(self.captions) // self.batch_size
        self._shuffle(number // per_epoch)
        start = number % per_epoch * self.batch_size
        indices = self._order[start : start + self.batch_size]
        choices = self._choices[indices]
        rows = self.captions.caption_rows(indices, choices)
        tokens = self._tokens(rows, number)
        crop = self.crop if self.with_images else None
        batch = self.captions.batch(
            self._local(indices),
            self._local(choices),
            words=tokens.shape[1],
            with_images=self.with_images and crop is None,
        )
        # Captions of other ranks may be equal, too.
        _, caption_ids = tokens.unique(dim=0, return_inverse=True)
        batch = batch._replace(tokens=self._local(tokens), caption_ids=self._local(caption_ids))
        if crop is None:
            return batch
        _, height, width, _ = self.captions.images.shape
        crops = draw_crops(self.batch_size, height, width, crop, seeded(self.seed, 1, number))
        crops = crops._replace(mirrored=crops.mirrored & ~self.captions.mentions_side[rows].unsqueeze(1))
        local_crops = Crops(*map(self._local, crops))
        images = crop_flip(self.captions.images, batch.image_rows, crop, local_crops)
        boxes, points = batch.boxes, batch.points
        if boxes is not None:
            boxes = crop_boxes(boxes, height, width, crop, local_crops)
        if points is not None:
            order = mirror_order(self.captions.point_names)
            points = crop_points(points, height, width, crop, local_crops, order)
        return batch._replace(images=images, boxes=boxes, points=points)

    def _tokens(self, rows: Tensor, number: int) -> Tensor:
        """The tokens of the captions of all ranks, padded to the longest, so that their words can be gathered.

        Of long captions, random words are kept; the choice depends on seed, batch and caption alone.
        """
        longest = int(self.captions.word_mask[rows].sum(dim=1).max())
        tokens, long = self.captions.tokens[rows, :longest], self.captions.long_tokens
        for i, row in enumerate(rows.tolist()):
            if row in long:
                order = torch.randperm(len(long[row]), generator=seeded(self.seed, 2, number, row))
                tokens[i] = long[row][order[:longest].sort().values]
        return tokens

    def _local(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.ranks)[self.rank]

    def _shuffle(self, epoch: int) -> None:
        """Draw the order of the images and the caption of each for an epoch, unless they are already drawn."""
        if epoch != self._epoch:
            generator = seeded(self.seed, 0, epoch)
            self._order = torch.randperm(len(self.captions), generator=generator)
            counts = self.captions.caption_counts
            self._choices = torch.randint(2**62, (len(self.captions),), generator=generator) % counts
            self._epoch = epoch
