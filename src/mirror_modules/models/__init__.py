"""Where the parts meet: the reference MirrorGAN."""

from mirror_modules.models.config import MirrorGANConfig
from mirror_modules.models.mirrorgan import MirrorGAN

__all__ = ["MirrorGAN", "MirrorGANConfig"]
