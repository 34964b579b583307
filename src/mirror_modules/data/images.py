"""Image files of all kinds become squares of red, green and blue bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules.data.damage import DamagedSample

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

# Named, because Pillow knows formats that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Larger JPEG files are shrunk while they are decoded. Smaller ones are not: what becomes of their pixels shall not
# depend on how a JPEG library shrinks.
LARGE_PIXELS = 2**24
MOST_PIXELS = 2**26
ORIENTATION = 0x0112


class Box(NamedTuple):
    """Where something is in an image, in pixels."""

    left: float
    top: float
    width: float
    height: float


def read_square(path: Path, resolution: int, around: Box | None = None) -> NDArray[np.uint8]:
    """Read an image, resize its shorter side to `resolution` (antialiased) and keep the middle, (H, W, 3).

    It is turned as its EXIF data say, transparency is laid on white, and 16-bit gray is scaled to bytes.

    Args:
        path: A JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file.
        resolution: Height and width of the result.
        around: What to cut out before, with some margin (see `surroundings`), in pixels as they are stored; None takes
            the whole image.

    Raises:
        ValueError: The file cannot be read as an image; the message names it and says why.
        ImportError: Pillow is missing.
        MemoryError: There is not enough memory for it.
    """
    return _read("read_square", path, path, lambda: path.stat().st_size, resolution, around)


def decode_square(content: bytes, name: str, resolution: int) -> NDArray[np.uint8]:
    """The same as `read_square`, of the bytes of an image file.

    Args:
        content: The bytes.
        name: What to call them in a message.
        resolution: Height and width of the result.

    Raises:
        ValueError: The bytes cannot be read as an image; the message says why.
        ImportError: Pillow is missing.
    """
    return _read("decode_square", name, BytesIO(content), lambda: len(content), resolution, None)


def image_size(file: Path | BytesIO) -> tuple[int, int]:
    """Width and height as they are stored; the file must be one that `read_square` reads."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=FORMATS) as image:
            return image.size


def surroundings(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The square around a bounding box as in the published preparation of birds, cut off at the image's borders.

        half = int(0.75 * max(box.width, box.height)) around the box's middle

    Returns:
        First column, first row, and the column and row after the last.

    Raises:
        ValueError: Nothing of it lies in the image.
    """
    half = max(int(max(box.width, box.height) * 0.75), 1)
    x, y = int(box.left + box.width / 2), int(box.top + box.height / 2)
    left, top, right, bottom = max(x - half, 0), max(y - half, 0), min(x + half, width), min(y + half, height)
    if left >= right or top >= bottom:
        raise ValueError(f"its bounding box {tuple(box)} lies outside its {width} x {height} pixels")
    return left, top, right, bottom


def shrink(pixels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """Resize a square of bytes (H, W, 3), antialiased, as `read_square` does."""
    from PIL import Image

    return np.array(Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BICUBIC))


def import_pillow() -> None:
    """Say how to install Pillow, if it is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("Reading images needs Pillow: pip install 'mirror-modules[train]'.") from error


def _read(
    owner: str,
    name: str | Path,
    file: Path | BytesIO,
    size: Callable[[], int],
    resolution: int,
    around: Box | None,
) -> NDArray[np.uint8]:
    import_pillow()
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Of many pixels and odd metadata, which are dealt with here.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                return _to_square(image, resolution, around)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        why = f"it is not of the formats {', '.join(FORMATS)}" if size() else "it is empty"
        raise DamagedSample(owner, name, f"cannot be read as an image ({why})") from error
    # Decoders meet damaged bytes with errors of every kind.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DamagedSample(owner, name, f"cannot be read as an image ({why})") from error


def _to_square(image: PillowImage, resolution: int, around: Box | None) -> NDArray[np.uint8]:
    from PIL import Image

    width, height = image.size
    left, top, right, bottom = (0, 0, width, height) if around is None else surroundings(around, width, height)
    side = min(right - left, bottom - top)
    x, y = left + (right - left - side) / 2, top + (bottom - top - side) / 2
    if width * height > LARGE_PIXELS:
        # Twice what is wanted is left for the antialiasing.
        shrink = max(side / (2 * resolution), 1)
        image.draft(None, (int(width / shrink), int(height / shrink)))
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels; at most {MOST_PIXELS} are decoded, make it smaller")
    across, down = image.width / width, image.height / height
    box = (x * across, y * down, min((x + side) * across, image.width), min((y + side) * down, image.height))
    square = _as_bytes(image).resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    if square.mode == "RGBA":
        paper = Image.new("RGBA", square.size, "white")
        paper.alpha_composite(square)
        square = paper.convert("RGB")
    # The middle square of a turned image is the turned middle square.
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(image.getexif().get(ORIENTATION, 1))
    return np.array(square if turn is None else square.transpose(turn))


def _as_bytes(image: PillowImage) -> PillowImage:
    """The same image as RGB, or as RGBA where it is transparent."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers; expected whole ones")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise ValueError(f"its pixels are numbers from {low} to {high}; expected 8 or 16 bits")
        # 65535 / 257 = 255; Pillow would cut everything above 255 off.
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)
