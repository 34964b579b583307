"""A shard folder holds the samples of the stream, with random access; damage is reported."""

import bz2
import gzip
import io
import json
import lzma
import math
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mirror_modules.data import (
    DamagedSample,
    InMemoryCaptions,
    ShardFolder,
    WebDatasetCaptions,
    open_captions,
    prepare_captions,
)
from mirror_modules.data.inspection import inspect_split
from mirror_modules.data.readers.files import class_named, class_of
from mirror_modules.data.readers.images import read_square
from tests.layouts import (
    SHARD_SUFFIXES,
    add_file,
    captions_of,
    damaged_sample,
    make_shards,
    write_image,
    write_shard,
)

pytest.importorskip("PIL.Image")

R = 13
NUMBER_OF = {caption: number for number in range(200) for caption in captions_of(number)}


def numbers(captions):
    return [NUMBER_OF[entry.captions[0]] for entry in captions.entries]


def identity(sample):
    return sample


def equal(one, other):
    return np.array_equal(one.image, other.image) and one[1:] == other[1:]


def read_all(captions):
    """The readable samples, and all skipped ones."""
    samples, skipped = [], list(captions.report.skipped)
    for i in range(len(captions)):
        try:
            samples.append(captions[i])
        except DamagedSample as error:
            skipped.append(error.skipped)
    return samples, skipped


def tar_of(files):
    """The bytes of a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            add_file(tar, name, content)
    return buffer.getvalue()


def test_samples_match_their_shards(tmp_path):
    captions = ShardFolder(make_shards(tmp_path, 11, 3), resolution=R)
    assert numbers(captions) == list(range(11))
    for number, entry in enumerate(captions.entries):
        suffix = SHARD_SUFFIXES[number % 3]
        assert entry.image == tmp_path / f"train-00{int(number > 4)}.tar" / f"{number:04}.{suffix}"
        expected = read_square(tmp_path / "images" / f"{number}.{suffix}", R)
        assert np.array_equal(captions[number].image, expected)
        assert np.array_equal(captions[number - 11].image, expected)
        assert captions[number].captions == tuple(captions_of(number))
        if number % 2:
            assert captions[number].class_id == number
    assert len({entry.class_id for entry in captions.entries}) == 11
    assert numbers(ShardFolder(tmp_path, split="validation")) == [11, 12, 13]


def test_samples_and_reports_equal_those_of_the_stream(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    image, text = write_image(tmp_path / "x.png", 0).read_bytes(), b"\xef\xbb\xbfa red thing\r\n\n...\na blue thing"
    preferred = json.dumps({"captions": ["a green thing"]}).encode()
    files = [
        ("0.png", image),  # not part of the sample below
        ("0.txt", text),
        ("README", b"no dot"),
        ("0.seg.png", image),
        ("a.b/0.JPG", image),
        ("a.b/0.Txt", text),
        ("a.b/0.json", preferred),
        ("__meta__/0.json", preferred),
        ("/rooted/0.webp", image),
        ("/rooted/0.txt", text),
        ("../0.txt", text),
        ("../0.jpeg", b"no image"),
        ("../0.png", image),
        ("0.txt", text),
        ("빨간.txt", text),
        ("빨간.png", image),
        ("0.png", image),
    ]
    write_shard(tmp_path / "train-a.tar", range(47, 63), damaged_sample)
    (tmp_path / "train-b.tar").write_bytes(tar_of([("0.txt", text)]))
    with tarfile.open(tmp_path / "train-c.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files:
            add_file(tar, name, content)
            folder = tarfile.TarInfo("between.txt")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    write_shard(tmp_path / "train-d.tar", range(70, 74))
    monkeypatch.chdir(tmp_path)
    stream = WebDatasetCaptions("train-{a..d}.tar", R, seed=None, on_error="list")
    expected = list(stream)
    samples, skipped = read_all(ShardFolder(".", resolution=R, on_error="list"))
    assert len(samples) == len(expected) == 14
    assert all(map(equal, samples, expected))
    assert sorted(skipped) == sorted(stream.report.skipped)
    # Samples and classes do not depend on the path of the folder.
    again, _ = read_all(ShardFolder(tmp_path, resolution=R, on_error="list"))
    assert all(map(equal, again, expected))


def test_a_shard_of_a_downloader_is_read(tmp_path, monkeypatch):
    """100 samples as img2dataset writes them through webdataset: jpg, txt, and a json of all that is known."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-00000.tar")) as writer:
        for number in range(100):
            caption, key = captions_of(number)[0], f"{number:09}"
            known = {
                "caption": caption,
                "url": f"https://example.org/{number}.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 23,
                "height": 19,
                "original_width": 1024,
                "original_height": 846,
                "exif": json.dumps({"Image Orientation": "Horizontal (normal)"}),
                "sha256": "0" * 64,
                "punsafe": math.nan,
            }
            image = write_image(tmp_path / "images" / f"{number}.jpg", number).read_bytes()
            writer.write({"__key__": key, "jpg": image, "txt": caption, "json": json.dumps(known, indent=4)})
    monkeypatch.chdir(tmp_path)
    folder, stream = ShardFolder(".", resolution=R), WebDatasetCaptions("train-00000.tar", R, seed=None)
    assert numbers(folder) == list(range(100))
    assert len({entry.class_id for entry in folder.entries}) == 100
    assert folder.report.skipped == folder.report.ignored == []
    for number, (one, other) in enumerate(zip(folder, stream, strict=True)):
        assert equal(one, other)
        assert one.captions == (captions_of(number)[0],)
        assert np.array_equal(one.image, read_square(tmp_path / "images" / f"{number}.jpg", R))


