"""Shards give each sample once, to whatever ranks and workers, and go on where they were stopped."""

import builtins
import gzip
import json
import tarfile
from collections import Counter
from itertools import chain, islice, pairwise, zip_longest

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mirror_modules.data import ErrorReport, WebDatasetCaptions
from mirror_modules.data.images import read_square
from mirror_modules.data.web_captions import FEW_SAMPLES, _Turns
from tests.layouts import SHARD_SUFFIXES, add_file, captions_of, damaged_sample, write_image, write_shard

pytest.importorskip("PIL.Image")
pytest.importorskip("webdataset")

# Samples of each shard.
SIZES = (5, 1, 3, 7, 2, 4, 1)
TOTAL, R = sum(SIZES), 13


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, first, paths = tmp_path_factory.mktemp("shards"), 0, []
    for i, size in enumerate(SIZES):
        paths.append(write_shard(folder / f"train-{i:03}.tar", range(first, first + size)))
        first += size
    return paths


NUMBER_OF = {caption: number for number in range(200) for caption in captions_of(number)}


def numbers(samples):
    return [NUMBER_OF[sample.captions[0]] for sample in samples]


def equal(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(one, other)
    )


def as_it_is(sample):
    return sample


def test_samples_are_what_was_written(shards):
    samples = list(WebDatasetCaptions(shards, R, seed=None))
    assert numbers(samples) == list(range(TOTAL))
    for number, sample in enumerate(samples):
        path = shards[0].parent / "images" / f"{number}.{SHARD_SUFFIXES[number % 3]}"
        assert np.array_equal(sample.image, read_square(path, R))
        assert sample.captions == tuple(captions_of(number))
        if number % 2:
            assert sample.class_id == number
    # Of those without a class, each is one of its own, the same each time.
    own = [sample.class_id for sample in samples[::2]]
    assert len(set(own)) == len(own)
    assert torch.tensor(own).min() >= 0
    assert own == [sample.class_id for sample in islice(WebDatasetCaptions(shards, R, seed=None), 0, None, 2)]


def test_names_with_braces_and_single_files(shards):
    braces = str(shards[0]).replace("000", "{000..006}")
    assert numbers(WebDatasetCaptions(braces, R, seed=None)) == list(range(TOTAL))
    assert numbers(WebDatasetCaptions(shards[3], R, seed=None)) == list(range(9, 16))
    assert numbers(WebDatasetCaptions(f"file:{shards[3]}", R, seed=None)) == list(range(9, 16))


def test_epochs_differ_and_a_seed_repeats_them(shards):
    one, other, third = (WebDatasetCaptions(shards, R, seed=seed, buffer=5) for seed in (3, 3, 4))
    epochs = [numbers(one) for _ in range(3)]
    assert epochs == [numbers(other) for _ in range(3)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, numbers(third)]}) == 4
    other.set_epoch(1)
    assert numbers(other) == epochs[1]


def test_the_buffer_mixes_shards(shards):
    def neighbors(buffer):
        read = numbers(WebDatasetCaptions(shards, R, seed=0, buffer=buffer))
        return sum(abs(b - a) == 1 for a, b in pairwise(read))

    assert neighbors(100) < neighbors(1)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 3), (7, 0)])
