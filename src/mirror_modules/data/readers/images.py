"""Decode image files of common formats into square RGB arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.metadata import without_metadata

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

# An explicit list: for some other formats Pillow starts external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# JPEG files with more pixels are downscaled by the decoder. Smaller files are not: their pixels must not depend on how
# a JPEG library downscales.
LARGE_PIXELS = 2**24
MAX_PIXELS = 2**26
ORIENTATION = 0x0112
_T = TypeVar("_T")


def _discard(reason: str) -> None:
    pass


class Box(NamedTuple):
    """A bounding box in pixels."""

    left: float
    top: float
    width: float
    height: float


class View(NamedTuple):
    """The square of a stored image that is kept, and the EXIF orientation by which it is turned afterwards."""

    left: float
    top: float
    side: float
    """Width and height, in pixels as stored."""
    orientation: int
    """1 to 8, as in EXIF; 1 is not turned."""

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The place of a stored pixel in the result, as shares of its width and height."""
        x, y = (x - self.left) / self.side, (y - self.top) / self.side
        if self.orientation in (5, 6, 7, 8):
            x, y = y, x
        if self.orientation in (2, 3, 6, 7):
            x = 1 - x
        if self.orientation in (3, 4, 7, 8):
            y = 1 - y
        return x, y


def read_square(
    path: Path, resolution: int, box: Box | None = None, *, ignore: Callable[[str], object] = _discard
) -> NDArray[np.uint8]:
    """Read an image, resize its shorter side to `resolution` (antialiased) and keep the center square, (H, W, 3).

    The EXIF orientation is applied, transparent pixels are composited onto white, and 16-bit gray is scaled to bytes.
    Damaged metadata is ignored; without a readable orientation, the image is not rotated.

    Args:
        path: A JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file.
        resolution: Height and width of the result.
        box: Bounding box to crop around, with a margin (see `square_around`), in pixels as stored; None uses the whole
            image.
        ignore: Called with a description of ignored damage.

    Returns:
        RGB bytes, (resolution, resolution, 3).

    Raises:
        ValueError: The file cannot be read as an image; the message names the file and the reason.
        ImportError: Pillow is missing.
        MemoryError: The decoded image does not fit in memory.
    """
    return read_view(path, resolution, box, ignore=ignore)[0]


def read_view(
    path: Path, resolution: int, box: Box | None = None, *, ignore: Callable[[str], object] = _discard
) -> tuple[NDArray[np.uint8], View]:
    """Read an image as `read_square` does; also return the part of it that is kept."""
    return _read("read_square", path, path, lambda: path.stat().st_size, resolution, box, ignore)


def decode_square(
    content: bytes, name: str, resolution: int, *, ignore: Callable[[str], object] = _discard
) -> NDArray[np.uint8]:
    """Decode the bytes of an image file, as `read_square` does.

    Args:
        content: The bytes.
        name: Name of the image in error messages.
        resolution: Height and width of the result.
        ignore: Called with a description of ignored damage.

    Returns:
        RGB bytes, (resolution, resolution, 3).

    Raises:
        ValueError: The bytes cannot be read as an image; the message gives the reason.
        ImportError: Pillow is missing.
    """
    return _read("decode_square", name, BytesIO(content), lambda: len(content), resolution, None, ignore)[0]


def square(image: PillowImage, resolution: int) -> NDArray[np.uint8]:
    """The center square of a Pillow image, as `read_square` reads it from a file.

    Raises:
        ValueError: The image has a mode or a size that cannot be converted.
    """
    return _to_square(image, resolution, None, _discard)[0]


def image_size(file: Path | BytesIO) -> tuple[int, int]:
    """Width and height as stored, of a file that `read_square` can read."""
    return _open(file, lambda image: image.size, _discard)


