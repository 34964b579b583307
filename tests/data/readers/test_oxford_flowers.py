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
    """Two training images of class 4 and one of class 10; one validation image of class 7."""
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


def test_samples_match_their_files(root):
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


def test_the_validation_split_has_its_own_classes(root):
    (sample,) = OxfordFlowers(str(root), split="validation")
    assert sample.class_id == 7
    assert sample.image.shape == (64, 64, 3)


@pytest.mark.parametrize("upright", [False, True])
def test_the_center_square_is_kept(root, upright):
    """Bands of 24, 48 and 24 pixels: only the white central one remains, up to the blur at its border."""
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


def test_gray_images_get_three_channels(root):
    Image.fromarray(np.full((20, 20), 90, dtype=np.uint8)).save(root / "jpg" / "image_00001.jpg")
    assert OxfordFlowers(root, resolution=9)[0].image.shape == (9, 9, 3)


def test_an_image_without_captions_raises_or_is_skipped(root):
    text = root / "text_c10" / "class_00004" / "image_00002.txt"
    text.write_text("\n . \n")
    message = r"image_00002.txt holds no caption of image_00002.jpg; fix it, or skip it with on_error='skip'\."
    with pytest.raises(ValueError, match=message):
        OxfordFlowers(root)
    flowers = OxfordFlowers(root, on_error="list")
    assert [sample.captions[0][:8] for sample in flowers] == ["flower 1", "flower 3"]
    assert flowers.report.skipped == [(str(text), "holds no caption of image_00002.jpg")]
    for number in range(5, 70):
        write_image(root / "jpg" / f"image_{number:05}.jpg", np.zeros((2, 2, 3), np.uint8))
        text.with_name(f"image_{number:05}.txt").write_text("a flower")
    assert len(OxfordFlowers(root, on_error="skip")) == 67


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
        "holds no caption of image_00002.jpg",
        "describes ",
    ]
    with pytest.raises(ValueError, match="OxfordFlowers: 3 samples cannot be read, more than 5% of them"):
        OxfordFlowers(root, on_error="skip")


def test_names_are_found_in_another_spelling(root):
    expected = list(OxfordFlowers(root, resolution=13))
    text = root / "text_c10" / "class_00004" / "image_00002.txt"
    text.rename(text.with_suffix(".TXT"))
    (root / "jpg" / "image_00003.jpg").rename(root / "jpg" / "image_00003.JPG")
    for one, other in zip(OxfordFlowers(root, resolution=13), expected, strict=True):
        assert np.array_equal(one.image, other.image)
        assert one[1:] == other[1:]


def test_other_files_do_not_stop_reading(root):
    expected = OxfordFlowers(root).entries
    folder = root / "text_c10" / "class_00004"
    for name in ("README.txt", "._image_00001.txt", ".DS_Store", "image_00001.txt~", ".image_00001.txt.swp"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    with pytest.warns(UserWarning, match=r"^OxfordFlowers: \S*README.txt is not named image_XXXXX.txt; ignored\.$"):
        flowers = OxfordFlowers(root)
    assert flowers.entries == expected
    assert flowers.report.ignored == [(str(folder / "README.txt"), "is not named image_XXXXX.txt")]


def test_a_class_listed_twice_is_read_once(root):
    (root / "trainclasses.txt").write_text("class_00004\nclass_00010\nclass_00004\n")
    assert len(OxfordFlowers(root)) == 3


def test_a_class_in_both_splits_is_refused(root):
    (root / "valclasses.txt").write_text("class_00007\nclass_00010\n")
    for split in ("train", "validation"):
        with pytest.raises(
            ValueError, match=r"class_00010 is in both .*trainclasses.txt and .*valclasses.txt; .*: remove"
        ):
            OxfordFlowers(root, split=split, on_error="list")


def test_an_image_in_two_classes_is_read_once(root):
    text = root / "text_c10" / "class_00010" / "image_00001.txt"
    text.write_text("a flower")
    with pytest.raises(
        ValueError, match=r"class_00010/image_00001.txt describes .*jpg, which already belongs to another class"
    ):
        OxfordFlowers(root)
    flowers = OxfordFlowers(root, on_error="list")
    assert [sample.class_id for sample in flowers] == [4, 4, 10]
    assert [skipped.file for skipped in flowers.report.skipped] == [str(text)]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; it must hold jpg/, text_c10/"):
        OxfordFlowers(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["jpg", "text_c10", "trainclasses.txt"])
def test_a_missing_part_of_the_layout_is_named(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"has no {part}; the folder must hold jpg/"):
        OxfordFlowers(root)


def test_invalid_class_lists_are_refused(root):
    (root / "trainclasses.txt").write_text("roses\n")
    with pytest.raises(ValueError, match=r"trainclasses.txt lists 'roses'; each line must be a folder class_XXXXX"):
        OxfordFlowers(root)
    (root / "trainclasses.txt").write_text("class_00099\n")
    with pytest.raises(FileNotFoundError, match=r"lists class_00099, but there is no folder"):
        OxfordFlowers(root)
    (root / "trainclasses.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"there is no image in the classes of .*trainclasses.txt; the folder must hold"
    ):
        OxfordFlowers(root)


def test_captions_without_an_image_are_refused(root):
    (root / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_00003.txt describes .*image_00003.jpg, which does not exist"):
        OxfordFlowers(root)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(root, content):
    path = root / "jpg" / "image_00001.jpg"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"image_00001.jpg cannot be read as an image \(.+\)"):
        OxfordFlowers(root)[0]


def test_captions_other_than_utf_8_are_refused(root):
    (root / "text_c10" / "class_00004" / "image_00001.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"image_00001.txt is not UTF-8 text"):
        OxfordFlowers(root)


def test_other_errors(root, monkeypatch):
    with pytest.raises(IndexError, match="index 3 is out of range for 3 samples"):
        OxfordFlowers(root)[3]
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', but it is 'test'"):
        OxfordFlowers(root, split="test")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'mirror-modules\[train\]'"):
        OxfordFlowers(root)
