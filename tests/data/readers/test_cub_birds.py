import pickle
import shutil
import struct
import tracemalloc

import numpy as np
import pytest

from mirror_modules.data import CubBirds
from mirror_modules.data.readers import cub_birds
from mirror_modules.data.readers.safe_pickle import PickledDict, read_pickle
from tests.layouts import captions_of, make_birds, write_pickle

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def root(tmp_path):
    return make_birds(tmp_path)


def rewrite(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_samples_match_their_files(root):
    birds = CubBirds(root, resolution=13)
    assert len(birds) == 6
    for i, sample in enumerate(birds):
        assert sample.image.shape == (13, 13, 3)
        assert sample.captions == tuple(captions_of(i, 10))
        assert sample.class_id == 1 + i % 2
        assert sample.attributes == {}


def test_the_validation_split_is_the_test_folder(root):
    birds = CubBirds(root, split="validation")
    assert [sample.captions[0] for sample in birds] == [captions_of(i)[0] for i in (6, 7, 8)]
    assert {sample.class_id for sample in birds} == {3, 4}


def test_the_square_around_the_box_is_kept(root):
    """The box (10, 5, 20, 12) is centered at (20, 11); a square of 15 pixels to each side exceeds the upper border."""
    path = CubBirds(root).entries[0].image
    pixels = np.asarray(Image.open(path).convert("RGB"))
    with Image.open(path) as image:
        rectangle = image.convert("RGB").crop((5, 0, 35, 26))
    expected = np.asarray(rectangle.crop((2, 0, 28, 26)))
    assert pixels.shape == (40, 60, 3)
    assert np.array_equal(CubBirds(root, resolution=26)[0].image, expected)


def test_the_box_is_a_share_of_the_square(root):
    """The box (10, 5, 20, 12) within the square from (7, 0) to (33, 26)."""
    sample = CubBirds(root, resolution=13)[0]
    assert sample.box == pytest.approx((3 / 26, 5 / 26, 20 / 26, 12 / 26))
    assert sample.points is None
    assert sample.point_names == ()


def test_key_points_are_those_of_parts(tmp_path):
    birds = CubBirds(make_birds(tmp_path, parts=True), resolution=13)
    assert birds.point_names == ("left eye", "tail", "right eye")
    for sample in birds:
        assert sample.point_names == birds.point_names
        left, tail, right = sample.points
        assert left == pytest.approx((7 / 26, 8 / 26, 1))
        assert tail == (0, 0, 0)
        assert right == pytest.approx((11 / 26, 8 / 26, 1))


@pytest.mark.parametrize("place", ["40.0 8.0 1", "14.0 8.0 0", "14.0 nan 1", "14.0 x 1", "1e300 8.0 1"])
def test_key_points_outside_of_the_square_or_without_a_place_are_not_visible(tmp_path, place):
    root = make_birds(tmp_path, parts=True)
    rewrite(root / "CUB_200_2011" / "parts" / "part_locs.txt", "2 1 14.0 8.0 1", f"2 1 {place}")
    birds = CubBirds(root)
    assert birds[1].points[0] == (0, 0, 0)
    assert birds[1].points[2][2] == birds[0].points[0][2] == 1


def test_images_without_lines_have_no_visible_key_point(tmp_path):
    root = make_birds(tmp_path, parts=True)
    path = root / "CUB_200_2011" / "parts" / "part_locs.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("3 ")))
    assert CubBirds(root)[2].points == ((0, 0, 0),) * 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2 1 14.0 8.0 1", "2 7 14.0 8.0 1", r"part_locs.txt has part '7', which is not in .*parts.txt"),
        ("2 1 14.0 8.0 1", "2 1 14.0 8.0", r"part_locs.txt line 4 is '2 1 14.0 8.0'; expected 5 columns"),
    ],
)
def test_damaged_lists_of_parts_are_refused(tmp_path, old, new, message):
    root = make_birds(tmp_path, parts=True)
    rewrite(root / "CUB_200_2011" / "parts" / "part_locs.txt", old, new)
    with pytest.raises(ValueError, match=message):
        CubBirds(root)