def square_around(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The square around a bounding box, as in the published preparation of CUB, clipped to the image.

        half_side = int(0.75 * max(box.width, box.height)), centered on the box

    Args:
        box: The bounding box, in pixels.
        width: Width of the image.
        height: Height of the image.

    Returns:
        First column, first row, and the column and row after the last: Pillow's (left, upper, right, lower).

    Raises:
        ValueError: The square lies outside the image.
    """
    half = max(int(max(box.width, box.height) * 0.75), 1)
    x, y = int(box.left + box.width / 2), int(box.top + box.height / 2)
    left, top, right, bottom = max(x - half, 0), max(y - half, 0), min(x + half, width), min(y + half, height)
    if left >= right or top >= bottom:
        raise ValueError(f"its bounding box {tuple(box)} lies outside its {width} x {height} pixels")
    return left, top, right, bottom


def shrink(pixels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """Resize square bytes (H, H, 3), antialiased, with the filter of `read_square`."""
    from PIL import Image

    return np.array(Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BICUBIC))


def import_pillow() -> None:
    """Raise an ImportError that names the install command if Pillow is missing."""
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
    box: Box | None,
    ignore: Callable[[str], object],
) -> tuple[NDArray[np.uint8], View]:
    import_pillow()
    from PIL import UnidentifiedImageError

    try:
        return _open(file, lambda image: _to_square(image, resolution, box, ignore), ignore)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        reason = f"it is none of the formats {', '.join(FORMATS)}" if size() else "it is empty"
        raise DamagedSample(owner, name, f"cannot be read as an image ({reason})") from error
    # Decoders raise errors of every type on damaged bytes.
    except Exception as error:
        raise DamagedSample(owner, name, f"cannot be read as an image ({_reason_of(error)})") from error


def _open(file: Path | BytesIO, use: Callable[[PillowImage], _T], ignore: Callable[[str], object]) -> _T:
    """Apply a function to an opened image; if that fails, try again without the metadata of the file."""
    from PIL import Image

    with warnings.catch_warnings():
        # Pillow warns about large images and odd metadata, both of which are handled here.
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=FORMATS) as image:
                return use(image)
        except MemoryError:
            raise
        except Exception as error:
            stripped = without_metadata(file.getvalue() if isinstance(file, BytesIO) else file.read_bytes())
            if stripped is None:
                raise
            try:
                with Image.open(BytesIO(stripped), formats=FORMATS) as image:
                    result = use(image)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001
                raise error from None
            ignore(f"has damaged metadata, without which it is read ({_reason_of(error)})")
            return result


def _reason_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_square(
    image: PillowImage, resolution: int, box: Box | None, ignore: Callable[[str], object]
) -> tuple[NDArray[np.uint8], View]:
    from PIL import Image

    width, height = image.size
    left, top, right, bottom = (0, 0, width, height) if box is None else square_around(box, width, height)
    side = min(right - left, bottom - top)
    x, y = left + (right - left - side) / 2, top + (bottom - top - side) / 2
    if width * height > LARGE_PIXELS:
        # At least twice the target size remains for the antialiased resize.
        factor = max(side / (2 * resolution), 1)
        image.draft(None, (int(width / factor), int(height / factor)))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels; at most {MAX_PIXELS} are decoded, downscale it")
    scale_x, scale_y = image.width / width, image.height / height
    crop = (
        x * scale_x,
        y * scale_y,
        min((x + side) * scale_x, image.width),
        min((y + side) * scale_y, image.height),
    )
    square = _to_rgb(image).resize((resolution, resolution), Image.Resampling.BICUBIC, box=crop)
    if square.mode == "RGBA":
        white = Image.new("RGBA", square.size, "white")
        white.alpha_composite(square)
        square = white.convert("RGB")
    # Rotating the center square gives the center square of the rotated image.
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    orientation = _orientation(image, ignore)
    turn = turns.get(orientation)
    view = View(x, y, side, 1 if turn is None else orientation)
    return np.array(square if turn is None else square.transpose(turn)), view


def _orientation(image: PillowImage, ignore: Callable[[str], object]) -> Any:
    """The EXIF orientation; None if there is none, or if it cannot be read, which is reported to `ignore`."""
    from PIL import Image

    orientation = None
    try:
        with warnings.catch_warnings(record=True) as problems:
            warnings.simplefilter("always")
            # Pillow hides the errors of a JPEG file's EXIF data: it has read them on opening the file.
            Image.Exif().load(image.info.get("exif") or b"")
            orientation = image.getexif().get(ORIENTATION)
        reason = str(problems[0].message) if problems else None
    except Exception as error:  # noqa: BLE001
        reason = _reason_of(error)
    if reason is not None and orientation is None:
        ignore(f"has damaged EXIF data, without which it is read ({reason})")
    return orientation


def _to_rgb(image: PillowImage) -> PillowImage:
    """Convert to 8-bit RGB, or to RGBA if the image has transparency."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected integers")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise ValueError(f"its pixels range from {low} to {high}; expected 8 or 16 bits")
        # 65535 / 257 = 255; Pillow's own conversion clips everything above 255.
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)
