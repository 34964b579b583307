"""A network in training: what one step does, and what a step that is not finite leaves alone."""

import copy

import pytest
import torch
from torch import nn

from mirror_modules.training.recipes import EngineRecipe
from mirror_modules.training.trainee import MovingAverage, enroll, untouched_unless
from mirror_modules.training.world import ALONE

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def make(largest=None, **options):
    return enroll(
        nn.Linear(3, 2), ALONE, EngineRecipe(**options), learning_rate=0.1, largest_gradient_norm=largest, cycle=9
    )


def take_a_step(trainee, factor=1.0, **options):
    trainee.optimizer.zero_grad()
    loss = (trainee.parallel(torch.ones(5, 3)) * factor).sum()
    trainee.backward(loss)
    return trainee.descend(loss, **options)


def weights(trainee):
    return copy.deepcopy({**trainee.module.state_dict(), **trainee.optimizer.state_dict()["state"]})


def same(one, other):
    return all(
        all(torch.equal(value[key], other[name][key]) for key in value)
        if isinstance(value, dict)
        else torch.equal(value, other[name])
        for name, value in one.items()
    )


def test_a_step_is_one_of_adam():
    trainee = make()
    plain = copy.deepcopy(trainee.module)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, pct_start=0.2)
    for _ in range(5):
        norm, finite = take_a_step(trainee)
        optimizer.zero_grad()
        plain(torch.ones(5, 3)).sum().backward()
        optimizer.step()
        assert trainee.learning_rate == schedule.get_last_lr()[0]
        schedule.step()
        # Two rows of weights and two biases, each with five samples of ones.
        assert norm.item() == pytest.approx((8 * 25) ** 0.5)
        assert finite
    for mine, theirs in zip(trainee.module.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("factor", NOT_FINITE)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_that_is_not_finite_moves_nothing(factor, precision):
    trainee = make(precision=precision, largest=1.0)
    take_a_step(trainee, 1e-3)
    before = weights(trainee)
    _, finite = take_a_step(trainee, factor)
    assert not finite
    assert same(before, weights(trainee))
    _, finite = take_a_step(trainee, 1e-3)
    assert finite
    assert not same(before, weights(trainee))


def test_a_loss_that_is_not_finite_is_one_whatever_its_gradient():
    trainee = make()
    take_a_step(trainee)
    before = weights(trainee)
    trainee.optimizer.zero_grad()
    loss = trainee.parallel(torch.ones(5, 3)).sum()
    trainee.backward(loss)
    _, finite = trainee.descend(loss + float("nan"))
    assert not finite
    assert same(before, weights(trainee))


def test_what_was_not_finite_before_keeps_it_where_it_is():
    trainee = make()
    take_a_step(trainee)
    before = weights(trainee)
    _, finite = take_a_step(trainee, so_far=[torch.tensor(True), torch.tensor(False)])
    assert not finite
    assert same(before, weights(trainee))
    _, finite = take_a_step(trainee, so_far=[torch.tensor(True)])
    assert finite


def test_a_float16_scale_shrinks_until_the_gradient_fits():
    trainee = make(precision="float16")
    trainee.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    outcomes = [bool(take_a_step(trainee)[1]) for _ in range(9)]
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]
    assert outcomes[-1]


def test_a_long_gradient_is_shortened_and_its_length_told():
    trainee = make(largest=0.5)
    norm, _ = take_a_step(trainee)
    assert norm.item() == pytest.approx(200**0.5)
    shortened = torch.cat([parameter.grad.flatten() for parameter in trainee.module.parameters()]).norm()
    assert shortened.item() == pytest.approx(0.5, rel=1e-4)


def test_a_state_goes_on_elsewhere():
    one, other = make(precision="float16"), make(precision="float16")
    take_a_step(one, float("inf"))
    take_a_step(one)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.scaler.get_scale() == one.scaler.get_scale()
    for trainee in (one, other):
        take_a_step(trainee)
    assert one.learning_rate == other.learning_rate
    assert same(weights(one), weights(other))


@pytest.mark.parametrize("flags", [[True, True], [True, False], [False, True]])
def test_statistics_go_back_unless_all_was_finite(flags):
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(5, 3))
    before = copy.deepcopy(dict(norm.named_buffers()))
    with untouched_unless([norm]) as finite:
        norm(torch.randn(5, 3) + float("inf"))
        finite += [torch.tensor(flag) for flag in flags]
    after = dict(norm.named_buffers())
    assert all(torch.equal(before[name], after[name]) != all(flags) for name in before)


def average_by_loops(values, decay):
    """The formula, number by number."""
    average = values[0]
    for n, value in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value
    return average


@pytest.mark.parametrize("decay", [0.16, 0.999])
def test_an_average_follows_weights_and_statistics(decay):
    network = nn.BatchNorm1d(1)
    average = MovingAverage(network, decay)
    seen = [[network.weight.item(), network.running_mean.item()]]
    for _ in range(7):
        with torch.no_grad():
            network.weight.add_(torch.randn(1))
        network(torch.randn(5, 1))
        average.update(network, torch.tensor(True))
        seen.append([network.weight.item(), network.running_mean.item()])
    assert average.module.weight.item() == pytest.approx(average_by_loops([w for w, _ in seen], decay), rel=1e-5)
    assert average.module.running_mean.item() == pytest.approx(average_by_loops([m for _, m in seen], decay), rel=1e-4)
    assert average.module.num_batches_tracked == 7
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_an_average_stands_still_in_a_skipped_step():
    network = nn.Linear(3, 2)
    average = MovingAverage(network, 0.9)
    before = copy.deepcopy(average.module.state_dict())
    with torch.no_grad():
        network.weight.add_(1)
    average.update(network, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())


def test_layout_and_frozen_weights():
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3))
    module[0].requires_grad_(False)
    trainee = enroll(module, ALONE, EngineRecipe(), learning_rate=0.1)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [parameter.shape for group in trainee.optimizer.param_groups for parameter in group["params"]] == [
        (2, 5, 3, 3),
        (2,),
    ]
    as_it_is = enroll(nn.Conv2d(3, 5, 3), ALONE, EngineRecipe(channels_last=False), learning_rate=0.1)
    assert as_it_is.module.weight.is_contiguous()
