"""Conditions of sentences against explicit sums and recorded results."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import ConditioningAugmentation, SentenceProjection
from mirror_modules.functional import interpolate_sentences, kl_divergence

PARITY = Path(__file__).parents[1] / "parity"
B, D, E = 3, 5, 7


def recorded(name):
    with np.load(PARITY / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


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


# Activations of other systems


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_match_the_loops(activation):
    module = ConditioningAugmentation(D, E, activation=activation).requires_grad_(False)
    sentence, noise = torch.randn(B, D), torch.randn(B, E)
    condition = module(sentence, noise=noise)
    assert module.linear.weight.shape == (2 * E, D)

    def activated(b, n):
        value = sum(float(module.linear.weight[n, d] * sentence[b, d]) for d in range(D)) + float(module.linear.bias[n])
        return max(value, 0.0) if activation == "relu" else value if value > 0 else 0.2 * value

    for b, e in product(range(B), range(E)):
        mean, spread = activated(b, e), activated(b, E + e)
        deviation = math.exp(spread / 2 if activation == "relu" else spread)
        assert condition.mean[b, e].item() == pytest.approx(mean, abs=1e-5)
        assert condition.log_variance[b, e].item() == pytest.approx(2 * math.log(deviation), abs=1e-5)
        assert condition.sample[b, e].item() == pytest.approx(mean + deviation * noise[b, e].item(), abs=1e-5)


@pytest.mark.parametrize("name", ["stackgan_conditioning", "stackgan_conditioning_original"])
def test_recorded_conditions(name):
    record = recorded(name)
    module = ConditioningAugmentation(12, 5, activation="leaky_relu" if name.endswith("original") else "relu")
    weight, bias = (record.get(f"state/fc.{part}", record.get(part)) for part in ("weight", "bias"))
    module.load_state_dict({"linear.weight": weight, "linear.bias": bias})
    condition = module(record["sentence"], noise=record["epsilon"])
    for field, value in condition._asdict().items():
        assert_close(value, record[field], atol=1e-6, rtol=1e-6)
    assert_close(kl_divergence(condition.mean, condition.log_variance), record["kl"], atol=1e-6, rtol=1e-6)
    if "kl_sum_over_features" in record:
        summed = kl_divergence(condition.mean, condition.log_variance, reduction="sum")
        assert_close(summed, record["kl_sum_over_features"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("activation", "largest"), [("glu", 3.0), ("relu", 3.0), ("leaky_relu", 2.0)])
def test_only_the_noise_of_leaky_relu_is_cut_off(activation, largest):
    condition = ConditioningAugmentation(D, E, activation=activation)(torch.randn(1, D).expand(20011, D))
    noise = (condition.sample - condition.mean) / (condition.log_variance / 2).exp()
    assert (noise.abs().max() < 2.001) == (largest == 2.0)
    # The standard error is 0.007. A standard normal cut off at 2 has a standard deviation of 0.88.
    assert_close(noise.mean(dim=0), torch.zeros(E), atol=0.04, rtol=0)
    assert_close(noise.std(dim=0), torch.full((E,), 0.88 if largest == 2.0 else 1.0), atol=0.04, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_compile_into_one_graph(compiled, activation):
    module, sentence = ConditioningAugmentation(D, E, activation=activation), torch.randn(B, D)
    condition = compiled(module)(sentence)
    assert_close(condition.mean, module(sentence).mean)
    condition.sample.square().sum().backward()
    assert module.linear.weight.grad.abs().sum() > 0


# Sentences without a distribution


@pytest.mark.parametrize("batch_norm", [False, True])
def test_projection_matches_the_loops(batch_norm):
    module, sentence = SentenceProjection(D, E, batch_norm=batch_norm).requires_grad_(False), torch.randn(B, D)
    weight, bias = module.linear.weight, module.linear.bias
    linear = [[sum(float(weight[e, d] * s[d]) for d in range(D)) + float(bias[e]) for e in range(E)] for s in sentence]
    condition = module(sentence)
    for e in range(E):
        column = [row[e] for row in linear]
        if batch_norm:
            mean = sum(column) / B
            variance = sum((value - mean) ** 2 for value in column) / B
            column = [(value - mean) / math.sqrt(variance + 1e-5) for value in column]
        for b, value in enumerate(column):
            assert condition[b, e].item() == pytest.approx(value if value > 0 else 0.2 * value, abs=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_projected_sentence_alone_equals_the_same_sentence_in_a_batch(batch_norm):
    module, sentence = SentenceProjection(D, E, batch_norm=batch_norm).eval(), torch.randn(B, D)
    assert_close(module(sentence[:1]), module(sentence)[:1], atol=1e-6, rtol=0)
    assert module.train()(sentence[:1]).isfinite().all()


def test_gradients_of_the_projection():
    module = SentenceProjection(D, E, batch_norm=True).double()
    assert gradcheck(module, torch.randn(B, D, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("kind", ["middle", "number", "tensor"])
def test_mixtures_match_the_loops(count, kind):
    sentence, pairs = torch.randn(count, D), count // 2
    offset = {"middle": 0.0, "number": 0.3, "tensor": torch.rand(pairs) * 2 - 1}[kind]
    mixtures = interpolate_sentences(sentence, *([] if kind == "middle" else [offset]))
    assert mixtures.shape == (pairs, D)
    for i, d in product(range(pairs), range(D)):
        first, second = float(sentence[i, d]), float(sentence[i + pairs, d])
        share = float(offset[i]) if kind == "tensor" else offset
        assert mixtures[i, d].item() == pytest.approx((first + second) / 2 + share * (second - first), abs=1e-6)


def test_recorded_mixtures():
    record = recorded("gan_int_cls_losses")
    assert_close(interpolate_sentences(record["sentence"]), record["interpolated"], atol=1e-6, rtol=0)
    extrapolated = interpolate_sentences(record["sentence"], record["alpha"])
    assert_close(extrapolated, record["extrapolated"], atol=1e-6, rtol=0)


def test_gradients_of_mixtures():
    inputs = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((7, D), (3,))]
    assert gradcheck(interpolate_sentences, inputs)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"text_dim must be a whole number of at least 1, but it is 0", lambda: ConditioningAugmentation(0)),
        (r"condition_dim must be a whole number .* it is -3", lambda: ConditioningAugmentation(D, -3)),
        (
            r"activation must be one of 'glu', 'relu', 'leaky_relu', but it is 'tanh'",
            lambda: ConditioningAugmentation(D, E, activation="tanh"),
        ),
        (r"SentenceProjection: text_dim must be a whole number", lambda: SentenceProjection(0)),
        (r"SentenceProjection: sentence has 7 features but", lambda: SentenceProjection(D)(torch.zeros(B, 7))),
        (
            r"interpolate_sentences: sentence must be \(B, D\) with at least two rows, but it is \(1, 5\)",
            lambda: interpolate_sentences(torch.zeros(1, D)),
        ),
        (
            r"offset must be a number or \(1,\), one per pair of the 3 sentences, but it is \(3,\)",
            lambda: interpolate_sentences(torch.zeros(B, D), torch.zeros(B)),
        ),
        (r"offset must be a finite number", lambda: interpolate_sentences(torch.zeros(B, D), math.inf)),
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
            r"kl_divergence: mean is \(3, 5, 7\) .*; both are \(B, E\)",
            lambda: kl_divergence(torch.zeros(B, D, E), torch.zeros(B, D, E), reduction="sum"),
        ),
        (
            r"ConditioningAugmentation: noise must be a tensor, but it is a int",
            lambda: ConditioningAugmentation(D, E)(torch.zeros(B, D), noise=0),
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
