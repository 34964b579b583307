"""The building blocks of MirrorGAN, each usable on its own in other text-to-image models.

STEM encodes text (`stem`), GLAM generates images (`glam`), STREAM captions them (`stream`), paired discriminators score
realism and consistency (`adversarial`); `MirrorGAN` combines them. Importing this package imports nothing else; the
first use of a name imports torch, and nothing heavier.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mirror_modules import adversarial as adversarial
    from mirror_modules import data as data
    from mirror_modules import functional as functional
    from mirror_modules import glam as glam
    from mirror_modules import interop as interop
    from mirror_modules import kernels as kernels
    from mirror_modules import metrics as metrics
    from mirror_modules import models as models
    from mirror_modules import stem as stem
    from mirror_modules import stream as stream
    from mirror_modules.adversarial import (
        AdversarialWeights,
        KeypointDiscriminator,
        KeypointImageDiscriminator,
        LocatedDiscriminator,
        PairedDiscriminator,
        PairedLogits,
    )
    from mirror_modules.glam import (
        CascadedGenerator,
        DeconvolutionGenerator,
        GeneratedImages,
        GlamBlock,
        GlobalLocalAttention,
        GlobalLocalContext,
        ImageRefinementStage,
        KeypointGate,
        KeypointGenerator,
        KeypointImageGenerator,
        KeypointMaps,
        LocatedGenerator,
        TextPlacer,
        WordAttention,
        WordContext,
    )
    from mirror_modules.models import BackboneConfig, MirrorGAN, MirrorGANConfig
    from mirror_modules.stem import (
        Condition,
        ConditioningAugmentation,
        ImageEncoder,
        ImageFeatures,
        MatchingLoss,
        MatchingTerms,
        SentenceProjection,
        TextEncoder,
        TextFeatures,
        Vocabulary,
    )
    from mirror_modules.stream import (
        Captioner,
        DenoisingAutoencoder,
        LatentSampler,
        LatentSamples,
        RedescriptionLoss,
        RedescriptionScore,
    )

__version__ = "0.1.0"

__all__ = [
    "AdversarialWeights",
    "BackboneConfig",
    "Captioner",
    "CascadedGenerator",
    "Condition",
    "ConditioningAugmentation",
    "DeconvolutionGenerator",
    "DenoisingAutoencoder",
    "GeneratedImages",
    "GlamBlock",
    "GlobalLocalAttention",
    "GlobalLocalContext",
    "ImageEncoder",
    "ImageFeatures",
    "ImageRefinementStage",
    "KeypointDiscriminator",
    "KeypointGate",
    "KeypointGenerator",
    "KeypointImageDiscriminator",
    "KeypointImageGenerator",
    "KeypointMaps",
    "LatentSampler",
    "LatentSamples",
    "LocatedDiscriminator",
    "LocatedGenerator",
    "MatchingLoss",
    "MatchingTerms",
    "MirrorGAN",
    "MirrorGANConfig",
    "PairedDiscriminator",
    "PairedLogits",
    "RedescriptionLoss",
    "RedescriptionScore",
    "SentenceProjection",
    "TextEncoder",
    "TextFeatures",
    "TextPlacer",
    "Vocabulary",
    "WordAttention",
    "WordContext",
    "functional",
]

# Where `__getattr__` finds what the imports above show to type checkers: modules, and the names that each exports here.
_EXPORTS = {
    "adversarial": (
        "AdversarialWeights",
        "KeypointDiscriminator",
        "KeypointImageDiscriminator",
        "LocatedDiscriminator",
        "PairedDiscriminator",
        "PairedLogits",
    ),
    "data": (),
    "functional": (),
    "glam": (
        "CascadedGenerator",
        "DeconvolutionGenerator",
        "GeneratedImages",
        "GlamBlock",
        "GlobalLocalAttention",
        "GlobalLocalContext",
        "ImageRefinementStage",
        "KeypointGate",
        "KeypointGenerator",
        "KeypointImageGenerator",
        "KeypointMaps",
        "LocatedGenerator",
        "TextPlacer",
        "WordAttention",
        "WordContext",
    ),
    "interop": (),
    "kernels": (),
    "metrics": (),
    "models": ("BackboneConfig", "MirrorGAN", "MirrorGANConfig"),
    "stem": (
        "Condition",
        "ConditioningAugmentation",
        "ImageEncoder",
        "ImageFeatures",
        "MatchingLoss",
        "MatchingTerms",
        "SentenceProjection",
        "TextEncoder",
        "TextFeatures",
        "Vocabulary",
    ),
    "stream": (
        "Captioner",
        "DenoisingAutoencoder",
        "LatentSampler",
        "LatentSamples",
        "RedescriptionLoss",
        "RedescriptionScore",
    ),
}

# Hidden from type checkers: with this function, they would accept every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        if name in _EXPORTS:
            return import_module(f"{__name__}.{name}")
        for module, names in _EXPORTS.items():
            if name in names:
                globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXPORTS})
