"""Captioned images: data sets, transforms, batching."""

from .batching import CaptionBatch, InMemoryCaptions
from .flowers_synthetic import SyntheticFlowers
from .oxford_flowers import OxfordFlowers
from .sample import CaptionedImage, CaptionedImages
from .synthetic_attributes import ATTRIBUTES, class_id_of
from .synthetic_captions import attributes_named, write_captions
from .synthetic_drawing import draw_flower
from .transforms import image_pyramid, random_crop_flip, to_bytes, to_float

__all__ = [
    "ATTRIBUTES",
    "CaptionBatch",
    "CaptionedImage",
    "CaptionedImages",
    "InMemoryCaptions",
    "OxfordFlowers",
    "SyntheticFlowers",
    "attributes_named",
    "class_id_of",
    "draw_flower",
    "image_pyramid",
    "random_crop_flip",
    "to_bytes",
    "to_float",
    "write_captions",
]
