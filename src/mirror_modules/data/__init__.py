"""Captioned images: data sets, transforms, batching."""

from mirror_modules.data.batching import RepeatableBatches
from mirror_modules.data.flowers.attributes import ATTRIBUTES, class_id_of
from mirror_modules.data.flowers.captions import attributes_named, write_captions
from mirror_modules.data.flowers.colors import measured_box, measured_colors
from mirror_modules.data.flowers.dataset import SyntheticFlowers
from mirror_modules.data.flowers.drawing import draw_flower
from mirror_modules.data.in_memory import CaptionBatch, InMemoryCaptions
from mirror_modules.data.preparing import Prepared, prepare_captions
from mirror_modules.data.readers.caption_folder import CaptionFolder
from mirror_modules.data.readers.coco_captions import CocoCaptions
from mirror_modules.data.readers.cub_birds import CubBirds
from mirror_modules.data.readers.damage import DamagedSample, ErrorReport, Skipped
from mirror_modules.data.readers.oxford_flowers import OxfordFlowers
from mirror_modules.data.readers.prepared import PreparedCaptions
from mirror_modules.data.readers.shard_folder import ShardFolder
from mirror_modules.data.readers.web_captions import WebDatasetCaptions
from mirror_modules.data.sample import CaptionedImage, CaptionedImages
from mirror_modules.data.sources import open_captions
from mirror_modules.data.transforms import image_pyramid, random_crop_flip, to_bytes, to_float

__all__ = [
    "ATTRIBUTES",
    "CaptionBatch",
    "CaptionFolder",
    "CaptionedImage",
    "CaptionedImages",
    "CocoCaptions",
    "CubBirds",
    "DamagedSample",
    "ErrorReport",
    "InMemoryCaptions",
    "OxfordFlowers",
    "Prepared",
    "PreparedCaptions",
    "RepeatableBatches",
    "ShardFolder",
    "Skipped",
    "SyntheticFlowers",
    "WebDatasetCaptions",
    "attributes_named",
    "class_id_of",
    "draw_flower",
    "image_pyramid",
    "measured_box",
    "measured_colors",
    "open_captions",
    "prepare_captions",
    "random_crop_flip",
    "to_bytes",
    "to_float",
    "write_captions",
]
