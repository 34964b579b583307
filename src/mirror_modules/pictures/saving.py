"""Images to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules._files import write_whole
from mirror_modules.models.pixels import from_model, to_model

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's name of each format, and its options. Others, such as GIF, would reduce the colors.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}


def save_images(images: Tensor | NDArray[Any] | Image | Sequence[Image], path: str | Path) -> list[Path]:
    """Write images as `MirrorGAN.generate` returns them to files, one per image.

    Args:
        images: A tensor (N, 3, H, W) in [-1, 1], an array (N, H, W, 3) of floats in [0, 1] or of bytes, or Pillow
            images, one or several.
        path: File to write; its suffix selects the format: .png, .jpg, .webp, .bmp or .tif. Several images are numbered
            before the suffix: flower-000.png, flower-001.png. A missing folder is created.

    Returns:
        The paths of the files.

    Raises:
        ValueError: `path` has another suffix, or `images` are none of the above.
        OSError: A file cannot be written.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from mirror_modules.pictures import save_images
        >>> folder = Path(tempfile.mkdtemp())
        >>> [path.name for path in save_images(torch.zeros(2, 3, 8, 8), folder / "gray.png")]
        ['gray-000.png', 'gray-001.png']
        >>> save_images(torch.zeros(1, 3, 8, 8), folder / "gray")
        Traceback (most recent call last):
        ValueError: save_images: 'gray' must end in .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff.
    """
    check_image_name("save_images", path)
    path = Path(path)
    listed = _as_pillow(images)
    paths = [path] if len(listed) == 1 else numbered(path, len(listed))
    path.parent.mkdir(parents=True, exist_ok=True)
    for image, file in zip(listed, paths):
        write_image(image, file)
    return paths


def write_image(image: Image, path: Path) -> None:
    """Write a Pillow image in the format of the suffix, atomically: a failed write keeps an existing file."""
    name, options = _FORMATS[path.suffix.lower()]
    write_whole(path, lambda temporary: image.save(temporary, format=name, **options))


def numbered(path: Path, count: int, first: int = 0) -> list[Path]:
    """File names with a number before the suffix."""
    return [path.with_name(f"{path.stem}-{first + i:03}{path.suffix}") for i in range(count)]


def check_image_name(owner: str, path: str | Path) -> None:
    """Require a suffix of a format that `save_images` writes."""
    if Path(path).suffix.lower() not in _FORMATS:
        *others, last = _FORMATS
        raise ValueError(f"{owner}: {Path(path).name!r} must end in {', '.join(others)} or {last}.")


def _as_pillow(images: Any) -> list[Image]:
    from PIL import Image

    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Sequence) and all(isinstance(image, Image.Image) for image in images):
        return list(images)
    if isinstance(images, Tensor | np.ndarray):
        return from_model(to_model("save_images", images, 1), "pil")  # type: ignore[return-value]
    raise ValueError(
        "save_images: images must be a tensor, an array, a Pillow image or a list of Pillow images, but they are of "
        f"the type {type(images).__name__}."
    )
