"""The adversarial objective, on logits (MirrorGAN, Sec. 3.4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_choice
from mirror_modules.adversarial.discriminator import PairedLogits

Weighting = Literal["paper", "release"]
Through = Literal["logits", "probabilities"]
Objective = Literal["logistic", "hinge"]


def discriminator_loss(
    real: PairedLogits,
    fake: PairedLogits,
    mismatched: Tensor | None = None,
    *,
    weighting: Weighting = "paper",
    through: Through = "logits",
    objective: Objective = "logistic",
    mismatched_weight: float | Tensor = 1.0,
) -> Tensor:
    """Compute the loss of a discriminator (MirrorGAN, Sec. 3.4).

        L_D = - 1/2 E log D(x) - 1/2 E log(1 - D(I)) - 1/2 E log D(x, s) - 1/2 E log(1 - D(I, s))

    `x` is a real image, `I` a generated one, `s` their sentence. Mismatched pairs, real images with another image's
    sentence, are not in the paper; they add - 1/2 E log(1 - D(x, s')). The published code uses other weights: half the
    sum of the two real terms plus a third of the sum of the three others. The hinge loss has max(0, 1 - logit) in place
    of - log D, and max(0, 1 + logit) in place of - log(1 - D).

    Args:
        real: Logits of real images with their sentences.
        fake: Logits of generated images with their sentences.
        mismatched: Consistency logits of mismatched pairs, any number of them; None takes `real.mismatched`. If that is
            None, too, the term is omitted.
        weighting: "paper", or "release" for the weights of the published code.
        through: "logits" is exact. "probabilities" rounds as the published code does: a probability close to 0 or 1
            loses its digits, and no logarithm exceeds 100.
        objective: "logistic" as above, or "hinge".
        mismatched_weight: Weight of the mismatched pairs' term within the sum.

    Returns:
        A scalar.

    Raises:
        ValueError: An option is unknown, options are incompatible, or "release" comes without mismatched pairs.

    Examples:
        >>> import torch
        >>> from mirror_modules import PairedLogits
        >>> from mirror_modules.functional import discriminator_loss
        >>> undecided = PairedLogits(realism=torch.zeros(3), consistency=torch.zeros(3))
        >>> round(discriminator_loss(undecided, undecided).item(), 4)  # 4 * 1/2 log 2
        1.3863
        >>> discriminator_loss(undecided, undecided, objective="hinge").item()
        2.0
    """
    _check_options("discriminator_loss", weighting, through, objective)
    mismatched = real.mismatched if mismatched is None else mismatched
    # With no mismatched pairs, use an empty sum: zero, but still in the graph, which DDP requires.
    mismatched_loss = at_least_float32(real.realism if mismatched is None else mismatched)[:0].sum()
    if mismatched is not None and mismatched.numel() > 0:
        mismatched_loss = mismatched_weight * _fake_loss(mismatched, through, objective)
    positive = _real_loss(real.realism, through, objective) + _real_loss(real.consistency, through, objective)
    negative = _fake_loss(fake.realism, through, objective) + _fake_loss(fake.consistency, through, objective)
    negative = negative + mismatched_loss
    if weighting == "paper":
        return 0.5 * (positive + negative)
    if mismatched is None:
        raise ValueError(
            "discriminator_loss: weighting='release' averages over mismatched pairs too; pass `mismatched`."
        )
    return positive / 2 + negative / 3


def generator_loss(
    fake: PairedLogits,
    *,
    weighting: Weighting = "paper",
    through: Through = "logits",
    objective: Objective = "logistic",
) -> Tensor:
    """Compute the adversarial loss of the generator at one stage (MirrorGAN, Sec. 3.4).

        L_G = - 1/2 E log D(I) - 1/2 E log D(I, s)

    The hinge loss has - logit in place of - log D.

    Args:
        fake: Logits of generated images with their sentences.
        weighting: "paper", or "release" with weights of 1, as in the published code.
        through: See `discriminator_loss`.
        objective: See `discriminator_loss`.

    Returns:
        A scalar.

    Raises:
        ValueError: An option is unknown, or options are incompatible.

    Examples:
        >>> import torch
        >>> from mirror_modules import PairedLogits
        >>> from mirror_modules.functional import generator_loss
        >>> undecided = PairedLogits(realism=torch.zeros(3), consistency=torch.zeros(3))
        >>> round(generator_loss(undecided).item(), 4)  # 2 * 1/2 log 2
        0.6931
        >>> fooled = PairedLogits(realism=torch.ones(3), consistency=torch.ones(3))
        >>> generator_loss(fooled, objective="hinge").item()
        -1.0
    """
    _check_options("generator_loss", weighting, through, objective)
    weight = 0.5 if weighting == "paper" else 1.0
    if objective == "hinge":
        return -weight * (at_least_float32(fake.realism).mean() + at_least_float32(fake.consistency).mean())
    return weight * (_real_loss(fake.realism, through, objective) + _real_loss(fake.consistency, through, objective))


def r1_penalty(images: Tensor, logits: PairedLogits) -> Tensor:
    """Penalize the discriminator's gradient at real images: the R1 penalty of Mescheder et al. (2018).

        R1 = 1/2 E || d (realism + consistency) / d image ||^2

    Args:
        images: Real images, (B, 3, H, W), with `requires_grad`.
        logits: A discriminator's logits of these images.

    Returns:
        A scalar, at least 0. Its own gradient is a second derivative of the discriminator.

    Raises:
        ValueError: `images` do not require a gradient, or `logits` do not depend on them.

    Examples:
        >>> import torch
        >>> from mirror_modules import PairedLogits
        >>> from mirror_modules.functional import r1_penalty
        >>> images = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> total = images.sum(dim=(1, 2, 3))
        >>> r1_penalty(images, PairedLogits(realism=total, consistency=total)).item()  # 1/2 * 48 * 2^2
        96.0
    """
    if not images.requires_grad:
        raise ValueError("r1_penalty: images must require a gradient; use images.detach().requires_grad_(True).")
    total = at_least_float32(logits.realism).sum() + at_least_float32(logits.consistency).sum()
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "r1_penalty: logits do not depend on images; compute them from this very tensor, not in no_grad."
        )
    return 0.5 * at_least_float32(gradient).square().sum() / images.shape[0]


def _real_loss(logits: Tensor, through: Through, objective: Objective) -> Tensor:
    """- E log D, or E max(0, 1 - logit)."""
    logits = at_least_float32(logits)
    if objective == "hinge":
        return F.relu(1 - logits).mean()
    return F.softplus(-logits).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, 1.0)


def _fake_loss(logits: Tensor, through: Through, objective: Objective) -> Tensor:
    """- E log(1 - D), or E max(0, 1 + logit)."""
    logits = at_least_float32(logits)
    if objective == "hinge":
        return F.relu(1 + logits).mean()
    return F.softplus(logits).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, 0.0)


def _cross_entropy_of_probabilities(logits: Tensor, target: float) -> Tensor:
    # Autocast rejects this function even for float32 inputs, as these are.
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(torch.sigmoid(logits), torch.full_like(logits, target))


def _check_options(owner: str, weighting: str, through: str, objective: str) -> None:
    check_choice(owner, "weighting", weighting, ("paper", "release"))
    check_choice(owner, "through", through, ("logits", "probabilities"))
    check_choice(owner, "objective", objective, ("logistic", "hinge"))
    if objective == "hinge" and through == "probabilities":
        raise ValueError(f"{owner}: objective='hinge' is defined on logits; use through='logits'.")
