"""Images are written in the format of the suffix, numbered where there are several."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirror_modules.data import to_float
from mirror_modules.pictures import save_images

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)


def read(file):
    with Image.open(file) as image:
        return image.format, np.asarray(image)


@pytest.mark.parametrize(
    "images",
    [
        to_float(torch.from_numpy(PIXELS)),
        PIXELS,
        (PIXELS / 255).astype(np.float32),
        [Image.fromarray(each) for each in PIXELS],
    ],
    ids=["tensor", "bytes", "floats", "pillow"],
)
def test_images_of_every_form_are_written_exactly(tmp_path, images):
    files = save_images(images, tmp_path / "new" / "f.png")
    assert files == [tmp_path / "new" / "f-000.png", tmp_path / "new" / "f-001.png"]
    for file, expected in zip(files, PIXELS):
        name, pixels = read(file)
        assert name == "PNG"
        assert np.array_equal(pixels, expected)
    assert save_images(images[:1], tmp_path / "one.png") == [tmp_path / "one.png"]


@pytest.mark.parametrize(
    ("suffix", "name"),
    [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"), ("tif", "TIFF")],
)
def test_the_suffix_selects_the_format(tmp_path, suffix, name):
    (file,) = save_images(Image.fromarray(PIXELS[0]), str(tmp_path / f"f.{suffix}"))
    assert read(file)[0] == name
    assert np.array_equal(read(file)[1], PIXELS[0]) == (name != "JPEG")


@pytest.mark.parametrize("name", ["f", "f.gif", "f.png.txt"])
def test_other_suffixes_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=f"save_images: '{name}' must end in .png, .jpg, .jpeg, .webp, .bmp, .tif or"):
        save_images(PIXELS, tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()


def test_other_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images must be a tensor, an array, .* of the type str"):
        save_images("f.png", tmp_path / "f.png")
    with pytest.raises(ValueError, match=r"save_images: images must be \(B, 3, H, W\)"):
        save_images(torch.zeros(3, 8, 8), tmp_path / "f.png")


def test_a_failed_write_keeps_the_existing_file(tmp_path, monkeypatch):
    (file,) = save_images(PIXELS[:1], tmp_path / "f.png")
    before = file.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_images(PIXELS[1:], file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
