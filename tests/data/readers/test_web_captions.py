"""A stream of shards yields each sample once over all ranks and workers, and resumes exactly."""

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
from mirror_modules.data.readers.images import read_square
from mirror_modules.data.readers.web_captions import MIN_SAMPLES, _Turns
from tests.layouts import SHARD_SUFFIXES, add_file, captions_of, damaged_sample, write_image, write_shard

pytest.importorskip("PIL.Image")
pytest.importorskip("webdataset")

# Number of samples in each shard.
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


def identity(sample):
    return sample


def test_samples_match_their_shards(shards):
    samples = list(WebDatasetCaptions(shards, R, seed=None))
    assert numbers(samples) == list(range(TOTAL))
    for number, sample in enumerate(samples):
        path = shards[0].parent / "images" / f"{number}.{SHARD_SUFFIXES[number % 3]}"
        assert np.array_equal(sample.image, read_square(path, R))
        assert sample.captions == tuple(captions_of(number))
        if number % 2:
            assert sample.class_id == number
    # Each sample without a class is its own class, the same in every pass.
    own = [sample.class_id for sample in samples[::2]]
    assert len(set(own)) == len(own)
    assert torch.tensor(own).min() >= 0
    assert own == [sample.class_id for sample in islice(WebDatasetCaptions(shards, R, seed=None), 0, None, 2)]


def test_names_with_braces_and_single_names(shards):
    braces = str(shards[0]).replace("000", "{000..006}")
    assert numbers(WebDatasetCaptions(braces, R, seed=None)) == list(range(TOTAL))
    assert numbers(WebDatasetCaptions(shards[3], R, seed=None)) == list(range(9, 16))
    assert numbers(WebDatasetCaptions(f"file:{shards[3]}", R, seed=None)) == list(range(9, 16))


def test_epochs_differ_and_are_reproducible_from_the_seed(shards):
    one, other, third = (WebDatasetCaptions(shards, R, seed=seed, buffer=5) for seed in (3, 3, 4))
    epochs = [numbers(one) for _ in range(3)]
    assert epochs == [numbers(other) for _ in range(3)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, numbers(third)]}) == 4
    other.set_epoch(1)
    assert numbers(other) == epochs[1]


def test_a_larger_buffer_shuffles_more(shards):
    def neighbors(buffer):
        order = numbers(WebDatasetCaptions(shards, R, seed=0, buffer=buffer))
        return sum(abs(b - a) == 1 for a, b in pairwise(order))

    assert neighbors(100) < neighbors(1)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 3), (7, 0)])
