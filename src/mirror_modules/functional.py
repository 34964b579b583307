"""Every pure operation in one place, as `torch.nn.functional`: the definitions, without weights."""

from collections.abc import Callable
from typing import Any

from mirror_modules.adversarial.losses import discriminator_loss, generator_loss, r1_penalty
from mirror_modules.glam.attention import choose_attention, global_local_attention, sentence_attention, word_attention
from mirror_modules.kernels import Choice
from mirror_modules.metrics.diversity import diversity
from mirror_modules.metrics.frechet_distance import frechet_distance
from mirror_modules.metrics.inception_score import inception_score
from mirror_modules.metrics.kernel_distance import kernel_distance
from mirror_modules.metrics.r_precision import r_precision, r_precision_folds
from mirror_modules.stem.conditioning import kl_divergence
from mirror_modules.stem.matching import choose_similarity, matching_loss, word_region_similarity
from mirror_modules.stream.redescription import balance_gradients, redescription_loss

__all__ = [
    "balance_gradients",
    "discriminator_loss",
    "diversity",
    "explain",
    "frechet_distance",
    "generator_loss",
    "global_local_attention",
    "inception_score",
    "kernel_distance",
    "kl_divergence",
    "matching_loss",
    "r1_penalty",
    "r_precision",
    "r_precision_folds",
    "redescription_loss",
    "sentence_attention",
    "word_attention",
    "word_region_similarity",
]


def explain(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Choice:
    """Which implementation a call would run, and why; nothing is computed.

        explain(global_local_attention, features, words, sentence).reason

    Args:
        operation: `global_local_attention` or `word_region_similarity`.
        *arguments: As the operation takes them.
        **options: As the operation takes them; `impl="triton"` asks whether the kernel could run.

    Returns:
        `Choice(implementation, reason)`.

    Raises:
        ValueError: The operation has one implementation only.
        NotImplementedError: `impl` names an implementation that cannot run, and the message says why.
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