def test_captions_from_a_pickle(tmp_path):
    root = make_birds(tmp_path, pickled=True)
    shutil.rmtree(root / "text")
    for split, first in (("train", 0), ("validation", 6)):
        birds = CubBirds(root, split=split)
        assert birds[1].captions == tuple(c.replace(",", "") for c in captions_of(first + 1, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, r"captions.pickle must be a list of training captions, test captions, words by number"),
        ([[], [], [], []], r"captions.pickle must be a list of training captions"),
        (
            [[[1] for _ in range(59)], [], {1: "x"}, {}],
            r"has 59 captions for split 'train'; expected 10 for each of the 6 images",
        ),
        ([3, [], {1: "x"}, {}], r"has no list of captions \(int\) for split 'train'"),
        ([[[2, "x", None] for _ in range(60)], [], {1: "x"}, {}], r"captions.pickle holds no caption of Wren_0000.jpg"),
        ([[7] * 60, [], {1: "x"}, {}], r"captions.pickle holds no caption of Wren_0000.jpg"),
    ],
)
def test_invalid_pickled_captions_are_refused(root, content, message):
    write_pickle(root / "captions.pickle", content)
    with pytest.raises(ValueError, match=message):
        CubBirds(root)


@pytest.mark.parametrize("number", [-1, 2**20, 2**64, "1", None])
def test_words_without_a_valid_number_are_dropped(root, number):
    words = {0: "<end>", 1: "red", 2: b"bird", 3: "x" * 101, 4: 5, number: "green", 2**20 - 1: "x" * 100}
    content = [[[1, number, 2, 3, 4, 0, 7, 2**20 - 1] for _ in range(60)], [], words, {}]
    write_pickle(root / "captions.pickle", content)
    assert CubBirds(root)[0].captions == ("red bird " + "x" * 100,) * 10


def test_the_last_of_two_words_with_one_number_counts(root):
    captions = pickle.dumps([[1] for _ in range(60)], protocol=2)[2:-1]
    (root / "captions.pickle").write_bytes(b"(" + captions + b"](I1\nVred\nI1\nVblue\ndt.")
    assert CubBirds(root)[0].captions == ("blue",) * 10


def test_pickled_captions_of_more_than_1000_words_are_dropped(root):
    content = [[[1] * (1000 + i % 2) for i in range(60)], [], {1: "x"}, {}]
    write_pickle(root / "captions.pickle", content)
    assert CubBirds(root)[0].captions == (" ".join(["x"] * 1000),) * 5


def test_names_may_be_bytes(root):
    names = [f"{1 + i % 2:03}.Wren/Wren_{i:04}".encode() for i in range(6)]
    write_pickle(root / "train" / "filenames.pickle", names)
    assert len(CubBirds(root)) == 6


@pytest.mark.parametrize(
    "part",
    [
        "CUB_200_2011/images",
        "CUB_200_2011/images.txt",
        "CUB_200_2011/bounding_boxes.txt",
        "train/filenames.pickle",
        "train/class_info.pickle",
        "text",
    ],
)
def test_a_missing_part_of_the_layout_is_named(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"has no {part}; the folder must hold CUB_200_2011/ with images/"):
        CubBirds(root)


@pytest.mark.parametrize("value", [-1, 2**31, 10**6000, [[1]], 1.0], ids=lambda value: type(value).__name__)
def test_an_invalid_class_is_refused_or_skipped(root, value):
    write_pickle(root / "train" / "class_info.pickle", [1, 2, value, 1, 2, 1])
    with pytest.raises(
        ValueError, match=r"class_info.pickle entry 2 is of type (int|list|float); expected a class number"
    ):
        CubBirds(root)
    birds = CubBirds(root, on_error="list")
    assert (len(birds), len(birds.report.skipped)) == (5, 1)


def stored(text):
    """A text as a pickle stores it, in memo 0."""
    opcode, content = (b"B", text) if isinstance(text, bytes) else (b"X", text.encode())
    return opcode + struct.pack("<I", len(content)) + content + b"q\0"


