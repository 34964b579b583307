"""A prepared folder reads as the originals do; one that is damaged, foreign or half made is refused."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mirror_modules.data import (
    InMemoryCaptions,
    PreparedCaptions,
    RepeatableBatches,
    open_captions,
    prepare_captions,
    preparing,
)
from mirror_modules.data.inspection import inspect_split
from mirror_modules.data.preparing import _write_array
from tests.layouts import MAKERS, make_coco, make_flowers, make_folder

pytest.importorskip("PIL.Image")

TRAINING, VALIDATION, SHARD, R = 11, 3, 5, 13


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Originals, and the cache of them."""
    folder = tmp_path_factory.mktemp("prepared")
    root = make_flowers(folder / "originals", TRAINING, VALIDATION)
    prepare_captions(root, folder / "cache", resolution=R, shard_size=SHARD)
    return root, folder / "cache"


@pytest.fixture
def cache(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made[1], tmp_path / "cache")


def change_facts(cache, change):
    facts = json.loads((cache / "prepared.json").read_text())
    change(facts)
    (cache / "prepared.json").write_text(json.dumps(facts))


def same_samples(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in ((one[i], other[i]) for i in range(len(one)))
    )


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("source", MAKERS)
def test_every_format_reads_from_the_cache_as_from_its_originals(tmp_path, source):
    root = MAKERS[source](tmp_path / "originals", TRAINING, VALIDATION)
    result = prepare_captions(root, tmp_path / "cache", resolution=R, source=source, shard_size=SHARD)
    assert result == (tmp_path / "cache", source, R, {"train": TRAINING, "validation": VALIDATION}, ())
    for split in ("train", "validation"):
        originals = open_captions(root, split, R)
        for name in ("auto", "prepared"):
            prepared = open_captions(str(tmp_path / "cache"), split, R, name)
            assert type(prepared) is PreparedCaptions
            assert same_samples(prepared, originals)
        names = [originals.root / entry.image for entry in prepared.entries]
        assert names == [entry.image for entry in originals.entries]
    assert sorted(files_of(tmp_path / "cache")) == [
        "prepared.json",
        *(f"train-0000{i}.npy" for i in range(3)),
        "train.jsonl",
        "validation-00000.npy",
        "validation.jsonl",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "originals"]


def test_anyone_can_read_the_files(made):
    images = np.load(made[1] / "train-00002.npy", mmap_mode="r")
    assert (images.dtype, images.shape) == (np.uint8, (1, R, R, 3))
    lines = [json.loads(line) for line in (made[1] / "train.jsonl").read_text().splitlines()]
    assert len(lines) == TRAINING
    assert set(lines[0]) == {"file", "captions", "class_id"}
    assert np.array_equal(images[0], open_captions(made[0], "train", R)[10].image)


def test_a_smaller_size_is_resized_and_a_larger_one_refused(made):
    small = PreparedCaptions(made[1], resolution=7)
    assert small[3].image.shape == (7, 7, 3)
    difference = small[3].image.astype(int) - open_captions(made[0], resolution=7)[3].image
    assert np.abs(difference).mean() < 20  # of noise, resized twice
    with pytest.raises(ValueError, match=r"resolution=17, but the images in .*cache were prepared at 13; ask for at"):
        PreparedCaptions(made[1], resolution=17)


def test_samples_are_counted_from_both_ends_and_belong_to_whom_they_are_handed(made):
    captions = PreparedCaptions(made[1], resolution=R)
    assert np.array_equal(captions[-1].image, captions[10].image)
    assert np.array_equal(captions[-11].image, captions[0].image)
    with pytest.raises(IndexError, match="PreparedCaptions: index 11 is outside the 11 samples"):
        captions[11]
    before = captions[4].image.copy()
    captions[4].image[:] = 0
    assert np.array_equal(captions[4].image, before)


