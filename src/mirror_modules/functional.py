"""Every pure operation in one place, like `torch.nn.functional`: the definitions, without weights."""

from collections.abc import Callable
from typing import Any

from mirror_modules._placing import crop_box, keypoint_gate, keypoint_maps, place_in_box
from mirror_modules.adversarial.diversity import mode_seeking_loss
from mirror_modules.adversarial.losses import discriminator_loss, generator_loss, r1_penalty
from mirror_modules.adversarial.pairing import mismatch
from mirror_modules.glam.attention import choose_attention, global_local_attention, sentence_attention, word_attention
from mirror_modules.glam.colors import color_consistency_loss
from mirror_modules.glam.keypoints import complete_keypoints
from mirror_modules.kernels import Choice
from mirror_modules.metrics.box_overlap import box_overlap
from mirror_modules.metrics.class_oracle import class_oracle
from mirror_modules.metrics.clip_score import clip_score
from mirror_modules.metrics.diversity import diversity
from mirror_modules.metrics.expected_hits import expected_hits
from mirror_modules.metrics.frechet_distance import frechet_distance
from mirror_modules.metrics.inception_score import inception_score
from mirror_modules.metrics.kernel_distance import kernel_distance
from mirror_modules.metrics.other_captions import other_captions
from mirror_modules.metrics.r_precision import r_precision, r_precision_folds
from mirror_modules.metrics.redescription_quality import redescription_quality, words_in_place
from mirror_modules.stem.conditioning import interpolate_sentences, kl_divergence
from mirror_modules.stem.matching import (
    choose_similarity,
    contrastive_terms,
    image_sentence_similarity,
    matching_loss,
    word_region_attention,
    word_region_similarity,
)
from mirror_modules.stream.balancing import balance_gradients
from mirror_modules.stream.captioner import append_end
from mirror_modules.stream.redescription import redescription_loss
from mirror_modules.stream.sampling import gaussian_prior, latent_step
from mirror_modules.stream.scoring import image_information

__all__ = [
    "append_end",
    "balance_gradients",
    "box_overlap",
    "class_oracle",
    "clip_score",
    "color_consistency_loss",
    "complete_keypoints",
    "contrastive_terms",
    "crop_box",
    "discriminator_loss",
    "diversity",
    "expected_hits",
    "explain",
    "frechet_distance",
    "gaussian_prior",
    "generator_loss",
    "global_local_attention",
    "image_information",
    "image_sentence_similarity",
    "inception_score",
    "interpolate_sentences",
    "kernel_distance",
    "keypoint_gate",
    "keypoint_maps",
    "kl_divergence",
    "latent_step",
    "matching_loss",
    "mismatch",
    "mode_seeking_loss",
    "other_captions",
    "place_in_box",
    "r1_penalty",
    "r_precision",
    "r_precision_folds",
    "redescription_loss",
    "redescription_quality",
    "sentence_attention",
    "word_attention",
    "word_region_attention",
    "word_region_similarity",
    "words_in_place",
]


def explain(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Choice:
    """Report which implementation a call would run, and why, without computing anything.

        explain(global_local_attention, features, words, sentence).reason

    Args:
        operation: `global_local_attention` or `word_region_similarity`.
        *arguments: Positional arguments of the operation.
        **options: Keyword arguments of the operation; `impl="triton"` checks whether the kernel could run.

    Returns:
        `Choice(implementation, reason)`.

    Raises:
        ValueError: The operation has only one implementation.
        NotImplementedError: `impl` names an implementation that cannot run; the message gives the reason.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import explain, word_region_similarity
        >>> regions, words = torch.zeros(2, 9, 4), torch.zeros(2, 5, 4)
        >>> choice = explain(word_region_similarity, regions, words)
        >>> choice.implementation  # on a CPU
        'torch'
    """
    choosers: dict[Callable[..., Any], Callable[..., Choice]] = {
        global_local_attention: choose_attention,
        word_region_similarity: choose_similarity,
    }
    if operation not in choosers:
        names = " or ".join(chooser.__name__ for chooser in choosers)
        given = getattr(operation, "__name__", operation)
        raise ValueError(f"explain: operation must be {names}, but it is {given!r}.")
    return choosers[operation](*arguments, **options)
