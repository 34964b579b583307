"""Noise of a seed: independent of the other images of a batch, and truncated by its quantiles."""

import math

import pytest
import torch
from torch.testing import assert_close

from mirror_modules.models.noise import sample_noise


def test_each_row_depends_on_its_seed_alone():
    rows = sample_noise("", 3, 7, 5, None)
    for i, row in enumerate(rows):
        assert torch.equal(sample_noise("", 1, 7, 5 + i, None)[0], row)
    assert torch.equal(sample_noise("", 2, 7, [7, 5], None), rows[[2, 0]])


def test_without_a_seed_the_noise_is_new():
    first, other = (sample_noise("", 3, 7, None, None) for _ in range(2))
    assert first.shape == (3, 7)
    assert not torch.equal(first, other)


def test_truncated_noise_has_the_truncated_normal_distribution_and_keeps_the_order():
    bound = 0.7
    plain, noise = (sample_noise("", 2, 4001, 0, truncation) for truncation in (None, bound))
    assert noise.abs().max() <= bound
    # Standard deviation of a standard normal truncated to [-b, b]: 1 - 2 b phi(b) / (2 Phi(b) - 1).
    density, mass = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi), math.erf(bound / math.sqrt(2))
    assert float(noise.std()) == pytest.approx(math.sqrt(1 - 2 * bound * density / mass), rel=0.05)
    assert torch.equal(noise.flatten().argsort(), plain.flatten().argsort())
    assert_close(sample_noise("", 2, 4001, 0, 50.0), plain)
