"""A weight that follows the norms of two gradients: against the formula, and where there is nothing to follow."""

import math

import pytest
import torch

from mirror_modules.training.balance import RATE, GradientBalance
from mirror_modules.training.world import ALONE

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def pull(balance, adversarial, other, count=3):
    """A step in which the two losses pull at each of the images with these gradients' norms."""
    images = torch.zeros(count, 3, 5, 7, requires_grad=True) * 1
    judged, read = balance.watch(images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    loss = adversarial * (judged * direction).sum() - balance.weight * other * (read * direction.roll(1, 0)).sum()
    loss.backward()


def test_the_ratio_is_that_of_the_weighted_gradients():
    balance = GradientBalance(3.0, None, ALONE)
    pull(balance, adversarial=5.0, other=2.0)
    assert float(balance.follow(TRUE)) == pytest.approx(3.0 * 2.0 / 5.0)
    assert float(balance.weight) == 3.0


def test_parts_of_a_batch_count_together():
    """One of 3 images with norms 5 and 2 each, one of 7 with 1 and 11: squares are added."""
    balance = GradientBalance(1.0, None, ALONE)
    pull(balance, 5.0, 2.0, count=3)
    pull(balance, 1.0, 11.0, count=7)
    expected = math.sqrt((3 * 4 + 7 * 121) / (3 * 25 + 7 * 1))
    assert float(balance.follow(TRUE)) == pytest.approx(expected)


def test_the_weight_follows_the_formula_and_arrives():
    balance, weight = GradientBalance(1.0, 0.25, ALONE), 1.0
    for _ in range(80):
        pull(balance, adversarial=5.0, other=2.0)
        found = float(balance.follow(TRUE))
        assert found == pytest.approx(weight * 2.0 / 5.0, rel=1e-4)
        weight *= (0.25 / found) ** RATE
        assert float(balance.weight) == pytest.approx(weight, rel=1e-4)
    assert found == pytest.approx(0.25, rel=1e-3)


def test_a_step_that_was_skipped_moves_nothing():
    balance = GradientBalance(1.0, 0.25, ALONE)
    pull(balance, 5.0, 2.0)
    balance.follow(FALSE)
    assert float(balance.weight) == 1.0


@pytest.mark.parametrize(
    ("adversarial", "other"), [(0.0, 2.0), (5.0, 0.0), (0.0, 0.0), (math.nan, 2.0), (5.0, math.inf)]
)
def test_where_one_is_silent_the_weight_stays(adversarial, other):
    balance = GradientBalance(1.5, 0.25, ALONE)
    pull(balance, adversarial, other)
    balance.follow(TRUE)
    assert float(balance.weight) == 1.5
    pull(balance, 5.0, 2.0)
    balance.follow(TRUE)
    assert float(balance.weight) == pytest.approx(1.5 * (0.25 / 0.6) ** RATE)


def test_half_precision_does_not_overflow():
    balance = GradientBalance(1.0, 0.5, ALONE)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.float16, requires_grad=True) * 1
    judged, read = balance.watch(images)
    ((judged.float() * 6e4).sum() + (read.float() * 3e4).sum()).backward()
    assert float(balance.follow(TRUE)) == pytest.approx(0.5, rel=1e-3)
