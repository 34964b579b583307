"""A prepared folder returns the samples of its originals; a damaged or foreign folder is refused."""

import dataclasses
import json
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from mirror_modules.data import InMemoryCaptions, PreparedCaptions, RepeatableBatches, open_captions, prepare_captions
from mirror_modules.data.inspection import inspect_split
from mirror_modules.data.mapped_images import MappedImages
from tests.layouts import make_flowers, same_samples

pytest.importorskip("PIL.Image")

TRAINING, VALIDATION, SHARD, R = 11, 3, 5, 13


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Originals and their prepared folder."""
    folder = tmp_path_factory.mktemp("prepared")
    root = make_flowers(folder / "originals", TRAINING, VALIDATION)
    prepare_captions(root, folder / "cache", resolution=R, shard_size=SHARD)
    return root, folder / "cache"


@pytest.fixture
def cache(made, tmp_path):
    """A copy of the prepared folder, to damage."""
    return shutil.copytree(made[1], tmp_path / "cache")


def change_facts(cache, change):
    facts = json.loads((cache / "prepared.json").read_text())
    change(facts)
    (cache / "prepared.json").write_text(json.dumps(facts))


def test_the_files_can_be_read_with_numpy_and_json(made):
    images = np.load(made[1] / "train-00002.npy", mmap_mode="r")
    assert (images.dtype, images.shape) == (np.uint8, (1, R, R, 3))
    lines = [json.loads(line) for line in (made[1] / "train.jsonl").read_text().splitlines()]
    assert len(lines) == TRAINING
    assert set(lines[0]) == {"file", "captions", "class_id"}
    assert np.array_equal(images[0], open_captions(made[0], "train", R)[10].image)


def test_a_lower_resolution_is_resized_and_a_higher_one_refused(made):
    small = PreparedCaptions(made[1], resolution=7)
    assert small[3].image.shape == (7, 7, 3)
    difference = small[3].image.astype(int) - open_captions(made[0], resolution=7)[3].image
    assert np.abs(difference).mean() < 20  # the images are noise, resized twice
    with pytest.raises(
        ValueError, match=r"resolution=17, but the images in .*cache were prepared at 13; pass at most that"
    ):
        PreparedCaptions(made[1], resolution=17)


def test_negative_indices_and_copies(made):
    captions = PreparedCaptions(made[1], resolution=R)
    assert np.array_equal(captions[-1].image, captions[10].image)
    assert np.array_equal(captions[-11].image, captions[0].image)
    with pytest.raises(IndexError, match="PreparedCaptions: index 11 is out of range for 11 samples"):
        captions[11]
    before = captions[4].image.copy()
    captions[4].image[:] = 0
    assert np.array_equal(captions[4].image, before)


@pytest.mark.parametrize("shard_size", [SHARD, 100])
def test_in_memory_data_is_the_same_mapped_or_copied(made, tmp_path, shard_size):
    prepare_captions(made[0], tmp_path / "cache", resolution=R, shard_size=shard_size)
    originals = InMemoryCaptions(open_captions(made[0], resolution=R), max_words=18)
    calls = []
    dataset = PreparedCaptions(tmp_path / "cache", resolution=R)
    prepared = InMemoryCaptions(dataset, max_words=18, progress=lambda *done: calls.append(done))
    assert calls == [(i + 1, TRAINING) for i in range(TRAINING)]
    if shard_size > SHARD:
        assert prepared.images.data_ptr() == dataset.stored_images().data_ptr()
    else:
        assert isinstance(prepared.images, MappedImages)
        assert prepared.images.shape == originals.images.shape
    assert torch.equal(prepared.images[:], originals.images)
    assert torch.equal(prepared.class_ids, originals.class_ids)
    assert prepared.captions == originals.captions
    assert prepared.attributes == originals.attributes
    for number in range(3):
        batch, expected = (RepeatableBatches(each, 5, seed=7, crop=11)[number] for each in (prepared, originals))
        assert all(torch.equal(a, b) for a, b in zip(batch[:4], expected[:4]))
        assert batch.captions == expected.captions


@pytest.mark.parametrize("shard_size", [SHARD, 100])
@pytest.mark.parametrize("rows", [[7, 0, 10, 4, 5], [3], range(0, TRAINING, 2)])
def test_a_subset_stays_mapped(made, tmp_path, shard_size, rows):
    """An image is a view of its file, and no other data of the files are read into memory."""
    prepare_captions(made[0], tmp_path / "cache", resolution=R, shard_size=shard_size)
    dataset = PreparedCaptions(tmp_path / "cache", resolution=R)
    subset, copied = (
        InMemoryCaptions(Subset(each, rows), max_words=18) for each in (dataset, open_captions(made[0], resolution=R))
    )
    assert len(subset) == len(subset.images) == len(rows)
    for name in ("class_ids", "tokens", "word_mask", "caption_counts"):
        assert torch.equal(getattr(subset, name), getattr(copied, name))
    assert subset.captions == copied.captions
    for i, row in enumerate(rows):
        start = dataset._shards[row // shard_size].__array_interface__["data"][0]
        assert subset.images[i].data_ptr() == start + row % shard_size * R * R * 3
        assert torch.equal(subset.images[i], copied.images[i])
    if len(rows) > 1:
        batches = [RepeatableBatches(each, 2, seed=7, crop=crop) for each in (subset, copied) for crop in (None, 11)]
        for mapped, other in zip(batches[:2], batches[2:]):
            assert torch.equal(mapped[1].images, other[1].images)
    copy = pickle.loads(ForkingPickler.dumps(subset))
    assert torch.equal(copy.images[:], copied.images)


def test_mapped_images_are_indexed_like_a_tensor():
    files = [torch.randint(256, (count, 2, 5, 3), dtype=torch.uint8) for count in (3, 1, 7)]
    rows = [10, 0, -8, 2, 4]
    mapped, tensor = MappedImages(files, rows), torch.cat(files)[rows]
    assert mapped.shape == tensor.shape
    assert len(mapped) == 5
    integers = 0, 4, -1, np.int64(2), torch.tensor(3)
    for index in (*integers, slice(1, 4), slice(None, None, 2), slice(2, 2), torch.tensor([3, 0, 0]), torch.arange(0)):
        assert torch.equal(mapped[index], tensor[index])
    chunks = list(mapped.split(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat(chunks), tensor)
    assert torch.equal(MappedImages(files)[:], torch.cat(files))
    for index in (5, -6, torch.tensor([5])):
        with pytest.raises(IndexError):
            mapped[index]


def test_images_in_one_file_at_a_lower_resolution_are_copied(made, tmp_path):
    prepare_captions(made[0], tmp_path / "cache", resolution=R)
    assert PreparedCaptions(tmp_path / "cache", resolution=11).stored_images() is None
    captions = InMemoryCaptions(PreparedCaptions(tmp_path / "cache", resolution=11), max_words=18)
    assert captions.images.shape == (TRAINING, 11, 11, 3)


def test_a_pickle_holds_the_path_of_the_folder_and_no_images(made):
    captions = PreparedCaptions(made[1], split="validation", resolution=11)
    pickled = pickle.dumps(captions)
    assert len(pickled) < 1000
    assert same_samples(pickle.loads(pickled), captions)


def test_a_pickle_of_mapped_images_holds_the_path_of_their_folder_and_no_images(made, tmp_path):
    prepare_captions(made[0], tmp_path / "cache", resolution=101)
    captions = InMemoryCaptions(PreparedCaptions(tmp_path / "cache", resolution=101), max_words=18)
    pickled = ForkingPickler.dumps(captions)
    assert len(pickled) < captions.images.numel() // 20
    assert not captions.images.is_shared(), "pickled for a worker process, the images were copied into shared memory"
    copy = pickle.loads(pickled)
    assert torch.equal(copy.images, captions.images)
    assert copy.images.data_ptr() == copy._mapped[0].stored_images().data_ptr()
    assert copy.captions == captions.captions
    batches = [RepeatableBatches(each, 5, seed=7, crop=11)[2].images for each in (captions, copy)]
    assert torch.equal(*batches)


def test_worker_processes_read_the_same_images(made):
    captions = PreparedCaptions(made[1], resolution=R)
    loader = DataLoader(captions, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert all(
        torch.equal(torch.as_tensor(sample.image), torch.from_numpy(captions[i].image))
        for i, sample in enumerate(loader)
    )


def test_a_prepared_folder_can_be_inspected(made):
    facts = inspect_split(open_captions(made[1], "train", R, on_error="list"))
    assert (facts.images, facts.captions) == (TRAINING, 3 * TRAINING)
    assert facts.shorter_side == facts.longer_side == (R, R, R)
    assert facts.damaged == ()


def test_missing_files_are_named(cache):
    for name in ("train.jsonl", "train-00001.npy", "prepared.json"):
        (cache / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"PreparedCaptions: .*cache has no {name}; the folder must hold"):
            open_captions(cache, resolution=R, source="prepared")


@pytest.mark.parametrize("size", [0, 7, 100, 128 + 5 * R * R * 3 - 1])
def test_a_truncated_shard_is_refused(cache, size):
    path = cache / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"train-00001.npy cannot be read: it is truncated or not an array .*; remove"):
        open_captions(cache, resolution=R, on_error="skip")
    assert len(open_captions(cache, "validation", R)) == VALIDATION


@pytest.mark.parametrize("position", range(8, 80, 3))
def test_a_damaged_header_is_refused(cache, position):
    path = cache / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[position : position + 3] = b"(('"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001.npy (cannot be read|holds).*; remove the folder and prepare"):
        open_captions(cache, resolution=R)


def test_trailing_data_is_refused(cache):
    with (cache / "train-00001.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train-00001.npy holds data after its images; remove the folder"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize(
    "array", [np.zeros((5, R, R, 3)), np.zeros((4, R, R, 3), np.uint8), np.zeros((5, R, 3, R), np.uint8)]
)
def test_a_shard_of_another_shape_or_type_is_refused(cache, array):
    np.save(cache / "train-00001.npy", array)
    with pytest.raises(ValueError, match=r"train-00001.npy holds .*, but prepared.json gives uint8 \(5, 13, 13, 3\)"):
        open_captions(cache, resolution=R)


def test_pickled_arrays_are_not_loaded(cache):
    np.save(cache / "train-00001.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"train-00001.npy cannot be read"):
        open_captions(cache, resolution=R)
    (cache / "train-00001.npy").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"train-00001.npy cannot be read"):
        open_captions(cache, resolution=R)


def test_wrong_counts_are_refused(cache):
    change_facts(cache, lambda facts: facts["splits"]["train"].update(images=12))
    with pytest.raises(ValueError, match=r"prepared.json counts 12 images, but 11 in its files; remove the folder"):
        open_captions(cache, resolution=R)
    change_facts(cache, lambda facts: facts["splits"]["train"]["shards"].update({"train-00002.npy": 2}))
    with pytest.raises(ValueError, match=r"train-00002.npy holds uint8 \(1, 13, 13, 3\), but prepared.json gives"):
        open_captions(cache, resolution=R)


def test_missing_or_damaged_lines_are_refused(cache):
    path = cache / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text in ("".join(lines[:-1]), "".join(lines)[:-1]):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"train.jsonl has 10 complete lines, but prepared.json counts 11 images"):
            open_captions(cache, resolution=R)
    row = json.loads(lines[2])
    for line in ("{", "[]", "7", json.dumps({"file": "a"})):
        path.write_text("".join([*lines[:2], line + "\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"train.jsonl line 3 has invalid content .*; remove the folder"):
            open_captions(cache, resolution=R)
    captions = ({"captions": []}, {"captions": "red"}, {"captions": [3]})
    for change in (*captions, {"class_id": True}, {"class_id": 10**30}, {"class_id": -1}, {"file": None}):
        path.write_text("".join([*lines[:2], json.dumps(row | change) + "\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"train.jsonl line 3 needs a file, captions and a class_id from 0 to"):
            open_captions(cache, resolution=R)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"train.jsonl is not UTF-8 text"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has invalid content .JSONDecodeError"),
        ("[]", "has invalid content .TypeError"),
        ('{"name": "another tool"}', "has invalid content .KeyError: 'format'"),
        ('{"format": 3}', "has format 3; this version reads 1 and 2"),
        ('{"format": 1, "resolution": 13}', "has invalid content .KeyError: 'splits'"),
    ],
)
def test_a_foreign_folder_is_refused(cache, text, message):
    (cache / "prepared.json").write_text(text)
    with pytest.raises(ValueError, match=rf"prepared.json {message}.*; remove the folder and prepare it again"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize("name", ["../train-00000.npy", "/etc/passwd", "validation-00000.npy", "train-00000.npy\n"])
def test_file_names_cannot_lead_out_of_the_folder(cache, name):
    change_facts(cache, lambda facts: facts["splits"]["train"].update(images=5, shards={name: 5}))
    with pytest.raises(
        ValueError, match=r"prepared.json has invalid image counts, or file names other than train-00000.npy"
    ):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize("number", [0, -5, 5.0, True, "5"])
def test_invalid_numbers_are_refused(cache, number):
    change_facts(cache, lambda facts: facts.update(resolution=number))
    with pytest.raises(ValueError, match=r"prepared.json has invalid (image counts|content)"):
        open_captions(cache, resolution=R)


def test_training_maps_a_split_in_one_file(made, tmp_path):
    from mirror_modules.training.batches import load_splits
    from mirror_modules.training.recipes import DataRecipe, demo

    prepare_captions(made[0], tmp_path / "cache", resolution=19)
    recipe = DataRecipe("prepared", str(tmp_path / "cache"), training_images=None, validation_images=None, augment=True)
    model = dataclasses.replace(demo().model, resolutions=(8, 16))
    splits = load_splits(recipe, model, seed=0)
    assert splits.training.images.shape == (TRAINING, 19, 19, 3)
    assert splits.validation.images.shape == (VALIDATION, 16, 16, 3)
    original = load_splits(dataclasses.replace(recipe, source="auto", path=str(made[0])), model, seed=0)
    assert torch.equal(splits.training.images, original.training.images)
    assert splits.training.captions == original.training.captions
    part = load_splits(dataclasses.replace(recipe, training_images=5), model, seed=0)
    assert isinstance(part.training.images, MappedImages)
    assert torch.equal(part.training.images[:], splits.training.images[[i * TRAINING // 5 for i in range(5)]])
