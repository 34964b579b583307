"""STREAM, text back: the captioner, the redescription loss and score, and what they select (MirrorGAN, Sec. 3.3)."""

from mirror_modules.stream.balancing import balance_gradients
from mirror_modules.stream.captioner import Captioner, append_end
from mirror_modules.stream.redescription import RedescriptionLoss, redescription_loss
from mirror_modules.stream.sampling import (
    DenoisingAutoencoder,
    LatentSampler,
    LatentSamples,
    gaussian_prior,
    latent_step,
)
from mirror_modules.stream.scoring import RedescriptionScore, image_information
from mirror_modules.stream.selection import BestOf, PreferencePair, best_of, preference_pairs

__all__ = [
    "BestOf",
    "Captioner",
    "DenoisingAutoencoder",
    "LatentSampler",
    "LatentSamples",
    "PreferencePair",
    "RedescriptionLoss",
    "RedescriptionScore",
    "append_end",
    "balance_gradients",
    "best_of",
    "gaussian_prior",
    "image_information",
    "latent_step",
    "preference_pairs",
    "redescription_loss",
]