@pytest.fixture
def read_both(tmp_path, monkeypatch):
    """Read a shard with both readers: its samples, what is skipped, and what the folder ignores."""
    pytest.importorskip("webdataset")
    # The stream takes the class of an image without one from the name of the shard as given.
    monkeypatch.chdir(tmp_path)

    def read(files):
        (tmp_path / "train-0.tar").write_bytes(tar_of(files))
        folder = ShardFolder(".", resolution=R, on_error="list")
        samples, skipped = read_all(folder)
        stream = WebDatasetCaptions("train-0.tar", R, seed=None, on_error="list")
        streamed = list(stream)
        assert len(samples) == len(streamed)
        assert all(map(equal, samples, streamed))
        assert skipped == stream.report.skipped
        return samples, skipped, folder.report.ignored

    return read


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"txt": b"x\ny"}, ("x", "y")),
        ({"txt": b"x\r\ny\r\n"}, ("x", "y")),
        ({"txt": b"x\ry\r"}, ("x", "y")),
        ({"txt": b"x\x0cy\xc2\x85z\xe2\x80\xa8w"}, ("x y z\u2028w",)),
        ({"txt": b"x", "json": b"{}"}, ("x",)),
        ({"txt": b"x", "json": b"[3]"}, ("x",)),
        ({"txt": b"x", "json": b'{"captions": ["y"]}'}, ("x",)),
        ({"txt": b"", "json": b'{"caption": "y"}'}, ("y",)),
        ({"txt": b"x", "caption": b"y"}, ("x",)),
        ({"caption": b"y", "json": b'{"caption": "z"}'}, ("y",)),
        ({"json": b'{"captions": ["x", "y"], "caption": "z"}'}, ("x", "y")),
        ({"json": b'{"captions": null, "caption": "z"}'}, ("z",)),
        ({"json": b'{"captions": [null, "y"]}'}, ("y",)),
        ({"json": b'{"captions": 5, "caption": "z"}'}, ("z",)),
        ({"json": b'{"caption": ["x", "y"]}'}, ("x", "y")),
        ({"json": b'\xef\xbb\xbf{"text": "x"}'}, ("x",)),
        ({"json": b'{"caption": "x\\ny"}'}, ("x y",)),
    ],
)
def test_captions_come_from_the_txt_or_else_from_the_json(tmp_path, read_both, members, captions):
    image = write_image(tmp_path / "x.jpg", 0).read_bytes()
    samples, skipped, ignored = read_both([("0.jpg", image), *((f"0.{n}", c) for n, c in members.items())])
    assert [sample.captions for sample in samples] == [captions]
    assert skipped == ignored == []


