"""Conditioning augmentation and its KL divergence against explicit sums."""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import ConditioningAugmentation
from mirror_modules.functional import kl_divergence

B, D, E = 3, 5, 7


def kl_by_loops(mean, log_variance, reduction):
    total = sum(
        0.5 * (mean[b, e].item() ** 2 + math.exp(log_variance[b, e]) - 1 - log_variance[b, e].item())
        for b, e in product(range(B), range(E))
    )
    return total / (B * E if reduction == "mean" else B)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_divergence_matches_the_loops(reduction):
    mean, log_variance = torch.randn(B, E), torch.randn(B, E)
    value = kl_divergence(mean, log_variance, reduction=reduction)
    assert value.item() == pytest.approx(kl_by_loops(mean, log_variance, reduction), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_divergence_matches_the_distributions_of_torch(reduction):
    mean, log_variance = torch.randn(B, E), torch.randn(B, E)
    normal, standard = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    elements = torch.distributions.kl_divergence(normal, standard)
    expected = elements.mean() if reduction == "mean" else elements.sum(dim=1).mean()
    assert_close(kl_divergence(mean, log_variance, reduction=reduction), expected)


def test_kl_divergence_of_the_standard_normal_is_zero():
    assert kl_divergence(torch.zeros(B, E), torch.zeros(B, E)).item() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_kl_divergence(reduction):
    inputs = [torch.randn(B, E, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(lambda *args: kl_divergence(*args, reduction=reduction), inputs)


def test_kl_divergence_sums_half_precision_in_float32():
    mean = torch.full((B, 1009), 0.1, dtype=torch.bfloat16)
    value = kl_divergence(mean, torch.zeros_like(mean))
    assert value.dtype == torch.float32
    assert_close(value, kl_divergence(mean.float(), torch.zeros(B, 1009)))


def test_the_sample_matches_the_loops():
    module, sentence, noise = ConditioningAugmentation(D, E).requires_grad_(False), torch.randn(B, D), torch.randn(B, E)
    condition = module(sentence, noise=noise)

    def linear(b, n):
        return sum(float(module.linear.weight[n, d] * sentence[b, d]) for d in range(D)) + float(module.linear.bias[n])

    def gated(b, n):
        return linear(b, n) / (1 + math.exp(-linear(b, 2 * E + n)))

    for b, e in product(range(B), range(E)):
        mean, log_variance = gated(b, e), gated(b, E + e)
        assert condition.mean[b, e].item() == pytest.approx(mean, abs=1e-5)
        assert condition.log_variance[b, e].item() == pytest.approx(log_variance, abs=1e-5)
        expected = mean + math.exp(log_variance / 2) * noise[b, e].item()
        assert condition.sample[b, e].item() == pytest.approx(expected, abs=1e-5)


def test_zero_noise_gives_the_mean():
    condition = ConditioningAugmentation(D, E)(torch.randn(B, D), noise=torch.zeros(B, E))
    assert_close(condition.sample, condition.mean, atol=0, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_each_call_samples_new_noise_unless_it_is_given(training):
    module, sentence, noise = ConditioningAugmentation(D, E).train(training), torch.randn(B, D), torch.randn(B, E)
    assert not torch.equal(module(sentence).sample, module(sentence).sample)
    assert torch.equal(module(sentence, noise=noise).sample, module(sentence, noise=noise).sample)


def test_samples_have_the_returned_mean_and_variance():
    condition = ConditioningAugmentation(D, E)(torch.randn(1, D).expand(20011, D))
    standardized = (condition.sample - condition.mean) / (condition.log_variance / 2).exp()
    # The standard error is 0.007.
    assert_close(standardized.mean(dim=0), torch.zeros(E), atol=0.04, rtol=0)
    assert_close(standardized.std(dim=0), torch.ones(E), atol=0.04, rtol=0)


def test_a_sentence_alone_equals_the_same_sentence_in_a_batch():
    module, sentence, noise = ConditioningAugmentation(D, E), torch.randn(B, D), torch.randn(B, E)
    together, alone = module(sentence, noise=noise), module(sentence[:1], noise=noise[:1])
    assert_close(tuple(alone), tuple(part[:1] for part in together), atol=1e-5, rtol=0)


def test_compiles_into_one_graph(compiled):
    module, sentence, noise = ConditioningAugmentation(D, E), torch.randn(B, D), torch.randn(B, E)

    def objective(sentence, noise):
        condition = module(sentence, noise=noise)
        return condition.sample.sum() + kl_divergence(condition.mean, condition.log_variance)

    loss = compiled(objective)(sentence, noise)
    assert_close(loss, objective(sentence, noise))
    loss.backward()
    assert module.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"text_dim must be a whole number of at least 1, but it is 0", lambda: ConditioningAugmentation(0)),
        (r"condition_dim must be a whole number .* it is -3", lambda: ConditioningAugmentation(D, -3)),
        (r"sentence has 7 features but .* text_dim=5", lambda: ConditioningAugmentation(D, E)(torch.zeros(B, 7))),
        (r"sentence must be \(B, D\), but it is \(5,\)", lambda: ConditioningAugmentation(D, E)(torch.zeros(D))),
        (
            r"noise is \(3, 5\), expected \(3, 7\) \(B, E\)",
            lambda: ConditioningAugmentation(D, E)(torch.zeros(B, D), noise=torch.zeros(B, D)),
        ),
        (
            r"kl_divergence: mean is \(3, 5\) but log_variance is \(3, 7\)",
            lambda: kl_divergence(torch.zeros(B, D), torch.zeros(B, E)),
        ),
        (
            r"kl_divergence: reduction must be one of 'mean', 'sum', but it is 'none'",
            lambda: kl_divergence(torch.zeros(B, E), torch.zeros(B, E), reduction="none"),
        ),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
