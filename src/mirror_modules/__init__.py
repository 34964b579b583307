"""The building blocks of MirrorGAN, each usable on its own in other text-to-image models.

STEM encodes text (`stem`), GLAM generates images (`glam`), STREAM captions them (`stream`), paired discriminators score
realism and consistency (`adversarial`); `MirrorGAN` combines them. Importing this package imports torch and nothing
heavier.
"""

from mirror_modules import functional
from mirror_modules.adversarial import PairedDiscriminator, PairedLogits
from mirror_modules.glam import (
    CascadedGenerator,
    GeneratedImages,
    GlobalLocalAttention,
    GlobalLocalContext,
    WordAttention,
    WordContext,
)
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
    "WordAttention",
    "WordContext",
    "functional",
]
