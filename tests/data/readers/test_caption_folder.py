import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from mirror_modules.data import CaptionFolder, open_captions
from mirror_modules.data.readers.files import SPLITS, read_lines
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
        (
            '{"file": "image0.png", "caption": "x", "class": []}',
            r"line 2 has a class that cannot be read \(the class must be a number or a name, but it is \[\]\)",
        ),
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


def test_images_without_captions_are_refused_or_skipped(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "image3.txt").rename(root / "train" / "image03.txt")
    with pytest.raises(
        FileNotFoundError, match=r"image3.png has no captions beside it in image3.txt \(similar: image03"
    ):
        CaptionFolder(root)
    (root / "train" / "image5.txt").write_bytes(b"\xff\xfe\x00")
    write_image(root / "train" / "image0.bmp", 0)
    (root / "train" / "image1.TXT").write_text("another thing")
    folder = CaptionFolder(root, on_error="list")
    assert len(folder) == 4
    reasons = {skipped.file.rsplit("/")[-1]: skipped.reason for skipped in folder.report.skipped}
    assert reasons.keys() == {"image3.png", "image5.txt", "image0.png", "image1.txt"}
    assert reasons["image1.txt"] == "shares its name with image1.TXT; put all captions into one of them"
    assert reasons["image5.txt"].startswith("is not UTF-8 text")
    assert reasons["image0.png"] == "shares its name and captions with image0.bmp; rename one of them"


# Files that systems, editors and people leave in a folder, and those of them that are named as ignored.
LITTER = {
    "._image0.png": b"\0\5\x16\7",
    "._image0.txt": b"\0\5\x16\7",
    "._captions.csv": b"\0\5\x16\7",
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "desktop.ini": b"[.ShellClassInfo]",
    "image0.txt~": b"an older caption",
    "#image0.txt#": b"an older caption",
    ".image0.txt.swp": b"b0VIM 9.0",
    ".#image0.txt": b"",
    "image0.png.part": b"",
    "README.txt": b"read me",
    "LICENSE.txt": b"CC BY 4.0",
    "image0.bak.txt": b"an older caption",
    "notes.caption": b"a note",
}
IGNORED = ["LICENSE.txt", "README.txt", "image0.bak.txt", "notes.caption"]


def test_other_files_do_not_stop_reading(tmp_path):
    root = make_folder(tmp_path / "divided")
    expected = CaptionFolder(root).entries
    for name, content in LITTER.items():
        (root / "train" / name).write_bytes(content)
    (root / "train" / "__MACOSX").mkdir()
    with pytest.warns(
        UserWarning, match=r"^CaptionFolder: \S*LICENSE.txt has no image of the same name beside it; .*"
    ) as said:
        folder = CaptionFolder(root)
    assert folder.entries == expected
    assert [(Path(file).name, reason) for file, reason in folder.report.ignored] == [
        (name, "has no image of the same name beside it") for name in IGNORED
    ]
    assert folder.report.skipped == []
    (warning,) = said
    assert "\n" not in str(warning.message)
    assert warning.filename == __file__
    assert type(open_captions(root, on_error="list")) is CaptionFolder


def test_a_stray_text_of_an_undivided_folder_is_named_in_one_split(tmp_path):
    root = make_undivided(tmp_path, 23)
    (root / "README.txt").write_text("read me")
    ignored = [CaptionFolder(root, split=split, on_error="list").report.ignored for split in SPLITS]
    assert sorted(map(len, ignored)) == [0, 1]
    for path in root.glob("*.png"):
        path.unlink()
    for split in SPLITS:
        with pytest.raises(ValueError, match=r"there is no image in the .* split of .*; the folder must hold"):
            CaptionFolder(root, split=split)


