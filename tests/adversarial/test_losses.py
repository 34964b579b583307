"""The adversarial objective against its logarithms, written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import PairedLogits
from mirror_modules.functional import discriminator_loss, generator_loss

REAL, FAKE, MISMATCHED = 3, 5, 2  # different primes: the batches need not be equally large
WAYS = ["logits", "probabilities"]


def draw(count, dtype=torch.float32):
    return PairedLogits(*(torch.randn(count, dtype=dtype, requires_grad=True) for _ in range(2)))


def minus_log(logits, *, real):
    """- E log D, or - E log(1 - D), by loops."""
    total = 0.0
    for logit in logits.tolist():
        probability = 1 / (1 + math.exp(-logit))
        total -= math.log(probability if real else 1 - probability)
    return total / len(logits)


def discriminator_loss_by_loops(real, fake, mismatched, weighting):
    accepted = [minus_log(logits, real=True) for logits in real]
    rejected = [minus_log(logits, real=False) for logits in fake]
    if mismatched is not None:
        rejected.append(minus_log(mismatched, real=False))
    return sum(accepted) / 2 + sum(rejected) / (2 if weighting == "paper" else 3)


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize(("weighting", "with_mismatched"), [("paper", False), ("paper", True), ("release", True)])
def test_discriminator_loss_matches_the_loops(weighting, with_mismatched, through):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED) if with_mismatched else None
    loss = discriminator_loss(real, fake, mismatched, weighting=weighting, through=through)
    assert loss.item() == pytest.approx(discriminator_loss_by_loops(real, fake, mismatched, weighting), rel=1e-5)


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize(("weighting", "weight"), [("paper", 0.5), ("release", 1.0)])
def test_generator_loss_matches_the_loops(weighting, weight, through):
    fake = draw(FAKE)
    expected = weight * sum(minus_log(logits, real=True) for logits in fake)
    assert generator_loss(fake, weighting=weighting, through=through).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize("weighting", ["paper", "release"])
def test_gradients(weighting, through):
    real, fake = draw(REAL, torch.float64), draw(FAKE, torch.float64)
    mismatched = torch.randn(MISMATCHED, dtype=torch.float64, requires_grad=True)

    def judge(a, b, c, d, e):
        pairs = PairedLogits(a, b), PairedLogits(c, d)
        return discriminator_loss(*pairs, e, weighting=weighting, through=through)

    assert gradcheck(judge, (*real, *fake, mismatched))
    assert gradcheck(lambda *f: generator_loss(PairedLogits(*f), weighting=weighting, through=through), tuple(fake))


def test_no_mismatched_pairs_weigh_nothing():
    real, fake = draw(REAL), draw(FAKE)
    without = discriminator_loss(real, fake)
    assert_close(discriminator_loss(real, fake, torch.empty(0)), without, atol=0, rtol=0)
    assert without.isfinite()


def test_extreme_logits_stay_finite_and_keep_their_gradient():
    real = PairedLogits(*torch.full((2, REAL), -1e4, requires_grad=True))
    fake = PairedLogits(*torch.full((2, FAKE), 1e4, requires_grad=True))
    assert discriminator_loss(real, fake).item() == pytest.approx(2e4)
    hopeless = torch.full((FAKE,), -1e4, requires_grad=True)
    generator_loss(PairedLogits(hopeless, hopeless)).backward()
    assert_close(hopeless.grad, torch.full((FAKE,), -1 / FAKE))


def test_probabilities_end_at_a_hundred():
    hopeless = torch.full((FAKE,), -1e4)
    assert generator_loss(PairedLogits(hopeless, hopeless), through="probabilities").item() == pytest.approx(100.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("through", WAYS)
def test_half_precision_is_summed_in_float32(dtype, through):
    logits = torch.linspace(-3, 3, 1009).to(dtype)
    half, full = PairedLogits(logits, logits), PairedLogits(logits.float(), logits.float())
    loss = generator_loss(half, through=through)
    assert loss.dtype == torch.float32
    assert_close(loss, generator_loss(full, through=through))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(discriminator_loss(half, half, through=through), discriminator_loss(full, full, through=through))


@pytest.mark.parametrize("through", WAYS)
def test_compiles_into_one_graph(compiled, through):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)

    def objective(real, fake, mismatched):
        return discriminator_loss(real, fake, mismatched, through=through) + generator_loss(fake, through=through)

    loss = compiled(objective)(real, fake, mismatched)
    assert_close(loss, objective(real, fake, mismatched))
    loss.backward()
    assert real.realism.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"weighting must be one of 'paper', 'release', but it is 'ours'", {"weighting": "ours"}),
        (r"through must be one of 'logits', 'probabilities', but it is 'sigmoid'", {"through": "sigmoid"}),
    ],
)
def test_unknown_options_raise(message, options):
    with pytest.raises(ValueError, match="discriminator_loss: " + message):
        discriminator_loss(draw(REAL), draw(FAKE), **options)
    with pytest.raises(ValueError, match="generator_loss: " + message):
        generator_loss(draw(FAKE), **options)


@pytest.mark.parametrize("mismatched", [None, torch.empty(0)])
def test_release_needs_mismatched_pairs(mismatched):
    with pytest.raises(ValueError, match=r"weighting='release' averages over mismatched pairs too; give some"):
        discriminator_loss(draw(REAL), draw(FAKE), mismatched, weighting="release")
