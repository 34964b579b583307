"""The systems built from the parts: MirrorGAN and others of its kind, and the encoder pair that trains with them."""

from mirror_modules.models.config import BackboneConfig, ModelConfig
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.models.mirrorgan import MirrorGAN, MirrorGANConfig
from mirror_modules.models.text_to_image import TextToImage, build_model, get_system, register_system

__all__ = [
    "BackboneConfig",
    "EncoderPair",
    "MirrorGAN",
    "MirrorGANConfig",
    "ModelConfig",
    "TextToImage",
    "build_model",
    "get_system",
    "register_system",
]
