"""STEM, text in: vocabulary, text encoder, conditioning augmentation, text-image matching (MirrorGAN, Sec. 3.1)."""

from mirror_modules.stem.conditioning import (
    Condition,
    ConditioningAugmentation,
    SentenceProjection,
    interpolate_sentences,
    kl_divergence,
)
from mirror_modules.stem.image_encoder import ConvBackbone, ImageEncoder, ImageFeatures, TorchvisionBackbone
from mirror_modules.stem.matching import (
    MatchingLoss,
    MatchingTerms,
    contrastive_terms,
    image_sentence_similarity,
    matching_loss,
    word_region_attention,
    word_region_similarity,
)
from mirror_modules.stem.text_encoder import TextEncoder, TextFeatures
from mirror_modules.stem.vocabulary import END, PAD, UNKNOWN, Vocabulary

__all__ = [
    "END",
    "PAD",
    "UNKNOWN",
    "Condition",
    "ConditioningAugmentation",
    "ConvBackbone",
    "ImageEncoder",
    "ImageFeatures",
    "MatchingLoss",
    "MatchingTerms",
    "SentenceProjection",
    "TextEncoder",
    "TextFeatures",
    "TorchvisionBackbone",
    "Vocabulary",
    "contrastive_terms",
    "image_sentence_similarity",
    "interpolate_sentences",
    "kl_divergence",
    "matching_loss",
    "word_region_attention",
    "word_region_similarity",
]