@pytest.mark.parametrize("style", ["texts", "list"])
@pytest.mark.parametrize("seed", range(5))
def test_two_of_a_few_images_are_for_validation(tmp_path, style, seed):
    for count in range(4, 13):
        root = make_undivided(tmp_path / str(count), count)
        if style == "list":
            rows = [{"file": f"image{i}.png", "caption": captions_of(i)[0]} for i in range(count)]
            (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        training, validation = (CaptionFolder(root, split=split, seed=seed) for split in SPLITS)
        assert len(validation) >= 2
        assert len(training) + len(validation) == count
        assert not names(training) & names(validation)


def test_the_validation_split_of_three_images_may_be_empty(tmp_path):
    make_undivided(tmp_path, 3)
    assert len(CaptionFolder(tmp_path)) == 3
    with pytest.raises(
        ValueError,
        match=r"there is no image in the validation split of .*; a tenth, chosen by a hash of the names, is the "
        r"validation split, and all 3 fell into the other split: add images, or divide them into train/ and",
    ):
        CaptionFolder(tmp_path, split="validation")
    assert len(CaptionFolder(tmp_path, split="validation", on_error="list")) == 0


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_are_those_of_any_system(tmp_path, end):
    def write(name, *lines):
        (tmp_path / "train" / name).write_bytes("".join(line + end for line in lines).encode())

    def captions():
        return [entry.captions for entry in CaptionFolder(tmp_path).entries]

    for name in ("a.png", "b.png"):
        write_image(tmp_path / "train" / name, 0)
    (tmp_path / "validation").mkdir()
    write("a.txt", "a red bird", "", "a blue bird")
    write("b.txt", "a green bird")
    expected = captions()
    assert expected == [("a red bird", "a blue bird"), ("a green bird",)]
    rows = [("a.png", "a red bird"), ("a.png", "a blue bird"), ("b.png", "a green bird")]
    write("captions.jsonl", *(json.dumps({"file": file, "caption": caption}) for file, caption in rows))
    assert captions() == expected
    (tmp_path / "train" / "captions.jsonl").unlink()
    write("captions.csv", "file,caption", *map(",".join, rows))
    assert captions() == expected


def read_one(root, files, **options):
    """The first sample of a folder with one image a.png and these files."""
    write_image(root / "train" / "a.png", 0)
    (root / "validation").mkdir(exist_ok=True)
    for name, content in files.items():
        (root / "train" / name).write_text(content, encoding="utf-8")
    return open_captions(root, **options)[0]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "x\ny"),
        ("a.TXT", "x\ny"),
        ("A.txt", "x\ny"),
        ("a.caption", "x\ny"),
        (
            "captions.jsonl",
            '{"file": "a.png", "caption": "x", "url": null}\n{"file": "a.png", "caption": "y", "width": 3}',
        ),
        ("Captions.JSONL", '{"file": "a.png", "caption": "x"}\n{"file": "a.png", "caption": "y"}'),
        ("captions.jsonl", '{"file": "a.png", "captions": ["x", null, "y"]}'),
        ("captions.jsonl", '{"file": "a.png", "captions": null, "caption": ["x", "y"]}'),
        ("captions.jsonl", '{"file": "a.png", "captions": 2, "caption": ["x", "y"]}'),
        ("captions.jsonl", '{"file": "a.png", "caption": null}\n{"file": "a.png", "caption": ["x", "y"]}'),
        ("captions.csv", "id,file,url,caption\n1,a.png,,x\n2,a.png,,y"),
        ("Captions.csv", "File, Caption\na.png,x\na.png,y"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}'),
        ("metadata.csv", "file_name,text\na.png,x\na.png,y"),
        ("Metadata.csv", "text,file_name,label\nx,a.png,3\ny,a.png,3"),
    ],
)
def test_captions_are_found_in_every_usual_place(tmp_path, name, content, mark):
    assert read_one(tmp_path, {name: mark + content}).captions == ("x", "y")


