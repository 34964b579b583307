"""The systems built from the parts: MirrorGAN and others of its kind, and the encoder pair that trains with them."""

from mirror_modules.models.attngan import AttnGAN, AttnGANConfig
from mirror_modules.models.config import BackboneConfig, ModelConfig
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.models.gan_int_cls import GANIntCLS, GANIntCLSConfig
from mirror_modules.models.gawwn import GAWWN, GAWWNConfig
from mirror_modules.models.mirrorgan import MirrorGAN, MirrorGANConfig
from mirror_modules.models.ppgn import PPGN, PPGNConfig, sample_latents
from mirror_modules.models.registry import build_model, get_system, register_system
from mirror_modules.models.stackgan import StackGAN, StackGANConfig
from mirror_modules.models.stackgan_v2 import StackGANv2, StackGANv2Config
from mirror_modules.models.text_to_image import TextToImage

__all__ = [
    "GAWWN",
    "PPGN",
    "AttnGAN",
    "AttnGANConfig",
    "BackboneConfig",
    "EncoderPair",
    "GANIntCLS",
    "GANIntCLSConfig",
    "GAWWNConfig",
    "MirrorGAN",
    "MirrorGANConfig",
    "ModelConfig",
    "PPGNConfig",
    "StackGAN",
    "StackGANConfig",
    "StackGANv2",
    "StackGANv2Config",
    "TextToImage",
    "build_model",
    "get_system",
    "register_system",
    "sample_latents",
]
