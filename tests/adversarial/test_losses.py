"""The adversarial objective against explicit sums of logarithms."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import PairedDiscriminator, PairedLogits
from mirror_modules.functional import discriminator_loss, generator_loss, r1_penalty

REAL, FAKE, MISMATCHED = 3, 5, 2  # different primes: batch sizes may differ
THROUGH = ["logits", "probabilities"]


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
    positive = [minus_log(logits, real=True) for logits in real[:2]]
    negative = [minus_log(logits, real=False) for logits in fake[:2]]
    if mismatched is not None:
        negative.append(minus_log(mismatched, real=False))
    return sum(positive) / 2 + sum(negative) / (2 if weighting == "paper" else 3)


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize(("weighting", "with_mismatched"), [("paper", False), ("paper", True), ("release", True)])
def test_discriminator_loss_matches_the_loops(weighting, with_mismatched, through):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED) if with_mismatched else None
    loss = discriminator_loss(real, fake, mismatched, weighting=weighting, through=through)
    assert loss.item() == pytest.approx(discriminator_loss_by_loops(real, fake, mismatched, weighting), rel=1e-5)


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize(("weighting", "weight"), [("paper", 0.5), ("release", 1.0)])
def test_generator_loss_matches_the_loops(weighting, weight, through):
    fake = draw(FAKE)
    expected = weight * sum(minus_log(logits, real=True) for logits in fake[:2])
    assert generator_loss(fake, weighting=weighting, through=through).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("weighting", ["paper", "release"])
def test_gradients(weighting, through):
    real, fake = draw(REAL, torch.float64), draw(FAKE, torch.float64)
    mismatched = torch.randn(MISMATCHED, dtype=torch.float64, requires_grad=True)

    def loss_of(a, b, c, d, e):
        return discriminator_loss(PairedLogits(a, b), PairedLogits(c, d), e, weighting=weighting, through=through)

    assert gradcheck(loss_of, (*real[:2], *fake[:2], mismatched))
    assert gradcheck(lambda *f: generator_loss(PairedLogits(*f), weighting=weighting, through=through), fake[:2])


def hinge(logits, *, real):
    """E max(0, 1 - logit), or E max(0, 1 + logit), by loops."""
    return sum(max(0.0, 1 - logit if real else 1 + logit) for logit in logits.tolist()) / len(logits)


@pytest.mark.parametrize(("weighting", "divisor"), [("paper", 2), ("release", 3)])
def test_hinge_losses_match_the_loops(weighting, divisor):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)
    options = {"weighting": weighting, "objective": "hinge"}
    positive = sum(hinge(logits, real=True) for logits in real[:2])
    negative = sum(hinge(logits, real=False) for logits in (*fake[:2], mismatched))
    loss = discriminator_loss(real, fake, mismatched, **options)
    assert loss.item() == pytest.approx(positive / 2 + negative / divisor, rel=1e-5)
    expected = -sum(sum(logits.tolist()) / FAKE for logits in fake[:2]) / (2 if weighting == "paper" else 1)
    assert generator_loss(fake, **options).item() == pytest.approx(expected, rel=1e-5)


def test_the_hinge_has_no_gradient_beyond_its_margin():
    confident = PairedLogits(torch.tensor([1.5], requires_grad=True), torch.tensor([1.5], requires_grad=True))
    discriminator_loss(confident, PairedLogits(*(-logits for logits in confident[:2])), objective="hinge").backward()
    assert [logits.grad.item() for logits in confident[:2]] == [0, 0]
    generator_loss(confident, objective="hinge").backward()
    assert [logits.grad.item() for logits in confident[:2]] == [-0.5, -0.5]


@pytest.mark.parametrize("weight", [0.25, torch.tensor(1.75)])
def test_mismatched_weight_scales_only_their_term(weight):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)
    without = discriminator_loss(real, fake)
    expected = without + weight * minus_log(mismatched, real=False) / 2
    assert_close(discriminator_loss(real, fake, mismatched, mismatched_weight=weight), expected)


def test_weighted_micro_batches_equal_the_whole_batch():
    """Micro-batches with different numbers of mismatched pairs, each weighted by its fraction of them."""
    real, fake, mismatched = draw(6), draw(6), torch.randn(5)
    whole = discriminator_loss(real, fake, mismatched)
    parts = []
    for i, pairs in enumerate((mismatched[:1], mismatched[1:])):
        half = slice(3 * i, 3 * i + 3)
        rows = [PairedLogits(*(logits[half] for logits in pair[:2])) for pair in (real, fake)]
        parts.append(discriminator_loss(*rows, pairs, mismatched_weight=2 * len(pairs) / 5))
    assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("weighting", ["paper", "release"])
def test_mismatched_pairs_may_come_with_the_real_ones(weighting):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)
    expected = discriminator_loss(real, fake, mismatched, weighting=weighting)
    together = real._replace(mismatched=mismatched)
    assert_close(discriminator_loss(together, fake, weighting=weighting), expected, atol=0, rtol=0)
    # Such as the valid ones of them.
    some = discriminator_loss(together, fake, mismatched[:1], weighting=weighting)
    assert_close(some, discriminator_loss(real, fake, mismatched[:1], weighting=weighting), atol=0, rtol=0)


@pytest.mark.parametrize("objective", ["logistic", "hinge"])
def test_an_empty_batch_of_mismatched_pairs_adds_zero_and_stays_in_the_graph(objective):
    real, fake, empty = draw(REAL), draw(FAKE), torch.empty(0, requires_grad=True)
    without = discriminator_loss(real, fake, objective=objective)
    loss = discriminator_loss(real, fake, empty, objective=objective, mismatched_weight=torch.tensor(0.0))
    assert_close(loss, without, atol=0, rtol=0)
    assert without.isfinite()
    # DDP needs the same graph on every rank.
    loss.backward()
    assert empty.grad is not None


def test_r1_is_half_the_squared_gradient():
    weights = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    logits = PairedLogits((weights * images.square()).sum((1, 2, 3)), 3 * images.sum((1, 2, 3)))
    total = 0.0
    for image, weight in zip(images.tolist(), weights.tolist()):
        for plane, weight_plane in zip(image, weight):
            for row, weight_row in zip(plane, weight_plane):
                total += sum((2 * w * x + 3) ** 2 for x, w in zip(row, weight_row)) / 2
    penalty = r1_penalty(images, logits)
    assert penalty.item() == pytest.approx(total / 2, rel=1e-9)
    (gradient,) = torch.autograd.grad(penalty, images)
    assert_close(gradient, (2 * weights * images + 3) * 2 * weights / 2)


def test_r1_has_a_gradient_for_every_weight_of_the_discriminator():
    discriminator = PairedDiscriminator(8, 5, channels=2, normalization="none").double()
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    r1_penalty(images, discriminator(images, torch.randn(3, 5, dtype=torch.float64))).backward()
    weights = [parameter for name, parameter in discriminator.named_parameters() if "bias" not in name]
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_r1_requires_images_with_a_gradient():
    with pytest.raises(ValueError, match=r"r1_penalty: images must require a gradient; use images\.detach"):
        r1_penalty(torch.rand(2, 3, 4, 4), draw(2))


def test_r1_requires_logits_of_these_images():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="r1_penalty: logits do not depend on images; compute them from this very"):
        r1_penalty(images, draw(2))
    with pytest.raises(ValueError, match="r1_penalty: logits do not depend on images"):
        r1_penalty(images, PairedLogits(torch.zeros(2), torch.zeros(2)))


def test_extreme_logits_stay_finite_and_keep_their_gradient():
    real = PairedLogits(*torch.full((2, REAL), -1e4, requires_grad=True))
    fake = PairedLogits(*torch.full((2, FAKE), 1e4, requires_grad=True))
    assert discriminator_loss(real, fake).item() == pytest.approx(2e4)
    rejected = torch.full((FAKE,), -1e4, requires_grad=True)
    generator_loss(PairedLogits(rejected, rejected)).backward()
    assert_close(rejected.grad, torch.full((FAKE,), -1 / FAKE))


def test_losses_through_probabilities_are_at_most_100():
    rejected = torch.full((FAKE,), -1e4)
    assert generator_loss(PairedLogits(rejected, rejected), through="probabilities").item() == pytest.approx(100.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("through", THROUGH)
def test_half_precision_is_summed_in_float32(dtype, through):
    logits = torch.linspace(-3, 3, 1009).to(dtype)
    half, full = PairedLogits(logits, logits), PairedLogits(logits.float(), logits.float())
    loss = generator_loss(half, through=through)
    assert loss.dtype == torch.float32
    assert_close(loss, generator_loss(full, through=through))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(discriminator_loss(half, half, through=through), discriminator_loss(full, full, through=through))


@pytest.mark.parametrize("through", THROUGH)
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
        (r"objective must be one of 'logistic', 'hinge', but it is 'wasserstein'", {"objective": "wasserstein"}),
        (
            "objective='hinge' is defined on logits; use through='logits'",
            {"objective": "hinge", "through": "probabilities"},
        ),
    ],
)
def test_unknown_options_raise(message, options):
    with pytest.raises(ValueError, match="discriminator_loss: " + message):
        discriminator_loss(draw(REAL), draw(FAKE), **options)
    with pytest.raises(ValueError, match="generator_loss: " + message):
        generator_loss(draw(FAKE), **options)


def test_release_needs_mismatched_pairs():
    with pytest.raises(ValueError, match=r"weighting='release' averages over mismatched pairs too; pass `mismatched`"):
        discriminator_loss(draw(REAL), draw(FAKE), weighting="release")
