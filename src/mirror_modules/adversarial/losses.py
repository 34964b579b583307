"""The adversarial objective, on logits (MirrorGAN, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_choice, check_number, check_tensors
from mirror_modules.adversarial.discriminator import PairedLogits

WeightingName = Literal["paper", "release", "gan-int-cls", "stackgan++"]
Through = Literal["logits", "probabilities"]
Objective = Literal["logistic", "hinge"]


@dataclass(frozen=True)
class AdversarialWeights:
    """Weights of the terms of `discriminator_loss` and `generator_loss`; a term of weight 0 is omitted.

    Real and generated images are each scored by consistency with their sentence and by realism, mismatched pairs by
    consistency and, if their images are not those of `real` again, by realism as well.

    Raises:
        ValueError: A weight is not a finite number of at least 0.
    """

    real: float
    """Of - log D(x, s)."""
    fake: float
    """Of - log(1 - D(I, s))."""
    mismatched: float
    """Of - log(1 - D(x, s')), or of the hinge."""
    real_realism: float
    """Of - log D(x)."""
    fake_realism: float
    """Of - log(1 - D(I))."""
    mismatched_realism: float
    """Of - log D(x') for the images x' of mismatched pairs, which are real."""
    generator: float | None = None
    """Of - log D(I, s) in the loss of the generator; None takes `real`."""
    generator_realism: float | None = None
    """Of - log D(I) in the loss of the generator; None takes `real_realism`."""

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        weights = {name: weight for name, weight in weights.items() if weight is not None}
        check_number("AdversarialWeights", **weights)
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"AdversarialWeights: {name} must be at least 0, but it is {weight!r}.")


# As published; StackGAN's second stage and AttnGAN use those of the released code of MirrorGAN, GAWWN and StackGAN's
# first stage those of GAN-INT-CLS.
WEIGHTINGS = {
    "paper": AdversarialWeights(1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 0),
    "release": AdversarialWeights(1 / 2, 1 / 3, 1 / 3, 1 / 2, 1 / 3, 0, generator=1, generator_realism=1),
    "gan-int-cls": AdversarialWeights(1, 1 / 2, 1 / 2, 0, 0, 0),
    "stackgan++": AdversarialWeights(1, 1, 1, 1, 1, 1),
}
Weighting = WeightingName | AdversarialWeights
# For logits that a weighting needs and that are missing.
ADVICE = {
    "mismatched": "pass `mismatched`",
    "mismatched.realism": "pass mismatched=PairedLogits(realism, consistency), the realism being that of the images",
}


def discriminator_loss(
    real: PairedLogits,
    fake: PairedLogits,
    mismatched: Tensor | PairedLogits | None = None,
    *,
    weighting: Weighting = "paper",
    through: Through = "logits",
    objective: Objective = "logistic",
    mismatched_weight: float | Tensor = 1.0,
) -> Tensor:
    """Compute the loss of a discriminator (MirrorGAN, Sec. 3.4).

        L_D = - 1/2 E log D(x) - 1/2 E log(1 - D(I)) - 1/2 E log D(x, s) - 1/2 E log(1 - D(I, s))

    `x` is a real image, `I` a generated one, `s` their sentence. Mismatched pairs, real images with another image's
    sentence, are not in the paper; they add - 1/2 E log(1 - D(x, s')). Other systems use other weights:

        weighting        D(x, s)   D(I, s)   D(x, s')   D(x)   D(I)   D(x')   used by
        "paper"            1/2       1/2       1/2      1/2    1/2     0      MirrorGAN's paper
        "release"          1/2       1/3       1/3      1/2    1/3     0      MirrorGAN's code, AttnGAN, StackGAN II
        "gan-int-cls"       1        1/2       1/2       0      0      0      GAN-INT-CLS, GAWWN, StackGAN I
        "stackgan++"        1         1         1        1      1      1      StackGAN++

    The hinge loss has max(0, 1 - logit) in place of - log D, and max(0, 1 + logit) in place of - log(1 - D).

    Args:
        real: Logits of real images with their sentences.
        fake: Logits of generated images with their sentences.
        mismatched: Consistency logits of mismatched pairs, any number of them, or `PairedLogits` with the realism of
            their images as well, which only a weight `mismatched_realism` needs; None takes `real.mismatched`. If that
            is None, too, "paper" omits the term.
        weighting: A name of the table, or `AdversarialWeights` of your own.
        through: "logits" is exact. "probabilities" rounds as the published code does: a probability close to 0 or 1
            loses its digits, and no logarithm exceeds 100.
        objective: "logistic" as above, or "hinge".
        mismatched_weight: Weight of the mismatched pairs' terms within the sum.

    Returns:
        A scalar.

    Raises:
        ValueError: An option is unknown, options are incompatible, logits that the weighting needs are missing, or an
            argument is of another type.

    Examples:
        >>> import torch
        >>> from mirror_modules import AdversarialWeights, PairedLogits
        >>> from mirror_modules.functional import discriminator_loss
        >>> undecided = PairedLogits(realism=torch.zeros(3), consistency=torch.zeros(3))
        >>> round(discriminator_loss(undecided, undecided).item(), 4)  # 4 * 1/2 log 2
        1.3863
        >>> discriminator_loss(undecided, undecided, objective="hinge").item()
        2.0
        >>> loss = discriminator_loss(undecided, undecided, mismatched=torch.zeros(5), weighting="gan-int-cls")
        >>> round(loss.item(), 4)  # (1 + 1/2 + 1/2) log 2
        1.3863
        >>> without_pairs = AdversarialWeights(1, 1, 0, 0, 0, 0)
        >>> round(discriminator_loss(undecided, undecided, weighting=without_pairs).item(), 4)  # 2 log 2
        1.3863
    """
    owner = "discriminator_loss"
    weights = _checked_weights(owner, weighting, through, objective)
    _check_logits(owner, real=real, fake=fake)
    if not isinstance(mismatched_weight, Tensor):
        check_number(owner, mismatched_weight=mismatched_weight)
    pairs = real.mismatched if mismatched is None else mismatched
    pair_realism, pair_consistency = pairs[:2] if isinstance(pairs, PairedLogits) else (None, pairs)
    if pair_consistency is not None:
        check_tensors(owner, mismatched=pair_consistency)
    total = partial(_total, owner, weighting, partial(_loss, through=through, objective=objective))
    positive = total(
        ("real.realism", weights.real_realism, real.realism, True),
        ("real.consistency", weights.real, real.consistency, True),
    )
    negative = total(
        ("fake.realism", weights.fake_realism, fake.realism, False),
        ("fake.consistency", weights.fake, fake.consistency, False),
    )
    if pair_consistency is None and weighting == "paper":
        return positive + negative
    if pair_consistency is not None and pair_consistency.numel() == 0:
        weights = replace(weights, mismatched=0, mismatched_realism=0)
    mismatched_loss = total(
        ("mismatched", weights.mismatched, pair_consistency, False),
        ("mismatched.realism", weights.mismatched_realism, pair_realism, True),
    )
    return positive + (negative + mismatched_weight * mismatched_loss)


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
        weighting: "paper"; "release" and "stackgan++" with weights of 1 in place of 1/2, as in published code;
            "gan-int-cls" for - E log D(I, s) alone; or `AdversarialWeights` of your own.
        through: See `discriminator_loss`.
        objective: See `discriminator_loss`.

    Returns:
        A scalar.

    Raises:
        ValueError: An option is unknown, options are incompatible, logits that the weighting needs are missing, or an
            argument is of another type.

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
    owner = "generator_loss"
    weights = _checked_weights(owner, weighting, through, objective)
    _check_logits(owner, fake=fake)
    consistency = weights.real if weights.generator is None else weights.generator
    realism = weights.real_realism if weights.generator_realism is None else weights.generator_realism
    return _total(
        owner,
        weighting,
        _generator_hinge if objective == "hinge" else partial(_loss, through=through, objective=objective),
        ("fake.realism", realism, fake.realism, True),
        ("fake.consistency", consistency, fake.consistency, True),
    )


def r1_penalty(images: Tensor, logits: PairedLogits) -> Tensor:
    """Penalize the discriminator's gradient at real images: the R1 penalty of Mescheder et al. (2018).

        R1 = 1/2 E || d (realism + consistency) / d image ||^2    consistency alone, if there is no realism

    Args:
        images: Real images, (B, 3, H, W), with `requires_grad`.
        logits: A discriminator's logits of these images.

    Returns:
        A scalar, at least 0. Its own gradient is a second derivative of the discriminator.

    Raises:
        ValueError: `images` do not require a gradient, `logits` do not depend on them, or are no `PairedLogits`.

    Examples:
        >>> import torch
        >>> from mirror_modules import PairedLogits
        >>> from mirror_modules.functional import r1_penalty
        >>> images = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> total = images.sum(dim=(1, 2, 3))
        >>> r1_penalty(images, PairedLogits(realism=total, consistency=total)).item()  # 1/2 * 48 * 2^2
        96.0
    """
    check_tensors("r1_penalty", images=images)
    _check_logits("r1_penalty", logits=logits)
    if not images.requires_grad:
        raise ValueError("r1_penalty: images must require a gradient; use images.detach().requires_grad_(True).")
    total = at_least_float32(logits.consistency).sum()
    if logits.realism is not None:
        total = at_least_float32(logits.realism).sum() + total
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "r1_penalty: logits do not depend on images; compute them from this very tensor, not in no_grad."
        )
    return 0.5 * at_least_float32(gradient).square().sum() / images.shape[0]


