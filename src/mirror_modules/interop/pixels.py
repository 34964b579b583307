"""Images in [-1, 1] as the input of other networks: resized, cropped and normalized, with gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules._checks import at_least_float32, check_choice, check_images, shape_of
from mirror_modules._typing import TypedCall
from mirror_modules.stem.image_encoder import IMAGENET_MEAN, IMAGENET_STD

Interpolation = Literal["nearest", "bilinear", "bicubic"]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
# By the number of Pillow's filter. Lanczos, which torch lacks, is close to bicubic.
_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic"}
# Largest mean difference from the pixels of a processor, in standard deviations: rounding to bytes causes 0.01.
TOLERANCE = 0.05


class Preprocess(TypedCall, nn.Module):
    """Resize, crop and normalize images in [-1, 1], differentiably.

        pixels = (crop(resize((x + 1) / 2)) - mean) / std

    Resizing is antialiased and, as with bytes, its result stays in [0, 1].

    Args:
        size: Height and width to resize to; one number for the shorter side; None does not resize.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        interpolation: "nearest", "bilinear" or "bicubic".
        crop: Height and width of the center that is cropped after resizing; None does not crop.

    Raises:
        ValueError: `interpolation` is unknown, a size is not positive, or there are not three means and three positive
            deviations.

    Examples:
        >>> import torch
        >>> from mirror_modules.interop import Preprocess
        >>> preprocess = Preprocess((224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> preprocess(torch.rand(2, 3, 64, 96) * 2 - 1).shape
        torch.Size([2, 3, 224, 224])
    """

    def __init__(
        self,
        size: tuple[int, int] | int | None,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        interpolation: Interpolation = "bicubic",
        crop: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_choice("Preprocess", "interpolation", interpolation, INTERPOLATIONS)
        _check_size("size", size, may_be_one=True)
        _check_size("crop", crop)
        self.size = tuple(size) if isinstance(size, list) else size
        self.crop = crop
        self.interpolation: Interpolation = interpolation
        # Not buffers, which half precision would round.
        self.mean, self.std = _channels("mean", mean), _channels("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"Preprocess: std must be above 0, but it is {self.std}.")

    @classmethod
    def imagenet(cls, size: tuple[int, int] | int | None = (224, 224)) -> Self:
        """The statistics of ImageNet, on which most classification networks were trained."""
        return cls(size, IMAGENET_MEAN, IMAGENET_STD, interpolation="bilinear")

    @classmethod
    def of_timm(cls, config: Mapping[str, Any]) -> Self:
        """The settings of a timm model, `model.pretrained_cfg`.

        Raises:
            ValueError: It lacks `input_size`, `mean` or `std`, or they are invalid.
        """
        missing = [name for name in ("input_size", "mean", "std") if name not in config]
        size = config.get("input_size")
        if missing or not isinstance(size, Sequence) or len(size) != 3:
            found = f"it lacks {', '.join(missing)}" if missing else f"its input_size is {size!r}"
            raise ValueError(
                "Preprocess: a data configuration of timm needs input_size, (3, height, width), mean and std, but "
                f"{found}; timm.data.resolve_data_config makes one."
            )
        height, width = size[1:]
        interpolation = config.get("interpolation", "bicubic")
        known: Interpolation = interpolation if interpolation in INTERPOLATIONS else "bicubic"
        return cls((height, width), config["mean"], config["std"], interpolation=known)

    @classmethod
    def of_processor(cls, image_processor: Any) -> Self:
        """The settings of a Hugging Face image processor, whose pixels are compared with ours on one image.

        Raises:
            ValueError: The processor does more than resize, crop, rescale and normalize.
        """
        setting = _Settings(image_processor)
        size = setting.size() if setting.is_on("do_resize") else None
        crop = setting.pair("crop_size") if setting.is_on("do_center_crop") else None
        normalizes = setting.is_on("do_normalize")
        mean = setting.value("image_mean") if normalizes else (0.0, 0.0, 0.0)
        std = setting.value("image_std") if normalizes else (1.0, 1.0, 1.0)
        if not setting.is_on("do_rescale"):
            mean, std = (tuple(value / 255 for value in values) for values in (mean, std))
        number = setting.value("resample")
        made = cls(
            size, mean, std, interpolation=_FILTERS.get(int(2 if number is None else number), "bicubic"), crop=crop
        )
        made._check_against(image_processor)
        return made

    def forward(self, images: Tensor) -> Tensor:
        """Convert images in [-1, 1], (B, 3, H, W), to pixels of the network, (B, 3, H', W'), at least float32.

        Raises:
            ValueError: The images are not floats (B, 3, H, W).
        """
        check_images("Preprocess", images)
        pixels = (at_least_float32(images) + 1) / 2
        if self.size is not None and (target := self._target(pixels)) != tuple(pixels.shape[2:]):
            options = {} if self.interpolation == "nearest" else {"antialias": True, "align_corners": False}
            pixels = F.interpolate(pixels, size=target, mode=self.interpolation, **options)
            # Bicubic interpolation overshoots.
            pixels = pixels.clamp(0, 1)
        if self.crop is not None:
            pixels = _center(pixels, *self.crop)
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def extra_repr(self) -> str:
        """Settings that the repr shows."""
        return f"size={self.size}, crop={self.crop}, interpolation={self.interpolation!r}"

    def _target(self, pixels: Tensor) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        height, width = pixels.shape[2:]
        short = int(self.size or 0)
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)

    def _check_against(self, image_processor: Any) -> None:
        """Compare with the processor on an image with gradients in both directions and another ratio of sides."""
        rows, columns = np.meshgrid(np.linspace(0, 1, 96), np.linspace(0, 1, 128), indexing="ij")
        image = np.stack([rows, columns, 0.5 + 0.5 * np.sin(9 * rows + 5 * columns)], axis=2)
        content = (255 * image).round().astype(np.uint8)
        expected = image_processor(images=[content], return_tensors="pt")["pixel_values"]
        ours = self(torch.from_numpy(content).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1)
        name = type(image_processor).__name__
        if not isinstance(expected, Tensor) or expected.shape != ours.shape:
            kind = shape_of(expected) if isinstance(expected, Tensor) else f"a {type(expected).__name__}"
            raise ValueError(
                f"{name} returns pixel_values {kind} for one image, where resizing, cropping and normalizing give "
                f"{shape_of(ours)}; processors that pad, or cut images into tiles or patches, are not supported."
            )
        difference = float((expected.float() - ours).abs().mean())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name} does more than resize, crop, rescale and normalize: its pixels differ by {difference:.2f} "
                "standard deviations from ours; such processors are not supported."
            )


class _Settings:
    """The attributes of an image processor, whose sizes are dictionaries or objects with the same fields."""

    def __init__(self, image_processor: Any) -> None:
        self.processor = image_processor

    def value(self, name: str) -> Any:
        return getattr(self.processor, name, None)

    def is_on(self, name: str) -> bool:
        return bool(self.value(name))

    def pair(self, name: str) -> tuple[int, int] | None:
        fields = self._fields(name)
        return (int(fields["height"]), int(fields["width"])) if fields.get("height") else None

    def size(self) -> tuple[int, int] | int | None:
        """Height and width, or the shorter side."""
        shortest = self._fields("size").get("shortest_edge")
        return self.pair("size") or (None if shortest is None else int(shortest))

    def _fields(self, name: str) -> Mapping[str, Any]:
        size = self.value(name)
        if size is None or isinstance(size, Mapping):
            return size or {}
        if isinstance(size, int):
            return {"height": size, "width": size}
        return {field: getattr(size, field, None) for field in ("height", "width", "shortest_edge")}


def _check_size(name: str, value: object, *, may_be_one: bool = False) -> None:
    is_pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_side, value))
    if not (value is None or is_pair or (may_be_one and _is_side(value))):
        one = ", one number for the shorter side" if may_be_one else ""
        raise ValueError(
            f"Preprocess: {name} must be (height, width){one} or None, each at least 1, but it is {value!r}."
        )


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _channels(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"Preprocess: {name} must hold three numbers, one per color channel, but it is {values!r}.")
    return numbers


def _center(pixels: Tensor, height: int, width: int) -> Tensor:
    """The center of images, padded with zeros where it is larger than they are."""
    vertical, horizontal = height - pixels.shape[2], width - pixels.shape[3]
    if max(vertical, horizontal) > 0:
        top, left = max(vertical, 0) // 2, max(horizontal, 0) // 2
        pixels = F.pad(pixels, (left, max(horizontal, 0) - left, top, max(vertical, 0) - top))
    top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]
