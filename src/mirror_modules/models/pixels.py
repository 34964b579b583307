"""Images in the forms that callers use, to and from the model's floats in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirror_modules._checks import shape_of
from mirror_modules.data.readers.images import read_square, square
from mirror_modules.data.transforms import to_bytes, to_float

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUTS = ("pt", "np", "pil")
# Resampling overshoots [-1, 1] a little; beyond this, the values are in another range.
LARGEST_VALUE, LARGEST_OF_ARRAY = 2.0, 1.5


def from_model(images: Tensor, output: str) -> Tensor | NDArray[np.float32] | list[Image]:
    """Convert floats (N, 3, H, W) in [-1, 1] to one of `OUTPUTS`.

    "pt" is the tensor itself, "np" floats in [0, 1], (N, H, W, 3), and "pil" a list of RGB images.
    """
    if output == "pt":
        return images
    if output == "np":
        return ((images.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    from PIL import Image

    return [Image.fromarray(pixels) for pixels in to_bytes(images).cpu().numpy()]


def to_model(owner: str, images: Any, resolution: int) -> Tensor:
    """Convert images of any accepted form to floats (B, 3, H, W) in [-1, 1]; see `TextToImage.describe`.

    Raises:
        ValueError: The images have none of these forms, are out of range, or cannot be read.
    """
    if isinstance(images, Tensor):
        return _from_tensor(owner, images)
    if isinstance(images, np.ndarray):
        return _from_array(owner, images)
    single = isinstance(images, str | Path) or _is_pillow(images)
    if not single and not isinstance(images, Sequence):
        raise ValueError(f"{owner}: images must be {_FORMS}, but they are {_kind(images)}.")
    listed = [images] if single else images
    pixels = np.zeros((0, resolution, resolution, 3), np.uint8)
    if listed:
        pixels = np.stack([_square(owner, image, resolution) for image in listed])
    return to_float(torch.from_numpy(pixels))


_FORMS = "a tensor, an array, a Pillow image, a path, or a list of Pillow images or paths"


def _from_tensor(owner: str, images: Tensor) -> Tensor:
    if images.dtype == torch.uint8 and images.ndim == 4 and 3 in (images.shape[1], images.shape[3]):
        return to_float(images.permute(0, 2, 3, 1) if images.shape[1] == 3 else images)
    if images.ndim != 4 or images.shape[1] != 3:
        hint = "; for one image, pass images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{owner}: images must be (B, 3, H, W), but they are {shape_of(images)}{hint}.")
    if not images.is_floating_point():
        raise ValueError(f"{owner}: images must be floats in [-1, 1] or bytes (uint8), but they are {images.dtype}.")
    return _checked_range(owner, images, LARGEST_VALUE, "[-1, 1]; pass bytes (uint8), or x / 127.5 - 1")


def _from_array(owner: str, images: NDArray[Any]) -> Tensor:
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[3] != 3:
        raise ValueError(f"{owner}: an array must be (B, H, W, 3) or (H, W, 3), but it is {images.shape}.")
    if batch.dtype == np.uint8:
        # A copy: arrays of Pillow images are read-only.
        return to_float(torch.from_numpy(batch.copy()))
    if not np.issubdtype(batch.dtype, np.floating):
        raise ValueError(f"{owner}: an array must hold floats in [0, 1] or bytes (uint8), but it holds {batch.dtype}.")
    pixels = torch.from_numpy(np.ascontiguousarray(batch, dtype=np.float32)).permute(0, 3, 1, 2)
    # Narrower than for tensors, so that values in [-1, 1] are refused.
    expected = "[0, 1]; pass bytes (uint8), x / 255, or (x + 1) / 2 of values in [-1, 1]"
    return _checked_range(owner, 2 * pixels - 1, LARGEST_OF_ARRAY, expected)


def _checked_range(owner: str, images: Tensor, largest: float, expected: str) -> Tensor:
    if images.numel() and not bool((images.abs() <= largest).all()):
        raise ValueError(f"{owner}: images must be finite and in {expected}.")
    return images


def _square(owner: str, image: Any, resolution: int) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return read_square(Path(image), resolution)
    if not _is_pillow(image):
        raise ValueError(f"{owner}: images must be {_FORMS}, but one is {_kind(image)}.")
    return square(image, resolution)


def _is_pillow(image: object) -> bool:
    from PIL import Image

    return isinstance(image, Image.Image)


def _kind(value: object) -> str:
    return f"of the type {type(value).__name__}"