def test_ranks_and_workers_share_without_overlap_or_loss(shards, ranks, workers):
    parts = [WebDatasetCaptions(shards, R, seed=5, buffer=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(2):
        epoch = [numbers(part.read(workers)) for part in parts]
        assert all(epoch)
        assert Counter(chain(*epoch)) == Counter(range(TOTAL))


def test_a_loader_of_ones_own_shares_them_too(shards):
    captions = WebDatasetCaptions(shards, R, seed=5, buffer=3)
    loader = DataLoader(captions, batch_size=None, num_workers=2, collate_fn=as_it_is)
    first = numbers(loader)
    assert sorted(first) == list(range(TOTAL))
    captions.set_epoch(1)
    second = numbers(loader)
    assert sorted(second) == list(range(TOTAL))
    assert first != second
    captions.set_epoch(0)
    assert sorted(first) == sorted(numbers(captions.read(2)))


def endless(captions, workers):
    while True:
        yield from captions.read(workers)


@pytest.mark.parametrize(
    ("workers", "stops"),
    [(0, (0, 1, 11, TOTAL - 1, TOTAL, TOTAL + 3)), (2, (5, TOTAL)), (3, (1, TOTAL - 2, TOTAL + 7))],
)
def test_a_resumed_stream_equals_the_unbroken_one(shards, workers, stops):
    options = {"resolution": R, "seed": 11, "buffer": 3}
    unbroken = list(islice(endless(WebDatasetCaptions(shards, **options), workers), 2 * TOTAL + 5))
    for stop in stops:
        first = WebDatasetCaptions(shards, **options)
        before = list(islice(endless(first, workers), stop))
        state = json.loads(json.dumps(first.state_dict()))
        second = WebDatasetCaptions(shards, **options)
        second.load_state_dict(state)
        after = list(islice(endless(second, workers), len(unbroken) - stop))
        assert equal(before + after, unbroken)


def test_workers_take_turns_until_all_have_ended(shards):
    captions = WebDatasetCaptions(shards, R, seed=11, buffer=3)
    captions._divide(3)
    streams = [[drawn.sample for drawn in captions._draw(worker, 3)] for worker in range(3)]
    expected = [sample for turn in zip_longest(*streams) for sample in turn if sample is not None]
    assert len({len(stream) for stream in streams}) > 1
    assert equal(list(captions.read(3)), expected)
    # An end comes again with each turn, whatever the loader has noticed.
    captions.set_epoch(0)
    turns = list(islice(_Turns(captions, 1), TOTAL + 5))
    assert [turn is None for turn in turns] == [False] * TOTAL + [True] * 5


def test_a_position_is_small_and_checked(shards):
    captions = WebDatasetCaptions(shards, R, seed=1)
    assert captions.state_dict() == {"epoch": 0, "samples": [0], "next": 0}
    list(islice(captions.read(2), 3))
    assert captions.state_dict() == {"epoch": 0, "samples": [2, 1], "next": 1}
    for workers in (0, 3):
        with pytest.raises(ValueError, match=r"the position is that of 2 worker processes, but there are [13]; go on"):
            list(captions.read(workers))
    for state in ({}, {"epoch": 0, "samples": [], "next": 0}, {"epoch": -1, "samples": [1], "next": 0}):
        with pytest.raises(ValueError, match="a position has an epoch, samples and whose turn is next, such as"):
            captions.load_state_dict(state)


# Damage.


REASONS = {
    50: "cannot be read as an image (it is empty)",
    51: "cannot be read as an image",
    52: "has no captions; expected a txt or a json",
    53: "has no image; expected one of jpg, jpeg, png, webp",
    54: "has captions that cannot be read ('utf-8' codec",
    55: "has no caption that says anything",
    56: "has captions that cannot be read (Expecting property",
    57: 'has captions that cannot be read (expected {"captions"',
    58: "has captions that cannot be read (the class must be a whole number from 0, but it is 'bird')",
    59: "has no caption that says anything",
}


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_samples_are_listed_once_and_the_others_read(tmp_path, workers):
    shard = write_shard(tmp_path / "a.tar", range(47, 63), damaged_sample)
    captions = WebDatasetCaptions(shard, R, seed=None, on_error="list")
    for _ in range(2):
        assert numbers(captions.read(workers)) == [47, 48, 49, 60, 61, 62]
    assert len(captions.report.skipped) == len(REASONS)
    for (number, reason), skipped in zip(REASONS.items(), captions.report.skipped):
        assert skipped.file.startswith(f"{shard}/{number:04}")
        assert skipped.reason.startswith(reason)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_damaged_sample_stops(tmp_path, workers):
    shards = [write_shard(tmp_path / f"{i}.tar", range(48 + 8 * i, 56 + 8 * i), damaged_sample) for i in range(2)]
    with pytest.raises(
        ValueError, match=r"WebDatasetCaptions: .*\.tar/00.. .*; mend it, or leave it out with on_error"
    ):
        list(WebDatasetCaptions(shards, R, on_error="stop").read(workers))
    with pytest.raises(ValueError, match=r"6 samples cannot be read, more than 5% of them"):
        list(WebDatasetCaptions(shards, R, on_error="skip").read(workers))


def test_few_damaged_samples_are_left_out_and_the_stream_goes_on_behind_them(tmp_path):
    shard = write_shard(tmp_path / "a.tar", range(48, 53), damaged_sample)
    assert FEW_SAMPLES == 100
    captions = WebDatasetCaptions(shard, R, seed=None, on_error="skip")
    assert numbers(captions) == [48, 49]
    captions = WebDatasetCaptions([shard, write_shard(tmp_path / "b.tar", range(70, 73))], R, on_error="skip")
    whole = list(captions)
    for stop in range(len(whole)):
        captions.set_epoch(0)
        before = list(islice(captions, stop))
        resumed = WebDatasetCaptions(captions.shards, R, on_error="skip")
        resumed.load_state_dict(captions.state_dict())
        assert equal(before + list(resumed), whole)


def test_a_shard_that_is_cut_short_gives_what_is_left_of_it(tmp_path):
    cut, after = (
        write_shard(tmp_path / f"{name}.tar", numbers) for name, numbers in (("a", range(5)), ("b", range(5, 8)))
    )
    with tarfile.open(cut) as tar:
        inside = tar.getmembers()[6].offset_data + 7
    content = cut.read_bytes()
    cut.write_bytes(content[:inside])
    captions = WebDatasetCaptions([cut, after], R, seed=None, on_error="list")
    assert numbers(captions) == [0, 1, 2, 5, 6, 7]
    (skipped,) = captions.report.skipped
    assert skipped.file == str(cut)
    assert skipped.reason.startswith("cannot be read as a whole (unexpected end of data")
    with pytest.raises(ValueError, match=r"a.tar cannot be read as a whole .*; mend it, or leave it out"):
        list(WebDatasetCaptions([cut, after], R))
    for nonsense in (b"", b"no tar file" * 100):
        cut.write_bytes(nonsense)
        captions = WebDatasetCaptions([cut, after], R, seed=None, on_error="list")
        assert numbers(captions) == [5, 6, 7]
        assert captions.report.skipped[0].file == str(cut)


def test_of_a_shard_that_is_cut_the_cut_is_told_first(tmp_path):
    cut = write_shard(tmp_path / "a.tar", range(5))
    with tarfile.open(cut) as tar:
        # The image is whole, and what is said of it is not.
        inside = tar.getmembers()[7].offset_data + 7
    cut.write_bytes(cut.read_bytes()[:inside])
    captions = WebDatasetCaptions(cut, R, seed=None, on_error="list")
    assert numbers(captions) == [0, 1, 2]
    assert [skipped.reason[:20] for skipped in captions.report.skipped] == [
        "cannot be read as a ",
        "has no captions; exp",
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda content, place: content.__setitem__(place + 300, content[place + 300] ^ 1),
            "a header in it is damaged",
        ),
        (
            lambda content, place: content.__setitem__(slice(place, place + 512), b"x" * 512),
            "a header in it is damaged",
        ),
        (
            lambda content, place: content.__setitem__(slice(place, place + 1024), bytes(1024)),
            "something follows the zeros",
        ),
        (
            lambda content, place: content.__delitem__(slice(place + 200, None)),
            "a header in it is damaged, or it is no tar file: truncated",
        ),
        (lambda content, place: content.__delitem__(slice(place, None)), "its end is missing"),
    ],
    ids=["bit", "block", "zeros", "cut", "end"],
)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path, change, reason, ending):
    shard = write_shard(tmp_path / "a.tar", range(9))
    content = bytearray(shard.read_bytes())
    change(content, content.find(b"0004."))
    damaged_shard = tmp_path / f"damaged.{ending}"
    damaged_shard.write_bytes(gzip.compress(content) if ending == "tar.gz" else content)
    with pytest.raises(ValueError, match=rf"damaged.{ending} cannot be read as a whole \({reason}.*\); mend it"):
        list(WebDatasetCaptions(damaged_shard, R, seed=None))
    captions = WebDatasetCaptions(damaged_shard, R, seed=None, on_error="list")
    assert numbers(captions) == [0, 1, 2, 3]
    assert [skipped.file for skipped in captions.report.skipped] == [str(damaged_shard)]


