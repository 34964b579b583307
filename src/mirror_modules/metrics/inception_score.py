"""Inception score: confident and diverse class predictions (Salimans et al., 2016; MirrorGAN, Sec. 4.1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mirror_modules._checks import check_choice, check_generator, check_positive
from mirror_modules.metrics._features import check_measurable


class InceptionScore(NamedTuple):
    """The score, in [1, number of classes]."""

    mean: float
    standard_deviation: float
    """Root mean square deviation of the splits from `mean`; published tables print it after ±."""


@torch.no_grad()
def inception_score(
    predictions: Tensor,
    *,
    kind: Literal["logits", "probabilities"] = "logits",
    splits: int = 10,
    generator: torch.Generator | None = None,
) -> InceptionScore:
    """Score how confident a classifier is about each image and how evenly classes occur (Salimans et al., Sec. 4).

        score = exp( mean_n KL(p_n || mean_n p_n) ),    p_n = softmax(predictions[n])

    The score is computed within each of `splits` parts, which differ in size by at most one image, and averaged. A part
    of M images cannot score more than M.

    Args:
        predictions: A classifier's predictions for generated images, (N, K) with K classes. The classifier defines the
            score.
        kind: "logits", or "probabilities" that sum to 1 over K.
        splits: Number of parts.
        generator: Shuffles the images before the split. None keeps their order: only for images in random order.

    Returns:
        Mean and deviation over the splits.

    Raises:
        ValueError: Not (N, K), not finite, not probabilities, fewer than two images in a split, or an argument of
            another type.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import inception_score
        >>> confident = torch.eye(7).repeat(6, 1)  # each of 7 classes on 6 images
        >>> round(inception_score(confident, kind="probabilities", splits=3).mean, 4)
        7.0
        >>> round(inception_score(torch.zeros(42, 7), splits=3).mean, 4)  # uniform predictions
        1.0
    """
    check_positive("inception_score", splits=splits)
    check_choice("inception_score", "kind", kind, ("logits", "probabilities"))
    check_generator("inception_score", generator)
    check_measurable("inception_score", "predictions", predictions, "(N, K)", (2,))
    if len(predictions) < 2 * splits:
        raise ValueError(
            f"inception_score: splits={splits} needs {2 * splits} images, two in each, but there are "
            f"{len(predictions)}; pass more images, or lower splits."
        )
    if kind == "probabilities":
        _check_probabilities(predictions)
    if generator is not None:
        order = torch.randperm(len(predictions), generator=generator, device=generator.device)
        predictions = predictions[order.to(predictions.device)]
    scores = torch.stack([_score(part.double(), kind) for part in predictions.tensor_split(splits)])
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


def _score(predictions: Tensor, kind: str) -> Tensor:
    # Half-precision probabilities sum to 1 only approximately.
    p = predictions.softmax(dim=1) if kind == "logits" else predictions / predictions.sum(dim=1, keepdim=True)
    # The mean of KL(p_n || mean p) is the entropy of the mean minus the mean of the entropies. entr(0) is 0.
    return (torch.special.entr(p.mean(dim=0)).sum() - torch.special.entr(p).sum(dim=1).mean()).exp()


def _check_probabilities(predictions: Tensor) -> None:
    if bool((predictions < 0).any()):
        raise ValueError(
            f"inception_score: predictions contain {float(predictions.min()):.3g}, which is not a probability; "
            'pass kind="logits" if these are logits.'
        )
    sums = predictions.double().sum(dim=1)
    worst = sums[(sums - 1).abs().argmax()]
    if abs(float(worst) - 1) > 0.01:
        raise ValueError(
            f"inception_score: a row of predictions sums to {float(worst):.3g}, but probabilities sum to 1; "
            'pass kind="logits" if these are logits.'
        )
