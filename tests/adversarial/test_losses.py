"""The adversarial objective against its logarithms, written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import PairedDiscriminator, PairedLogits
from mirror_modules.functional import discriminator_loss, generator_loss, r1_penalty

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


def minus_margin(logits, *, real):
    """The hinge, by loops."""
    return sum(max(0.0, 1 - logit if real else 1 + logit) for logit in logits.tolist()) / len(logits)


@pytest.mark.parametrize(("weighting", "share"), [("paper", 2), ("release", 3)])
def test_hinge_losses_match_the_loops(weighting, share):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)
    options = {"weighting": weighting, "objective": "hinge"}
    accepted = sum(minus_margin(logits, real=True) for logits in real)
    rejected = sum(minus_margin(logits, real=False) for logits in (*fake, mismatched))
    loss = discriminator_loss(real, fake, mismatched, **options)
    assert loss.item() == pytest.approx(accepted / 2 + rejected / share, rel=1e-5)
    expected = -sum(sum(logits.tolist()) / FAKE for logits in fake) / (2 if weighting == "paper" else 1)
    assert generator_loss(fake, **options).item() == pytest.approx(expected, rel=1e-5)


def test_a_hinge_asks_for_no_more_than_its_margin():
    sure = PairedLogits(torch.tensor([1.5], requires_grad=True), torch.tensor([1.5], requires_grad=True))
    discriminator_loss(sure, PairedLogits(*(-logits for logits in sure)), objective="hinge").backward()
    assert [logits.grad.item() for logits in sure] == [0, 0]
    generator_loss(sure, objective="hinge").backward()
    assert [logits.grad.item() for logits in sure] == [-0.5, -0.5]


@pytest.mark.parametrize("weight", [0.25, torch.tensor(1.75)])
def test_the_weight_of_mismatched_pairs_is_theirs_alone(weight):
    real, fake, mismatched = draw(REAL), draw(FAKE), torch.randn(MISMATCHED)
    without = discriminator_loss(real, fake)
    expected = without + weight * minus_log(mismatched, real=False) / 2
    assert_close(discriminator_loss(real, fake, mismatched, mismatched_weight=weight), expected)


def test_weighted_parts_are_the_whole():
    """Parts of a batch with different numbers of mismatched pairs, each weighted by its share."""
    real, fake, mismatched = draw(6), draw(6), torch.randn(5)
    whole = discriminator_loss(real, fake, mismatched)
    parts = []
    for i, pairs in enumerate((mismatched[:1], mismatched[1:])):
        half = slice(3 * i, 3 * i + 3)
        rows = [PairedLogits(*(logits[half] for logits in pair)) for pair in (real, fake)]
        parts.append(discriminator_loss(*rows, pairs, mismatched_weight=2 * len(pairs) / 5))
    assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("objective", ["logistic", "hinge"])
def test_no_mismatched_pairs_weigh_nothing(objective):
    real, fake, none = draw(REAL), draw(FAKE), torch.empty(0, requires_grad=True)
    without = discriminator_loss(real, fake, objective=objective)
    loss = discriminator_loss(real, fake, none, objective=objective, mismatched_weight=torch.tensor(0.0))
    assert_close(loss, without, atol=0, rtol=0)
    assert without.isfinite()
    # Processes that train together need the same graph from all.
    loss.backward()
    assert none.grad is not None


def test_r1_is_half_the_squared_gradient():
    weights = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    verdict = PairedLogits((weights * images.square()).sum((1, 2, 3)), 3 * images.sum((1, 2, 3)))
    total = 0.0
    for image, weight in zip(images.tolist(), weights.tolist()):
        for plane, of_plane in zip(image, weight):
            for row, of_row in zip(plane, of_plane):
                total += sum((2 * w * x + 3) ** 2 for x, w in zip(row, of_row)) / 2
    penalty = r1_penalty(images, verdict)
    assert penalty.item() == pytest.approx(total / 2, rel=1e-9)
    (gradient,) = torch.autograd.grad(penalty, images)
    assert_close(gradient, (2 * weights * images + 3) * 2 * weights / 2)


def test_r1_reaches_the_discriminator(network):
    judge, images, sentence = network
    images = images.requires_grad_(True)
    r1_penalty(images, judge(images, sentence)).backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in judge.named_parameters() if "bias" not in name)


@pytest.fixture
def network():
    judge = PairedDiscriminator(8, 5, channels=2, normalization="none").double()
    return judge, torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)


def test_r1_needs_a_gradient_of_the_images():
    with pytest.raises(ValueError, match=r"r1_penalty: images need a gradient; judge images\.detach"):
        r1_penalty(torch.rand(2, 3, 4, 4), draw(2))


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
        (r"objective must be one of 'logistic', 'hinge', but it is 'wasserstein'", {"objective": "wasserstein"}),
        ("the hinge loss is one of logits", {"objective": "hinge", "through": "probabilities"}),
    ],
)
def test_unknown_options_raise(message, options):
    with pytest.raises(ValueError, match="discriminator_loss: " + message):
        discriminator_loss(draw(REAL), draw(FAKE), **options)
    with pytest.raises(ValueError, match="generator_loss: " + message):
        generator_loss(draw(FAKE), **options)


def test_release_needs_mismatched_pairs():
    with pytest.raises(ValueError, match=r"weighting='release' averages over mismatched pairs too; give some"):
        discriminator_loss(draw(REAL), draw(FAKE), weighting="release")
