"""Image files of all modes and formats become RGB squares; damaged ones are named with the reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest

from mirror_modules.data.readers import images
from mirror_modules.data.readers.images import Box, image_size, read_square, read_view, square_around

Image = pytest.importorskip("PIL.Image")

# Darker at the left and at the top: every rotation or flip gives another image.
RAMP = (np.arange(40)[None, :] * 5 + np.arange(40)[:, None]).astype(np.uint8)
TURNED = {
    1: RAMP,
    2: RAMP[:, ::-1],
    3: RAMP[::-1, ::-1],
    4: RAMP[::-1],
    5: RAMP.T,
    6: RAMP.T[::-1],  # the decoder rotates it by 90 degrees clockwise
    7: RAMP.T[::-1, ::-1],
    8: RAMP.T[:, ::-1],
}


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def close(one, other, tolerance=3):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "P", "1", "YCbCr", "LA", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (9, 7), (0, 0, 0)).convert(mode)
    name = "image.jpg" if mode in ("CMYK", "YCbCr") else "image.png"
    square = read_square(saved(tmp_path, image, name), 5)
    assert square.shape == (5, 5, 3)
    assert square.dtype == np.uint8
    assert square.max() <= 3


@pytest.mark.parametrize("name", ["i.jpg", "i.png", "i.webp", "i.gif", "i.bmp", "i.tiff", "i.ppm"])
def test_every_format_gives_the_same_pixels(tmp_path, name):
    square = read_square(saved(tmp_path, Image.fromarray(RAMP).convert("RGB"), name), 40)
    assert close(square, RAMP[..., None], 12)


@pytest.mark.parametrize("orientation", TURNED)
def test_the_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(TURNED[orientation]), "image.jpg", exif=exif, quality=100)
    assert close(read_square(path, 40), RAMP[..., None])


def test_a_box_is_in_pixels_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = saved(tmp_path, Image.fromarray(RAMP), exif=exif)
    assert close(read_square(path, 12, Box(10, 20, 8, 8)), RAMP[18:30, 8:20][::-1, ::-1, None])


def test_an_unknown_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 99
    assert close(read_square(saved(tmp_path, Image.fromarray(RAMP), exif=exif), 40), RAMP[..., None])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_composited_onto_white(tmp_path, mode):
    options = {}
    if mode == "RGBA":
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    elif mode == "LA":
        image = Image.new("LA", (8, 8), (0, 0))
    elif mode == "P":
        image, options = Image.new("P", (8, 8), 0), {"transparency": 0}
        image.putpalette([10, 20, 30] * 256)
    else:
        image, options = Image.new("RGB", (8, 8), (9, 8, 7)), {"transparency": (9, 8, 7)}
    assert read_square(saved(tmp_path, image, **options), 4).min() == 255


def test_half_transparency_becomes_half_white(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 255, 128)))
    assert close(read_square(path, 4), [127, 127, 255], 1)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (256, 1))
    for name in ("gray.png", "gray.tiff"):
        assert close(read_square(saved(tmp_path, Image.fromarray(ramp), name), 256), np.arange(256)[None, :, None], 1)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    for pixels, message in (
        (np.full((8, 8), 0.5, np.float32), "its pixels are floating-point numbers"),
        (np.full((8, 8), 70000, np.int32), "its pixels range from 70000 to 70000; expected 8 or 16 bits"),
        (np.full((8, 8), -1, np.int32), "its pixels range from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=f"image.tiff cannot be read as an image .{message}"):
            read_square(saved(tmp_path, Image.fromarray(pixels), "image.tiff"), 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (20_000, 3)])
def test_extreme_sizes(tmp_path, size):
    assert read_square(saved(tmp_path, Image.new("RGB", size, "red")), 8).shape == (8, 8, 3)


def test_large_jpeg_files_are_downscaled_by_the_decoder(tmp_path, monkeypatch):
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    path = saved(tmp_path, Image.fromarray(np.tile(ramp, (400, 1))), "image.jpg", quality=95)
    whole = read_square(path, 16)
    decoded = []
    to_rgb = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000)
    assert close(read_square(path, 16), whole)
    assert close(read_square(path, 300), np.linspace(64, 191, 300)[None, :, None])
    assert decoded == [(100, 50), (800, 400)]
    boxed = read_square(path, 8, Box(40, 40, 160, 160))
    monkeypatch.setattr(images, "LARGE_PIXELS", 10**9)
    assert close(boxed, read_square(path, 8, Box(40, 40, 160, 160)))


def test_a_wide_jpeg_file_takes_little_memory(tmp_path):
    path = saved(tmp_path, Image.new("L", (20_000, 4_000), 90), "wide.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(read_square(path, 16), 90)


def test_decompression_bombs_are_refused(tmp_path):
    """A file of a few bytes may declare gigabytes of pixels."""

    def png(width, height):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b""))
        chunks = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    (tmp_path / "large.png").write_bytes(png(12_000, 12_000))
    with pytest.raises(ValueError, match=r"large.png cannot be read as an image .it has 12000 x 12000 pixels; at most"):
        read_square(tmp_path / "large.png", 8)
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    with pytest.raises(
        ValueError, match=r"bomb.png cannot be read as an image .Image size .3600000000 pixels. exceeds"
    ):
        read_square(tmp_path / "bomb.png", 8)


def test_a_memory_error_is_not_reported_as_damage(tmp_path, monkeypatch):
    def full(image):
        raise MemoryError

    path = saved(tmp_path, Image.new("RGB", (9, 7)))
    monkeypatch.setattr(images, "_to_rgb", full)
    with pytest.raises(MemoryError):
        read_square(path, 8)


def test_files_that_are_no_images_are_named(tmp_path):
    def refused(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image") as caught:
            read_square(path, 8)
        assert caught.value.skipped.file == str(path)
        return str(caught.value)

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)).save(buffer, "JPEG")
    assert "(it is empty)" in refused("empty.jpg", b"")
    assert "(it is none of the formats JPEG, PNG" in refused("text.jpg", b"not an image")
    assert "truncated" in refused("cut.jpg", buffer.getvalue()[:1000])
    # Pillow would start Ghostscript for EPS.
    assert "(it is none of the formats" in refused("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"nowhere.png cannot be read as an image .*No such file"):
        read_square(tmp_path / "nowhere.png", 8)


def test_the_square_around_a_box():
    """Half its side is 0.75 of the longer side of the box, in whole pixels; it is clipped to the image."""
    assert square_around(Box(60, 27, 325, 304), 500, 500) == (0, 0, 465, 422)
    assert square_around(Box(100, 100, 40, 20), 500, 400) == (90, 80, 150, 140)
    assert square_around(Box(470, 10, 20, 20), 500, 400) == (465, 5, 495, 35)
    assert square_around(Box(490, 390, 10, 10), 500, 400) == (488, 388, 500, 400)
    assert square_around(Box(3, 3, 0.5, 0.5), 500, 400) == (2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"its bounding box \(900, 3, 5, 5\) lies outside its 500 x 400 pixels"):
        square_around(Box(900, 3, 5, 5), 500, 400)


def test_the_image_is_cropped_around_the_box(tmp_path):
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[15:55, 35:75] = 255
    path = saved(tmp_path, Image.fromarray(pixels))
    assert read_square(path, 10, Box(45, 25, 20, 20)).min() == 255
    assert read_square(path, 10, Box(5, 25, 20, 20)).max() == 0
    # Clipping at the border leaves a rectangle, whose center square is kept: columns 0 to 20 of rows 5 to 25.
    ramp = np.tile(np.arange(90, dtype=np.uint8)[None, :, None], (60, 1, 3))
    square = read_square(saved(tmp_path, Image.fromarray(ramp)), 20, Box(-5, 5, 20, 20))
    assert close(square[:, :, 0], np.arange(20)[None], 1)


def test_the_size_is_that_of_the_stored_image(tmp_path):
    assert image_size(saved(tmp_path, Image.new("RGB", (31, 17)))) == (31, 17)


def chunk(name, content, checksum=None):
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def encoded(kind, pixels=RAMP, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def png_with(*chunks, before_pixels=True, pixels=RAMP):
    """A PNG with further chunks behind its header, or behind its pixels."""
    content = encoded("PNG", pixels)
    at = 33 if before_pixels else len(content) - 12
    return content[:at] + b"".join(chunks) + content[at:]


def jpeg_with(marker, content):
    image = encoded("JPEG", quality=100)
    return image[:2] + struct.pack(">HH", 0xFF00 + marker, len(content) + 2) + content + image[2:]


def tiff_header(orientation=3, count=1):
    """EXIF data with an orientation; with a count of several values, their offset lies outside."""
    return struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, count, orientation, 0)


def divided(content, at):
    return content[:at], content[at:]


LONG_TEXT = bytes(2**20 + 1)
SHORT_PROFILE = b"\xff\xe2\0\x0eICC_PROFILE\0"
BROKEN_EXIF = {
    "garbage": b"garbage",
    "zeros": bytes(100),
    "cut in its header": b"II*",
    "an offset outside": b"II*\0\xff\xff\xff\x7f",
    "cut in its only entry": tiff_header()[:15],
    "values outside": tiff_header(2**30, 2**20),
}
BROKEN_METADATA = {
    **{f"{name}, PNG": png_with(chunk(b"eXIf", exif)) for name, exif in BROKEN_EXIF.items()},
    **{
        f"{name}, PNG, behind the pixels": png_with(chunk(b"eXIf", e), before_pixels=False)
        for name, e in BROKEN_EXIF.items()
    },
    **{f"{name}, WebP": encoded("WEBP", lossless=True, exif=exif) for name, exif in BROKEN_EXIF.items()},
    **{f"{name}, JPEG": jpeg_with(0xE1, b"Exif\0\0" + exif) for name, exif in BROKEN_EXIF.items()},
    "an EXIF profile as text": png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\n012")),
    "a long compressed text": png_with(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG_TEXT))),
    "a long international text": png_with(chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG_TEXT))),
    "a long text behind": png_with(chunk(b"zTXt", b"x\0\0" + zlib.compress(LONG_TEXT)), before_pixels=False),
    "a text of unknown compression": png_with(chunk(b"zTXt", b"workflow\0\7garbage")),
    "a color profile of no name": png_with(chunk(b"iCCP", b"profile")),
    "a color profile of unknown compression": png_with(chunk(b"iCCP", b"profile\0\7garbage")),
    "a long color profile": png_with(chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG_TEXT))),
    "a wrong checksum of a text": png_with(chunk(b"tEXt", b"a\0b", checksum=1)),
    "a wrong checksum of the EXIF data": png_with(chunk(b"eXIf", tiff_header(), checksum=1)),
    "a short gamma": png_with(chunk(b"gAMA", b"")),
    "a short density": png_with(chunk(b"pHYs", b"\0")),
    "short animation control": png_with(chunk(b"acTL", b"\0")),
    "animation out of order": png_with(
        chunk(b"acTL", struct.pack(">II", 3, 0)), chunk(b"fcTL", struct.pack(">5I2H2B", 5, 40, 40, 0, 0, 1, 1, 0, 0))
    ),
    "a PNG cut in a trailing text": png_with(chunk(b"tEXt", b"a\0" + bytes(100)), before_pixels=False)[:-60],
    "a short color profile, JPEG": jpeg_with(0xE2, b"ICC_PROFILE\0"),
    "a short JFIF header": jpeg_with(0xE0, b"JFIF"),
    "a WebP cut in its EXIF data": encoded("WEBP", lossless=True, exif=tiff_header() + bytes(99))[:-60],
    "a WebP of a wrong length": encoded("WEBP", lossless=True).replace(b"RIFF", b"RIFF\xff\xff\0\0")[:8]
    + encoded("WEBP", lossless=True)[8:],
}


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_damaged_metadata_costs_no_pixel(tmp_path, name):
    """The image is read, not rotated, and the damage is reported."""
    path, ignored = tmp_path / "image", []
    path.write_bytes(BROKEN_METADATA[name])
    assert close(read_square(path, 40, ignore=ignored.append), RAMP[..., None])
    assert len(ignored) == 1
    assert ignored[0].startswith("has damaged ")
    assert image_size(path) == (40, 40)


@pytest.mark.parametrize(
    "content",
    [
        png_with(chunk(b"eXIf", tiff_header()), chunk(b"zTXt", b"x\0\0" + zlib.compress(LONG_TEXT)), pixels=TURNED[3]),
        png_with(chunk(b"eXIf", tiff_header()), chunk(b"gAMA", b""), pixels=TURNED[3]),
        encoded("WEBP", TURNED[3], lossless=True, exif=tiff_header(), xmp=bytes(99))[:-60],
        SHORT_PROFILE.join(divided(encoded("JPEG", TURNED[3], quality=100, exif=b"Exif\0\0" + tiff_header()), 2)),
    ],
    ids=["long text", "short gamma", "WebP cut in its XMP data", "JPEG with a short color profile"],
)
def test_an_intact_orientation_survives_other_damage(tmp_path, content):
    path, ignored = tmp_path / "image", []
    path.write_bytes(content)
    assert close(read_square(path, 40, ignore=ignored.append), RAMP[..., None])
    assert [reason[:20] for reason in ignored] == ["has damaged metadata"]


def test_transparency_and_colors_survive_damaged_metadata(tmp_path):
    """A transparent color of a PNG, and the inverted CMYK of a JPEG with Adobe's marker."""
    buffer, text = io.BytesIO(), chunk(b"zTXt", b"x\0\0" + zlib.compress(LONG_TEXT))
    Image.new("RGB", (8, 8), (9, 8, 7)).save(buffer, "PNG", transparency=(9, 8, 7))
    (tmp_path / "image.png").write_bytes(buffer.getvalue()[:33] + text + buffer.getvalue()[33:])
    ignored = []
    assert read_square(tmp_path / "image.png", 4, ignore=ignored.append).min() == 255
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(buffer, "JPEG", quality=100)
    (tmp_path / "image.jpg").write_bytes(SHORT_PROFILE.join(divided(buffer.getvalue(), 2)))
    assert close(read_square(tmp_path / "image.jpg", 4, ignore=ignored.append), [0, 255, 255])
    assert [reason[:20] for reason in ignored] == ["has damaged metadata"] * 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF", "GIF"])
