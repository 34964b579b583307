"""Samples of the real data sets, if present: their research licenses do not permit them in this repository.

MIRROR_MODULES_TEST_DATA names a folder with oxford_flowers/, birds/ and coco_mini/, each with any number of images.
"""

import numpy as np
import pytest
import torch

from mirror_modules.data import InMemoryCaptions, RepeatableBatches, open_captions

pytest.importorskip("PIL.Image")

SOURCES = {"oxford_flowers": "OxfordFlowers", "birds": "CubBirds", "coco_mini": "CocoCaptions"}
RESOLUTION = 38


def test_every_file_is_read(real_sample):
    classes = []
    for split in ("train", "validation"):
        captions = open_captions(real_sample, split, RESOLUTION)
        assert type(captions).__name__ == SOURCES[real_sample.name]
        # At most a few hundred, spread over all classes.
        for i in range(0, len(captions), max(len(captions) // 300, 1)):
            sample = captions[i]
            assert sample.image.shape == (RESOLUTION, RESOLUTION, 3)
            assert sample.image.dtype == np.uint8
            assert sample.image.std() > 1
            assert 1 <= len(sample.captions) <= 12
        classes.append({entry.class_id for entry in captions.entries})
        assert not captions.report.skipped
    if real_sample.name != "coco_mini":
        assert not classes[0] & classes[1]


def test_batches_of_real_images(real_sample):
    captions = open_captions(real_sample, "validation", RESOLUTION)
    some = torch.utils.data.Subset(captions, range(min(len(captions), 70)))
    loaded = InMemoryCaptions(some, max_words=18, long_captions="subsample")
    batch = RepeatableBatches(loaded, 8, 0, crop=32)[3]
    assert batch.images.shape == (8, 32, 32, 3)
    assert batch.tokens.shape[1] <= 18
    assert bool(batch.word_mask.any(dim=1).all())
