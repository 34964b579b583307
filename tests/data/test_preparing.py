"""`prepare_captions` writes a folder completely or not at all, resumes after an interruption, and refuses conflicts."""

import errno
import json
import os
import shutil
import sys

import numpy as np
import pytest

from mirror_modules.data import PreparedCaptions, open_captions, prepare_captions, preparing
from mirror_modules.data.preparing import _write_array
from tests.layouts import MAKERS, files_of, make_birds, make_coco, make_flowers, make_folder, same_samples

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
    """A copy of the prepared folder."""
    return shutil.copytree(made[1], tmp_path / "cache")


@pytest.mark.parametrize("source", MAKERS)
def test_a_prepared_folder_equals_its_originals_in_every_format(tmp_path, source):
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


def test_damaged_originals_raise_or_are_skipped(tmp_path):
    root = make_coco(tmp_path / "originals", 61, VALIDATION)
    (root / "train2017" / f"{7:012}.jpg").write_bytes(b"")
    (root / "train2017" / f"{11:012}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"11.jpg, which does not exist \(similar: .*\); fix it"):
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


def test_too_many_damaged_originals_raise(tmp_path):
    root = make_flowers(tmp_path / "originals", TRAINING, VALIDATION)
    (root / "jpg" / "image_00002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image_00002.jpg cannot be read .*; fix it, or skip it"):
        prepare_captions(root, tmp_path / "cache", resolution=R)
    with pytest.raises(ValueError, match=r"prepare_captions: 1 samples cannot be read, more than 5% of them"):
        prepare_captions(root, tmp_path / "cache", resolution=R, on_error="skip")
    assert not (tmp_path / "cache").exists()


def test_a_shard_of_only_damaged_originals_leaves_no_file(tmp_path):
    root = make_flowers(tmp_path / "originals", 41, VALIDATION)
    (root / "jpg" / "image_00002.jpg").write_bytes(b"")
    prepare_captions(root, tmp_path / "cache", resolution=R, on_error="skip", shard_size=1)
    captions = PreparedCaptions(tmp_path / "cache", resolution=R)
    assert len(captions) == len(list((tmp_path / "cache").glob("train-*.npy"))) == 40
    originals = open_captions(root, "train", R)
    rows = [i for i, entry in enumerate(originals.entries) if entry.image.name != "image_00002.jpg"]
    assert all(np.array_equal(captions[i].image, originals[row].image) for i, row in enumerate(rows))


class Killed(BaseException):
    """An exception that no handler catches."""


def kill_after(count):
    done = []

    def progress(*_):
        done.append(1)
        if len(done) > count:
            raise Killed

    return progress


@pytest.mark.parametrize("count", [0, 3, 5, 7, 11, 13])
def test_a_resumed_call_equals_an_uninterrupted_one(made, tmp_path, monkeypatch, count):
    with pytest.raises(Killed):
        prepare_captions(made[0], tmp_path / "cache", resolution=R, shard_size=SHARD, progress=kill_after(count))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="has no known format"):
        open_captions(tmp_path)
    (unfinished,) = tmp_path.iterdir()
    # A temporary file, as SIGKILL leaves it behind.
    (unfinished / ".train-00001.npy.x1y2z3").write_bytes(b"half")
    decoded = []
    read_image = PreparedCaptions.__base__._read_image
    monkeypatch.setattr(
        PreparedCaptions.__base__, "_read_image", lambda self, i: decoded.append((self.split, i)) or read_image(self, i)
    )
    calls = []
    prepare_captions(
        made[0], tmp_path / "cache", resolution=R, shard_size=SHARD, progress=lambda *done: calls.append(done)
    )
    assert files_of(tmp_path / "cache") == files_of(made[1])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert calls[-1] == ("validation", VALIDATION, VALIDATION)
    kept = count // SHARD * SHARD if count < TRAINING else TRAINING
    assert len(decoded) == TRAINING + VALIDATION - kept


def test_samples_skipped_before_an_interruption_stay_listed(tmp_path):
    root = make_flowers(tmp_path / "originals", 41, VALIDATION)
    (root / "jpg" / "image_00002.jpg").write_bytes(b"")
    options = {"resolution": R, "on_error": "skip", "shard_size": 37}
    with pytest.raises(Killed):
        prepare_captions(root, tmp_path / "cache", **options, progress=kill_after(39))
    result = prepare_captions(root, tmp_path / "cache", **options)
    assert [skipped.file[-9:] for skipped in result.skipped] == ["00002.jpg"]
    assert result == prepare_captions(root, tmp_path / "cache", **options)