@pytest.mark.parametrize("shard_size", [SHARD, 100])
def test_in_memory_is_the_same_mapped_or_copied(made, tmp_path, shard_size):
    prepare_captions(made[0], tmp_path / "cache", resolution=R, shard_size=shard_size)
    originals = InMemoryCaptions(open_captions(made[0], resolution=R), max_words=18)
    calls = []
    dataset = PreparedCaptions(tmp_path / "cache", resolution=R)
    prepared = InMemoryCaptions(dataset, max_words=18, progress=lambda *done: calls.append(done))
    assert calls == [(i + 1, TRAINING) for i in range(TRAINING)]
    assert (dataset.stored_images() is None) == (shard_size == SHARD)
    if shard_size > SHARD:
        assert prepared.images.data_ptr() == dataset.stored_images().data_ptr()
    assert torch.equal(prepared.images, originals.images)
    assert torch.equal(prepared.class_ids, originals.class_ids)
    assert prepared.captions == originals.captions
    assert prepared.attributes == originals.attributes
    for number in range(3):
        ours, theirs = (RepeatableBatches(each, 5, seed=7, crop=11)[number] for each in (prepared, originals))
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4]))
        assert ours.captions == theirs.captions


def test_one_file_of_another_size_is_copied(made, tmp_path):
    prepare_captions(made[0], tmp_path / "cache", resolution=R)
    assert PreparedCaptions(tmp_path / "cache", resolution=11).stored_images() is None
    captions = InMemoryCaptions(PreparedCaptions(tmp_path / "cache", resolution=11), max_words=18)
    assert captions.images.shape == (TRAINING, 11, 11, 3)


def test_a_pickle_holds_the_name_of_the_folder_and_no_images(made):
    captions = PreparedCaptions(made[1], split="validation", resolution=11)
    pickled = pickle.dumps(captions)
    assert len(pickled) < 1000
    assert same_samples(pickle.loads(pickled), captions)


def test_processes_read_what_one_reads(made):
    captions = PreparedCaptions(made[1], resolution=R)
    loader = DataLoader(captions, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert all(
        torch.equal(torch.as_tensor(read.image), torch.from_numpy(captions[i].image)) for i, read in enumerate(loader)
    )


def test_a_cache_is_inspected(made):
    facts = inspect_split(open_captions(made[1], "train", R, on_error="list"))
    assert (facts.images, facts.captions) == (TRAINING, 3 * TRAINING)
    assert facts.shorter_side == facts.longer_side == (R, R, R)
    assert facts.damaged == ()


# Making it.


def test_damaged_originals_stop_or_are_left_out(tmp_path):
    root = make_coco(tmp_path / "originals", 61, VALIDATION)
    (root / "train2017" / f"{7:012}.jpg").write_bytes(b"")
    (root / "train2017" / f"{11:012}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"11.jpg, which does not exist; mend it"):
        prepare_captions(root, tmp_path / "cache", resolution=R)
    calls = []
    result = prepare_captions(
        root,
        tmp_path / "cache",
        resolution=R,
        on_error="skip",
        shard_size=7,
        progress=lambda *done: calls.append(done),
    )
    assert result.images == {"train": 59, "validation": VALIDATION}
    missing, empty = result.skipped
    assert (missing.reason[:9], empty.reason[:14]) == ("describes", "cannot be read")
    assert calls[:60] == [("train", i + 1, 60) for i in range(60)]
    originals = open_captions(root, "train", R, on_error="skip")
    kept = [originals[i] for i, entry in enumerate(originals.entries) if int(entry.image.stem) != 7]
    prepared = PreparedCaptions(tmp_path / "cache", resolution=R)
    assert same_samples(prepared, kept)
    assert prepared.report.skipped == []


def test_too_many_damaged_originals_are_refused(tmp_path):
    root = make_flowers(tmp_path / "originals", TRAINING, VALIDATION)
    (root / "jpg" / "image_00002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image_00002.jpg cannot be read .*; mend it, or leave it out"):
        prepare_captions(root, tmp_path / "cache", resolution=R)
    with pytest.raises(ValueError, match=r"prepare_captions: 1 samples cannot be read, more than 5% of them"):
        prepare_captions(root, tmp_path / "cache", resolution=R, on_error="skip")
    assert not (tmp_path / "cache").exists()


def test_a_shard_of_damaged_originals_alone_is_no_file(tmp_path):
    root = make_flowers(tmp_path / "originals", 41, VALIDATION)
    (root / "jpg" / "image_00002.jpg").write_bytes(b"")
    prepare_captions(root, tmp_path / "cache", resolution=R, on_error="skip", shard_size=1)
    captions = PreparedCaptions(tmp_path / "cache", resolution=R)
    assert len(captions) == len(list((tmp_path / "cache").glob("train-*.npy"))) == 40
    originals = open_captions(root, "train", R)
    rows = [i for i, entry in enumerate(originals.entries) if entry.image.name != "image_00002.jpg"]
    assert all(np.array_equal(captions[i].image, originals[row].image) for i, row in enumerate(rows))


class Killed(BaseException):
    """Nothing catches it."""


def kill_after(count):
    done = []

    def progress(*_):
        done.append(1)
        if len(done) > count:
            raise Killed

    return progress


@pytest.mark.parametrize("count", [0, 3, 5, 7, 11, 13])
def test_a_killed_call_goes_on_and_equals_the_unbroken_one(made, tmp_path, monkeypatch, count):
    with pytest.raises(Killed):
        prepare_captions(made[0], tmp_path / "cache", resolution=R, shard_size=SHARD, progress=kill_after(count))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="has no format that is known"):
        open_captions(tmp_path)
    (unfinished,) = tmp_path.iterdir()
    # As SIGKILL leaves it.
    (unfinished / ".train-00001.npy.x1y2z3").write_bytes(b"half")
    read = []
    whole = PreparedCaptions.__base__._read_image
    monkeypatch.setattr(
        PreparedCaptions.__base__, "_read_image", lambda self, i: read.append((self.split, i)) or whole(self, i)
    )
    calls = []
    prepare_captions(
        made[0], tmp_path / "cache", resolution=R, shard_size=SHARD, progress=lambda *done: calls.append(done)
    )
    assert files_of(tmp_path / "cache") == files_of(made[1])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert calls[-1] == ("validation", VALIDATION, VALIDATION)
    kept = count // SHARD * SHARD if count < TRAINING else TRAINING
    assert len(read) == TRAINING + VALIDATION - kept


def test_what_was_left_out_before_a_stop_is_remembered(tmp_path):
    root = make_flowers(tmp_path / "originals", 41, VALIDATION)
    (root / "jpg" / "image_00002.jpg").write_bytes(b"")
    options = {"resolution": R, "on_error": "skip", "shard_size": 37}
    with pytest.raises(Killed):
        prepare_captions(root, tmp_path / "cache", **options, progress=kill_after(39))
    result = prepare_captions(root, tmp_path / "cache", **options)
    assert [skipped.file[-9:] for skipped in result.skipped] == ["00002.jpg"]
    assert result == prepare_captions(root, tmp_path / "cache", **options)


def test_a_call_that_differs_begins_anew(made, tmp_path):
    root = shutil.copytree(made[0], tmp_path / "originals")
    with pytest.raises(Killed):
        prepare_captions(root, tmp_path / "cache", resolution=R, shard_size=SHARD, progress=kill_after(7))
    # Another picture under the name of one that was read already.
    shutil.copy(root / "jpg" / "image_00003.jpg", root / "jpg" / "image_00000.jpg")
    prepare_captions(root, tmp_path / "cache", resolution=R, shard_size=SHARD)
    assert same_samples(PreparedCaptions(tmp_path / "cache", resolution=R), open_captions(root, "train", R))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "originals"]


