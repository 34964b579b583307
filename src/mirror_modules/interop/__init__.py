"""Other people's networks as parts: Hugging Face's captioners and encoders, timm and torchvision backbones."""

from mirror_modules.interop.huggingface import HuggingFaceCaptioner, captioner_from
from mirror_modules.interop.pixels import Preprocess

__all__ = ["HuggingFaceCaptioner", "Preprocess", "captioner_from"]
