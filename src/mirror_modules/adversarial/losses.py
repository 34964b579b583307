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


def discriminator_loss(
    real: PairedLogits,
    fake: PairedLogits,
    mismatched: Tensor | None = None,
    *,
    weighting: Weighting = "paper",
    through: Through = "logits",
) -> Tensor:
    """What a discriminator minimizes (MirrorGAN, Sec. 3.4).

        L_D = - 1/2 E log D(x) - 1/2 E log(1 - D(I)) - 1/2 E log D(x, s) - 1/2 E log(1 - D(I, s))

    `x` is a real image, `I` a generated one, `s` their sentence. Mismatched pairs, real images with another image's
    sentence, are not in the paper; they add - 1/2 E log(1 - D(x, s')). The published code weighs otherwise: half the
    sum of the two real terms plus a third of the sum of the three others.

    Args:
        real: Logits of real images with their sentences.
        fake: Logits of generated images with their sentences.
        mismatched: Consistency logits of mismatched pairs, any number of them; None leaves the term out.
        weighting: "paper" or "release", the published code's.
        through: "logits" is exact. "probabilities" rounds as the published code does: a probability close to 0 or 1
            loses its digits, and no logarithm exceeds 100.

    Returns:
        A scalar.

    Raises:
        ValueError: `weighting` or `through` is unknown, or "release" comes without mismatched pairs.
    """
    _check_options("discriminator_loss", weighting, through)
    # An empty batch of mismatched pairs has no mean; it weighs nothing.
    has_mismatched = mismatched is not None and mismatched.numel() > 0
    wrong = torch.zeros_like(real.realism[:1]).sum()
    if mismatched is not None and has_mismatched:
        wrong = _says_no(mismatched, through)
    accepted = _says_yes(real.realism, through) + _says_yes(real.consistency, through)
    rejected = _says_no(fake.realism, through) + _says_no(fake.consistency, through) + wrong
    if weighting == "paper":
        return 0.5 * (accepted + rejected)
    if not has_mismatched:
        raise ValueError("discriminator_loss: weighting='release' averages over mismatched pairs too; give some.")
    return accepted / 2 + rejected / 3


def generator_loss(fake: PairedLogits, *, weighting: Weighting = "paper", through: Through = "logits") -> Tensor:
    """What the generator minimizes at one stage (MirrorGAN, Sec. 3.4).

        L_G = - 1/2 E log D(I) - 1/2 E log D(I, s)

    Args:
        fake: Logits of generated images with their sentences.
        weighting: "paper", or "release" with weights of 1, as the published code.
        through: See `discriminator_loss`.

    Returns:
        A scalar.

    Raises:
        ValueError: `weighting` or `through` is unknown.
    """
    _check_options("generator_loss", weighting, through)
    weight = 0.5 if weighting == "paper" else 1.0
    return weight * (_says_yes(fake.realism, through) + _says_yes(fake.consistency, through))


def _says_yes(logits: Tensor, through: Through) -> Tensor:
    """- E log D."""
    logits = at_least_float32(logits)
    return F.softplus(-logits).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, 1.0)


def _says_no(logits: Tensor, through: Through) -> Tensor:
    """- E log(1 - D)."""
    logits = at_least_float32(logits)
    return F.softplus(logits).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, 0.0)


def _cross_entropy_of_probabilities(logits: Tensor, target: float) -> Tensor:
    # Autocast refuses this function for every input; these are float32 or wider.
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(torch.sigmoid(logits), torch.full_like(logits, target))


def _check_options(owner: str, weighting: str, through: str) -> None:
    check_choice(owner, "weighting", weighting, ("paper", "release"))
    check_choice(owner, "through", through, ("logits", "probabilities"))
