"""Splits and training batches: sizes, vocabulary, augmentation, and reproducibility."""

import dataclasses
import shutil
import unicodedata

import numpy as np
import pytest
import torch

from mirror_modules.data import CaptionedImage, ErrorReport, InMemoryCaptions, RepeatableBatches, SyntheticFlowers
from mirror_modules.data.transforms import to_float
from mirror_modules.stem import Vocabulary
from mirror_modules.stem.vocabulary import split_words
from mirror_modules.training.batches import (
    Splits,
    draw_held_out,
    has_classes,
    load_batches,
    load_splits,
    to_device,
    unseen_captions,
)
from tests.layouts import captions_of, make_coco, make_flowers

CPU = torch.device("cpu")


def make_splits(recipe, **changes):
    return load_splits(dataclasses.replace(recipe.data, **changes), recipe.model, recipe.seed)


def make_batches(training, seed=3, batch_size=7, count=9):
    crop = 16 if training.images.shape[1] > 16 else None
    batches = RepeatableBatches(training, batch_size, seed, crop=crop)
    return [to_device(batch, CPU) for batch in load_batches(batches, 0, count)]


def test_splits_have_the_sizes_of_the_recipe(tiny_recipe):
    splits = make_splits(tiny_recipe)
    assert splits.training.images.shape == (41, 16, 16, 3)
    assert splits.validation.images.shape == (31, 16, 16, 3)


def test_the_vocabulary_is_built_from_training_captions_only(tiny_recipe):
    splits = make_splits(tiny_recipe, training_images=2)
    captions = [caption for captions in splits.training.captions for caption in captions]
    assert splits.vocabulary == Vocabulary.build(captions)
    assert splits.validation.vocabulary is splits.vocabulary
    assert len(make_splits(tiny_recipe, min_count=9).vocabulary) < len(make_splits(tiny_recipe).vocabulary)


def test_training_and_validation_images_differ(tiny_recipe):
    splits = make_splits(tiny_recipe)
    training = {image.numpy().tobytes() for image in splits.training.images}
    assert not training & {image.numpy().tobytes() for image in splits.validation.images}


def test_the_images_depend_on_the_seed_of_the_recipe(tiny_recipe):
    first = make_splits(tiny_recipe)
    second = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed + 1)
    assert torch.equal(first.training.images, make_splits(tiny_recipe).training.images)
    assert not torch.equal(first.training.images, second.training.images)


def test_a_subset_of_the_photographs_is_evenly_spaced(tiny_recipe, monkeypatch):
    """Data sets on disk are sorted by class: their first images belong to a few classes."""

    def open_sorted(path, split, resolution, source, *, on_error):
        flowers = SyntheticFlowers(23, resolution=resolution, split=split)
        flowers.report, flowers.entries = ErrorReport(on_error), ()
        return flowers

    monkeypatch.setattr("mirror_modules.training.batches.open_captions", open_sorted)
    changes = {"source": "oxford-flowers", "path": "somewhere"}
    subset = make_splits(tiny_recipe, **changes, training_images=5, validation_images=None)
    whole = SyntheticFlowers(23, resolution=16)
    assert [tuple(captions) for captions in subset.training.captions] == [whole[i].captions for i in (0, 4, 9, 13, 18)]
    assert len(subset.validation) == 23


def splits_of(training, validation, max_words=5, min_count=1):
    """Splits of black images with these captions."""

    def samples(captions):
        return [CaptionedImage(np.zeros((2, 2, 3), np.uint8), tuple(each), i, {}) for i, each in enumerate(captions)]

    in_training = InMemoryCaptions(samples(training), max_words=max_words, min_count=min_count)
    return Splits(in_training, InMemoryCaptions(samples(validation), in_training.vocabulary, max_words=max_words))


@pytest.mark.parametrize(
    "caption",
    [
        "A red flower.",
        "a red flower",
        "a  RED, flower!",
        "a red-flower",
        unicodedata.normalize("NFD", "a red flower").upper(),
    ],
)
def test_a_caption_that_the_model_reads_alike_is_not_unseen(caption):
    splits = splits_of([["A red flower."]], [[caption, "a red bird"], [caption], ["a blue flower"]])
    assert unseen_captions(splits) == [(0, "a red bird"), (2, "a blue flower")]


def test_captions_are_compared_as_far_as_the_model_reads_them():
    """Words beyond `max_words` are not read, and unknown words are all the same."""
    training = [["a large red flower with petals"], ["é"], ["one"], ["a rose", "a rose", "a bird", "a bird"]]
    validation = [
        ["a large red flower with thorns"],
        ["a large red flower"],
        ["E\u0301"],
        ["one one"],
        ["two"],
        ["three"],
    ]
    assert [image for image, _ in unseen_captions(splits_of(training, validation))] == [1, 3, 4, 5]
    assert [image for image, _ in unseen_captions(splits_of(training, validation, max_words=6))] == [0, 1, 3, 4, 5]
    # All words but a, rose and bird become unknown: "two" is read as "one" was in training.
    assert [image for image, _ in unseen_captions(splits_of(training, validation, min_count=2))] == [1, 3]