@pytest.mark.parametrize("text", ["x" * 200_000, b"x" * 200_000, "한" * 60_000], ids=["text", "bytes", "wide text"])
@pytest.mark.parametrize("file", ["train/filenames.pickle", "train/class_info.pickle", "captions.pickle"])
def test_memory_is_proportional_to_the_pickles(root, file, text):
    """Copies of a text of 200 kB, each of which takes two bytes in the file, would take 300 to 500 MB."""
    content = b"](" + stored(text) + b"h\0" * 2000 + b"e"
    if file == "captions.pickle":
        captions = (b"](" + b"K\1" * 40 + b"e") * 60
        content = b"](](" + captions + b"e]}K\1" + stored(text) + b"se"
    else:
        write_pickle(root / "train" / "filenames.pickle", [f"{i}" for i in range(2001)])
        write_pickle(root / "train" / "class_info.pickle", [1] * 2001)
    (root / file).write_bytes(b"\x80\3" + content + b".")
    tracemalloc.start()
    birds = CubBirds(root, on_error="list")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert (len(birds), len(birds.report.skipped)) == (0, 6 if file == "captions.pickle" else 2001)


class Unhashable(int):
    __hash__ = None


def test_integers_of_pickles_are_never_hashed(tmp_path, monkeypatch):
    """They can be chosen such that each lookup in a set or dict visits all of them."""

    def read_unhashable(path):
        return unhashable(read_pickle(path))

    def unhashable(value):
        if isinstance(value, PickledDict):
            result = PickledDict()
            for key, each in value.items():
                result[unhashable(key)] = unhashable(each)
            return result
        if isinstance(value, list):
            return [unhashable(each) for each in value]
        return Unhashable(value) if isinstance(value, int) else value

    monkeypatch.setattr(cub_birds, "read_pickle", read_unhashable)
    birds = CubBirds(make_birds(tmp_path, pickled=True))
    assert [entry.class_id for entry in birds.entries] == [1, 2, 1, 2, 1, 2]
    assert birds[0].captions[0] == captions_of(0)[0].replace(",", "")


@pytest.mark.parametrize("classes", [[3, 2, 4], [2, 2, 0], [None, 2**40, 2]])
def test_a_class_in_both_splits_is_refused(root, classes):
    write_pickle(root / "test" / "class_info.pickle", classes)
    for split in ("train", "validation"):
        with pytest.raises(
            ValueError, match=r"class 2 is in class_info.pickle of both train and test in .*: remove the class"
        ):
            CubBirds(root, split=split, on_error="list")


def test_invalid_class_files_are_refused(root):
    write_pickle(root / "train" / "class_info.pickle", [1, 2])
    with pytest.raises(ValueError, match=r"class_info.pickle has 2 classes, but .*filenames.pickle has 6 images"):
        CubBirds(root)
    write_pickle(root / "train" / "class_info.pickle", {1: 2})
    with pytest.raises(ValueError, match=r"class_info.pickle must hold a list, but it holds a PickledDict"):
        CubBirds(root)
    write_pickle(root / "train" / "class_info.pickle", [1, 2, "wren", 1, 2, 1])
    with pytest.raises(ValueError, match=r"class_info.pickle entry 2 is 'wren'; expected a class number"):
        CubBirds(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "entry 1 is None; expected an image name such as 001.Wren/Wren_0001, of at most 511 characters"),
        (5, "entry 1 is of type int; expected an image name"),
        (b"../x", "entry 1 is b'../x'; expected an image name"),
        ("x" * 511, "names x*, which is not in images.txt"),
        ("x" * 512, f"entry 1 is '{'x' * 199}...; expected an image name"),
        (b"x" * 10**6, f"entry 1 is b'{'x' * 198}...; expected an image name"),
        ("../secret/x", "entry 1 is '../secret/x'; expected an image name"),
        ("/etc/passwd", "entry 1 is '/etc/passwd'"),
        ("001.Wren/Wren_0000", "entry 1 names 001.Wren/Wren_0000 a second time"),
        (
            "001.Wren/Wren_9999",
            r"entry 1 names 001.Wren/Wren_9999, which is not in images.txt \(similar: 001.Wren/Wren_0004, ",
        ),
    ],
)
def test_invalid_names_are_refused_or_skipped(root, name, message):
    write_pickle(root / "train" / "filenames.pickle", ["001.Wren/Wren_0000", name])
    write_pickle(root / "train" / "class_info.pickle", [1, 1])
    with pytest.raises(ValueError, match=message):
        CubBirds(root)
    birds = CubBirds(root, on_error="list")
    assert (len(birds), len(birds.report.skipped)) == (1, 1)