def _total(
    owner: str,
    weighting: Weighting,
    loss: Callable[[Tensor, bool], Tensor],
    *terms: tuple[str, float, Tensor | None, bool],
) -> Tensor:
    """The weighted sum of the losses of logits, each (name, weight, logits, whether their target is real)."""
    losses = []
    for name, weight, logits, is_real in terms:
        if logits is None and weight > 0:
            raise ValueError(
                f"{owner}: weighting={weighting!r} has a weight for {name}, but these logits are None; "
                f"{ADVICE.get(name, 'build the discriminator with realism=True')}, or use a weighting without them."
            )
        if logits is None:
            continue
        check_tensors(owner, **{name: logits})
        if not logits.is_floating_point():
            raise ValueError(f"{owner}: {name} must be floating point, but the logits are {logits.dtype}.")
        logits = at_least_float32(logits)
        # With weight 0, use an empty sum: zero, but still in the graph, which DDP requires.
        losses.append(weight * loss(logits, is_real) if weight > 0 else logits[:0].sum())
    return sum(losses[1:], start=losses[0]) if losses else torch.zeros(())


def _check_logits(owner: str, **logits: object) -> None:
    for name, value in logits.items():
        if not isinstance(value, PairedLogits):
            raise ValueError(
                f"{owner}: {name} must be PairedLogits, but it is a {type(value).__name__}; for logits of one kind, "
                "pass PairedLogits(realism=None, consistency=logits) and a weighting without realism."
            )


