import sys

import numpy as np
import pytest

from mirror_modules.data import OxfordFlowers

Image = pytest.importorskip("PIL.Image")


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=95)


@pytest.fixture
def root(tmp_path):
    """Two photographs of class 4 and one of class 10 to train on, one of class 7 held out."""
    for number, (name, captions) in enumerate(
        [("class_00004", 3), ("class_00004", 2), ("class_00010", 1), ("class_00007", 1)], start=1
    ):
        color = np.full((19, 31, 3), 40 * number, dtype=np.uint8)
        write_image(tmp_path / "jpg" / f"image_{number:05}.jpg", color)
        folder = tmp_path / "text_c10" / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"flower {number} has petals, caption {i}." for i in range(captions)]
        (folder / f"image_{number:05}.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "trainclasses.txt").write_text("class_00004\nclass_00010\n")
    (tmp_path / "valclasses.txt").write_text("class_00007\n")
    return tmp_path


def test_samples_belong_to_their_files(root):
    flowers = OxfordFlowers(root, resolution=13)
    assert len(flowers) == 3
    for number, class_id, captions in [(1, 4, 3), (2, 4, 2), (3, 10, 1)]:
        sample = flowers[number - 1]
        assert sample.image.shape == (13, 13, 3)
        assert sample.image.dtype == np.uint8
        assert np.abs(sample.image.astype(int) - 40 * number).max() <= 2
        assert sample.captions == tuple(f"flower {number} has petals, caption {i}." for i in range(captions))
        assert sample.class_id == class_id
        assert sample.attributes == {}
    assert flowers[-1].class_id == 10


def test_validation_has_classes_of_its_own(root):
    (sample,) = OxfordFlowers(str(root), split="validation")
    assert sample.class_id == 7
    assert sample.image.shape == (64, 64, 3)


@pytest.mark.parametrize("upright", [False, True])
def test_middle_square_is_kept(root, upright):
    """Bands of 24, 48 and 24 pixels: only the middle one is left, white up to the blur at its border."""
    bands = np.zeros((48, 96, 3), dtype=np.uint8)
    bands[:, 24:72] = 255
    write_image(root / "jpg" / "image_00001.jpg", bands.transpose(1, 0, 2) if upright else bands)
    image = OxfordFlowers(root, resolution=10)[0].image
    assert image.shape == (10, 10, 3)
    assert image.min() > 220
    assert image[1:-1, 1:-1].min() > 250


def test_resizing_is_antialiased(root):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[::2] = 255
    Image.fromarray(stripes).save(root / "jpg" / "image_00001.jpg", quality=100)
    image = OxfordFlowers(root, resolution=8)[0].image.astype(int)
    assert np.abs(image - 127).max() < 12


def test_gray_photographs_get_three_channels(root):
    Image.fromarray(np.full((20, 20), 90, dtype=np.uint8)).save(root / "jpg" / "image_00001.jpg")
    assert OxfordFlowers(root, resolution=9)[0].image.shape == (9, 9, 3)


def test_missing_captions_are_an_error_or_left_out(root):
    text = root / "text_c10" / "class_00004" / "image_00002.txt"
    text.write_text("\n . \n")
    with pytest.raises(ValueError, match=r"image_00002.txt holds no caption; add one, or pass strict=False"):
        OxfordFlowers(root)
    assert [sample.captions[0][:8] for sample in OxfordFlowers(root, strict=False)] == ["flower 1", "flower 3"]


def test_damaged_samples_are_listed(root):
    folder = root / "text_c10"
    (folder / "class_00004" / "image_00001.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "class_00004" / "image_00002.txt").write_text("...")
    (root / "jpg" / "image_00003.jpg").unlink()
    flowers = OxfordFlowers(root, on_error="list")
    assert len(flowers) == 0
    reasons = [(skipped.file[-9:], skipped.reason) for skipped in flowers.report.skipped]
    assert [file for file, _ in reasons] == ["00001.txt", "00002.txt", "00003.txt"]
    assert [reason.split("(")[0].split(str(root))[0] for _, reason in reasons] == [
        "is not UTF-8 text ",
        "holds no caption",
        "describes ",
    ]
    # What strict=False leaves out is no damage.
    assert len(OxfordFlowers(root, on_error="list", strict=False).report.skipped) == 2
    with pytest.raises(ValueError, match="OxfordFlowers: 3 samples cannot be read, more than 5% of them"):
        OxfordFlowers(root, on_error="skip")


def test_a_class_that_is_listed_twice_is_read_once(root):
    (root / "trainclasses.txt").write_text("class_00004\nclass_00010\nclass_00004\n")
    assert len(OxfordFlowers(root)) == 3


def test_a_class_of_both_splits_is_refused(root):
    (root / "valclasses.txt").write_text("class_00007\nclass_00010\n")
    for split in ("train", "validation"):
        with pytest.raises(
            ValueError, match=r"class_00010 is in both .*trainclasses.txt and .*valclasses.txt; .*: take"
        ):
            OxfordFlowers(root, split=split, on_error="list")


def test_a_photograph_of_two_classes_is_read_once(root):
    text = root / "text_c10" / "class_00010" / "image_00001.txt"
    text.write_text("a flower")
    with pytest.raises(
        ValueError, match=r"class_00010/image_00001.txt describes .*jpg, which another class has already"
    ):
        OxfordFlowers(root)
    flowers = OxfordFlowers(root, on_error="list")
    assert [sample.class_id for sample in flowers] == [4, 4, 10]
    assert [skipped.file for skipped in flowers.report.skipped] == [str(text)]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; it must hold jpg/, text_c10/"):
        OxfordFlowers(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["jpg", "text_c10", "trainclasses.txt"])
def test_wrong_layout(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"has no {part}; the folder must hold jpg/"):
        OxfordFlowers(root)


def test_class_list_that_lists_something_else(root):
    (root / "trainclasses.txt").write_text("roses\n")
    with pytest.raises(ValueError, match=r"trainclasses.txt lists 'roses'; each line must be a folder class_XXXXX"):
        OxfordFlowers(root)
    (root / "trainclasses.txt").write_text("class_00099\n")
    with pytest.raises(FileNotFoundError, match=r"lists class_00099, but there is no folder"):
        OxfordFlowers(root)
    (root / "trainclasses.txt").write_text("")
    with pytest.raises(ValueError, match=r"the classes in .*trainclasses.txt have no photograph"):
        OxfordFlowers(root)


def test_captions_without_a_photograph(root):
    (root / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_00003.txt describes .*image_00003.jpg, which does not exist"):
        OxfordFlowers(root)


@pytest.mark.parametrize("content", [b"", b"not a photograph", None])
def test_unreadable_photograph(root, content):
    path = root / "jpg" / "image_00001.jpg"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"image_00001.jpg cannot be read as an image \(.+\)"):
        OxfordFlowers(root)[0]


def test_captions_that_are_not_text(root):
    (root / "text_c10" / "class_00004" / "image_00001.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"image_00001.txt is not UTF-8 text"):
        OxfordFlowers(root)


def test_other_errors(root, monkeypatch):
    with pytest.raises(IndexError, match="index 3 is outside the 3 samples"):
        OxfordFlowers(root)[3]
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', but it is 'test'"):
        OxfordFlowers(root, split="test")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'mirror-modules\[train\]'"):
        OxfordFlowers(root)
