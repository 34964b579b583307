"""Other people's networks as parts: captioners and encoders of Hugging Face, backbones of timm and torchvision."""

from mirror_modules.interop.backbones import build_backbone, checksum
from mirror_modules.interop.huggingface import HuggingFaceCaptioner, captioner_from
from mirror_modules.interop.image_encoders import ImageEncoderAdapter, image_encoder_from
from mirror_modules.interop.pixels import Preprocess
from mirror_modules.interop.text_encoders import TextEncoderAdapter, text_encoder_from

__all__ = [
    "HuggingFaceCaptioner",
    "ImageEncoderAdapter",
    "Preprocess",
    "TextEncoderAdapter",
    "build_backbone",
    "captioner_from",
    "checksum",
    "image_encoder_from",
    "text_encoder_from",
]
