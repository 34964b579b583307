"""Sampling of latents against recorded steps, explicit loops, and distributions with a known gradient."""

import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import Captioner, CascadedGenerator, DenoisingAutoencoder, LatentSampler, RedescriptionScore
from mirror_modules.functional import gaussian_prior, latent_step
from mirror_modules.stem import ConvBackbone

PARITY = Path(__file__).parents[1] / "parity"
CASES = ["plain", "plain_no_noise", "prior_only", "condition_only", "released", "released_strong_prior"]
B, D, STEPS = 3, 7, 5


class Recorded:
    """Generator, encoder and captioner of the recording: linear maps, and a ReLU in the encoder."""

    def __init__(self, dtype=torch.float32):
        with np.load(PARITY / "ppgn_update.npz") as file:
            record = {key: torch.from_numpy(file[key]) for key in file}
        self.record = {key: value.to(dtype) if value.is_floating_point() else value for key, value in record.items()}

    def make(self, latents):
        return latents @ self.record["generator_weight"].mT + self.record["generator_bias"]

    def denoise(self, latents):
        return F.relu(self.make(latents) @ self.record["encoder_weight"].mT + self.record["encoder_bias"])

    def score(self, images, words, lengths):
        scores_BV = images @ self.record["feature_weight"].mT @ self.record["word_weight"].mT
        # The word before the first has id 0.
        logits = scores_BV.unsqueeze(1) + self.record["previous_word_weight"][F.pad(words[:, :-1], (1, 0))]
        log_p = logits.log_softmax(dim=2).gather(2, words.unsqueeze(2)).squeeze(2)
        return log_p.where(torch.arange(words.shape[1]) < lengths.unsqueeze(1), 0.0).sum(dim=1)

    def options(self, case):
        prior, condition, noise = self.record[f"{case}/epsilons"].tolist()
        released = {"step_sizes": (1.0, 1e-10), "bounds": (0.0, 30.0)}
        plain = {"step_sizes": None}
        weights = {"prior_weight": prior, "condition_weight": condition, "noise_weight": noise}
        return {**weights, **(released if case.startswith("released") else plain)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_recorded_samples(case, dtype):
    toy = Recorded(dtype)
    record = toy.record
    sampler = LatentSampler(toy.make, toy.score, denoiser=toy.denoise, steps=6, **toy.options(case))
    samples = sampler(record["start"], record["words"], record["lengths"], noise=record["noise"])
    assert_recorded = partial(assert_close, atol=1e-5, rtol=1e-5)
    assert_recorded(samples.latents, record[f"{case}/latents"][-1])
    assert_recorded(samples.log_likelihood[0], record["log_likelihood_start"])
    assert_recorded(samples.log_likelihood[1:], record[f"{case}/log_likelihood"])


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps(case):
    toy = Recorded()
    record, options = toy.record, toy.options(case)
    sizes, before = options.pop("step_sizes"), record["start"]
    for i, after in enumerate(record[f"{case}/latents"]):
        before = before.requires_grad_()
        likelihood = toy.score(toy.make(before), record["words"], record["lengths"])
        (gradient,) = torch.autograd.grad(likelihood.sum(), before)
        size = None if sizes is None else 1 + (1e-10 - 1) * i / 5
        before = before.detach()
        moved = latent_step(before, toy.denoise(before), gradient, record["noise"][i], step_size=size, **options)
        assert_close(moved, after, atol=1e-5, rtol=1e-5)
        if i == 0:
            assert_close(gradient, record["condition_gradient_start"], atol=1e-5, rtol=1e-5)
            assert_close(toy.denoise(before) - before, record["prior_start"], atol=1e-5, rtol=1e-5)
        before = after.clone()


def step_by_loops(latents, denoised, gradient, noise, weights, size, bounds):
    result = torch.zeros_like(latents)
    for b in range(B):
        direction = [
            weights[0] * (float(r) - float(h)) + weights[1] * float(g) + weights[2] * float(e)
            for h, r, g, e in zip(latents[b], denoised[b], gradient[b], noise[b], strict=True)
        ]
        if size is not None:
            length = sum(abs(d) for d in direction) / D
            direction = [size * d / length for d in direction]
        for d in range(D):
            value = float(latents[b, d]) + direction[d]
            result[b, d] = value if bounds is None else min(max(value, bounds[0]), bounds[1])
    return result


@pytest.mark.parametrize(("size", "bounds"), list(product([None, 0.7], [None, (-0.3, 0.4)])))
def test_a_step_matches_the_loops(size, bounds):
    inputs = [torch.randn(B, D, dtype=torch.float64) for _ in range(4)]
    expected = step_by_loops(*inputs, (0.3, 0.5, 0.7), size, bounds)
    weights = {"prior_weight": 0.3, "condition_weight": 0.5, "noise_weight": 0.7}
    assert_close(latent_step(*inputs, **weights, step_size=size, bounds=bounds), expected)


def test_a_direction_of_zero_moves_nothing():
    latents, zero = torch.randn(B, D), torch.zeros(B, D)
    weights = {"prior_weight": 1.0, "condition_weight": 1.0}
    assert_close(latent_step(latents, latents, zero, **weights, step_size=1.0), latents, atol=0, rtol=0)


def test_gradients_of_a_step():
    inputs = [torch.randn(B, D, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weights = {"prior_weight": 0.3, "condition_weight": 0.5, "noise_weight": 0.7}
    assert gradcheck(lambda *args: latent_step(*args, **weights, step_size=0.9), inputs)


def test_the_gaussian_prior_is_the_regression_of_latents_on_noisy_latents():
    clean = torch.randn(200003, dtype=torch.float64)
    noisy = clean + 0.6 * torch.randn(200003, dtype=torch.float64)
    slope = (clean * noisy).sum() / noisy.square().sum()
    assert gaussian_prior(torch.ones(1), noise_level=0.6).item() == pytest.approx(slope.item(), abs=0.01)


def test_the_prior_step_is_the_gradient_of_the_density():
    """R(h) - h = s^2 d log N(h; 0, 1 + s^2) / dh."""
    latents = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    density = torch.distributions.Normal(0.0, math.sqrt(1 + 0.6**2)).log_prob(latents).sum()
    (gradient,) = torch.autograd.grad(density, latents)
    assert_close(gaussian_prior(latents, 0.6) - latents, 0.36 * gradient)


def test_a_trained_autoencoder_learns_the_gaussian_prior():
    autoencoder = DenoisingAutoencoder(2, hidden_dims=(31,))
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=0.01)
    for _ in range(400):
        latents = torch.randn(257, 2)
        optimizer.zero_grad()
        F.mse_loss(autoencoder(latents + torch.randn(257, 2)), latents).backward()
        optimizer.step()
    latents = torch.randn(1009, 2)
    error = F.mse_loss(autoencoder(latents), gaussian_prior(latents))
    assert error < 0.01
    assert F.mse_loss(latents, gaussian_prior(latents)) > 0.2


def likelihood(images, target):
    return -(images - target).square().flatten(1).sum(dim=1)


def test_only_the_prior_leads_to_its_mode():
    sampler = LatentSampler(torch.tanh, likelihood, prior_weight=1.0, condition_weight=0.0, steps=30, step_sizes=None)
    assert_close(sampler(torch.randn(B, D), 0.5).latents, torch.zeros(B, D), atol=1e-5, rtol=0)


def test_noise_alone_follows_the_prior():
    """Langevin sampling: with e1 = eps / (2 s^2 / (1 + s^2)), e3 = sqrt(eps), the latents are standard normal."""
    eps, level = 0.1, 1.0
    sampler = LatentSampler(
        torch.tanh,
        likelihood,
        prior_weight=eps / 2 * (1 + level**2) / level**2,
        condition_weight=0.0,
        noise_weight=math.sqrt(eps),
        steps=100,
        step_sizes=None,
    )
    latents = sampler(torch.full((2003, D), 3.0), 0.5).latents
    assert latents.mean().abs() < 0.05
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("step_sizes", [None, (0.3, 0.01)])
def test_a_sample_alone_equals_the_same_sample_in_a_batch(step_sizes):
    weights = {"prior_weight": 0.1, "condition_weight": 0.2, "noise_weight": 0.01}
    sampler = LatentSampler(torch.tanh, likelihood, steps=STEPS, step_sizes=step_sizes, **weights)
    start, target, noise = torch.randn(B, D), torch.randn(B, D), torch.randn(STEPS, B, D)
    together = sampler(start, target, noise=noise)
    alone = sampler(start[1:2], target[1:2], noise=noise[:, 1:2])
    assert_close(alone.latents, together.latents[1:2], atol=1e-6, rtol=0)
    assert_close(alone.log_likelihood, together.log_likelihood[:, 1:2], atol=1e-6, rtol=1e-6)


def test_a_generator_of_random_numbers_repeats_the_samples():
    sampler = LatentSampler(torch.tanh, likelihood, noise_weight=0.5, steps=STEPS)
    start = torch.randn(B, D)
    first, again = (sampler(start, 0.5, generator=torch.Generator().manual_seed(7)).latents for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sampler(start, 0.5, generator=torch.Generator().manual_seed(8)).latents)
    state = torch.get_rng_state()
    LatentSampler(torch.tanh, likelihood, steps=STEPS)(start, 0.5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_samples_without_gradients_around_it(mode):
    sampler, start = LatentSampler(torch.tanh, likelihood, steps=STEPS), torch.randn(B, D)
    expected = sampler(start, 0.5)
    with mode():
        samples = sampler(start.clone(), 0.5)
    assert_close(tuple(samples), tuple(expected), atol=0, rtol=0)
    assert not samples.latents.requires_grad
    assert not samples.log_likelihood.requires_grad


def test_the_captioner_finds_the_caption_more_likely_afterwards():
    generator = CascadedGenerator(D, 4, 6, channels=2, resolutions=(4, 8), attention="none").eval()
    captioner = Captioner(ConvBackbone(2, 2), 13, embedding_dim=4, hidden_dim=5)
    captions = torch.randint(3, 13, (17, 5))
    # Untrained, the captioner hardly depends on the image: float32 would hide the climb, and a larger prior undo it.
    generator, captioner = generator.double(), captioner.double()

    def make(latents):
        noise, condition = latents.split([D, 4], dim=1)
        return generator(noise, condition, latents.new_zeros(len(latents), 1, 6)).images[-1]

    sampler = LatentSampler(make, RedescriptionScore(captioner), prior_weight=1e-8, steps=20, step_sizes=(0.01, 1e-3))
    start = torch.randn(17, D + 4, dtype=torch.float64)
    samples = sampler(start, captions)
    assert samples.log_likelihood.shape == (21, 17)
    assert (samples.log_likelihood[-1] > samples.log_likelihood[0]).all()
    assert not torch.equal(samples.latents, start)
    assert all(parameter.grad is None for parameter in [*generator.parameters(), *captioner.parameters()])


def test_the_autoencoder_matches_the_loops():
    module = DenoisingAutoencoder(D, hidden_dims=(5, 3)).requires_grad_(False)
    latents = torch.randn(B, D)
    for row, expected in zip(latents, module(latents), strict=True):
        values = row.tolist()
        linears = [layer for layer in module.layers if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linears):
            values = [
                sum(float(w) * value for w, value in zip(weights, values, strict=True)) + float(bias)
                for weights, bias in zip(layer.weight, layer.bias, strict=True)
            ]
            values = values if i == len(linears) - 1 else [max(value, 0.0) for value in values]
        assert values == pytest.approx(expected.tolist(), abs=1e-5)


START = torch.zeros(B, D)
WEIGHTS = {"prior_weight": 1.0, "condition_weight": 1.0}


def sample(make=torch.tanh, score=likelihood, start=START, **options):
    noise = options.pop("noise", None)
    return LatentSampler(make, score, steps=STEPS, **options)(start, 0.5, noise=noise)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"prior_weight must be at least 0, but it is -1", lambda: sample(prior_weight=-1)),
        (r"noise_weight must be a finite number", lambda: sample(noise_weight=math.nan)),
        (r"step_sizes must be at least 0, but they are \(1.0, -1.0\)", lambda: sample(step_sizes=(1.0, -1.0))),
        (r"bounds must be \(smallest, largest\), but they are \(3, 3\)", lambda: sample(bounds=(3, 3))),
        (r"bounds must be \(smallest, largest\), but they are 30", lambda: sample(bounds=30)),
        (r"step_sizes must be \(first, last\), but they are 0\.1", lambda: sample(step_sizes=0.1)),
        (r"step_sizes\[1\] must be a finite number, but it is nan", lambda: sample(step_sizes=(1.0, math.nan))),
        (r"noise must be a tensor, but it is a int", lambda: sample(noise=0)),
        (
            r"generator must be a torch\.Generator or None, but it is a int",
            lambda: LatentSampler(torch.tanh, likelihood, steps=STEPS)(START, 0.5, generator=7),
        ),
        (r"steps must be a whole number of at least 1", lambda: LatentSampler(torch.tanh, likelihood, steps=0)),
        (r"latents must be floats \(B, ...\), but they are torch.float32 \(7,\)", lambda: sample(start=START[0])),
        (r"noise must be \(5, 3, 7\), \(steps, B, ...\), but it is \(3, 7\)", lambda: sample(noise=START)),
        (
            r"score must return one value per sample \(3,\), but it returned \(\)",
            lambda: sample(score=lambda images, target: images.sum()),
        ),
        (r"the score does not depend on the latents; make and", lambda: sample(make=lambda latents: latents.detach())),
    ],
)
def test_errors_of_the_sampler(message, call):
    with pytest.raises(ValueError, match="LatentSampler: " + message):
        call()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"latent_step: gradient must have the shape of latents \(3, 7\), but it is \(3, 1\)",
            lambda: latent_step(START, START, START[:, :1], prior_weight=1.0, condition_weight=1.0),
        ),
        (
            r"latent_step: latents must be \(B, \.\.\.\) with at least two axes, but they are \(7,\)",
            lambda: latent_step(START[0], START[0], START[0], **WEIGHTS, step_size=0.1),
        ),
        (
            r"latent_step: bounds must be \(smallest, largest\), but they are \(1, -1\)",
            lambda: latent_step(START, START, START, **WEIGHTS, bounds=(1, -1)),
        ),
        (r"latent_step: noise must be a tensor", lambda: latent_step(START, START, START, 0, **WEIGHTS)),
        (
            r"latent_step: step_size must be a finite",
            lambda: latent_step(START, START, START, **WEIGHTS, step_size="1"),
        ),
        (r"gaussian_prior: .* noise_level positive, but .* 0", lambda: gaussian_prior(START, 0)),
        (r"gaussian_prior: latents must be floating point", lambda: gaussian_prior(START.long())),
        (r"DenoisingAutoencoder: hidden_dims\[1\] must be a whole number", lambda: DenoisingAutoencoder(3, (4, 0))),
        (r"DenoisingAutoencoder: hidden_dims must be a sequence .* it is 64", lambda: DenoisingAutoencoder(3, 64)),
        (r"DenoisingAutoencoder: latents has 7 features but", lambda: DenoisingAutoencoder(3, (4,))(START)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