def test_a_folder_that_is_there(made, cache, tmp_path):
    before = files_of(cache)
    assert prepare_captions(made[0], cache, resolution=R, shard_size=SHARD).images["train"] == TRAINING
    assert files_of(cache) == before
    with pytest.raises(FileExistsError, match="was prepared with other settings or from other originals; remove it"):
        prepare_captions(made[0], cache, resolution=11, shard_size=SHARD)
    assert files_of(cache) == before
    (tmp_path / "empty").mkdir()
    assert prepare_captions(made[0], tmp_path / "empty", resolution=R).images["train"] == TRAINING
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("other", "file"):
        with pytest.raises(FileExistsError, match=rf"{name} exists and is not empty; name a folder that is to be made"):
            prepare_captions(made[0], tmp_path / name, resolution=R)


def test_a_full_disk_leaves_nothing_that_looks_finished(made, tmp_path, monkeypatch):
    def full(file, *_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing, "_write_header", full)
    with pytest.raises(
        OSError, match=r"cache cannot be written \(No space left on device\); it needs about 0 MiB.*room"
    ):
        prepare_captions(made[0], tmp_path / "cache", resolution=R)
    assert not (tmp_path / "cache").exists()
    (unfinished,) = tmp_path.iterdir()
    assert not any(unfinished.iterdir())
    monkeypatch.undo()
    prepare_captions(made[0], tmp_path / "cache", resolution=R)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_is_no_full_disk_asks_for_no_room(made, tmp_path):
    (tmp_path / "file").write_text("mine")
    calls = []
    with pytest.raises(OSError, match=r"file/cache cannot be written \(Not a directory\)\.$"):
        prepare_captions(made[0], tmp_path / "file" / "cache", resolution=R, progress=lambda *done: calls.append(done))
    assert not calls


