"""Judges: is it a photograph, and does it belong to this sentence? (MirrorGAN, Sec. 3.4)"""

from mirror_modules.adversarial.discriminator import PairedDiscriminator, PairedLogits
from mirror_modules.adversarial.losses import discriminator_loss, generator_loss, r1_penalty
from mirror_modules.adversarial.pairing import Mismatch, mismatch

__all__ = [
    "Mismatch",
    "PairedDiscriminator",
    "PairedLogits",
    "discriminator_loss",
    "generator_loss",
    "mismatch",
    "r1_penalty",
]
