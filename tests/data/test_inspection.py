"""Statistics of a data set, checked against a count by hand."""

import io
from collections import Counter

import pytest

from mirror_modules.data import open_captions, prepare_captions
from mirror_modules.data.inspection import MAX_LISTED, Spread, describe_splits, inspect_folder, inspect_split
from tests.layouts import make_coco, make_folder, make_shards, write_image, write_shard

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def root(tmp_path):
    """Three training images of two classes, one of them damaged, and two validation images."""
    rows = {
        "train": [
            ("a", "A red, red bird.", "x"),
            ("a", "one two three four five", "x"),
            ("b", "red", "y"),
            ("c", "?", "y"),
        ],
        "validation": [("d", "a red fish", "y"), ("e", "a bird", "z"), ("e", "two birds", "z")],
    }
    for split, lines in rows.items():
        for i, name in enumerate(dict.fromkeys(name for name, _, _ in lines)):
            write_image(tmp_path / split / f"{name}.png", i, (10 + i, 30 - i))
        table = [f'{name}.png,"{caption}",{group}' for name, caption, group in lines]
        (tmp_path / split / "captions.csv").write_text("\n".join(["file,caption,class", *table]))
    return tmp_path


def facts_of(root, split, **options):
    return inspect_split(open_captions(root, split, 8, on_error="list"), **options)


def test_a_split_is_counted(root):
    facts = facts_of(root, "train", max_words=4)
    assert (facts.images, facts.captions, facts.long_captions) == (2, 3, 1)
    assert facts.captions_each == (1, 1.5, 2)
    assert (facts.shorter_side, facts.longer_side) == ((10, 10.5, 11), (29, 29.5, 30))
    assert facts.caption_words == (1, 4, 5)
    assert facts.words == Counter({"red": 3, **dict.fromkeys(["a", "bird", "one", "two", "three", "four", "five"], 1)})
    assert len(facts.classes) == 2
    assert [skipped.reason for skipped in facts.damaged] == ["holds no caption of c.png"]
    assert [sample.captions[0] for sample in facts.samples] == ["A red, red bird.", "red"]


def test_damaged_images_are_found_too(root):
    (root / "train" / "b.png").write_bytes(b"")
    facts = facts_of(root, "train")
    assert facts.images == 1
    assert [skipped.reason for skipped in facts.damaged] == [
        "holds no caption of c.png",
        "cannot be read as an image (it is empty)",
    ]


def test_samples_are_evenly_spaced(tmp_path):
    root = make_folder(tmp_path, training=20)
    (root / "train" / "image0.png").write_bytes(b"")
    samples = facts_of(root, "train", samples=4).samples
    captions = open_captions(root, "train")
    indices = [next(i for i, e in enumerate(captions.entries) if e.captions == s.captions) for s in samples]
    assert indices == [1, 5, 10, 15]


def test_the_table_holds_the_statistics(root):
    training, validation = facts_of(root, "train"), facts_of(root, "validation")
    text = describe_splits(training, validation, min_count=1)
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert rows["images"] == ["2", "2"]
    assert rows["damaged"] == ["1", "0"]
    assert rows["shorter side, pixels"] == ["10", "/", "10.5", "/", "11", "10", "/", "10.5", "/", "11"]
    assert rows["longer than 18 words"] == ["0.0%", "0.0%"]
    # a red fish, a bird, two birds: all but fish and birds are in the vocabulary.
    assert "vocabulary: 8 words from the training captions, with min_count=1; it covers 71.4% of the words" in text
    assert "and 66.7% of the distinct words" in text
    assert "vocabulary: 1 words from the training captions, with min_count=2; it covers 14.3%" in describe_splits(
        training, validation, min_count=2
    )
    assert "damaged: 1 of 5\n" in text
    assert "captions.csv line 5 holds no caption of c.png" in text


def test_the_list_of_damaged_files_is_limited(tmp_path):
    root = make_folder(tmp_path, training=MAX_LISTED + 5)
    for path in (root / "train").glob("*.png"):
        path.write_bytes(b"")
    training, validation = facts_of(root, "train"), facts_of(root, "validation")
    text = describe_splits(training, validation)
    assert text.count("it is empty") == MAX_LISTED
    assert text.endswith("\n  and 5 more")
    assert training.shorter_side is None
    assert "damaged: 25 of 28" in text
    assert "it covers 0.0% of the words" in text


