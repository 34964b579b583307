"""Every pure operation in one place, as `torch.nn.functional`: the definitions, without weights."""

from mirror_modules.adversarial.losses import discriminator_loss, generator_loss
from mirror_modules.glam.attention import global_local_attention, sentence_attention, word_attention
from mirror_modules.metrics.r_precision import r_precision
from mirror_modules.stem.conditioning import kl_divergence
from mirror_modules.stem.matching import matching_loss, word_region_similarity
from mirror_modules.stream.redescription import redescription_loss

__all__ = [
    "discriminator_loss",
    "generator_loss",
    "global_local_attention",
    "kl_divergence",
    "matching_loss",
    "r_precision",
    "redescription_loss",
    "sentence_attention",
    "word_attention",
    "word_region_similarity",
]
