"""MirrorGAN's parts, each of which stands alone in somebody else's text-to-image model.

STEM reads text (`stem`), GLAM draws images (`glam`), STREAM reads them back (`stream`), discriminators judge
(`adversarial`); `MirrorGAN` puts them together. Importing this package costs torch and nothing heavier.
"""

from mirror_modules import functional
from mirror_modules.adversarial import PairedDiscriminator, PairedLogits
from mirror_modules.glam import CascadedGenerator, GeneratedImages, GlobalLocalAttention, GlobalLocalContext
from mirror_modules.models import MirrorGAN, MirrorGANConfig
from mirror_modules.stem import (
    Condition,
    ConditioningAugmentation,
    ImageEncoder,
    ImageFeatures,
    MatchingLoss,
    MatchingTerms,
    TextEncoder,
    TextFeatures,
    Vocabulary,
)
from mirror_modules.stream import Captioner, RedescriptionLoss

__version__ = "0.1.0"

__all__ = [
    "Captioner",
    "CascadedGenerator",
    "Condition",
    "ConditioningAugmentation",
    "GeneratedImages",
    "GlobalLocalAttention",
    "GlobalLocalContext",
    "ImageEncoder",
    "ImageFeatures",
    "MatchingLoss",
    "MatchingTerms",
    "MirrorGAN",
    "MirrorGANConfig",
    "PairedDiscriminator",
    "PairedLogits",
    "RedescriptionLoss",
    "TextEncoder",
    "TextFeatures",
    "Vocabulary",
    "functional",
]
