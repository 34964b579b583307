"""Captioned images: data sets, transforms, batching."""

from mirror_modules.data.batching import CaptionBatch, InMemoryCaptions, RepeatableBatches
from mirror_modules.data.flowers_synthetic import SyntheticFlowers
from mirror_modules.data.oxford_flowers import OxfordFlowers
from mirror_modules.data.sample import CaptionedImage, CaptionedImages
from mirror_modules.data.synthetic_attributes import ATTRIBUTES, class_id_of
from mirror_modules.data.synthetic_captions import attributes_named, write_captions
from mirror_modules.data.synthetic_colors import measured_colors
from mirror_modules.data.synthetic_drawing import draw_flower
from mirror_modules.data.transforms import image_pyramid, random_crop_flip, to_bytes, to_float

__all__ = [
    "ATTRIBUTES",
    "CaptionBatch",
    "CaptionedImage",
    "CaptionedImages",
    "InMemoryCaptions",
    "OxfordFlowers",
    "RepeatableBatches",
    "SyntheticFlowers",
    "attributes_named",
    "class_id_of",
    "draw_flower",
    "image_pyramid",
    "measured_colors",
    "random_crop_flip",
    "to_bytes",
    "to_float",
    "write_captions",
]