def test_ignored_files_are_counted_and_listed(tmp_path):
    """A stray text file, and a photograph whose orientation cannot be read, which is intact otherwise."""
    root = make_folder(tmp_path)
    for split in ("train", "validation"):
        (root / split / "README.txt").write_text("read me")
    Image.new("RGB", (31, 17)).save(root / "train" / "image2.png", exif=b"garbage")
    text, _ = inspect_folder(root)
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert rows["images"] == ["6", "3"]
    assert rows["damaged"] == ["0", "0"]
    assert "damaged: " not in text
    assert text.splitlines()[-5:] == [
        "ignored, without loss of an image: 3",
        f"  {root}/train/README.txt has no image of the same name beside it",
        f"  {root}/train/image2.png has damaged EXIF data, without which it is read "
        "(not a TIFF file (header b'garbage' not valid))",
        f"  {root}/validation/README.txt has no image of the same name beside it",
        f"train with: mirror-modules train photos-64 --data {root}",
    ]
    for i in range(MAX_LISTED):
        (root / "train" / f"{i}.txt").write_text("a note")
    assert "\n  and 3 more\n" in inspect_folder(root).text


@pytest.mark.parametrize("make", [make_coco, make_shards])
def test_images_with_damaged_metadata_are_counted(tmp_path, make):
    root = make(tmp_path)
    image = io.BytesIO()
    Image.new("RGB", (31, 17)).save(image, "PNG")
    damaged = image.getvalue()[:33] + b"\0\0\0\1tEXtx\0\0\0\0" + image.getvalue()[33:]
    if make is make_coco:
        (root / "train2017" / "000000000002.jpg").write_bytes(damaged)
    else:
        (root / "train-000.tar").unlink()
        write_shard(root / "train-000.tar", [1], lambda number, files: {"png": damaged, "json": files["json"]})
    facts = facts_of(root, "train")
    assert [file[-3:] for file, _ in facts.ignored] == ["jpg" if make is make_coco else "png"]
    assert facts.ignored[0].reason.startswith("has damaged metadata, without which it is read (")
    assert facts.longer_side.maximum == 31
    assert facts.damaged == ()


def test_classes_are_compared_if_the_data_set_has_classes(tmp_path):
    root = make_folder(tmp_path, training=9, validation=6, style="csv")
    assert "classes in both splits: 3" in describe_splits(facts_of(root, "train"), facts_of(root, "validation"))
    table = root / "validation" / "captions.csv"
    table.write_text(table.read_text().replace(",red", ",violet").replace(",green", ",gold"))
    assert "classes in both splits: 1" in describe_splits(facts_of(root, "train"), facts_of(root, "validation"))
    plain = make_folder(tmp_path / "plain")
    assert "in both splits" not in describe_splits(facts_of(plain, "train"), facts_of(plain, "validation"))


def test_a_folder_is_inspected(root):
    text, samples = inspect_folder(root)
    assert text.startswith(f"{root} is read as 'folder'\n")
    assert "captions.csv line 5 holds no caption of c.png\n" in text
    assert text.endswith(f"\ntrain with: mirror-modules train photos-64 --data {root}")
    assert [sample.captions[0] for sample in samples] == ["A red, red bird.", "red", "a red fish", "a bird"]
    assert {sample.image.shape for sample in samples} == {(64, 64, 3)}
    text, samples = inspect_folder(root, source="folder", resolution=9, max_words=2, min_count=2)
    assert {sample.image.shape for sample in samples} == {(9, 9, 3)}
    assert "longer than 2 words" in text
    assert "vocabulary: 1 words" in text
    assert text.endswith(f" --data {root} --data.source folder")


def test_the_path_in_the_command_is_quoted(tmp_path):
    root = make_folder(tmp_path / "my photos")
    assert inspect_folder(root).text.endswith(f"\ntrain with: mirror-modules train photos-64 --data '{root}'")


def test_a_folder_prepared_at_a_low_resolution_is_inspected_at_it(tmp_path):
    prepare_captions(make_coco(tmp_path / "data"), tmp_path / "cache", resolution=13)
    text, samples = inspect_folder(tmp_path / "cache")
    assert text.startswith(f"{tmp_path / 'cache'} is read as 'prepared'\n")
    assert {sample.image.shape for sample in samples} == {(13, 13, 3)}


def test_without_a_readable_image_there_are_no_samples(tmp_path):
    root = make_coco(tmp_path)
    for path in root.glob("*/*.jpg"):
        path.write_bytes(b"")
    text, samples = inspect_folder(root)
    assert samples == ()
    assert "damaged: 9 of 9" in text
    assert "train with" not in text


def test_errors(root):
    with pytest.raises(ValueError, match="inspect_split: max_words must be a whole number of at least 1, but it is 0"):
        facts_of(root, "train", max_words=0)
    facts = facts_of(root, "train")
    with pytest.raises(ValueError, match="describe_splits: min_count must be a whole number of at least 1"):
        describe_splits(facts, facts, min_count=0)
    with pytest.raises(ValueError, match="inspect_folder: resolution must be a whole number of at least 1"):
        inspect_folder(root, resolution=0)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        inspect_folder(root / "nowhere")


def test_spread():
    assert Spread.of([]) is None
    assert str(Spread.of([3, 1, 2, 1000])) == "1 / 2.5 / 1000"