@pytest.mark.parametrize(
    ("members", "class_id"),
    [
        ({"cls": b"3"}, 3),
        ({"cls": b"3\n"}, 3),
        ({"cls": b"3", "json": b'{"class": 5}'}, 3),
        ({"json": b'{"class": 3}'}, 3),
        ({"json": b'{"label": 3}'}, 3),
        ({"json": b'{"class": 5, "label": 3}'}, 5),
        ({"json": b'{"class": null, "label": 3}'}, 3),
        ({"cls": b"wren"}, class_named("wren")),
        ({"json": b'{"class": "wren"}'}, class_named("wren")),
        ({"cls": b""}, None),
        ({"json": b'{"class": null}'}, None),
        ({"json": b'{"label": "wren"}'}, None),
        ({"json": b'{"label": -1}'}, None),
        ({"json": b'{"label": [1, 2]}'}, None),
    ],
)
def test_the_class_comes_from_the_cls_or_else_from_the_json(tmp_path, read_both, members, class_id):
    image = write_image(tmp_path / "x.jpg", 0).read_bytes()
    files = [("0.jpg", image), ("0.txt", b"x"), *((f"0.{name}", content) for name, content in members.items())]
    ((sample,), _, _) = read_both(files)
    assert sample.class_id == (class_of("train-0.tar/0") if class_id is None else class_id)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"x", "cls": b"\xff"}, "has a class that cannot be read ('utf-8' codec"),
        (
            {"txt": b"x", "cls": b"-1"},
            "has a class that cannot be read (the class must be a name, or an integer from 0",
        ),
        (
            {"txt": b"x", "json": b'{"class": []}'},
            "has a class that cannot be read (the class must be a number or a name",
        ),
        ({"txt": b"\xff"}, "has captions that cannot be read ('utf-8' codec"),
        ({"txt": b"", "json": b"{"}, "has captions that cannot be read (Expecting property"),
        ({"txt": b"", "json": b'{"caption": null}'}, "has no caption with a word"),
        ({"json": b'{"prompt": "x"}'}, "has no captions; expected a txt, or a json such as"),
        ({}, "has no captions; expected a txt, or a json such as"),
    ],
)
def test_unreadable_captions_and_classes_are_damage(tmp_path, read_both, members, reason):
    image = write_image(tmp_path / "x.jpg", 0).read_bytes()
    samples, skipped, _ = read_both([("0.jpg", image), *((f"0.{n}", c) for n, c in members.items())])
    assert samples == []
    assert [each.reason[: len(reason)] for each in skipped] == [reason]


def test_a_damaged_json_beside_a_txt_is_ignored(tmp_path, read_both):
    image = write_image(tmp_path / "x.jpg", 0).read_bytes()
    files = [("0.jpg", image), ("0.txt", b"x"), ("0.json", b"{")]
    samples, skipped, ((file, reason),) = read_both(files)
    assert [sample.captions for sample in samples] == [("x",)]
    assert skipped == []
    assert file.endswith("train-0.tar/0")
    assert reason.startswith("has a json that cannot be read (Expecting property")


@pytest.mark.parametrize(
    "litter",
    [
        "._0.jpg",
        "d/._0.jpg",
        "./._0.jpg",
        "__MACOSX/._0.jpg",
        "__MACOSX/0.jpg",
        "d/__MACOSX/d/0.txt",
        "@eaDir/0.jpg",
        ".DS_Store",
        "d/.DS_Store",
        "Thumbs.db",
        "d/desktop.ini",
        "0.txt~",
        "d/#0.txt#",
        "d/.0.txt.swp",
        "README.md",
        "README.txt",
        "d/LICENSE.txt",
        "0000.parquet",
        "0.seg.png",
    ],
)
def test_other_files_in_a_shard_are_ignored(tmp_path, read_both, litter):
    """Before, within and after the samples, since a sample consists of consecutive members."""
    one, two = (write_image(tmp_path / f"{i}.png", i).read_bytes() for i in range(2))
    files = [("0.png", one), ("0.txt", b"x"), ("d/0.png", two), ("d/0.txt", b"y")]
    expected, *_ = read_both(files)
    assert len(expected) == 2
    for at in range(5):
        samples, skipped, _ = read_both([*files[:at], (litter, b"\0\5\x16\7"), *files[at:]])
        assert all(map(equal, samples, expected))
        assert len(samples) == 2
        assert skipped == []


def test_worker_processes_read_the_same_samples(tmp_path):
    captions = ShardFolder(make_shards(tmp_path, 11, 3), resolution=R)
    copy = pickle.loads(pickle.dumps(captions))
    assert copy.entries == captions.entries
    loader = DataLoader(captions, batch_size=None, shuffle=False, num_workers=2, collate_fn=identity)
    for one, other, third in zip(loader, captions, copy, strict=True):
        assert equal(one, other)
        assert equal(third, other)


def test_sizes_are_those_of_the_stored_images(tmp_path):
    captions = open_captions(make_shards(tmp_path), resolution=R, on_error="list")
    assert captions.stored_size(4) == (23, 19)
    facts = inspect_split(captions)
    assert (facts.images, facts.shorter_side, facts.longer_side) == (6, (19, 19, 19), (23, 23, 23))


def cut(content, at):
    return content[:at]