def test_links_lead_to_the_folder(made, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        made_here = prepare_captions(made[0], tmp_path / f"to-{name}", resolution=R, shard_size=SHARD)
        assert made_here.folder == tmp_path / name
        assert files_of(tmp_path / f"to-{name}") == files_of(made[1])


def test_a_folder_is_prepared_by_one_process_at_a_time(made, tmp_path):
    """A call within the progress of another stands for a second process."""
    pytest.importorskip("fcntl")

    def second(*_):
        with pytest.raises(ValueError, match=r"another process prepares .*cache from the same originals; wait for it"):
            prepare_captions(made[0], tmp_path / "cache", resolution=R)
        raise Killed

    with pytest.raises(Killed):
        prepare_captions(made[0], tmp_path / "cache", resolution=R, progress=second)

    def other(*_):
        if not (tmp_path / "cache").exists():
            prepare_captions(made[0], tmp_path / "cache", resolution=11)

    # Of two that differ, the first to end stays, and the other keeps what it has done.
    with pytest.raises(OSError, match=r"cache cannot be written \(Directory not empty\)"):
        prepare_captions(made[0], tmp_path / "cache", resolution=R, progress=other)
    assert len(list(tmp_path.iterdir())) == 2
    assert PreparedCaptions(tmp_path / "cache", resolution=11)


def test_an_image_of_both_splits_is_refused(made, tmp_path):
    root = shutil.copytree(made[0], tmp_path / "originals")
    shutil.copy(root / "text_c10" / "class_00001" / "image_00002.txt", root / "text_c10" / "class_00007")
    with pytest.raises(
        ValueError, match=r"prepare_captions: 1 images are in both splits, such as .*image_00002.jpg; what"
    ):
        prepare_captions(root, tmp_path / "cache", resolution=R)


def test_a_finished_folder_that_lacks_a_part_is_refused(made, cache):
    change_facts(cache, lambda facts: facts.pop("source"))
    with pytest.raises(
        ValueError, match=r"prepared.json lacks a part \('source'\); remove the folder and write it again"
    ):
        prepare_captions(made[0], cache, resolution=R, shard_size=SHARD)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode")
def test_names_that_are_not_unicode_are_listed(tmp_path):
    root = make_folder(tmp_path / "originals", 41, VALIDATION)
    for suffix in (b".png", b".jpg"):
        shutil.copy(root / "train" / "image0.png", os.fsencode(root / "train") + b"/\xff" + suffix)
    (root / "train" / "image0.txt").rename(root / "train" / os.fsdecode(b"\xff.txt"))
    (root / "train" / "image0.png").unlink()
    result = prepare_captions(root, tmp_path / "cache", resolution=R, on_error="skip")
    (skipped,) = result.skipped
    assert skipped.reason.startswith(r"has the name of \udcff.jpg, and the same captions")
    assert r"\udcff.jpg" in (tmp_path / "cache" / "train.jsonl").read_text()


def test_arguments_are_checked(made, tmp_path):
    for changes, message in (
        ({"resolution": 0}, "prepare_captions: resolution must be a whole number of at least 1, but it is 0"),
        ({"resolution": 8193}, "prepare_captions: resolution=8193 exceeds 8192, which is as large as images may be"),
        ({"shard_size": 0}, "prepare_captions: shard_size must be a whole number of at least 1, but it is 0"),
        ({"on_error": "list"}, "on_error must be one of 'stop', 'skip', but it is 'list'"),
        ({"source": "imagenet"}, "source must be one of 'auto', 'oxford-flowers'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_captions(made[0], tmp_path / "cache", **{"resolution": R} | changes)
    with pytest.raises(ValueError, match="cache is prepared already, and images lose by being resized twice"):
        prepare_captions(made[1], tmp_path / "cache", resolution=7)
    assert not any(tmp_path.iterdir())


def test_the_number_of_images_is_known_at_last(made, tmp_path):
    captions = PreparedCaptions(made[1], resolution=R)
    _write_array(tmp_path / "a.npy", (captions[i] for i in range(3)), 10**9, R)
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.stack([captions[i].image for i in range(3)]))


# Damage to the cache itself.


def test_missing_files_are_named(cache):
    for name in ("train.jsonl", "train-00001.npy", "prepared.json"):
        (cache / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"PreparedCaptions: .*cache has no {name}; the folder must hold"):
            open_captions(cache, resolution=R, source="prepared")


@pytest.mark.parametrize("left", [0, 7, 100, 128 + 5 * R * R * 3 - 1])
def test_a_truncated_shard_is_refused(cache, left):
    path = cache / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"train-00001.npy cannot be read; it was cut short or is no array .*; remove"):
        open_captions(cache, resolution=R, on_error="skip")
    assert len(open_captions(cache, "validation", R)) == VALIDATION


@pytest.mark.parametrize("place", range(8, 80, 3))
def test_a_damaged_header_is_refused(cache, place):
    path = cache / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[place : place + 3] = b"(('"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001.npy (cannot be read|holds).*; remove the folder and write"):
        open_captions(cache, resolution=R)


def test_a_file_that_holds_more_is_refused(cache):
    with (cache / "train-00001.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train-00001.npy holds more than its images; remove the folder"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize(
    "array", [np.zeros((5, R, R, 3)), np.zeros((4, R, R, 3), np.uint8), np.zeros((5, R, 3, R), np.uint8)]
)
def test_a_shard_of_another_form_is_refused(cache, array):
    np.save(cache / "train-00001.npy", array)
    with pytest.raises(ValueError, match=r"train-00001.npy holds .*, but prepared.json says uint8 \(5, 13, 13, 3\)"):
        open_captions(cache, resolution=R)


def test_pickles_are_not_read(cache):
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
    with pytest.raises(ValueError, match=r"train-00002.npy holds uint8 \(1, 13, 13, 3\), but prepared.json says"):
        open_captions(cache, resolution=R)


def test_lines_that_are_missing_or_damaged_are_refused(cache):
    path = cache / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text in ("".join(lines[:-1]), "".join(lines)[:-1]):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"train.jsonl has 10 whole lines, but prepared.json counts 11 images"):
            open_captions(cache, resolution=R)
    row = json.loads(lines[2])
    for line in ("{", "[]", "7", json.dumps({"file": "a"})):
        path.write_text("".join([*lines[:2], line + "\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"train.jsonl line 3 does not hold what it should .*; remove the folder"):
            open_captions(cache, resolution=R)
    captions = ({"captions": []}, {"captions": "red"}, {"captions": [3]})
    for change in (*captions, {"class_id": True}, {"class_id": 10**30}, {"class_id": -1}, {"file": None}):
        path.write_text("".join([*lines[:2], json.dumps(row | change) + "\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"train.jsonl line 3 needs a file, captions and a class_id from 0, below"):
            open_captions(cache, resolution=R)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"train.jsonl is not UTF-8 text"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not hold what it should .JSONDecodeError"),
        ("[]", "does not hold what it should .TypeError"),
        ('{"name": "another tool"}', "does not hold what it should .KeyError: 'format'"),
        ('{"format": 2}', "is of format 2; this version reads 1"),
        ('{"format": 1, "resolution": 13}', "does not hold what it should .KeyError: 'splits'"),
    ],
)
def test_a_foreign_folder_is_refused(cache, text, message):
    (cache / "prepared.json").write_text(text)
    with pytest.raises(ValueError, match=rf"prepared.json {message}.*; remove the folder and write it again"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize("name", ["../train-00000.npy", "/etc/passwd", "validation-00000.npy", "train-00000.npy\n"])
def test_names_do_not_lead_elsewhere(cache, name):
    change_facts(cache, lambda facts: facts["splits"]["train"].update(images=5, shards={name: 5}))
    with pytest.raises(ValueError, match=r"prepared.json names other files or numbers of images than train-00000.npy"):
        open_captions(cache, resolution=R)


@pytest.mark.parametrize("number", [0, -5, 5.0, True, "5"])
def test_numbers_are_checked(cache, number):
    change_facts(cache, lambda facts: facts.update(resolution=number))
    with pytest.raises(ValueError, match=r"prepared.json names other files or numbers|does not hold what it should"):
        open_captions(cache, resolution=R)


def test_training_maps_the_whole_of_one_file(made, tmp_path):
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
    assert torch.equal(part.training.images, splits.training.images[[i * TRAINING // 5 for i in range(5)]])
