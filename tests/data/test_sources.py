"""`open_captions` recognizes every format; damaged samples of all of them end up in one report."""

import contextlib
import os
import pickle
import shutil

import pytest
import torch

from mirror_modules.data import (
    CaptionFolder,
    CocoCaptions,
    CubBirds,
    DamagedSample,
    ErrorReport,
    InMemoryCaptions,
    OxfordFlowers,
    ShardFolder,
    open_captions,
    sources,
)
from mirror_modules.data.readers import caption_folder
from mirror_modules.data.readers.files import check_apart
from tests.layouts import captions_of, make_birds, make_coco, make_flowers, make_folder, make_shards, write_image

pytest.importorskip("PIL.Image")

FORMATS = {
    "oxford-flowers": (make_flowers, OxfordFlowers),
    "birds": (make_birds, CubBirds),
    "coco": (make_coco, CocoCaptions),
    "folder": (make_folder, CaptionFolder),
    "webdataset": (make_shards, ShardFolder),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognized(tmp_path, name):
    make, reader = FORMATS[name]
    make(tmp_path)
    for source in ("auto", name):
        for split, size in (("train", 6), ("validation", 3)):
            captions = open_captions(str(tmp_path), split, 9, source)
            assert type(captions) is reader
            assert (len(captions), captions[0].image.shape) == (size, (9, 9, 3))


@pytest.mark.parametrize("style", ["jsonl", "csv"])
def test_a_caption_folder_is_recognized_by_its_list(tmp_path, style):
    assert type(open_captions(make_folder(tmp_path, style=style))) is CaptionFolder
    assert type(open_captions(tmp_path / "train", on_error="list")) is CaptionFolder


def images_with_texts(image, text):
    def make(root):
        for split in ("train", "validation"):
            write_image(root / split / image, 0)
            (root / split / text).write_text("a red bird")

    return make


def list_of_images(name, style="csv"):
    def make(root):
        make_folder(root, style=style)
        for split in ("train", "validation"):
            (root / split / f"captions.{style}").rename(root / split / name)

    return make


def only(make, *names):
    """A data set with some of its files alone."""

    def make_part(root):
        make(root)
        for path in root.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make_part


LAYOUTS = {
    "jpg and txt": images_with_texts("a.jpg", "a.txt"),
    "jpg and TXT": images_with_texts("a.jpg", "a.TXT"),
    "JPG and txt": images_with_texts("a.JPG", "A.txt"),
    "tiff and caption": images_with_texts("a.tiff", "a.caption"),
    "a hidden pair": images_with_texts(".a.png", ".a.txt"),
    "a pair of macOS": images_with_texts("._a.png", "._a.txt"),
    "other names": images_with_texts("a.png", "b.txt"),
    "Captions.csv": list_of_images("Captions.csv"),
    "CAPTIONS.JSONL": list_of_images("CAPTIONS.JSONL", "jsonl"),
    "metadata.csv": list_of_images("metadata.csv"),
    "metadata.jsonl": list_of_images("metadata.jsonl", "jsonl"),
    "a hidden list": list_of_images(".captions.csv"),
    "captions.tsv": list_of_images("captions.tsv"),
    "flowers": make_flowers,
    "birds": make_birds,
    "coco 2014": lambda root: make_coco(root, year="2014"),
    "coco 2015": lambda root: make_coco(root, year="2015"),
    "shards": make_shards,
    "training shards": only(make_shards, "train-000.tar"),
    "copies of images": only(make_shards, "images"),
    "nothing": lambda root: None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_format_is_recognized_exactly_if_its_reader_reads_something(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    readable = set()
    for name, (reader, *_) in sources.FORMATS.items():
        for split in ("train", "validation"):
            with contextlib.suppress(ValueError, FileNotFoundError):
                readable |= {name} if len(reader(tmp_path, split=split)) else set()
    assert len(readable) <= 1
    if readable:
        assert {sources.recognize(tmp_path)} == readable
    else:
        with pytest.raises(ValueError, match="has no known format"):
            sources.recognize(tmp_path)


def test_the_hint_names_no_system_folder_and_no_unreadable_one(tmp_path, monkeypatch):
    make_birds(tmp_path / "__MACOSX")
    make_birds(tmp_path / "birds")
    (tmp_path / "a").mkdir()
    scan_folder = caption_folder.scan_folder

    def refuse(folder):
        if folder.name == "a":
            raise PermissionError(folder)
        return scan_folder(folder)

    monkeypatch.setattr(caption_folder, "scan_folder", refuse)
    with pytest.raises(ValueError, match=r"Did you mean .*/birds\?"):
        open_captions(tmp_path)


def test_an_unknown_format_is_refused_with_the_files_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"has no known format\. Looked for oxford-flowers: text_c10/") as error:
        open_captions(tmp_path)
    for signature in (
        "birds: CUB_200_2011/",
        "coco: annotations/captions_{train,val}{2017,2014}.json",
        "folder: captions.jsonl, captions.csv, metadata.jsonl, metadata.csv, or an image with a .txt or .caption",
    ):
        assert signature in str(error.value)
    make_coco(tmp_path / "a" / "coco")
    with pytest.raises(ValueError, match=r"Did you mean .*/a/coco\?"):
        open_captions(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; pass the folder of the data set"):
        open_captions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="source must be one of 'auto', 'oxford-flowers', 'birds', 'coco', 'folder'"):
        open_captions(tmp_path, source="imagenet")


def damage(root, count, pattern):
    for path in sorted(root.rglob(pattern))[:count]:
        path.write_bytes(b"damaged")


def test_damaged_samples_raise_or_are_skipped_without_a_gap(tmp_path):
    root = make_coco(tmp_path, training=60)
    damage(root / "train2017", 3, "*.jpg")
    stops = open_captions(root)
    with pytest.raises(ValueError, match=r"000000000000.jpg cannot be read as an image .*; fix it, or skip it"):
        InMemoryCaptions(stops, max_words=18, report=stops.report)
    with pytest.raises(ValueError, match=r"000000000000.jpg cannot be read as an image"):
        InMemoryCaptions(stops, max_words=18)

    skips = open_captions(root, resolution=13, on_error="skip")
    calls = []
    captions = InMemoryCaptions(
        skips, max_words=18, report=skips.report, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(i + 1, 60) for i in range(60)]
    assert len(captions) == len(captions.images) == len(captions.class_ids) == len(captions.caption_counts) == 57
    assert captions.tokens.shape[0] == 171
    for i in range(57):
        assert sorted(captions.captions[i]) == sorted(captions_of(i + 3))
        assert torch.equal(captions.images[i], torch.from_numpy(skips[i + 3].image))
        assert captions.class_ids[i] == i + 3
    assert [skipped.file[-6:] for skipped in skips.report.skipped] == ["00.jpg", "01.jpg", "02.jpg"]


def test_more_than_five_percent_damaged_samples_raise(tmp_path):
    root = make_coco(tmp_path, training=60)
    damage(root / "train2017", 4, "*.jpg")
    skips = open_captions(root, on_error="skip")
    with pytest.raises(ValueError, match=r"4 samples cannot be read, more than 5% of them: .*00.jpg .*; .*01.jpg .*"):
        InMemoryCaptions(skips, max_words=18, report=skips.report)
    lists = open_captions(root, on_error="list")
    assert len(InMemoryCaptions(lists, max_words=18, report=lists.report)) == 56


def test_samples_skipped_on_opening_and_on_reading_count_together(tmp_path):
    root = make_birds(tmp_path, training=60, captions=2)
    damage(root / "CUB_200_2011" / "images" / "001.Wren", 2, "*.jpg")
    texts = sorted((root / "text" / "002.Wren").glob("*.txt"))
    texts[0].unlink()
    skips = open_captions(root, on_error="skip")
    assert len(InMemoryCaptions(skips, max_words=18, report=skips.report)) == 57
    assert [skipped.file[-4:] for skipped in skips.report.skipped] == [".txt", ".jpg", ".jpg"]
    texts[1].write_text("")
    skips = open_captions(root, on_error="skip")
    with pytest.raises(ValueError, match=r"4 samples cannot be read, more than 5% of them: .*Wren_0001.txt cannot be"):
        InMemoryCaptions(skips, max_words=18, report=skips.report)
    for text in texts[2:4]:
        text.unlink()
    with pytest.raises(ValueError, match=r"CubBirds: 4 samples cannot be read, more than 5% of them: .*Wren_0001.txt"):
        open_captions(root, on_error="skip")


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    root = make_coco(tmp_path, training=2)
    damage(root / "train2017", 2, "*.jpg")
    lists = open_captions(root, on_error="list")
    with pytest.raises(ValueError, match=r"none of the 2 samples can be read: .*00.jpg cannot be read"):
        InMemoryCaptions(lists, max_words=18, report=lists.report)


def test_an_image_in_both_splits_is_refused_under_any_name(tmp_path):
    """Splits made of links, and names that the file system does not tell apart, lead to one file."""
    root = make_folder(tmp_path / "folder")
    splits = [open_captions(root, split) for split in ("train", "validation")]
    check_apart("owner", *splits)
    (root / "validation" / "image7.png").unlink()
    (root / "validation" / "image7.png").symlink_to(root / "train" / "image2.png")
    (root / "validation" / "image8.png").unlink()
    os.link(root / "train" / "image3.png", root / "validation" / "image8.png")
    with pytest.raises(ValueError, match=r"owner: 2 images are in both splits, such as \S*validation/image7.png; "):
        check_apart("owner", *(open_captions(root, split) for split in ("train", "validation")))
    shards = make_shards(tmp_path / "shards")
    check_apart("owner", *(open_captions(shards, split) for split in ("train", "validation")))
    (shards / "validation-002.tar").symlink_to(shards / "train-001.tar")
    with pytest.raises(ValueError, match=r"owner: 3 images are in both splits, such as \S*validation-002.tar/0003.jpg"):
        check_apart("owner", *(open_captions(shards, split) for split in ("train", "validation")))


def test_the_listing_is_one_line():
    report = ErrorReport("skip")
    for i in range(7):
        report.add("Reader", f"f{i}", "is bad")
    assert report.listing(2) == "f0 is bad; f1 is bad; and 5 more"
    for _ in range(2):
        report.ignore("g", "is odd")
    assert report.ignored == [("g", "is odd")]
    report.add("Reader", "undecodable\udcff", "is bad")
    assert report.skipped[-1].file.encode() == b"undecodable\\udcff"
    with pytest.raises(ValueError, match="on_error must be one of 'stop', 'skip', 'list', but it is 'ignore'"):
        ErrorReport("ignore")


def test_a_damaged_sample_can_be_pickled():
    error = DamagedSample("Reader", "x.jpg", "is bad")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "Reader: x.jpg is bad."
