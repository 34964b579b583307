import json
import os
import shutil
import sys

import numpy as np
import pytest

from mirror_modules.data import CaptionFolder
from mirror_modules.data.readers.files import read_lines
from tests.layouts import captions_of, make_folder, write_image

pytest.importorskip("PIL.Image")
STYLES = ("txt", "jsonl", "csv")


def make_undivided(root, count=100, first=0):
    for i in range(first, first + count):
        write_image(root / f"image{i}.png", i, (3, 3))
        (root / f"image{i}.txt").write_text("\n".join(captions_of(i)))
    return root


def names(folder):
    return {entry.image.name for entry in folder.entries}


@pytest.mark.parametrize("style", STYLES)
def test_samples_match_their_files(tmp_path, style):
    root = make_folder(tmp_path, style=style)
    for split, numbers in (("train", range(6)), ("validation", (6, 7, 8))):
        folder = CaptionFolder(root, split=split, resolution=13)
        assert [sample.captions for sample in folder] == [tuple(captions_of(i)) for i in numbers]
        assert all(sample.image.shape == (13, 13, 3) and sample.image.dtype == np.uint8 for sample in folder)


@pytest.mark.parametrize("style", STYLES)
def test_classes_come_from_a_list_or_each_image_is_its_own(tmp_path, style):
    classes = [sample.class_id for sample in CaptionFolder(make_folder(tmp_path, style=style))]
    assert [classes.index(each) for each in classes] == ([0, 1, 2, 3, 4, 5] if style == "txt" else [0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("style", ["jsonl", "csv"])
def test_a_class_is_the_same_in_both_splits(tmp_path, style):
    """Images 0 to 5 have the classes 0, 1, 2, 0, 1, 2, and images 6 and 7 the classes 0 and 1."""
    root = make_folder(tmp_path, validation=2, style=style)
    training = [entry.class_id for entry in CaptionFolder(root).entries]
    assert [entry.class_id for entry in CaptionFolder(root, split="validation").entries] == training[:2]
    assert all(0 <= class_id < 2**63 for class_id in training)
    for split in ("train", "validation"):
        (root / split / "captions.csv").unlink(missing_ok=True)
        (root / split / "captions.jsonl").write_text('{"file": "image.png", "caption": "x"}')
        write_image(root / split / "image.png", 0)
    own = [CaptionFolder(root, split=split).entries[0].class_id for split in ("train", "validation")]
    assert len({*own, *training}) == 5


def test_an_image_without_a_class_is_its_own_class(tmp_path):
    rows = [("a.png", "red"), ("b.png", ""), ("c.png", "red"), ("d.png", ""), ("a.png", "red")]
    for file, _ in rows:
        write_image(tmp_path / "train" / file, 0)
    (tmp_path / "validation").mkdir()
    lines = ["class,caption,file", *(f"{group},some words,{file}" for file, group in rows)]
    (tmp_path / "train" / "captions.csv").write_text("\n".join(lines))
    a, b, c, d = (sample.class_id for sample in CaptionFolder(tmp_path))
    assert a == c
    assert len({a, b, d}) == 3


def test_a_tenth_is_the_validation_split_and_stays_in_it(tmp_path):
    root = make_undivided(tmp_path)
    training, validation = CaptionFolder(root), CaptionFolder(root, split="validation")
    assert len(training) + len(validation) == 100
    assert 3 <= len(validation) <= 20
    assert not names(training) & names(validation)
    assert names(CaptionFolder(root, seed=1, split="validation")) != names(validation)
    make_undivided(root, 100, first=100)
    assert names(training) < names(CaptionFolder(root))
    assert names(validation) < names(CaptionFolder(root, split="validation"))


def test_a_list_is_divided_like_text_files(tmp_path):
    make_undivided(tmp_path)
    rows = [{"file": f"image{i}.png", "caption": c} for i in range(100) for c in captions_of(i)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training, validation = CaptionFolder(tmp_path), CaptionFolder(tmp_path, split="validation")
    assert len(training) + len(validation) == 100
    assert 3 <= len(validation) <= 20
    assert all(len(entry.captions) == 3 for entry in training.entries)


def test_unusual_captions(tmp_path):
    """Commas, quotes and emoji are kept, control characters are removed, and lines without a word are skipped."""
    write_image(tmp_path / "train" / "a.png", 0)
    (tmp_path / "validation").mkdir()
    long = " ".join(["word"] * 10_000)
    lines = [
        'a "red", round one',
        "빨간 꽃 🌺",
        "one\x00two\x1cthree\x85four",
        "\ud800 x",
        "...",
        "",
        " \t",
        "🌺",
        long,
    ]
    expected = ('a "red", round one', "빨간 꽃 🌺", "one two three four", "x", long)
    rows = [{"file": "./a.png", "caption": caption} for caption in lines]
    path = tmp_path / "train" / "captions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert CaptionFolder(tmp_path)[0].captions == expected
    path.unlink()
    (tmp_path / "train" / "a.txt").write_bytes("\r\n".join(lines).encode("utf-8", "replace"))
    assert CaptionFolder(tmp_path)[0].captions == (*expected[:3], "? x", long)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"jsonl line 2 is not JSON"),
        ("3", r'jsonl line 2 must be an object \{"file"'),
        ('{"file": "image0.png"}', "line 2 needs a file and a caption, both strings"),
        ('{"file": 3, "caption": "x"}', "line 2 needs a file and a caption"),
        ('{"file": "../x.png", "caption": "x"}', r"line 2 names the file '../x.png', which is not in this folder"),
        ('{"file": "", "caption": "x"}', "line 2 names the file ''"),
        ('{"file": "image0.png", "caption": "x", "class": []}', "line 2 has the class .*; expected a name or a number"),
        (
            '{"file": "image0.png", "caption": "x", "class": "b"}',
            "line 1 gives image0.png another class than a later line",
        ),
        ('{"file": "image1.png", "caption": "!"}', "line 2 holds no caption of image1.png"),
        ('{"file": "image2.png", "caption": "x"}', "line 2 describes .*image2.png, which does not exist"),
        ('{"file": "\\ud800.png", "caption": "x"}', "line 2 describes .*, which does not exist"),
        (json.dumps({"file": "x" * 5000, "caption": "x"}), "line 2 describes .*xxx, which does not exist"),
        (json.dumps({"file": "x/" * 5000 + "x", "caption": "x"}), "line 2 describes .*/x/x, which does not exist"),
    ],
)
def test_invalid_lines_are_refused_or_skipped(tmp_path, row, message):
    for i in range(2):
        write_image(tmp_path / "train" / f"image{i}.png", i)
    (tmp_path / "validation").mkdir()
    good = '{"file": "image0.png", "caption": "x", "class": "a"}'
    (tmp_path / "train" / "captions.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CaptionFolder(tmp_path)
    folder = CaptionFolder(tmp_path, on_error="list")
    assert len(folder.report.skipped) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"captions.csv begins with \[\]; the first line must name the columns file and caption"),
        (b"image,text\na.png,x\n", r"captions.csv begins with \['image', 'text'\]"),
        (
            b"file,caption\na.png,a red, round one\n",
            "line 2 has 3 columns instead of 2; quote captions that contain commas",
        ),
        (b"file,caption\na.png\n", "line 2 has 1 columns instead of 2"),
        (b'file,caption\na.png,"' + b"x" * 200_000 + b'"\n', r"line 2 is not CSV \(field larger than"),
        (
            b'file,caption\na.png,x\na.png,"a 12 bird\na.png,y\n',
            r"line 3 is not CSV \(unexpected end of data\); double a",
        ),
        (b'file,caption\na.png,"x\ny"\na.png,"x\ny",z\n', "line 4 has 3 columns instead of 2"),
        (b"file,caption,caption\na.png,x,y\n", "the first line must name the columns file and caption, once each"),
        (b"file;caption\na.png;x\n", r"begins with \['file;caption'\]; .* and separated by commas"),
        (b"file,caption\na.png,\xff\n", "captions.csv is not UTF-8 text .*; save it as UTF-8"),
    ],
)
def test_invalid_tables_are_refused(tmp_path, content, message):
    write_image(tmp_path / "train" / "a.png", 0)
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "captions.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CaptionFolder(tmp_path)