@pytest.mark.parametrize("orientation", [0, 9, 99, 65535])
def test_an_odd_orientation_is_no_damage(tmp_path, kind, orientation):
    options = {"exif": tiff_header(orientation)} if kind in ("PNG", "WEBP", "JPEG") else {}
    options |= {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {}
    path, ignored = tmp_path / "image", []
    path.write_bytes(encoded(kind, **options))
    assert close(read_square(path, 40, ignore=ignored.append), RAMP[..., None], 12)
    assert ignored == []


def test_damage_to_other_exif_entries_does_not_matter(tmp_path):
    """A camera's name whose text lies outside, beside an intact orientation."""
    entries = struct.pack("<HHIIHHIII", 0x0110, 2, 99, 2**20, 0x0112, 3, 1, 3, 0)
    path, ignored = tmp_path / "image", []
    path.write_bytes(encoded("PNG", TURNED[3], exif=struct.pack("<2sHIH", b"II", 42, 8, 2) + entries))
    assert close(read_square(path, 40, ignore=ignored.append), RAMP[..., None])
    assert ignored == []


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, kind):
    frames = [Image.fromarray(pixels).convert("RGB") for pixels in (RAMP, RAMP.T, RAMP[::-1])]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "image", kind, save_all=True, append_images=frames[1:], **options)
    assert close(read_square(tmp_path / "image", 40), RAMP[..., None], 12)
    if kind != "TIFF":  # whose directory is at its end
        content = (tmp_path / "image").read_bytes()
        (tmp_path / "image").write_bytes(content[:-200])
        assert close(read_square(tmp_path / "image", 40), RAMP[..., None], 12)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF"])
