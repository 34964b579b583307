"""The systems built from the parts: the reference MirrorGAN, and the encoder pair that it is trained with."""

from mirror_modules.models.config import BackboneConfig, MirrorGANConfig
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.models.mirrorgan import MirrorGAN

__all__ = ["BackboneConfig", "EncoderPair", "MirrorGAN", "MirrorGANConfig"]