def test_an_unclosed_quotation_mark_costs_only_its_own_row(tmp_path):
    lines = ["file,caption", *(f"image{i}.png,a red bird number {i}" for i in range(40))]
    lines[10] = 'image9.png,"a 12 bird'
    lines[20] = 'image19.png,"a ""red"", round bird"'
    for i in range(40):
        write_image(tmp_path / "train" / f"image{i}.png", i, (3, 3))
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "captions.csv").write_text("\n".join(lines))
    folder = CaptionFolder(tmp_path, on_error="skip")
    assert [entry.image.name for entry in folder.entries] == [f"image{i}.png" for i in range(40) if i != 9]
    assert folder[18].captions == ('a "red", round bird',)
    (skipped,) = folder.report.skipped
    assert skipped.file.endswith("captions.csv line 11")


def test_unpaired_files_are_refused_or_skipped(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "image3.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"image3.png has no captions beside it in image3.txt; fix it"):
        CaptionFolder(root)
    (root / "train" / "image4.png").unlink()
    (root / "train" / "image5.txt").write_bytes(b"\xff\xfe\x00")
    write_image(root / "train" / "image0.bmp", 0)
    (root / "train" / "image1.TXT").write_text("another thing")
    folder = CaptionFolder(root, on_error="list")
    assert len(folder) == 3
    reasons = {skipped.file.rsplit("/")[-1]: skipped.reason for skipped in folder.report.skipped}
    assert reasons.keys() == {"image3.png", "image4.txt", "image5.txt", "image0.png", "image1.txt"}
    assert reasons["image1.txt"] == "shares its name with image1.TXT; put all captions into one of them"
    assert reasons["image4.txt"] == "has no image of the same name beside it"
    assert reasons["image5.txt"].startswith("is not UTF-8 text")
    assert reasons["image0.png"] == "shares its name and captions with image0.bmp; rename one of them"


def test_the_validation_split_of_few_images_may_be_empty(tmp_path):
    make_undivided(tmp_path, 3)
    assert len(CaptionFolder(tmp_path)) == 3
    with pytest.raises(
        ValueError,
        match=r"there is no image in the validation split of .*; a tenth, chosen by a hash of the names, is the "
        r"validation split, and all 3 fell into the other split: add images, or divide them into train/ and",
    ):
        CaptionFolder(tmp_path, split="validation")
    assert len(CaptionFolder(tmp_path, split="validation", on_error="list")) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_named_pipe_is_refused_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        read_lines("reader", tmp_path / "pipe")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode on this platform")
@pytest.mark.parametrize("on_error", ["stop", "list"])
def test_reports_of_names_that_are_not_unicode_can_be_encoded(tmp_path, on_error):
    root = make_folder(tmp_path)
    for suffix in (b".png", b".jpg"):
        shutil.copy(root / "train" / "image0.png", os.fsencode(root / "train") + b"/\xff" + suffix)
    try:
        reported = str(CaptionFolder(root, on_error=on_error).report.skipped)
    except OSError as error:
        reported = str(error)
    assert "\\udcff.jpg" in reported
    assert reported.encode()


def test_ambiguous_layouts_are_refused(tmp_path):
    root = make_folder(tmp_path, style="csv")
    (root / "train" / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train has both captions.jsonl and captions.csv; keep one of them"):
        CaptionFolder(root)
    (root / "validation").rename(root / "test")
    with pytest.raises(FileNotFoundError, match=r"has no validation; the folder must hold images, each with a text"):
        CaptionFolder(root)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"there is no image in the train split of .*; the folder must hold images, each"
    ):
        CaptionFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"CaptionFolder: there is no folder .*nowhere; it must hold images"):
        CaptionFolder(tmp_path / "nowhere")