def headers(content):
    """Offsets of the headers of a tar file, and of its end."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar] + [tar.offset]


def negative_size(content):
    """The third member declares that it ends where its header begins; some versions of tarfile would loop forever."""
    info = tarfile.TarInfo("0001.png")
    info.size = -512
    at = headers(content)[2]
    return content[:at] + info.tobuf(tarfile.GNU_FORMAT) + content[at + 512 :]


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGED_HEADER = "a header in it is damaged"
# Damage to a shard of samples 0 to 4: the change, the reported reason, and the number of samples before it.
DAMAGED_SHARDS = {
    "cut in an image": (lambda c: cut(c, headers(c)[6] + 519), "unexpected end of data", 3),
    "cut in a text": (lambda c: cut(c, headers(c)[7] + 519), "unexpected end of data", 3),
    "cut in a header": (lambda c: cut(c, headers(c)[6] + 7), DAMAGED_HEADER, 3),
    "cut between files": (lambda c: cut(c, headers(c)[6]), "its end is missing", 3),
    "cut after all": (lambda c: cut(c, headers(c)[-1]), "its end is missing", 5),
    "zeros": (
        lambda c: c[: headers(c)[6]] + bytes(1024) + c[headers(c)[6] + 1024 :],
        "data follows its end-of-archive marker",
        3,
    ),
    "zeros to its end": (lambda c: c[: headers(c)[6]] + bytes(2**21), "it ends in more than 1 MiB of zeros", 3),
    "no sample": (lambda c: bytes(10240), "it holds no sample", 0),
    "damaged header": (lambda c: flipped(c, headers(c)[4]), DAMAGED_HEADER, 2),
    "negative size": (negative_size, "", 1),
    "empty": (lambda c: b"", "empty file", 0),
    "no tar": (lambda c: b"no tar file" * 100, "a header in it is damaged, or it is not a tar file", 0),
    "gzip": (gzip.compress, "it is compressed; decompress it, since images are read by their offset", 0),
    "bzip2": (bz2.compress, "it is compressed; decompress it", 0),
    "xz": (lzma.compress, "it is compressed; decompress it", 0),
}


@pytest.mark.parametrize("name", DAMAGED_SHARDS)
def test_a_damaged_shard_is_reported_and_yields_the_samples_before_the_damage(tmp_path, name):
    change, reason, intact = DAMAGED_SHARDS[name]
    damaged = write_shard(tmp_path / "train-a.tar", range(5))
    write_shard(tmp_path / "train-b.tar", range(5, 8))
    damaged.write_bytes(change(damaged.read_bytes()))
    captions = ShardFolder(tmp_path, resolution=R, on_error="list")
    assert numbers(captions) == [*range(intact), 5, 6, 7]
    assert captions.report.skipped[0].file == str(damaged)
    with pytest.raises(ValueError, match=rf"a\.tar cannot be read completely \({reason}.*\); fix it, or skip it"):
        ShardFolder(tmp_path)
    with pytest.raises(ValueError, match="cannot be read, more than 5% of them"):
        ShardFolder(tmp_path, on_error="skip")


def test_a_truncated_image_belongs_to_no_sample(tmp_path):
    image = write_image(tmp_path / "x.png", 0).read_bytes()
    content = tar_of([("0.txt", b"a red thing"), ("0.png", image)])
    (tmp_path / "train-a.tar").write_bytes(cut(content, headers(content)[1] + 519))
    captions = ShardFolder(tmp_path, on_error="list")
    assert len(captions) == 0
    assert [skipped.reason[:25] for skipped in captions.report.skipped] == [
        "cannot be read completely",
        "has no image; expected on",
    ]


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst"])
def test_a_compressed_shard_is_not_overlooked(tmp_path, suffix):
    content = write_shard(tmp_path / "train-a.tar", range(5)).read_bytes()
    compress = {"tar.bz2": bz2.compress, "tar.xz": lzma.compress, "tar.zst": lambda c: b"\x28\xb5\x2f\xfd" + c}
    (tmp_path / f"train-b.{suffix}").write_bytes(compress.get(suffix, gzip.compress)(content))
    with pytest.raises(
        ValueError, match=rf"train-b\.{suffix} cannot be read completely \(it is compressed; decompress it"
    ):
        open_captions(tmp_path)
    (tmp_path / "train-a.tar").unlink()
    with pytest.raises(ValueError, match="it is compressed; decompress it"):
        open_captions(tmp_path)


def test_a_member_name_like_a_compression_header_is_accepted(tmp_path):
    image = write_image(tmp_path / "x.png", 0).read_bytes()
    (tmp_path / "train-a.tar").write_bytes(tar_of([("BZh9.png", image), ("BZh9.txt", b"a red thing")]))
    assert len(ShardFolder(tmp_path)) == 1


def test_a_folder_in_place_of_a_shard_is_reported(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "train-002.tar").mkdir()
    with pytest.raises(ValueError, match=r"train-002\.tar cannot be read completely \(Is a directory\)"):
        ShardFolder(tmp_path)


def test_a_repeated_name_is_listed(tmp_path):
    one, two = (write_image(tmp_path / f"{i}.png", i).read_bytes() for i in range(2))
    files = [("0.png", one), ("0.png", two), ("0.txt", b"a red thing"), ("1.png", two), ("1.txt", b"a blue thing")]
    (tmp_path / "train-a.tar").write_bytes(tar_of(files))
    captions = ShardFolder(tmp_path, resolution=R, on_error="list")
    assert len(captions) == 2
    assert np.array_equal(captions[0].image, read_square(tmp_path / "0.png", R))
    assert captions.report.skipped == [
        (f"{tmp_path / 'train-a.tar'}/0.png", "occurs twice in one sample; the first one is read")
    ]
    with pytest.raises(ValueError, match=r"a\.tar/0\.png occurs twice in one sample; the first one is read; fix it"):
        ShardFolder(tmp_path)


def test_an_incomplete_sample_does_not_join_the_next_shard(tmp_path):
    image = write_image(tmp_path / "x.png", 0).read_bytes()
    (tmp_path / "train-a.tar").write_bytes(tar_of([("0.png", image)]))
    (tmp_path / "train-b.tar").write_bytes(tar_of([("0.txt", b"a red thing")]))
    captions = ShardFolder(tmp_path, on_error="list")
    assert len(captions) == 0
    assert [skipped.reason[:14] for skipped in captions.report.skipped] == ["has no caption", "has no image; "]


def test_damaged_samples_raise_or_are_skipped(tmp_path):
    def few(number, files):
        return damaged_sample(number, files) if number < 53 else files

    write_shard(tmp_path / "train-a.tar", range(48, 130), few)
    with pytest.raises(ValueError, match=r"ShardFolder: .*a\.tar/0052 has no captions; .*; fix it, or skip it"):
        ShardFolder(tmp_path)
    captions = ShardFolder(tmp_path, resolution=R, on_error="skip")
    loaded = InMemoryCaptions(captions, max_words=18, report=captions.report)
    assert len(loaded) == 79
    assert [skipped.file[-8:] for skipped in captions.report.skipped] == ["tar/0052", "0050.jpg", "0051.jpg"]


def test_a_shard_that_changes_or_vanishes_damages_its_samples(tmp_path):
    captions = ShardFolder(make_shards(tmp_path), resolution=R)
    shard = tmp_path / "train-001.tar"
    shard.write_bytes(cut(shard.read_bytes(), 700))
    for i, reason in ((3, "broken|[Tt]runcated"), (5, "it is empty")):
        with pytest.raises(
            DamagedSample, match=rf"train-001\.tar/000{i}\..* cannot be read as an image \(.*({reason})"
        ):
            captions[i]
    shard.unlink()
    with pytest.raises(DamagedSample, match=r"train-001\.tar/0003\.jpg cannot be read \(No such file or directory\)"):
        captions[3]
    assert captions[0].image.shape == (R, R, 3)


def test_a_missing_split_is_named(tmp_path):
    make_shards(tmp_path)
    for shard in tmp_path.glob("validation-*.tar"):
        shard.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"ShardFolder: .* has no validation-\*\.tar; the folder must hold the shards train-\*\.tar and",
    ):
        open_captions(tmp_path, "validation")
    (tmp_path / "validation-0.tar").write_bytes(tar_of([]))
    with pytest.raises(ValueError, match=r"validation-0\.tar cannot be read completely \(it holds no sample\)"):
        open_captions(tmp_path, "validation")


def test_a_prepared_folder_matches_its_shards_at_any_path(tmp_path):
    root, cache = make_shards(tmp_path / "originals"), tmp_path / "cache"
    made = prepare_captions(root, cache, resolution=R)
    moved = shutil.move(root, tmp_path / "moved")
    assert prepare_captions(moved, cache, resolution=R) == made
    shard = moved / "train-001.tar"
    with tarfile.open(shard) as tar:
        pixel = tar.getmembers()[0].offset_data + 400
    shard.write_bytes(flipped(shard.read_bytes(), pixel))
    with pytest.raises(FileExistsError, match="was prepared with other settings or from other originals"):
        prepare_captions(moved, cache, resolution=R)