def test_one_place_precedes_the_other(tmp_path):
    places = {
        "captions.csv": "file,caption\na.png,in captions.csv",
        "a.txt": "in a.txt",
        "a.caption": "in a.caption",
        "metadata.jsonl": '{"file_name": "a.png", "text": "in metadata.jsonl"}',
    }
    for name in list(places):
        assert read_one(tmp_path, places).captions == (f"in {name}",)
        (tmp_path / "train" / name).unlink()
        del places[name]
    (tmp_path / "train" / "metadata.csv").write_text("")
    (tmp_path / "train" / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train has both metadata.jsonl and metadata.csv; keep one of them"):
        CaptionFolder(tmp_path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"class": "b"}, "b"),
        ({"class": " b "}, "b"),
        ({"class": 3}, "3"),
        ({"class": "", "label": 3}, "3"),
        ({"label": 3}, "3"),
        ({"label": "3"}, "3"),
        ({"class": "b", "label": 3}, "b"),
        ({"class": unicodedata.normalize("NFD", "é")}, unicodedata.normalize("NFC", "é")),
        ({"label": "b"}, None),
        ({"label": -1}, None),
        ({"label": 3.5}, None),
        ({"class": " "}, None),
    ],
)
def test_the_class_is_a_name_or_a_number_or_an_integer_label(tmp_path, row, expected):
    def class_of(fields):
        line = json.dumps({"file": "a.png", "caption": "x", **fields})
        return read_one(tmp_path, {"captions.jsonl": line}).class_id

    assert class_of(row) == class_of({} if expected is None else {"class": expected})
    assert (class_of(row) == class_of({})) == (expected is None)


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é빨") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("on_disk", "listed"),
    [
        (f"{DECOMPOSED}.png", f"{COMPOSED}.png"),
        (f"{COMPOSED}.png", f"{DECOMPOSED}.png"),
        (f"{DECOMPOSED}/x.png", f"{COMPOSED}/x.png"),
        (f"{DECOMPOSED}.PNG", f"{COMPOSED}.png"),
        ("im/A.PNG", "im/a.png"),
        ("Im/a.png", "im/A.png"),
        ("im/a.png", "im\\a.png"),
        ("im/a.png", ".\\im\\a.png"),
        ("im/a.png", " im/a.png "),
        ("straße.png", "STRASSE.png"),
    ],
)
def test_a_listed_file_is_found_in_another_spelling(tmp_path, on_disk, listed):
    image = write_image(tmp_path / "train" / on_disk, 7)
    (tmp_path / "validation").mkdir()
    rows = [{"file": name, "caption": caption} for name, caption in ((listed, "x"), (on_disk, "y"))]
    (tmp_path / "train" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (entry,) = CaptionFolder(tmp_path).entries
    assert entry.image == image
    assert entry.captions == ("x", "y")


def test_the_unicode_form_matters_less_than_case(tmp_path):
    names = [unicodedata.normalize("NFD", name) for name in ("é.png", "É.png")]
    for name in names:
        write_image(tmp_path / "train" / name, 0)
    if len(os.listdir(tmp_path / "train")) < 2:
        pytest.skip("the file system does not tell these names apart")
    (tmp_path / "validation").mkdir()
    rows = "\n".join(json.dumps({"file": unicodedata.normalize("NFC", name), "caption": "x"}) for name in names)
    (tmp_path / "train" / "captions.jsonl").write_text(rows)
    assert [entry.image.name for entry in CaptionFolder(tmp_path).entries] == names


def test_the_exact_spelling_comes_first(tmp_path):
    """On file systems that tell case and Unicode forms apart, each name is a file of its own."""
    names = ("a.png", "A.png", f"{COMPOSED}.png", f"{DECOMPOSED}.png")
    for i, name in enumerate(names):
        write_image(tmp_path / "train" / name, i)
    if len(os.listdir(tmp_path / "train")) < 4:
        pytest.skip("the file system does not tell these names apart")
    (tmp_path / "validation").mkdir()
    rows = "\n".join(json.dumps({"file": name, "caption": name}) for name in names)
    (tmp_path / "train" / "captions.jsonl").write_text(rows)
    assert [entry.image.name for entry in CaptionFolder(tmp_path).entries] == list(names)
    (tmp_path / "train" / "captions.jsonl").unlink()
    for name in names:
        (tmp_path / "train" / name).with_suffix(".txt").write_text(Path(name).stem)
    assert all(entry.captions == (entry.image.stem,) for entry in CaptionFolder(tmp_path).entries)
    (tmp_path / "train" / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/a.png has no captions beside it in a.txt; fix it"):
        CaptionFolder(tmp_path)


@pytest.mark.parametrize(("image", "text"), [(f"{DECOMPOSED}.png", f"{COMPOSED}.txt"), ("IMG_1.PNG", "img_1.txt")])
def test_a_text_file_is_found_in_another_spelling(tmp_path, image, text):
    write_image(tmp_path / "train" / image, 0)
    (tmp_path / "train" / text).write_text("a red bird")
    (tmp_path / "validation").mkdir()
    assert open_captions(tmp_path)[0].captions == ("a red bird",)


@pytest.mark.parametrize(
    ("on_disk", "listed", "similar"),
    [
        (["im/a.jpg"], "im/a.png", r"im/a.png, which does not exist \(similar: a.jpg\); fix it"),
        (["images/a.png"], "image/a.png", r"image/a.png, which does not exist \(similar: images\)"),
        (["im/red 1.png", "im/red 2.png"], "im/red_2.png", r"red_2.png, which does not exist \(similar: red 2.png\)"),
        ([f"im/{i:05}.png" for i in range(300)], "im/217.png", r"217.png, which does not exist \(similar: 00217.png\)"),
        (["im/A.png", "im/a.PNG"], "im/a.png", r"im/a.png, which does not exist \(similar: A.png, a.PNG\)"),
        (["im/x.png"], "im/something.png", r"something.png, which does not exist; fix it"),
        (["im/a.png"], "im/../im/a.png", "names the file 'im/../im/a.png', which is not in this folder"),
        (["im/a.png"], "..\\train\\im\\a.png", "names the file .*, which is not in this folder"),
    ],
)
def test_the_message_about_a_missing_file_names_similar_ones(tmp_path, on_disk, listed, similar):
    for name in on_disk:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    if len(os.listdir((tmp_path / "train" / on_disk[0]).parent)) < len(on_disk):
        pytest.skip("the file system does not tell these names apart")
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "captions.jsonl").write_text(json.dumps({"file": listed, "caption": "x"}))
    with pytest.raises((ValueError, FileNotFoundError), match=similar):
        CaptionFolder(tmp_path)


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
