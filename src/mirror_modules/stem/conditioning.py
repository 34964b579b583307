"""Conditioning augmentation: a distribution of conditions around each sentence (MirrorGAN, Sec. 3.1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    at_least_float32,
    check_choice,
    check_features,
    check_positive,
    check_precision,
    check_tensors,
    shape_of,
)
from mirror_modules._pretrained import FromModelFolder
from mirror_modules._typing import TypedCall


class Condition(NamedTuple):
    """A sample from the conditioning distribution of each sentence, and the parameters of that distribution."""

    sample: Tensor
    """mean + exp(log_variance / 2) * noise. (B, E)"""
    mean: Tensor
    """Mean of the distribution. (B, E)"""
    log_variance: Tensor
    """Logarithm of its variance, per element. (B, E)"""


def kl_divergence(mean: Tensor, log_variance: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Compute the KL divergence of N(mean, variance) from N(0, I), which keeps conditions close to a standard normal.

        KL = 1/2 (mean^2 + variance - 1 - log variance)    per element

    Args:
        mean: Mean of the distribution, (B, E).
        log_variance: Logarithm of its variance, (B, E).
        reduction: "mean" over all elements, as in the published code, or "sum" over the features and mean over the
            batch.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: Shapes disagree, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import kl_divergence
        >>> kl_divergence(torch.zeros(2, 5), torch.zeros(2, 5))  # the standard normal itself
        tensor(0.)
        >>> kl_divergence(torch.ones(2, 5), torch.zeros(2, 5), reduction="sum")
        tensor(2.5000)
    """
    check_choice("kl_divergence", "reduction", reduction, ("mean", "sum"))
    check_tensors("kl_divergence", mean=mean, log_variance=log_variance)
    if mean.shape != log_variance.shape:
        raise ValueError(f"kl_divergence: mean is {shape_of(mean)} but log_variance is {shape_of(log_variance)}.")
    mean, log_variance = at_least_float32(mean), at_least_float32(log_variance)
    elements = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return elements.mean() if reduction == "mean" else elements.sum(dim=1).mean()


class ConditioningAugmentation(FromModelFolder, TypedCall, nn.Module):
    """Sample a condition from a learned normal distribution around the sentence (MirrorGAN, Sec. 3.1).

        sample = mu(s) + sigma(s) * eps,    eps ~ N(0, I)

    `mu` and `log sigma^2` come from one linear layer with a gated linear unit.

    Args:
        text_dim: Features D of the sentence.
        condition_dim: Features E of the condition.

    Raises:
        ValueError: A size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from mirror_modules import ConditioningAugmentation
        >>> augmentation = ConditioningAugmentation(text_dim=64, condition_dim=20)
        >>> sentence = torch.randn(3, 64)
        >>> augmentation(sentence).sample.shape
        torch.Size([3, 20])
        >>> condition = augmentation(sentence, noise=torch.zeros(3, 20))
        >>> bool((condition.sample == condition.mean).all())
        True
    """

    def __init__(self, text_dim: int, condition_dim: int = 100) -> None:
        super().__init__()
        check_positive("ConditioningAugmentation", text_dim=text_dim, condition_dim=condition_dim)
        self.text_dim, self.condition_dim = text_dim, condition_dim
        self.linear = nn.Linear(text_dim, 4 * condition_dim)

    def forward(self, sentence: Tensor, *, noise: Tensor | None = None) -> Condition:
        """Sample a condition.

        Args:
            sentence: Sentence features, (B, D).
            noise: Standard normal noise eps, (B, E); None samples it, also in eval mode. Zeros give the mean.

        Returns:
            The sample, the mean and the log variance, each (B, E).

        Raises:
            ValueError: Sizes disagree.
        """
        check_features("ConditioningAugmentation", "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        check_precision("ConditioningAugmentation", self.linear, sentence=sentence)
        mean, log_variance = F.glu(self.linear(sentence), dim=1).chunk(2, dim=1)
        if noise is None:
            noise = torch.randn_like(mean)
        elif noise.shape != mean.shape:
            raise ValueError(f"ConditioningAugmentation: noise is {shape_of(noise)}, expected {shape_of(mean)} (B, E).")
        return Condition(mean + torch.exp(0.5 * log_variance) * noise, mean, log_variance)
