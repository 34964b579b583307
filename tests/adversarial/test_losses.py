"""The adversarial objective against explicit sums of logarithms."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import AdversarialWeights, PairedDiscriminator, PairedLogits
from mirror_modules.functional import discriminator_loss, generator_loss, r1_penalty

REAL, FAKE, MISMATCHED = 3, 5, 2  # different primes: batch sizes may differ
THROUGH = ["logits", "probabilities"]
PARITY = Path(__file__).parents[1] / "parity"


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
        (
            r"weighting must be one of 'paper', 'release', 'gan-int-cls', 'stackgan\+\+', but it is 'ours'",
            {"weighting": "ours"},
        ),
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
    with pytest.raises(
        ValueError, match=r"'release' has a weight for mismatched, but these logits are None; pass `mism"
    ):
        discriminator_loss(draw(REAL), draw(FAKE), weighting="release")


LOGITS = torch.zeros(3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"discriminator_loss: real must be PairedLogits, but it is a Tensor; .*PairedLogits\(realism=None",
            lambda: discriminator_loss(LOGITS, LOGITS),
        ),
        (r"discriminator_loss: fake must be PairedLogits", lambda: discriminator_loss(draw(REAL), LOGITS)),
        (r"discriminator_loss: mismatched must be a tensor", lambda: discriminator_loss(draw(2), draw(2), [0.0, 1.0])),
        (
            r"discriminator_loss: mismatched_weight must be a finite number, but it is nan",
            lambda: discriminator_loss(draw(2), draw(2), LOGITS, mismatched_weight=math.nan),
        ),
        (
            r"discriminator_loss: real\.consistency must be floating point, but the logits are torch\.int64",
            lambda: discriminator_loss(PairedLogits(LOGITS, LOGITS.long()), draw(2)),
        ),
        (r"generator_loss: fake must be PairedLogits, but it is a tuple", lambda: generator_loss((LOGITS, LOGITS))),
        (r"generator_loss: fake\.realism must be a tensor", lambda: generator_loss(PairedLogits([0.0], LOGITS))),
        (r"r1_penalty: images must be a tensor", lambda: r1_penalty([0.0], draw(2))),
        (r"r1_penalty: logits must be PairedLogits", lambda: r1_penalty(torch.zeros(2, requires_grad=True), LOGITS)),
    ],
)
def test_arguments_of_another_type_raise(message, call):
    with pytest.raises(ValueError, match=message):
        call()


# Weights of other systems


def weighted_loss_by_loops(real, fake, mismatched, weights):
    terms = [
        (weights.real, real.consistency, True),
        (weights.real_realism, real.realism, True),
        (weights.fake, fake.consistency, False),
        (weights.fake_realism, fake.realism, False),
        (weights.mismatched, mismatched.consistency, False),
        (weights.mismatched_realism, mismatched.realism, True),
    ]
    return sum(weight * minus_log(logits, real=is_real) for weight, logits, is_real in terms)


WEIGHTS = {
    "gan-int-cls": AdversarialWeights(1, 0.5, 0.5, 0, 0, 0),
    "stackgan++": AdversarialWeights(1, 1, 1, 1, 1, 1),
    "six primes": AdversarialWeights(2, 3, 5, 7, 11, 13),
}


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", WEIGHTS)
def test_six_weights_match_the_loops(name, through):
    real, fake, mismatched = draw(REAL), draw(FAKE), draw(MISMATCHED)
    expected = weighted_loss_by_loops(real, fake, mismatched, WEIGHTS[name])
    weightings = [WEIGHTS[name]] if name == "six primes" else [WEIGHTS[name], name]
    for weighting in weightings:
        loss = discriminator_loss(real, fake, mismatched, weighting=weighting, through=through)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        positive = minus_log(fake.consistency, real=True), minus_log(fake.realism, real=True)
        expected_generator = WEIGHTS[name].real * positive[0] + WEIGHTS[name].real_realism * positive[1]
        loss = generator_loss(fake, weighting=weighting, through=through)
        assert loss.item() == pytest.approx(expected_generator, rel=1e-5)


def test_the_weights_of_the_generator_may_differ():
    weights, fake = AdversarialWeights(2, 3, 5, 7, 11, 13, generator=17, generator_realism=19), draw(FAKE)
    expected = 17 * minus_log(fake.consistency, real=True) + 19 * minus_log(fake.realism, real=True)
    assert generator_loss(fake, weighting=weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["paper", "release"])
def test_published_weights_by_name_equal_the_same_numbers(name):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)
    third, generator = (1 / 2, None) if name == "paper" else (1 / 3, 1)
    weights = AdversarialWeights(1 / 2, third, third, 1 / 2, third, 0, generator, generator)
    for loss in (partial(discriminator_loss, real, fake, mismatched), partial(generator_loss, fake)):
        assert_close(loss(weighting=weights), loss(weighting=name), atol=0, rtol=0)


def test_mismatched_weight_scales_consistency_and_realism_of_mismatched_pairs():
    real, fake, mismatched = draw(REAL), draw(FAKE), draw(MISMATCHED)
    weights = AdversarialWeights(2, 3, 5, 7, 11, 13)
    without = weighted_loss_by_loops(real, fake, mismatched, replace(weights, mismatched=0, mismatched_realism=0))
    whole = weighted_loss_by_loops(real, fake, mismatched, weights)
    loss = discriminator_loss(real, fake, mismatched, weighting=weights, mismatched_weight=0.25)
    assert loss.item() == pytest.approx(without + 0.25 * (whole - without), rel=1e-5)


def test_logits_of_weight_zero_may_be_missing_or_stay_in_the_graph():
    real, fake = draw(REAL), draw(FAKE)
    weights = AdversarialWeights(1, 1, 0, 0, 0, 0)
    loss = discriminator_loss(real, fake, weighting=weights) + generator_loss(fake, weighting=weights)
    bare = [PairedLogits(None, logits.consistency) for logits in (real, fake)]
    expected = discriminator_loss(*bare, weighting=weights) + generator_loss(bare[1], weighting=weights)
    assert_close(loss, expected, atol=0, rtol=0)
    loss.backward()
    assert (real.realism.grad == 0).all()
    assert (fake.realism.grad == 0).all()
    with pytest.raises(
        ValueError, match=r"generator_loss: weighting='paper' has a weight for fake.realism, but .* build"
    ):
        generator_loss(bare[1])
    with pytest.raises(
        ValueError, match=r"weighting='stackgan\+\+' has a weight for real.realism, but these logits are"
    ):
        discriminator_loss(*bare, torch.zeros(2), weighting="stackgan++")
    with pytest.raises(ValueError, match=r"mismatched.realism, but .* pass mismatched=PairedLogits\(realism, consist"):
        discriminator_loss(real, fake, torch.zeros(2), weighting="stackgan++")


def test_an_empty_batch_of_mismatched_pairs_with_realism_adds_zero():
    real, fake, empty = draw(REAL), draw(FAKE), draw(0)
    loss = discriminator_loss(real, fake, empty, weighting="stackgan++")
    without = replace(WEIGHTS["stackgan++"], mismatched=0, mismatched_realism=0)
    assert_close(loss, discriminator_loss(real, fake, weighting=without), atol=0, rtol=0)
    loss.backward()
    assert empty.realism.grad is not None
    assert empty.consistency.grad is not None


@pytest.mark.parametrize(
    ("message", "weights"),
    [
        ("AdversarialWeights: fake must be at least 0, but it is -1", (1, -1, 0, 0, 0, 0)),
        ("AdversarialWeights: mismatched_realism must be a finite number", (1, 1, 0, 0, 0, math.inf)),
        ("AdversarialWeights: generator must be a finite number, but it is 'one'", (1, 1, 0, 0, 0, 0, "one")),
    ],
)
def test_unsuitable_weights_raise(message, weights):
    with pytest.raises(ValueError, match=message):
        AdversarialWeights(*weights)


def test_recorded_losses_of_gan_int_cls():
    with np.load(PARITY / "gan_int_cls_losses.npz") as file:
        record = {key: torch.from_numpy(file[key]) for key in file}
    real, wrong, fake, own, mixed = (
        PairedLogits(None, record[f"{name}_logits"]) for name in ("real", "wrong", "fake", "own", "interpolated")
    )
    loss = discriminator_loss(real, fake, wrong, weighting="gan-int-cls")
    assert_close(loss, record["discriminator_loss"], atol=1e-6, rtol=0)
    loss = discriminator_loss(real, fake, weighting=AdversarialWeights(1, 1, 0, 0, 0, 0))
    assert_close(loss, record["discriminator_loss_without_wrong"], atol=1e-6, rtol=0)
    own_loss, mixed_loss = (generator_loss(logits, weighting="gan-int-cls") for logits in (own, mixed))
    assert_close(own_loss + mixed_loss, record["generator_loss_sum_of_means"], atol=1e-6, rtol=0)
    for name, weight in (("0", 0.0), ("half", 0.5), ("1", 1.0)):
        # Of the published code, which divides by the number of all images.
        loss = 2 / 3 * own_loss + weight / 3 * mixed_loss
        assert_close(loss, record[f"generator_loss_weight_{name}"], atol=1e-6, rtol=0)


def test_r1_without_realism_is_that_of_consistency():
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    total = images.sum(dim=(1, 2, 3))
    assert r1_penalty(images, PairedLogits(None, total)).item() == 24
