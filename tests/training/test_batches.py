"""Splits and training batches: what a recipe asks for is what arrives, the same each time."""

import dataclasses
import shutil

import pytest
import torch

from mirror_modules.data import ErrorReport, RepeatableBatches, SyntheticFlowers
from mirror_modules.data.transforms import to_float
from mirror_modules.stem import Vocabulary
from mirror_modules.training.batches import load_batches, load_splits, to_device
from tests.layouts import make_coco, make_flowers

CPU = torch.device("cpu")


def splits_of(recipe, **changes):
    return load_splits(dataclasses.replace(recipe.data, **changes), recipe.model, recipe.seed)


def batches_of(training, seed=3, batch_size=7, count=9):
    crop = 16 if training.images.shape[1] > 16 else None
    batches = RepeatableBatches(training, batch_size, seed, crop=crop)
    return [to_device(batch, CPU) for batch in load_batches(batches, 0, count)]


def test_splits_have_the_sizes_of_the_recipe(tiny_recipe):
    splits = splits_of(tiny_recipe)
    assert splits.training.images.shape == (41, 16, 16, 3)
    assert splits.validation.images.shape == (31, 16, 16, 3)


def test_the_vocabulary_is_of_the_training_captions_alone(tiny_recipe):
    splits = splits_of(tiny_recipe, training_images=2)
    seen = [caption for captions in splits.training.captions for caption in captions]
    assert splits.vocabulary == Vocabulary.build(seen)
    assert splits.validation.vocabulary is splits.vocabulary
    assert len(splits_of(tiny_recipe, min_count=9).vocabulary) < len(splits_of(tiny_recipe).vocabulary)


def test_training_and_validation_images_differ(tiny_recipe):
    splits = splits_of(tiny_recipe)
    training = {image.numpy().tobytes() for image in splits.training.images}
    assert not training & {image.numpy().tobytes() for image in splits.validation.images}


def test_the_seed_of_the_recipe_decides_the_images(tiny_recipe):
    first = splits_of(tiny_recipe)
    second = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed + 1)
    assert torch.equal(first.training.images, splits_of(tiny_recipe).training.images)
    assert not torch.equal(first.training.images, second.training.images)


def test_a_part_of_the_photographs_is_spread_over_all_classes(tiny_recipe, monkeypatch):
    """Data sets on disk are sorted by class; the first images would be of a few classes."""

    def open_sorted(path, split, resolution, source, *, on_error):
        flowers = SyntheticFlowers(23, resolution=resolution, split=split)
        flowers.report, flowers.entries = ErrorReport(on_error), ()
        return flowers

    monkeypatch.setattr("mirror_modules.training.batches.open_captions", open_sorted)
    changes = {"source": "oxford-flowers", "path": "somewhere"}
    part = splits_of(tiny_recipe, **changes, training_images=5, validation_images=None)
    whole = SyntheticFlowers(23, resolution=16)
    assert [tuple(captions) for captions in part.training.captions] == [whole[i].captions for i in (0, 4, 9, 13, 18)]
    assert len(part.validation) == 23


def test_a_photograph_of_both_splits_is_refused(tiny_recipe, tmp_path):
    root = make_flowers(tmp_path, training=6, validation=3)
    shutil.copy(root / "text_c10/class_00001/image_00002.txt", root / "text_c10/class_00007")
    with pytest.raises(
        ValueError, match=r"load_splits: 1 images are in both splits, such as .*image_00002\.jpg; what is"
    ):
        splits_of(tiny_recipe, source="oxford-flowers", path=str(root), training_images=None, validation_images=None)


def test_what_is_damaged_is_counted(tiny_recipe, tmp_path):
    root = make_coco(tmp_path, training=41, validation=7)
    for number in (3, 11):
        (root / "train2017" / f"{number:012}.jpg").write_bytes(b"")
    splits = splits_of(tiny_recipe, source="coco", path=str(root), on_error="skip", validation_images=5)
    assert splits.left_out == {"training": 2, "validation": 0}


def test_photographs_need_a_folder(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="--data PATH"):
        splits_of(tiny_recipe, source="oxford-flowers")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        splits_of(tiny_recipe, source="oxford-flowers", path=str(tmp_path / "nowhere"))


def test_each_epoch_shows_each_image_once_with_a_caption_of_its_own(tiny_recipe):
    training = splits_of(tiny_recipe).training
    floats = to_float(training.images)
    epoch = batches_of(training, count=41 // 7)
    shown = []
    for batch in epoch:
        assert batch.images.shape == (7, 3, 16, 16)
        assert batch.images.min() >= -1
        assert batch.images.max() <= 1
        for image, caption, class_id in zip(batch.images, batch.captions, batch.class_ids):
            row = next(i for i in range(41) if torch.equal(floats[i], image) and caption in training.captions[i])
            assert training.class_ids[row] == class_id
            shown.append(row)
    assert len(set(shown)) == 35


def test_batches_repeat_by_their_seed(tiny_recipe):
    training = splits_of(tiny_recipe, augment=True).training
    first, again, other = batches_of(training), batches_of(training), batches_of(training, seed=4)
    assert all(torch.equal(a.images, b.images) and a.captions == b.captions for a, b in zip(first, again))
    assert not torch.equal(first[0].images, other[0].images)


def test_augmented_images_are_cut_from_larger_ones(tiny_recipe):
    splits = splits_of(tiny_recipe, augment=True)
    assert splits.training.images.shape == (41, 19, 19, 3)
    assert splits.validation.images.shape == (31, 16, 16, 3)
    larger = to_float(splits.training.images)
    windows = larger.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    batch = batches_of(splits.training, count=1)[0]
    for image in batch.images:
        assert any((windows == view).flatten(1).all(dim=1).any() for view in (image, image.flip(2)))


def test_workers_prepare_the_same_batches(tiny_recipe):
    batches = RepeatableBatches(splits_of(tiny_recipe, augment=True).training, 7, 3, crop=16)
    before = torch.get_rng_state()
    alone, by_workers = list(load_batches(batches, 2, 9)), list(load_batches(batches, 2, 9, workers=2))
    assert len(alone) == len(by_workers) == 7
    for one, other in zip(alone, by_workers):
        assert one.captions == other.captions
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), before)