def test_a_call_with_changed_originals_starts_over(made, tmp_path):
    root = shutil.copytree(made[0], tmp_path / "originals")
    with pytest.raises(Killed):
        prepare_captions(root, tmp_path / "cache", resolution=R, shard_size=SHARD, progress=kill_after(7))
    # Another image replaces one that was already prepared.
    shutil.copy(root / "jpg" / "image_00003.jpg", root / "jpg" / "image_00000.jpg")
    prepare_captions(root, tmp_path / "cache", resolution=R, shard_size=SHARD)
    assert same_samples(PreparedCaptions(tmp_path / "cache", resolution=R), open_captions(root, "train", R))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "originals"]


def test_existing_folders(made, cache, tmp_path):
    before = files_of(cache)
    assert prepare_captions(made[0], cache, resolution=R, shard_size=SHARD).images["train"] == TRAINING
    assert files_of(cache) == before
    with pytest.raises(FileExistsError, match="was prepared with other settings or from other originals; remove it"):
        prepare_captions(made[0], cache, resolution=11, shard_size=SHARD)
    assert files_of(cache) == before
    (tmp_path / "empty").mkdir()
    assert prepare_captions(made[0], tmp_path / "empty", resolution=R).images["train"] == TRAINING
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("notes")
    (tmp_path / "file").write_text("notes")
    for name in ("other", "file"):
        with pytest.raises(
            FileExistsError, match=rf"{name} exists and is not empty; name a folder that does not exist yet"
        ):
            prepare_captions(made[0], tmp_path / name, resolution=R)


def test_a_full_disk_leaves_no_folder_that_looks_complete(made, tmp_path, monkeypatch):
    def full(file, *_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing, "_write_header", full)
    with pytest.raises(
        OSError, match=r"cache cannot be written \(No space left on device\); it needs about 0 MiB.*free some space"
    ):
        prepare_captions(made[0], tmp_path / "cache", resolution=R)
    assert not (tmp_path / "cache").exists()
    (unfinished,) = tmp_path.iterdir()
    assert not any(unfinished.iterdir())
    monkeypatch.undo()
    prepare_captions(made[0], tmp_path / "cache", resolution=R)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_other_write_errors_do_not_mention_disk_space(made, tmp_path):
    (tmp_path / "file").write_text("notes")
    calls = []
    with pytest.raises(OSError, match=r"file/cache cannot be written \(Not a directory\)\.$"):
        prepare_captions(made[0], tmp_path / "file" / "cache", resolution=R, progress=lambda *done: calls.append(done))
    assert not calls


def test_symbolic_links_are_followed(made, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        made_here = prepare_captions(made[0], tmp_path / f"to-{name}", resolution=R, shard_size=SHARD)
        assert made_here.folder == tmp_path / name
        assert files_of(tmp_path / f"to-{name}") == files_of(made[1])


def test_only_one_process_prepares_a_folder(made, tmp_path):
    """A call inside the progress callback of another one stands for a second process."""
    pytest.importorskip("fcntl")

    def second(*_):
        with pytest.raises(
            ValueError, match=r"another process is preparing .*cache from the same originals; wait for it"
        ):
            prepare_captions(made[0], tmp_path / "cache", resolution=R)
        raise Killed

    with pytest.raises(Killed):
        prepare_captions(made[0], tmp_path / "cache", resolution=R, progress=second)

    def other(*_):
        if not (tmp_path / "cache").exists():
            prepare_captions(made[0], tmp_path / "cache", resolution=11)

    # If two calls differ, the first to finish wins, and the other keeps its unfinished folder.
    with pytest.raises(OSError, match=r"cache cannot be written \(Directory not empty\)"):
        prepare_captions(made[0], tmp_path / "cache", resolution=R, progress=other)
    assert len(list(tmp_path.iterdir())) == 2
    assert PreparedCaptions(tmp_path / "cache", resolution=11)


def test_an_image_in_both_splits_is_refused(made, tmp_path):
    root = shutil.copytree(made[0], tmp_path / "originals")
    shutil.copy(root / "text_c10" / "class_00001" / "image_00002.txt", root / "text_c10" / "class_00007")
    with pytest.raises(
        ValueError, match=r"prepare_captions: 1 images are in both splits, such as .*image_00002.jpg; validating"
    ):
        prepare_captions(root, tmp_path / "cache", resolution=R)


def test_an_existing_folder_that_lacks_a_field_is_refused(made, cache):
    facts = json.loads((cache / "prepared.json").read_text())
    del facts["source"]
    (cache / "prepared.json").write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match=r"prepared.json lacks a field \('source'\); remove the folder and prepare it again"
    ):
        prepare_captions(made[0], cache, resolution=R, shard_size=SHARD)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode on this platform")
def test_names_that_are_not_unicode_are_listed(tmp_path):
    root = make_folder(tmp_path / "originals", 41, VALIDATION)
    for suffix in (b".png", b".jpg"):
        shutil.copy(root / "train" / "image0.png", os.fsencode(root / "train") + b"/\xff" + suffix)
    (root / "train" / "image0.txt").rename(root / "train" / os.fsdecode(b"\xff.txt"))
    (root / "train" / "image0.png").unlink()
    result = prepare_captions(root, tmp_path / "cache", resolution=R, on_error="skip")
    (skipped,) = result.skipped
    assert skipped.reason.startswith(r"shares its name and captions with \udcff.jpg")
    assert r"\udcff.jpg" in (tmp_path / "cache" / "train.jsonl").read_text()


