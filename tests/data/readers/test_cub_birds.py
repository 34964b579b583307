import shutil

import numpy as np
import pytest

from mirror_modules.data import CubBirds
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


def test_a_class_in_both_splits_is_refused(root):
    write_pickle(root / "test" / "class_info.pickle", [3, 2, 4])
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
    with pytest.raises(ValueError, match=r"class_info.pickle must hold a list, but it holds a dict"):
        CubBirds(root)
    write_pickle(root / "train" / "class_info.pickle", [1, 2, "wren", 1, 2, 1])
    with pytest.raises(ValueError, match=r"class_info.pickle entry 2 is 'wren'; expected a class number"):
        CubBirds(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "entry 1 is None; expected an image name"),
        ("../secret/x", "entry 1 is '../secret/x'; expected an image name"),
        ("/etc/passwd", "entry 1 is '/etc/passwd'"),
        ("001.Wren/Wren_0000", "entry 1 names 001.Wren/Wren_0000 a second time"),
        ("001.Wren/Wren_9999", r"Wren_9999.jpg has no bounding box of positive size in bounding_boxes.txt"),
    ],
)
def test_invalid_names_are_refused_or_skipped(root, name, message):
    write_pickle(root / "train" / "filenames.pickle", ["001.Wren/Wren_0000", name])
    write_pickle(root / "train" / "class_info.pickle", [1, 1])
    with pytest.raises(ValueError, match=message):
        CubBirds(root)
    birds = CubBirds(root, on_error="list")
    assert (len(birds), len(birds.report.skipped)) == (1, 1)


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