def test_ranks_and_workers_partition_the_samples(shards, ranks, workers):
    parts = [WebDatasetCaptions(shards, R, seed=5, buffer=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(2):
        epoch = [numbers(part.read(workers)) for part in parts]
        assert all(epoch)
        assert Counter(chain(*epoch)) == Counter(range(TOTAL))


def test_a_custom_data_loader_partitions_them_too(shards):
    captions = WebDatasetCaptions(shards, R, seed=5, buffer=3)
    loader = DataLoader(captions, batch_size=None, num_workers=2, collate_fn=identity)
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
def test_a_resumed_stream_equals_an_uninterrupted_one(shards, workers, stops):
    options = {"resolution": R, "seed": 11, "buffer": 3}
    uninterrupted = list(islice(endless(WebDatasetCaptions(shards, **options), workers), 2 * TOTAL + 5))
    for stop in stops:
        first = WebDatasetCaptions(shards, **options)
        before = list(islice(endless(first, workers), stop))
        state = json.loads(json.dumps(first.state_dict()))
        second = WebDatasetCaptions(shards, **options)
        second.load_state_dict(state)
        after = list(islice(endless(second, workers), len(uninterrupted) - stop))
        assert equal(before + after, uninterrupted)


def test_workers_take_turns_until_all_are_exhausted(shards):
    captions = WebDatasetCaptions(shards, R, seed=11, buffer=3)
    captions._set_workers(3)
    streams = [[loaded.sample for loaded in captions._load(worker, 3)] for worker in range(3)]
    expected = [sample for turn in zip_longest(*streams) for sample in turn if sample is not None]
    assert len({len(stream) for stream in streams}) > 1
    assert equal(list(captions.read(3)), expected)
    # An exhausted worker returns None at every further turn.
    captions.set_epoch(0)
    turns = list(islice(_Turns(captions, 1), TOTAL + 5))
    assert [turn is None for turn in turns] == [False] * TOTAL + [True] * 5


def test_a_position_is_small_and_validated(shards):
    captions = WebDatasetCaptions(shards, R, seed=1)
    assert captions.state_dict() == {"epoch": 0, "samples": [0], "next": 0}
    list(islice(captions.read(2), 3))
    assert captions.state_dict() == {"epoch": 0, "samples": [2, 1], "next": 1}
    for workers in (0, 3):
        with pytest.raises(
            ValueError, match=r"the position belongs to 2 worker processes, but there are [13]; continue"
        ):
            list(captions.read(workers))
    for state in (
        {},
        None,
        {"epoch": 0, "samples": [], "next": 0},
        {"epoch": 0, "samples": 3, "next": 0},
        {"epoch": -1, "samples": [1], "next": 0},
    ):
        with pytest.raises(ValueError, match="a position has an epoch, samples and the next worker, such as"):
            captions.load_state_dict(state)


REASONS = {
    50: "cannot be read as an image (it is empty)",
    51: "cannot be read as an image",
    52: "has no captions; expected a txt, or a json such as",
    53: "has no image; expected one of jpg, jpeg, png, webp",
    54: "has captions that cannot be read ('utf-8' codec",
    55: "has no caption with a word",
    56: "has captions that cannot be read (Expecting property",
    57: "has no captions; expected a txt, or a json such as",
    58: "has a class that cannot be read (the class must be a name, or an integer from 0 to 2**63 - 1, but it is -1)",
    59: "has no caption with a word",
}


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_samples_are_listed_once_and_the_others_are_read(tmp_path, workers):
    shard = write_shard(tmp_path / "a.tar", range(47, 63), damaged_sample)
    captions = WebDatasetCaptions(shard, R, seed=None, on_error="list")
    for _ in range(2):
        assert numbers(captions.read(workers)) == [47, 48, 49, 60, 61, 62]
    assert len(captions.report.skipped) == len(REASONS)
    for (number, reason), skipped in zip(REASONS.items(), captions.report.skipped):
        assert skipped.file.startswith(f"{shard}/{number:04}")
        assert skipped.reason.startswith(reason)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_damaged_sample_raises(tmp_path, workers):
    shards = [write_shard(tmp_path / f"{i}.tar", range(48 + 8 * i, 56 + 8 * i), damaged_sample) for i in range(2)]
    with pytest.raises(ValueError, match=r"WebDatasetCaptions: .*\.tar/00\S+ .*; fix it, or skip it with on_error"):
        list(WebDatasetCaptions(shards, R, on_error="stop").read(workers))
    with pytest.raises(ValueError, match=r"6 samples cannot be read, more than 5% of them"):
        list(WebDatasetCaptions(shards, R, on_error="skip").read(workers))


def test_few_damaged_samples_are_skipped_and_the_stream_resumes_after_them(tmp_path):
    shard = write_shard(tmp_path / "a.tar", range(48, 53), damaged_sample)
    assert MIN_SAMPLES == 100
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


def test_a_truncated_shard_yields_the_samples_before_the_cut(tmp_path):
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
    assert skipped.reason.startswith("cannot be read completely (unexpected end of data")
    with pytest.raises(ValueError, match=r"a.tar cannot be read completely .*; fix it, or skip it"):
        list(WebDatasetCaptions([cut, after], R))
    for content in (b"", b"no tar file" * 100):
        cut.write_bytes(content)
        captions = WebDatasetCaptions([cut, after], R, seed=None, on_error="list")
        assert numbers(captions) == [5, 6, 7]
        assert captions.report.skipped[0].file == str(cut)


def test_a_truncated_shard_is_reported_before_its_last_sample(tmp_path):
    cut = write_shard(tmp_path / "a.tar", range(5))
    with tarfile.open(cut) as tar:
        # The image is complete, its captions are not.
        inside = tar.getmembers()[7].offset_data + 7
    cut.write_bytes(cut.read_bytes()[:inside])
    captions = WebDatasetCaptions(cut, R, seed=None, on_error="list")
    assert numbers(captions) == [0, 1, 2]
    assert [skipped.reason[:20] for skipped in captions.report.skipped] == [
        "cannot be read compl",
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
            "data follows its end-of-archive marker",
        ),
        (
            lambda content, place: content.__delitem__(slice(place + 200, None)),
            "a header in it is damaged, or it is not a tar file: truncated",
        ),
        (lambda content, place: content.__delitem__(slice(place, None)), "its end is missing"),
    ],
    ids=["bit", "block", "zeros", "cut", "end"],
)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_damage_in_the_middle_is_not_mistaken_for_the_end(tmp_path, change, reason, ending):
    shard = write_shard(tmp_path / "a.tar", range(9))
    content = bytearray(shard.read_bytes())
    change(content, content.find(b"0004."))
    damaged_shard = tmp_path / f"damaged.{ending}"
    damaged_shard.write_bytes(gzip.compress(content) if ending == "tar.gz" else content)
    with pytest.raises(ValueError, match=rf"damaged.{ending} cannot be read completely \({reason}.*\); fix it"):
        list(WebDatasetCaptions(damaged_shard, R, seed=None))
    captions = WebDatasetCaptions(damaged_shard, R, seed=None, on_error="list")
    assert numbers(captions) == [0, 1, 2, 3]
    assert [skipped.file for skipped in captions.report.skipped] == [str(damaged_shard)]