def test_arguments_are_checked(made, tmp_path):
    for changes, message in (
        ({"resolution": 0}, "prepare_captions: resolution must be a whole number of at least 1, but it is 0"),
        ({"resolution": 8193}, "prepare_captions: resolution=8193 exceeds 8192, the largest size that can be decoded"),
        ({"shard_size": 0}, "prepare_captions: shard_size must be a whole number of at least 1, but it is 0"),
        ({"on_error": "list"}, "on_error must be one of 'stop', 'skip', but it is 'list'"),
        ({"source": "imagenet"}, "source must be one of 'auto', 'oxford-flowers'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_captions(made[0], tmp_path / "cache", **{"resolution": R} | changes)
    with pytest.raises(ValueError, match="cache is already prepared, and resizing images twice degrades them"):
        prepare_captions(made[1], tmp_path / "cache", resolution=7)
    assert not any(tmp_path.iterdir())


def test_the_number_of_images_in_the_header_is_corrected(made, tmp_path):
    captions = PreparedCaptions(made[1], resolution=R)
    _write_array(tmp_path / "a.npy", (captions[i] for i in range(3)), 10**9, R)
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.stack([captions[i].image for i in range(3)]))


# Boxes and key points


@pytest.mark.parametrize("parts", [False, True])
def test_boxes_and_key_points_are_kept(tmp_path, parts):
    root = make_birds(tmp_path / "originals", TRAINING, VALIDATION, parts=parts)
    prepare_captions(root, tmp_path / "cache", resolution=R, shard_size=SHARD)
    facts = json.loads((tmp_path / "cache" / "prepared.json").read_text())
    assert facts["format"] == 2
    assert facts["point_names"] == (["left eye", "tail", "right eye"] if parts else [])
    originals, prepared = (open_captions(path, "train", R) for path in (root, tmp_path / "cache"))
    assert same_samples(prepared, originals)
    assert prepared[0].box is not None
    assert prepared.is_located
    assert originals.is_located
    assert prepared.point_names == originals.point_names
    # At a lower resolution, shares are the same.
    assert open_captions(tmp_path / "cache", "train", R - 3)[0][4:] == originals[0][4:]


def test_folders_without_boxes_keep_their_format(made):
    facts = json.loads((made[1] / "prepared.json").read_text())
    assert facts["format"] == 1
    assert "point_names" not in facts
    assert not any(open_captions(path, "train", R).is_located for path in made)
    assert set(json.loads((made[1] / "train.jsonl").read_text().splitlines()[0])) == {"file", "captions", "class_id"}


def test_a_changed_key_point_is_another_original(tmp_path):
    root = make_birds(tmp_path / "originals", TRAINING, VALIDATION, parts=True)
    prepare_captions(root, tmp_path / "cache", resolution=R)
    path = root / "CUB_200_2011" / "parts" / "part_locs.txt"
    path.write_text(path.read_text().replace("1 1 14.0 8.0 1", "1 1 15.0 8.0 1"))
    with pytest.raises(FileExistsError, match="was prepared with other settings or from other originals"):
        prepare_captions(root, tmp_path / "cache", resolution=R)


@pytest.mark.parametrize(
    "change",
    [
        {"box": [0.1, 0.1, 0.5]},
        {"box": [0.1, 0.1, 0.0, 0.5]},
        {"box": [0.1, 0.1, "0.5", 0.5]},
        {"box": [0.1, 0.1, True, 0.5]},
        {"points": [[0.1, 0.1, 1]]},
        {"points": [[0.1, 0.1]] * 3},
        {"points": {"left eye": [0.1, 0.1, 1]}},
        {"points": [[0.1, 0.1, float("inf")]] * 3},
    ],
)
def test_damaged_boxes_and_key_points_are_refused(tmp_path, change):
    root = make_birds(tmp_path / "originals", TRAINING, VALIDATION, parts=True)
    prepare_captions(root, tmp_path / "cache", resolution=R)
    path = tmp_path / "cache" / "train.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *others]) + "\n")
    message = r"train.jsonl line 1 needs a box of x, y, width and height, or null, and 3 points .* remove the folder"
    with pytest.raises(ValueError, match=message):
        open_captions(tmp_path / "cache", "train", R)


def test_names_of_key_points_must_be_a_list(tmp_path):
    root = make_birds(tmp_path / "originals", TRAINING, VALIDATION, parts=True)
    prepare_captions(root, tmp_path / "cache", resolution=R)
    path = tmp_path / "cache" / "prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"point_names": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"names the key points \[1, 2, 3\]; expected a list of strings"):
        open_captions(tmp_path / "cache", "train", R)