def test_a_truncated_image_is_refused_unless_all_pixels_are_there(tmp_path, kind):
    """Cut at every byte: pixels are complete or the file is refused, with and without metadata behind them."""
    noise = np.random.default_rng(0).integers(0, 256, (17, 13, 3), dtype=np.uint8)
    options = {"lossless": True, "exif": tiff_header(orientation=1), "xmp": bytes(23)} if kind == "WEBP" else {}
    content, path = encoded(kind, noise, **options), tmp_path / "image"
    if kind == "PNG":
        content = content[:-12] + chunk(b"tEXt", b"a\0" + bytes(23)) + content[-12:]
    path.write_bytes(content)
    whole, accepted = read_square(path, 13), []
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            square = read_square(path, 13)
        except ValueError:
            continue
        assert np.array_equal(square, whole)
        accepted.append(length)
    # Once the pixels are there, what follows does not matter.
    assert accepted == list(range(len(content) - len(accepted), len(content)))
    assert len(accepted) > {"PNG": 46, "WEBP": 60, "JPEG": -1, "GIF": 0}[kind]


def test_damaged_pixels_are_not_taken_for_damaged_metadata(tmp_path):
    """A byte too many or too few among the pixels of a WebP moves the border of the next chunk."""
    noise = np.random.default_rng(0).integers(0, 256, (17, 13, 3), dtype=np.uint8)
    content = encoded("WEBP", noise, lossless=True, exif=tiff_header())
    for changed in (content[:120] + b"\7" + content[120:], content[:120] + content[121:]):
        (tmp_path / "image.webp").write_bytes(changed)
        with pytest.raises(ValueError, match=r"image.webp cannot be read as an image .could not create decoder object"):
            read_square(tmp_path / "image.webp", 8)


# Places in the square


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("box", [None, Box(12, 4, 10, 16)])
def test_places_of_pixels_follow_crop_and_orientation(tmp_path, orientation, box):
    """A single white pixel, found again in the result."""
    pixels = np.zeros((40, 60), np.uint8)
    row, column = 15, 21
    pixels[row, column] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(pixels), "image.png", exif=exif)
    side = 40 if box is None else 23  # clipped at the upper border
    square, view = read_view(path, side, box)
    assert np.array_equal(square, read_square(path, side, box))
    (found,) = np.argwhere(square[..., 0] == square.max())
    x, y = view.place(column + 0.5, row + 0.5)
    assert (y * side, x * side) == pytest.approx(found + 0.5, abs=0.51)