def test_a_compressed_shard_is_read_and_a_truncated_one_is_reported(tmp_path):
    content = gzip.compress(write_shard(tmp_path / "a.tar", range(9)).read_bytes())
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(content)
    assert numbers(WebDatasetCaptions(shard, R, seed=None)) == list(range(9))
    for left in (1000, len(content) // 2):
        shard.write_bytes(content[:left])
        captions = WebDatasetCaptions(shard, R, seed=None, on_error="list")
        assert len(list(captions)) < 9
        assert captions.report.skipped[0].file == str(shard)


def test_an_empty_shard_is_reported(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    with pytest.raises(ValueError, match=r"a.tar cannot be read completely \(it holds no sample\)"):
        list(WebDatasetCaptions(tmp_path / "a.tar", R))


def test_a_name_that_looks_remote_may_be_a_file(tmp_path, monkeypatch):
    write_shard(tmp_path / "run:b.tar", range(3))
    monkeypatch.chdir(tmp_path)
    assert numbers(WebDatasetCaptions("run:b.tar", R, seed=None)) == [0, 1, 2]


def test_commands_are_read_and_their_exit_status_is_checked(tmp_path):
    shard = write_shard(tmp_path / "a.tar", range(3))
    assert numbers(WebDatasetCaptions(f"pipe:cat {shard}", R, seed=None)) == [0, 1, 2]
    assert len(list(islice(WebDatasetCaptions(f"pipe:cat {shard}", R, seed=None), 1))) == 1
    with pytest.raises(ValueError, match=r"cannot be read completely \(.*: exit 7 "):
        list(WebDatasetCaptions("pipe:exit 7", R))


def test_an_incomplete_sample_does_not_join_the_next_shard(tmp_path):
    image = write_image(tmp_path / "x.png", 0).read_bytes()
    for name, files in (("a", {"0.png": image}), ("b", {"0.txt": b"a red thing"})):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file, content in files.items():
                add_file(tar, file, content)
    captions = WebDatasetCaptions([tmp_path / "a.tar", tmp_path / "b.tar"], R, seed=None, on_error="list")
    assert list(captions) == []
    assert [skipped.reason[:14] for skipped in captions.report.skipped] == ["has no caption", "has no image; "]


def test_a_repeated_name_is_listed(tmp_path):
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
        ({"seed": -1}, "WebDatasetCaptions: seed must be at least 0, or None, but it is -1"),
        ({"rank": 2, "ranks": 2}, "rank must be from 0 to 1 with ranks=2, but it is 2"),
        (
            {"ranks": 8},
            "7 shards cannot be distributed over 8 ranks with 1 worker processes each; write more and smaller",
        ),
        ({"shards": []}, "0 shards cannot be distributed over 1 ranks"),
        (
            {"shards": [*shards, shards[2]]},
            "shards names .*train-002.tar twice; its samples would be read twice per epoch",
        ),
        (
            {"shards": "train-{0..3.tar"},
            r"shards='train-\{0..3.tar' cannot be expanded \(Unbalanced braces: .*\)",
        ),
        ({"on_error": "ignore"}, "on_error must be one of 'stop', 'skip', 'list', but it is 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            WebDatasetCaptions(**{"shards": shards} | changes)
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*nowhere.tar; pass tar files that exist"):
        WebDatasetCaptions([shards[0], shards[0].with_name("nowhere.tar")], on_error="list")
    with pytest.raises(ValueError, match="7 shards cannot be distributed over 1 ranks with 8 worker processes each"):
        list(WebDatasetCaptions(shards).read(8))
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1, but it is -1"):
        list(WebDatasetCaptions(shards).read(-1))
    assert type(WebDatasetCaptions(shards).report) is ErrorReport


def test_without_webdataset_the_error_names_the_install_command(shards, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.partition(".")[0] == "webdataset":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"Reading shards needs webdataset: pip install 'mirror-modules\[data\]'"):
        WebDatasetCaptions(shards)
