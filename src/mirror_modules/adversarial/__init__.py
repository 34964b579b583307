"""Discriminators: is an image a photograph, and does it match this sentence? (MirrorGAN, Sec. 3.4)"""

from mirror_modules.adversarial.discriminator import PairedDiscriminator, PairedLogits
from mirror_modules.adversarial.diversity import mode_seeking_loss
from mirror_modules.adversarial.keypoints import KeypointDiscriminator
from mirror_modules.adversarial.located import KeypointImageDiscriminator, LocatedDiscriminator
from mirror_modules.adversarial.losses import AdversarialWeights, discriminator_loss, generator_loss, r1_penalty
from mirror_modules.adversarial.pairing import Mismatch, mismatch

__all__ = [
    "AdversarialWeights",
    "KeypointDiscriminator",
    "KeypointImageDiscriminator",
    "LocatedDiscriminator",
    "Mismatch",
    "PairedDiscriminator",
    "PairedLogits",
    "discriminator_loss",
    "generator_loss",
    "mismatch",
    "mode_seeking_loss",
    "r1_penalty",
]
