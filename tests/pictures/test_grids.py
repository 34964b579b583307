"""Grids keep every pixel in place, captions stay below their images, heat follows the weights."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from mirror_modules.data import CaptionedImage
from mirror_modules.data.transforms import to_float
from mirror_modules.pictures.grids import (
    as_data_url,
    captioned_grid,
    grid,
    heat_overlay,
    same_size,
    sample_sheet,
    wrap,
    write_png,
)

N, H, W = 5, 3, 7
WHITE = 255


def make_images(count=N, height=H, width=W):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def grid_by_loops(images, columns, scale, gap):
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = (count + columns - 1) // columns
    size = (rows * (height * scale + gap) - gap, columns * (width * scale + gap) - gap, 3)
    picture = np.full(size, WHITE, np.uint8)
    for i in range(count):
        for y in range(height * scale):
            for x in range(width * scale):
                for color in range(3):
                    value = round((float(images[i, color, y // scale, x // scale]) + 1) * 127.5)
                    top, left = i // columns * (height * scale + gap), i % columns * (width * scale + gap)
                    picture[top + y, left + x, color] = value
    return picture


@pytest.mark.parametrize(("columns", "scale", "gap"), [(2, 1, 2), (3, 2, 1), (1, 1, 0), (5, 3, 4), (11, 1, 2)])
def test_a_grid_matches_the_loops(columns, scale, gap):
    images = make_images()
    picture = grid(images, columns, scale, gap)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, grid_by_loops(images, columns, scale, gap))


def test_values_outside_the_range_are_clipped():
    images = torch.tensor([-7.0, 0.0, 7.0]).reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(grid(images, 1), [[[0, 128, 255]]])


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (make_images()[0], {}, r"grid: images must be \(B, 3, H, W\), but they are \(3, 3, 7\)"),
        (make_images().byte(), {}, r"grid: images must be floats in \[-1, 1\], but they are torch.uint8"),
        (make_images(0), {}, r"grid: images must be a whole number of at least 1, but it is 0"),
        (make_images(), {"columns": 0}, r"grid: columns must be a whole number of at least 1, but it is 0"),
        (make_images(), {"scale": 0}, r"grid: scale must be a whole number of at least 1, but it is 0"),
        (make_images(), {"gap": -1}, r"grid: gap must be 0 or more, but it is -1"),
    ],
)
def test_invalid_grids_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        grid(images, **{"columns": 2, **options})


def test_captions_stay_below_their_images():
    images = make_images(5, 11, 13)
    scale, columns = 5, 2
    captions = ["", "a very small red flower with many petals", "leaf", "", "x"]
    picture = captioned_grid(images, captions, columns, scale)
    plain = grid(images, 1, scale, gap=0)
    height, width = 11 * scale, 13 * scale
    # Tops of the rows: find each image in the picture.
    tops, below = [], []
    for i in range(5):
        left = i % columns * (picture.shape[1] - width)
        tile = plain[i * height : (i + 1) * height]
        fits = [
            top
            for top in range(picture.shape[0] - height)
            if np.array_equal(picture[top : top + height, left : left + width], tile)
        ]
        assert len(fits) == 1
        tops += fits
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    ends = [tops[2], tops[2], tops[4], tops[4], picture.shape[0]]
    for i in range(5):
        left = i % columns * (picture.shape[1] - width)
        below.append((picture[tops[i] + height : ends[i], left : left + width] < 200).any())
    assert below == [bool(caption) for caption in captions]
    between = picture[:, width : picture.shape[1] - width]
    assert (between == WHITE).all()


def test_a_longer_caption_only_heightens_its_row():
    images = make_images(2, 40, 70)
    one, more = (captioned_grid(images, ["a red flower " * n, "x"], 2).shape[0] for n in (1, 5))
    assert more > one
    assert captioned_grid(images, ["x", "x"], 1).shape[0] > captioned_grid(images, ["x", "x"], 2).shape[0]


def test_captions_and_images_must_have_equal_counts():
    with pytest.raises(ValueError, match=r"captioned_grid: 1 captions for 5 images; give one for each image"):
        captioned_grid(make_images(), ["a flower"], 2)


@pytest.mark.parametrize("captions", ["abcde", [None] * N, [["a"]] * N])
def test_captions_must_be_strings(captions):
    """A single string would be split into letters."""
    with pytest.raises(ValueError, match=r"captioned_grid: captions must be a list of strings, .* wrap a single one"):
        captioned_grid(make_images(), captions, 2)


def make_samples(captions, size):
    pixels = np.random.default_rng(0).integers(0, 256, (len(captions), size, size, 3), dtype=np.uint8)
    return [CaptionedImage(image, (caption, "another"), 0, {}) for image, caption in zip(pixels, captions)]


def test_a_sample_sheet_shows_first_captions_below_enlarged_images():
    captions = ["a red flower", "a leaf", "five petals", "white", "green"]
    samples = make_samples(captions, 32)
    images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in samples]))
    np.testing.assert_array_equal(sample_sheet(samples), captioned_grid(images, captions, columns=4, scale=4))


@pytest.mark.parametrize(("size", "width"), [(7, 126), (64, 128), (128, 128), (150, 150)])
def test_a_sample_sheet_keeps_captions_legible(size, width):
    assert sample_sheet(make_samples(["a"], size)).shape[1] == width


def test_a_sample_sheet_shortens_long_captions():
    long, beginning = "flower " * 100, " ".join(["flower"] * 22) + " ..."
    np.testing.assert_array_equal(sample_sheet(make_samples([long], 64)), sample_sheet(make_samples([beginning], 64)))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "sample_sheet: there is no sample; give at least one"),
        (
            [*make_samples("ab", 7), *make_samples("c", 5)],
            r"sample_sheet: sample 2 is \(5, 5, 3\), but sample 0 is \(7, 7, 3\); open the data set with one",
        ),
        (
            [*make_samples("a", 7), CaptionedImage(np.zeros((7, 7, 3), np.uint8), (), 0, {})],
            "sample_sheet: sample 1 has no caption; give it one, or remove it",
        ),
    ],
)
def test_samples_without_a_common_sheet_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        sample_sheet(samples)


def test_samples_may_come_from_a_generator():
    samples = make_samples("ab", 7)
    np.testing.assert_array_equal(sample_sheet(sample for sample in samples), sample_sheet(samples))


@pytest.mark.parametrize("width", [1, 30, 61, 200])
def test_wrapped_lines_fit_and_keep_every_letter(width):
    font = ImageFont.load_default(10)
    text = "a flower  with\tchrysanthemumlike petals ünd Blätter"
    lines = wrap(text, width, font)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)
    if width == 200:
        assert lines[0].startswith("a flower with ")


def test_lines_are_filled_and_line_breaks_kept():
    font = ImageFont.load_default(10)
    assert wrap("a b c\nd", 500, font) == ["a b c", "d"]
    assert wrap("a b c", font.getlength("a b"), font) == ["a b", "c"]
    assert wrap(" \n ", 500, font) == []


def test_heat_is_brightest_at_the_largest_weight():
    weights = torch.zeros(3, 5)
    weights[1, 3] = 0.2
    overlay = heat_overlay(torch.zeros(3, 12, 20), weights).astype(int)
    assert overlay.shape == (12, 20, 3)
    brightness = overlay.sum(axis=2)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert 4 <= y < 8
    assert 12 <= x < 16
    # Uniform far from the weight.
    assert (overlay[:, :8] == overlay[0, 0]).all()


def test_heat_depends_only_on_relative_weights():
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    image = make_images()[0]
    np.testing.assert_array_equal(heat_overlay(image, weights * 8), heat_overlay(image, weights))


def test_zero_weights_give_no_heat():
    image = make_images()[0]
    faint = torch.zeros(3, 5)
    faint[0, 0] = 1
    none = heat_overlay(image, torch.zeros(3, 5))
    np.testing.assert_array_equal(none[:, 3:], heat_overlay(image, faint)[:, 3:])
    assert none.max() < 130


def test_the_image_is_visible_through_the_heat():
    image = torch.full((3, 4, 6), -1.0)
    image[:, :, 3:] = 1
    overlay = heat_overlay(image, torch.ones(2, 2)).astype(int)
    assert (overlay[:, 3:] - overlay[:, :3] > 50).all()


@pytest.mark.parametrize(
    ("image", "weights", "message"),
    [
        (make_images(), torch.ones(2, 2), r"heat_overlay: image must be \(3, H, W\), but it is \(5, 3, 3, 7\)"),
        (make_images()[0, :2], torch.ones(2, 2), r"heat_overlay: images must be \(B, 3, H, W\)"),
        (make_images()[0], torch.ones(1, 2, 2), r"heat_overlay: weights must be \(h, w\), .* they are \(1, 2, 2\)"),
        (make_images()[0], torch.ones(0, 2), r"heat_overlay: weights must be \(h, w\), at least one, .* are \(0, 2\)"),
        (make_images()[0], -torch.ones(2, 2), r"heat_overlay: weights must be finite and at least 0"),
        (make_images()[0], torch.full((2, 2), torch.nan), r"heat_overlay: weights must be finite and at least 0"),
    ],
)
def test_invalid_weights_are_refused(image, weights, message):
    with pytest.raises(ValueError, match=message):
        heat_overlay(image, weights)


def test_small_images_are_enlarged_by_repeating_pixels():
    small, large = make_images(2, 2, 2), make_images(2, 6, 6)
    both = same_size([small, large])
    assert both.shape == (2, 2, 3, 6, 6)
    torch.testing.assert_close(both[1], large, atol=0, rtol=0)
    for y in range(6):
        for x in range(6):
            torch.testing.assert_close(both[0, :, :, y, x], small[:, :, y // 3, x // 3], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("batches", "listed"),
    [([], r"\(none\)"), ([make_images(2), make_images(3)], r"\(\(2, 3, 3, 7\), \(3, 3, 3, 7\)\)")],
)
def test_batches_of_other_numbers_of_images_are_refused(batches, listed):
    with pytest.raises(ValueError, match=f"same_size: there must be one or more batches with the same .*{listed}"):
        same_size(batches)


def test_a_png_is_lossless(tmp_path):
    picture = grid(make_images(), 2)
    write_png(picture, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_a_failed_write_keeps_the_old_png(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    write_png(grid(make_images(), 2), path)
    before = path.read_bytes()

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        write_png(grid(make_images(), 1), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_a_data_url_holds_its_content():
    assert as_data_url("text/plain", b"flower") == "data:text/plain;base64,Zmxvd2Vy"