def upper_case_suffix(root):
    """Image 2 is a .JPG, in the list and on disk."""
    rewrite(root / "CUB_200_2011" / "images.txt", "Wren_0002.jpg", "Wren_0002.JPG")
    image = root / "CUB_200_2011" / "images" / "001.Wren" / "Wren_0002.jpg"
    image.rename(image.with_suffix(".JPG"))


def backslashes(root):
    path = root / "CUB_200_2011" / "images.txt"
    path.write_text(path.read_text().replace("/", "\\"))
    names = [f"{1 + i % 2:03}.Wren\\Wren_{i:04}" for i in range(6)]
    write_pickle(root / "train" / "filenames.pickle", names)


def other_case(root):
    """As of an archive that was unpacked by a system that ignores case."""
    (root / "text" / "001.Wren").rename(root / "text" / "001.wren")
    (root / "CUB_200_2011" / "images" / "002.Wren").rename(root / "CUB_200_2011" / "images" / "002.WREN")
    write_pickle(root / "train" / "filenames.pickle", [f"{1 + i % 2:03}.wren/WREN_{i:04}" for i in range(6)])


@pytest.mark.parametrize("change", [upper_case_suffix, backslashes, other_case])
def test_names_are_found_in_another_spelling(root, change):
    expected = list(CubBirds(root, resolution=13))
    change(root)
    birds = CubBirds(root, resolution=13)
    for one, other in zip(birds, expected, strict=True):
        assert np.array_equal(one.image, other.image)
        assert one[1:] == other[1:]
    assert all(entry.image.is_file() for entry in birds.entries)


def test_an_image_that_is_not_listed_is_not_blamed_on_its_box(root):
    rewrite(root / "CUB_200_2011" / "images.txt", "001.Wren/Wren_0002.jpg", "001.Wren/Wren-0002.jpg")
    with pytest.raises(
        ValueError,
        match=r"filenames.pickle entry 2 names 001.Wren/Wren_0002, which is not in images.txt "
        r"\(similar: 001.Wren/Wren-0002\); fix it",
    ):
        CubBirds(root)


@pytest.mark.parametrize("box", ["10.0 5.0 0.0 12.0", "10.0 5.0 x 12.0", "10.0 5.0 nan 12.0", "10.0 5.0 1e300 12.0"])
def test_invalid_boxes_are_refused(root, box):
    rewrite(root / "CUB_200_2011" / "bounding_boxes.txt", "3 10.0 5.0 20.0 12.0", f"3 {box}")
    with pytest.raises(ValueError, match=r"Wren_0002.jpg has no bounding box of positive size in bounding_boxes.txt"):
        CubBirds(root)


def test_invalid_tables_are_refused(root):
    rewrite(root / "CUB_200_2011" / "images.txt", "2 002.Wren/Wren_0001.jpg", "2")
    with pytest.raises(ValueError, match=r"images.txt line 2 is '2'; expected 2 columns"):
        CubBirds(root)


def test_a_box_outside_its_image_is_named_on_access(root):
    rewrite(root / "CUB_200_2011" / "bounding_boxes.txt", "1 10.0 5.0", "1 990.0 5.0")
    with pytest.raises(ValueError, match=r"Wren_0000.jpg cannot be read as an image .its bounding box .* lies outside"):
        CubBirds(root)[0]


def test_missing_or_empty_captions_are_refused_or_skipped(root):
    text = root / "text" / "001.Wren" / "Wren_0002.txt"
    text.write_text("\n ... \n")
    with pytest.raises(ValueError, match=r"Wren_0002.txt holds no caption of Wren_0002.jpg; fix it, or skip it"):
        CubBirds(root)
    text.unlink()
    with pytest.raises(FileNotFoundError, match=r"Wren_0002.txt cannot be read .No such file or directory.; fix it"):
        CubBirds(root)
    birds = CubBirds(root, on_error="list")
    assert len(birds) == 5
    assert [skipped.file for skipped in birds.report.skipped] == [str(text)]
