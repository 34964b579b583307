"""STREAM, text back: the captioner, the redescription loss and score, and what they select (MirrorGAN, Sec. 3.3)."""

from mirror_modules.stream.balancing import balance_gradients
from mirror_modules.stream.captioner import Captioner, append_end
from mirror_modules.stream.redescription import RedescriptionLoss, redescription_loss
from mirror_modules.stream.scoring import RedescriptionScore, image_information
from mirror_modules.stream.selection import BestOf, PreferencePair, best_of, preference_pairs

__all__ = [
    "BestOf",
    "Captioner",
    "PreferencePair",
    "RedescriptionLoss",
    "RedescriptionScore",
    "append_end",
    "balance_gradients",
    "best_of",
    "image_information",
    "preference_pairs",
    "redescription_loss",
]