def test_a_compressed_shard_is_read_and_one_that_is_cut_is_told(tmp_path):
    content = gzip.compress(write_shard(tmp_path / "a.tar", range(9)).read_bytes())
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(content)
    assert numbers(WebDatasetCaptions(shard, R, seed=None)) == list(range(9))
    for left in (1000, len(content) // 2):
        shard.write_bytes(content[:left])
        captions = WebDatasetCaptions(shard, R, seed=None, on_error="list")
        assert len(list(captions)) < 9
        assert captions.report.skipped[0].file == str(shard)


def test_a_shard_of_nothing_is_told(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    with pytest.raises(ValueError, match=r"a.tar cannot be read as a whole \(there is no sample in it\)"):
        list(WebDatasetCaptions(tmp_path / "a.tar", R))


def test_a_name_that_looks_remote_may_be_a_file(tmp_path, monkeypatch):
    write_shard(tmp_path / "run:b.tar", range(3))
    monkeypatch.chdir(tmp_path)
    assert numbers(WebDatasetCaptions("run:b.tar", R, seed=None)) == [0, 1, 2]


def test_commands_are_read_and_fail_by_their_status(tmp_path):
    shard = write_shard(tmp_path / "a.tar", range(3))
    assert numbers(WebDatasetCaptions(f"pipe:cat {shard}", R, seed=None)) == [0, 1, 2]
    assert len(list(islice(WebDatasetCaptions(f"pipe:cat {shard}", R, seed=None), 1))) == 1
    with pytest.raises(ValueError, match=r"cannot be read as a whole \(.*: exit 7 "):
        list(WebDatasetCaptions("pipe:exit 7", R))


def test_the_torn_end_of_a_shard_does_not_meet_the_next_one(tmp_path):
    image = write_image(tmp_path / "x.png", 0).read_bytes()
    for name, files in (("a", {"0.png": image}), ("b", {"0.txt": b"a red thing"})):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file, content in files.items():
                add_file(tar, file, content)
    captions = WebDatasetCaptions([tmp_path / "a.tar", tmp_path / "b.tar"], R, seed=None, on_error="list")
    assert list(captions) == []
    assert [skipped.reason[:14] for skipped in captions.report.skipped] == ["has no caption", "has no image; "]


def test_a_name_that_occurs_twice_is_listed(tmp_path):
    image = write_image(tmp_path / "x.png", 0).read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file, content in (("0.png", image), ("0.png", image), ("0.txt", captions_of(0)[0].encode())):
            add_file(tar, file, content)
    captions = WebDatasetCaptions(tmp_path / "a.tar", R, on_error="list")
    assert numbers(captions) == [0]
    assert "duplicate file name" in captions.report.skipped[0].reason


def test_arguments_are_checked(shards):
    for changes, message in (
        ({"resolution": 0}, "WebDatasetCaptions: resolution must be a whole number of at least 1, but it is 0"),
        ({"buffer": 0}, "buffer must be a whole number of at least 1, but it is 0"),
        ({"rank": 2, "ranks": 2}, "rank must be from 0 to 1 with ranks=2, but it is 2"),
        ({"ranks": 8}, "7 shards cannot be dealt to 8 ranks with 1 worker processes each; make more and smaller"),
        ({"shards": []}, "0 shards cannot be dealt to 1 ranks"),
        ({"shards": [*shards, shards[2]]}, "shards names .*train-002.tar twice; its samples would be seen twice"),
        ({"on_error": "ignore"}, "on_error must be one of 'stop', 'skip', 'list', but it is 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            WebDatasetCaptions(**{"shards": shards} | changes)
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*nowhere.tar; name tar files that exist"):
        WebDatasetCaptions([shards[0], shards[0].with_name("nowhere.tar")], on_error="list")
    with pytest.raises(ValueError, match="7 shards cannot be dealt to 1 ranks with 8 worker processes each"):
        list(WebDatasetCaptions(shards).read(8))
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1, but it is -1"):
        list(WebDatasetCaptions(shards).read(-1))
    assert type(WebDatasetCaptions(shards).report) is ErrorReport


def test_without_webdataset_it_says_how_to_install_it(shards, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.partition(".")[0] == "webdataset":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"Reading shards needs webdataset: pip install 'mirror-modules\[data\]'"):
        WebDatasetCaptions(shards)
