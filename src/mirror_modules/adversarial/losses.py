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
    """What a discriminator minimizes (MirrorGAN, Sec. 3.4).

        L_D = - 1/2 E log D(x) - 1/2 E log(1 - D(I)) - 1/2 E log D(x, s) - 1/2 E log(1 - D(I, s))

    `x` is a real image, `I` a generated one, `s` their sentence. Mismatched pairs, real images with another image's
    sentence, are not in the paper; they add - 1/2 E log(1 - D(x, s')). The published code weighs otherwise: half the
    sum of the two real terms plus a third of the sum of the three others. The hinge loss has max(0, 1 - logit) in place
    of - log D, and max(0, 1 + logit) in place of - log(1 - D).

    Args:
        real: Logits of real images with their sentences.
        fake: Logits of generated images with their sentences.
        mismatched: Consistency logits of mismatched pairs, any number of them; None leaves the term out.
        weighting: "paper" or "release", the published code's.
        through: "logits" is exact. "probabilities" rounds as the published code does: a probability close to 0 or 1
            loses its digits, and no logarithm exceeds 100.
        objective: "logistic" as above, or "hinge".
        mismatched_weight: Weight of the term of mismatched pairs within the sum.

    Returns:
        A scalar.

    Raises:
        ValueError: An option is unknown, options exclude each other, or "release" comes with `mismatched=None`.
    """
    _check_options("discriminator_loss", weighting, through, objective)
    # An empty batch of mismatched pairs has no mean. Its sum is 0, and the graph is that of a batch with pairs, as
    # processes that train together need it.
    wrong = at_least_float32(real.realism if mismatched is None else mismatched)[:0].sum()
    if mismatched is not None and mismatched.numel() > 0:
        wrong = mismatched_weight * _says_no(mismatched, through, objective)
    accepted = _says_yes(real.realism, through, objective) + _says_yes(real.consistency, through, objective)
    rejected = _says_no(fake.realism, through, objective) + _says_no(fake.consistency, through, objective) + wrong
    if weighting == "paper":
        return 0.5 * (accepted + rejected)
    if mismatched is None:
        raise ValueError("discriminator_loss: weighting='release' averages over mismatched pairs too; give some.")
    return accepted / 2 + rejected / 3


def generator_loss(
    fake: PairedLogits,
    *,
    weighting: Weighting = "paper",
    through: Through = "logits",
    objective: Objective = "logistic",
) -> Tensor:
    """What the generator minimizes at one stage (MirrorGAN, Sec. 3.4).

        L_G = - 1/2 E log D(I) - 1/2 E log D(I, s)

    The hinge loss has - logit in place of - log D.

    Args:
        fake: Logits of generated images with their sentences.
        weighting: "paper", or "release" with weights of 1, as the published code.
        through: See `discriminator_loss`.
        objective: See `discriminator_loss`.

    Returns:
        A scalar.

    Raises:
        ValueError: An option is unknown, or options exclude each other.
    """
    _check_options("generator_loss", weighting, through, objective)
    weight = 0.5 if weighting == "paper" else 1.0
    if objective == "hinge":
        return -weight * (at_least_float32(fake.realism).mean() + at_least_float32(fake.consistency).mean())
    return weight * (_says_yes(fake.realism, through, objective) + _says_yes(fake.consistency, through, objective))


def r1_penalty(images: Tensor, verdict: PairedLogits) -> Tensor:
    """Half the squared gradient of what a discriminator says of real images, the R1 penalty of Mescheder et al. (2018).

        R1 = 1/2 E || d (realism + consistency) / d image ||^2

    Args:
        images: What was judged, (B, 3, H, W), with `requires_grad`.
        verdict: The logits, which depend on them.

    Returns:
        A scalar, at least 0; its own gradient is a second derivative of the discriminator.

    Raises:
        ValueError: `images` need no gradient.
    """
    if not images.requires_grad:
        raise ValueError("r1_penalty: images need a gradient; judge images.detach().requires_grad_(True).")
    said = at_least_float32(verdict.realism).sum() + at_least_float32(verdict.consistency).sum()
    (gradient,) = torch.autograd.grad(said, images, create_graph=True)
    return 0.5 * at_least_float32(gradient).square().sum() / len(images)


def _says_yes(logits: Tensor, through: Through, objective: Objective) -> Tensor:
    """- E log D, or its hinge."""
    logits = at_least_float32(logits)
    if objective == "hinge":
        return F.relu(1 - logits).mean()
    return F.softplus(-logits).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, 1.0)


def _says_no(logits: Tensor, through: Through, objective: Objective) -> Tensor:
    """- E log(1 - D), or its hinge."""
    logits = at_least_float32(logits)
    if objective == "hinge":
        return F.relu(1 + logits).mean()
    return F.softplus(logits).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, 0.0)


def _cross_entropy_of_probabilities(logits: Tensor, target: float) -> Tensor:
    # Autocast refuses this function for every input; these are float32 or wider.
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(torch.sigmoid(logits), torch.full_like(logits, target))


def _check_options(owner: str, weighting: str, through: str, objective: str) -> None:
    check_choice(owner, "weighting", weighting, ("paper", "release"))
    check_choice(owner, "through", through, ("logits", "probabilities"))
    check_choice(owner, "objective", objective, ("logistic", "hinge"))
    if objective == "hinge" and through == "probabilities":
        raise ValueError(f"{owner}: the hinge loss is one of logits; use through='logits'.")
