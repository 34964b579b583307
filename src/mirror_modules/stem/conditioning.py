"""Conditions of sentences: conditioning augmentation (MirrorGAN, Sec. 3.1), projection, and mixtures of sentences."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    at_least_float32,
    check_choice,
    check_features,
    check_number,
    check_positive,
    check_precision,
    check_tensors,
    shape_of,
)
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules._pretrained import FromModelFolder
from mirror_modules._typing import TypedCall

Activation = Literal["glu", "relu", "leaky_relu"]
# Bounds of the truncated noise of the "leaky_relu" variant.
LARGEST_NOISE = 2.0


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
    if mean.ndim != 2 or mean.shape != log_variance.shape:
        raise ValueError(
            f"kl_divergence: mean is {shape_of(mean)} but log_variance is {shape_of(log_variance)}; both are (B, E)."
        )
    mean, log_variance = at_least_float32(mean), at_least_float32(log_variance)
    elements = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return elements.mean() if reduction == "mean" else elements.sum(dim=1).mean()


def interpolate_sentences(sentence: Tensor, offset: float | Tensor = 0.0) -> Tensor:
    """Mix the first half of a batch of sentences with the second half (GAN-INT-CLS, Reed et al., ICML 2016, Sec. 4.3).

        mixture_i = (s_i + s_j) / 2 + offset_i * (s_j - s_i),    j = i + B // 2

    Images of mixtures have no real counterpart: only the generator's adversarial loss scores them, which makes the
    generator fill the gaps between the captions.

    Args:
        sentence: Sentence features, (B, D), of at least two sentences. The last of an odd number is not mixed.
        offset: 0 is the middle, -1/2 the first and 1/2 the second sentence of a pair, and beyond is extrapolation: a
            number, or one per pair, (B // 2,). The published code has 0, or `torch.rand(B // 2) * 2 - 1`.

    Returns:
        (B // 2, D).

    Raises:
        ValueError: `sentence` is not (B, D) with at least two rows, or `offset` has another size.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import interpolate_sentences
        >>> sentence = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
        >>> interpolate_sentences(sentence).tolist()
        [[2.0], [3.0]]
        >>> interpolate_sentences(sentence, torch.tensor([0.5, 1.0])).tolist()
        [[4.0], [7.0]]
    """
    owner = "interpolate_sentences"
    check_tensors(owner, sentence=sentence)
    if sentence.ndim != 2 or sentence.shape[0] < 2:
        raise ValueError(f"{owner}: sentence must be (B, D) with at least two rows, but it is {shape_of(sentence)}.")
    pairs = sentence.shape[0] // 2
    first, second = sentence[:pairs], sentence[pairs : 2 * pairs]
    if isinstance(offset, Tensor):
        if offset.shape != (pairs,):
            raise ValueError(
                f"{owner}: offset must be a number or ({pairs},), one per pair of the {sentence.shape[0]} sentences, "
                f"but it is {shape_of(offset)}."
            )
        offset = offset.unsqueeze(1).to(sentence.dtype)
    else:
        check_number(owner, offset=offset)
    return (first + second) / 2 + offset * (second - first)


class ConditioningAugmentation(FromModelFolder, TypedCall, nn.Module):
    """Sample a condition from a learned normal distribution around the sentence (MirrorGAN, Sec. 3.1).

        sample = mu(s) + sigma(s) * eps,    eps ~ N(0, I)

    `mu` and `log sigma^2` come from one linear layer and an activation, of which there are three in published code:

        activation      range                             used by
        "glu"           all numbers                       StackGAN++, AttnGAN, MirrorGAN: gated linear unit
        "relu"          mu >= 0, sigma >= 1               StackGAN in PyTorch
        "leaky_relu"    all numbers, slope 0.2 below 0    StackGAN in TensorFlow

    The last predicts log sigma, which is doubled for `log_variance`, and its noise is cut off at two deviations.

    Args:
        text_dim: Features D of the sentence.
        condition_dim: Features E of the condition.
        activation: "glu", "relu" or "leaky_relu".

    Raises:
        ValueError: A size is not a whole number of at least 1, or `activation` is unknown.

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

    def __init__(self, text_dim: int, condition_dim: int = 100, *, activation: Activation = "glu") -> None:
        super().__init__()
        check_positive("ConditioningAugmentation", text_dim=text_dim, condition_dim=condition_dim)
        check_choice("ConditioningAugmentation", "activation", activation, ("glu", "relu", "leaky_relu"))
        self.text_dim, self.condition_dim, self.activation = text_dim, condition_dim, activation
        self.linear = nn.Linear(text_dim, (4 if activation == "glu" else 2) * condition_dim)

    def forward(self, sentence: Tensor, *, noise: Tensor | None = None) -> Condition:
        """Sample a condition.

        Args:
            sentence: Sentence features, (B, D).
            noise: Standard normal noise eps, (B, E); None samples it, also in eval mode, with "leaky_relu" between -2
                and 2. Zeros give the mean.

        Returns:
            The sample, the mean and the log variance, each (B, E).

        Raises:
            ValueError: Sizes disagree.
        """
        check_features("ConditioningAugmentation", "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        check_precision("ConditioningAugmentation", self.linear, sentence=sentence)
        predicted = self.linear(sentence)
        if self.activation == "glu":
            mean, log_variance = F.glu(predicted, dim=1).chunk(2, dim=1)
        elif self.activation == "relu":
            mean, log_variance = F.relu(predicted).chunk(2, dim=1)
        else:
            mean, log_deviation = F.leaky_relu(predicted, 0.2).chunk(2, dim=1)
            log_variance = 2 * log_deviation
        if noise is None:
            noise = _truncated_normal_like(mean) if self.activation == "leaky_relu" else torch.randn_like(mean)
        check_tensors("ConditioningAugmentation", noise=noise)
        if noise.shape != mean.shape:
            raise ValueError(f"ConditioningAugmentation: noise is {shape_of(noise)}, expected {shape_of(mean)} (B, E).")
        return Condition(mean + torch.exp(0.5 * log_variance) * noise, mean, log_variance)


def _truncated_normal_like(tensor: Tensor) -> Tensor:
    """Standard normal noise between -2 and 2, by the inverse of its distribution function."""
    share = math.erf(LARGEST_NOISE / math.sqrt(2))
    uniform = 2 * torch.rand_like(tensor, dtype=torch.float32) - 1
    return (math.sqrt(2) * torch.erfinv(share * uniform)).to(tensor.dtype)


class SentenceProjection(TypedCall, nn.Module):
    """Compress a sentence without a distribution around it (GAN-INT-CLS, Reed et al., ICML 2016, Sec. 4.1).

        condition = LeakyReLU(W s + b)    slope 0.2 below 0; with batch norm before it, if asked for

    In place of `ConditioningAugmentation` where a system draws nothing and has no KL divergence.

    Args:
        text_dim: Features D of the sentence.
        condition_dim: Features E of the condition.
        batch_norm: Normalize over the batch, as the published discriminators do.

    Raises:
        ValueError: A size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from mirror_modules import SentenceProjection
        >>> SentenceProjection(text_dim=64, condition_dim=20)(torch.randn(3, 64)).shape
        torch.Size([3, 20])
    """

    def __init__(self, text_dim: int, condition_dim: int = 128, *, batch_norm: bool = False) -> None:
        super().__init__()
        check_positive("SentenceProjection", text_dim=text_dim, condition_dim=condition_dim)
        self.text_dim, self.condition_dim = text_dim, condition_dim
        self.linear = nn.Linear(text_dim, condition_dim)
        self.norm = FeatureBatchNorm(condition_dim) if batch_norm else None

    def forward(self, sentence: Tensor) -> Tensor:
        """Compress a sentence.

        Args:
            sentence: Sentence features, (B, D).

        Returns:
            The condition, (B, E).

        Raises:
            ValueError: Sizes disagree.
        """
        check_features("SentenceProjection", "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        check_precision("SentenceProjection", self.linear, sentence=sentence)
        projected = self.linear(sentence)
        return F.leaky_relu(projected if self.norm is None else self.norm(projected), 0.2)