def _loss(logits: Tensor, is_real: bool, *, through: Through, objective: Objective) -> Tensor:
    """- E log D, or E max(0, 1 - logit) if the target is real; else - E log(1 - D), or E max(0, 1 + logit)."""
    signed = -logits if is_real else logits
    if objective == "hinge":
        return F.relu(1 + signed).mean()
    return F.softplus(signed).mean() if through == "logits" else _cross_entropy_of_probabilities(logits, float(is_real))


def _generator_hinge(logits: Tensor, is_real: bool) -> Tensor:
    return -logits.mean()


def _cross_entropy_of_probabilities(logits: Tensor, target: float) -> Tensor:
    # Autocast rejects this function even for float32 inputs, as these are.
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(torch.sigmoid(logits), torch.full_like(logits, target))


def _checked_weights(owner: str, weighting: Weighting, through: str, objective: str) -> AdversarialWeights:
    check_choice(owner, "through", through, ("logits", "probabilities"))
    check_choice(owner, "objective", objective, ("logistic", "hinge"))
    if objective == "hinge" and through == "probabilities":
        raise ValueError(f"{owner}: objective='hinge' is defined on logits; use through='logits'.")
    if isinstance(weighting, AdversarialWeights):
        return weighting
    check_choice(owner, "weighting", weighting, tuple(WEIGHTINGS))
    return WEIGHTINGS[weighting]