def test_unseen_captions_by_loops(tiny_recipe):
    """Word lists compared pair by pair."""
    splits = make_splits(tiny_recipe)
    max_words, expected = tiny_recipe.model.max_words, []
    for image, captions in enumerate(splits.validation.captions):
        for caption in captions:
            words = split_words(caption)[:max_words]
            if not any(split_words(each)[:max_words] == words for other in splits.training.captions for each in other):
                expected.append((image, caption))
                break
    assert unseen_captions(splits) == expected
    assert len(expected) > 10


def test_a_photograph_in_both_splits_is_rejected(tiny_recipe, tmp_path):
    root = make_flowers(tmp_path, training=6, validation=3)
    shutil.copy(root / "text_c10/class_00001/image_00002.txt", root / "text_c10/class_00007")
    with pytest.raises(
        ValueError, match=r"load_splits: 1 images are in both splits, such as .*image_00002\.jpg; validating"
    ):
        make_splits(tiny_recipe, source="oxford-flowers", path=str(root), training_images=None, validation_images=None)


NONE = torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 5])
def test_held_out_images_are_a_share_of_each_class(share, seed):
    sizes = {3: 41, 11: 2, 2: 17, 7: 1, 5: 30}
    random = torch.Generator().manual_seed(seed)
    classes = torch.cat([torch.full((size,), class_id) for class_id, size in sizes.items()])
    classes = classes[torch.randperm(len(classes), generator=random)]
    rows = draw_held_out(classes, NONE, share, seed)
    # 7 has a single image, which stays in the training.
    assert len(rows) == int(share * (len(classes) - 1) + 1e-9)
    assert rows.tolist() == sorted(set(rows.tolist()))
    for class_id, size in sizes.items():
        drawn = sum(int(classes[row]) == class_id for row in rows)
        assert drawn == 0 if size == 1 else abs(drawn - share * size) < 1
        assert size - drawn >= max(1, size // 2)
    assert torch.equal(rows, draw_held_out(classes, NONE, share, seed))
    assert not torch.equal(rows, draw_held_out(classes, NONE, share, seed + 1))


def test_every_image_is_held_out_equally_often():
    classes = torch.arange(23) % 3
    counts = torch.zeros(23)
    for seed in range(1500):
        counts[draw_held_out(classes, NONE, 0.3, seed)] += 1
    assert counts.sum() == 1500 * 6
    # Five standard deviations around the mean.
    assert (counts - counts.mean()).abs().max() < 5 * (1500 * (6 / 23) * (17 / 23)) ** 0.5


@pytest.mark.parametrize(
    ("classes", "validation", "share"),
    [
        (torch.arange(40) % 4, torch.tensor([7, 9]), 0.0),
        (torch.arange(40) % 4, torch.tensor([7, 3]), 0.1),  # class 3 is in both splits
        (torch.arange(40), torch.tensor([47]), 0.1),  # every image has a class of its own
        (torch.zeros(40).long(), torch.tensor([47]), 0.1),
        (torch.arange(19) % 4, torch.tensor([7]), 0.1),  # a single image
        (NONE, NONE, 0.1),
    ],
)
def test_nothing_is_held_out_where_it_would_say_nothing_new(classes, validation, share):
    assert draw_held_out(classes, validation, share, seed=0).tolist() == []


def test_data_have_classes_if_images_share_them():
    assert has_classes(torch.tensor([3, 5, 3, 5]))
    assert not has_classes(torch.tensor([3, 5, 3, 5, 7]))
    assert not has_classes(torch.tensor([3, 3, 3, 3]))


def test_held_out_images_are_kept_from_the_training_and_its_vocabulary(tiny_recipe, tmp_path):
    root = make_flowers(tmp_path, training=43, validation=5)
    options = {"source": "oxford-flowers", "path": str(root), "training_images": None, "validation_images": None}
    whole = make_splits(tiny_recipe, **options, held_out_share=0.0)
    splits = make_splits(tiny_recipe, **options, held_out_share=0.3, augment=True)
    assert whole.held_out is None
    assert (len(whole.training), len(splits.training), len(splits.held_out)) == (43, 31, 12)
    assert splits.training.images.shape[1] == 19
    held_out, kept = splits.held_out.captions, splits.training.captions
    assert sorted([*held_out, *kept]) == sorted(whole.training.captions)
    assert splits.vocabulary == Vocabulary.build([caption for captions in kept for caption in captions])
    assert splits.held_out.vocabulary is splits.vocabulary
    for image, captions, class_id in zip(splits.held_out.images, held_out, splits.held_out.class_ids):
        row = whole.training.captions.index(captions)
        assert torch.equal(image, whole.training.images[row])
        assert class_id == whole.training.class_ids[row]
    # Runs that differ in their seeds are compared on the same images.
    again = make_splits(dataclasses.replace(tiny_recipe, seed=5), **options, held_out_share=0.3, augment=True)
    assert again.held_out.captions == held_out
    # The limits of the recipe hold for what is left.
    few = make_splits(tiny_recipe, **{**options, "training_images": 7, "validation_images": 3}, held_out_share=0.3)
    assert (len(few.training), len(few.validation), len(few.held_out)) == (7, 3, 3)
    assert set(few.training.captions) <= set(kept)
    assert set(few.held_out.captions) <= set(held_out)


def test_drawn_flowers_have_no_held_out_images(tiny_recipe):
    assert make_splits(tiny_recipe).held_out is None


def test_damaged_held_out_images_are_counted_with_those_of_training(tiny_recipe, tmp_path, capsys):
    root = make_flowers(tmp_path, training=83, validation=5)
    options = {"source": "oxford-flowers", "path": str(root), "training_images": None, "held_out_share": 0.5}
    splits = make_splits(tiny_recipe, **options)
    for captions in (splits.held_out.captions[3], splits.training.captions[5]):
        number = next(i for i in range(83) if captions[0] == captions_of(i)[0])
        (root / "jpg" / f"image_{number:05}.jpg").write_bytes(b"")
    damaged = make_splits(tiny_recipe, **options, on_error="skip")
    assert damaged.skipped == {"training": 2, "validation": 0}
    assert (len(damaged.training), len(damaged.held_out)) == (len(splits.training) - 1, len(splits.held_out) - 1)
    assert "held-out images: 1 skipped, 30 read: " in capsys.readouterr().out


def test_damaged_files_are_counted(tiny_recipe, tmp_path):
    root = make_coco(tmp_path, training=41, validation=7)
    for number in (3, 11):
        (root / "train2017" / f"{number:012}.jpg").write_bytes(b"")
    splits = make_splits(tiny_recipe, source="coco", path=str(root), on_error="skip", validation_images=5)
    assert splits.skipped == {"training": 2, "validation": 0}


def test_photographs_need_a_path(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="--data PATH"):
        make_splits(tiny_recipe, source="oxford-flowers")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_splits(tiny_recipe, source="oxford-flowers", path=str(tmp_path / "nowhere"))


def test_each_epoch_has_each_image_at_most_once_with_one_of_its_captions(tiny_recipe):
    training = make_splits(tiny_recipe).training
    floats = to_float(training.images)
    epoch = make_batches(training, count=41 // 7)
    rows = []
    for batch in epoch:
        assert batch.images.shape == (7, 3, 16, 16)
        assert batch.images.min() >= -1
        assert batch.images.max() <= 1
        for image, caption, class_id in zip(batch.images, batch.captions, batch.class_ids):
            row = next(i for i in range(41) if torch.equal(floats[i], image) and caption in training.captions[i])
            assert training.class_ids[row] == class_id
            rows.append(row)
    assert len(set(rows)) == 35


def test_batches_are_reproducible_from_their_seed(tiny_recipe):
    training = make_splits(tiny_recipe, augment=True).training
    first, again, other = make_batches(training), make_batches(training), make_batches(training, seed=4)
    assert all(torch.equal(a.images, b.images) and a.captions == b.captions for a, b in zip(first, again))
    assert not torch.equal(first[0].images, other[0].images)


def test_augmented_images_are_crops_of_larger_ones_or_their_mirror_images(tiny_recipe):
    splits = make_splits(tiny_recipe, augment=True)
    assert splits.training.images.shape == (41, 19, 19, 3)
    assert splits.validation.images.shape == (31, 16, 16, 3)
    larger = to_float(splits.training.images)
    windows = larger.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    batch = make_batches(splits.training, count=1)[0]
    for image in batch.images:
        assert any((windows == view).flatten(1).all(dim=1).any() for view in (image, image.flip(2)))


def test_loader_processes_prepare_the_same_batches(tiny_recipe):
    batches = RepeatableBatches(make_splits(tiny_recipe, augment=True).training, 7, 3, crop=16)
    before = torch.get_rng_state()
    expected, by_workers = list(load_batches(batches, 2, 9)), list(load_batches(batches, 2, 9, workers=2))
    assert len(expected) == len(by_workers) == 7
    for one, other in zip(expected, by_workers):
        assert one.captions == other.captions
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), before)
