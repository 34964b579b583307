"""A network in training: its optimizer step, skipped non-finite steps, clipping, and the moving average."""

import copy

import pytest
import torch
from torch import nn

from mirror_modules.training.distributed import SINGLE_PROCESS
from mirror_modules.training.network import MovingAverage, frozen, prepare, restoring_buffers
from mirror_modules.training.recipes import EngineRecipe

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def make(max_grad_norm=None, **options):
    return prepare(
        nn.Linear(3, 2),
        SINGLE_PROCESS,
        EngineRecipe(**options),
        learning_rate=0.1,
        max_grad_norm=max_grad_norm,
        cycle=9,
    )


def train_step(network, factor=1.0, **options):
    network.optimizer.zero_grad()
    loss = (network.parallel(torch.ones(5, 3)) * factor).sum()
    network.backward(loss)
    return network.optimizer_step(loss, **options)


def tensors(network):
    """Weights and optimizer state."""
    return copy.deepcopy({**network.module.state_dict(), **network.optimizer.state_dict()["state"]})


def same(one, other):
    return all(
        all(torch.equal(value[key], other[name][key]) for key in value)
        if isinstance(value, dict)
        else torch.equal(value, other[name])
        for name, value in one.items()
    )


def test_a_step_matches_adam_with_a_one_cycle_schedule():
    network = make()
    plain = copy.deepcopy(network.module)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, pct_start=0.2)
    for _ in range(5):
        norm, finite = train_step(network)
        optimizer.zero_grad()
        plain(torch.ones(5, 3)).sum().backward()
        optimizer.step()
        assert network.learning_rate == schedule.get_last_lr()[0]
        schedule.step()
        # 2 x 3 weights and 2 biases, each with gradient 5 from five inputs of ones.
        assert norm.item() == pytest.approx((8 * 25) ** 0.5)
        assert finite
    for parameter, expected in zip(network.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


@pytest.mark.parametrize("factor", NOT_FINITE)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_non_finite_gradient_changes_nothing(factor, precision):
    network = make(precision=precision, max_grad_norm=1.0)
    train_step(network, 1e-3)
    before = tensors(network)
    _, finite = train_step(network, factor)
    assert not finite
    assert same(before, tensors(network))
    _, finite = train_step(network, 1e-3)
    assert finite
    assert not same(before, tensors(network))


def test_a_non_finite_loss_with_a_finite_gradient_changes_nothing():
    network = make()
    train_step(network)
    before = tensors(network)
    network.optimizer.zero_grad()
    loss = network.parallel(torch.ones(5, 3)).sum()
    network.backward(loss)
    _, finite = network.optimizer_step(loss + float("nan"))
    assert not finite
    assert same(before, tensors(network))


def test_a_non_finite_network_earlier_in_the_step_changes_nothing():
    network = make()
    train_step(network)
    before = tensors(network)
    _, finite = train_step(network, finite_before=[torch.tensor(True), torch.tensor(False)])
    assert not finite
    assert same(before, tensors(network))
    _, finite = train_step(network, finite_before=[torch.tensor(True)])
    assert finite


def test_the_float16_loss_scale_decreases_until_gradients_are_finite():
    network = make(precision="float16")
    network.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    results = [bool(train_step(network)[1]) for _ in range(9)]
    assert results == sorted(results)
    assert not results[0]
    assert results[-1]


def test_gradients_are_clipped_and_their_norm_before_clipping_returned():
    network = make(max_grad_norm=0.5)
    norm, _ = train_step(network)
    assert norm.item() == pytest.approx(200**0.5)
    clipped = torch.cat([parameter.grad.flatten() for parameter in network.module.parameters()]).norm()
    assert clipped.item() == pytest.approx(0.5, rel=1e-4)


def test_training_continues_from_a_state_dict():
    one, other = make(precision="float16"), make(precision="float16")
    train_step(one, float("inf"))
    train_step(one)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.scaler.get_scale() == one.scaler.get_scale()
    for network in (one, other):
        train_step(network)
    assert one.learning_rate == other.learning_rate
    assert same(tensors(one), tensors(other))


@pytest.mark.parametrize("flags", [[True, True], [True, False], [False, True]])
def test_buffers_are_restored_unless_all_flags_are_true(flags):
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(5, 3))
    before = copy.deepcopy(dict(norm.named_buffers()))
    with restoring_buffers([norm]) as finite:
        norm(torch.randn(5, 3) + float("inf"))
        finite += [torch.tensor(flag) for flag in flags]
    after = dict(norm.named_buffers())
    assert all(torch.equal(before[name], after[name]) != all(flags) for name in before)


def average_by_loops(values, decay):
    """The formula of `MovingAverage`, update by update."""
    average = values[0]
    for n, value in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value
    return average


@pytest.mark.parametrize("decay", [0.16, 0.999])
def test_the_moving_average_matches_the_loops(decay):
    network = nn.BatchNorm1d(1)
    average = MovingAverage(network, decay)
    weights, means = [network.weight.item()], [network.running_mean.item()]
    for _ in range(7):
        with torch.no_grad():
            network.weight.add_(torch.randn(1))
        network(torch.randn(5, 1))
        average.update(network, torch.tensor(True))
        weights.append(network.weight.item())
        means.append(network.running_mean.item())
    assert average.module.weight.item() == pytest.approx(average_by_loops(weights, decay), rel=1e-5)
    assert average.module.running_mean.item() == pytest.approx(average_by_loops(means, decay), rel=1e-4)
    assert average.module.num_batches_tracked == 7
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_a_skipped_step_does_not_change_the_moving_average():
    network = nn.Linear(3, 2)
    average = MovingAverage(network, 0.9)
    before = copy.deepcopy(average.module.state_dict())
    with torch.no_grad():
        network.weight.add_(1)
    average.update(network, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())


def test_weights_that_are_frozen_for_good_stay_so_after_the_generator_update():
    network = prepare(
        nn.Sequential(nn.Linear(3, 5).requires_grad_(False), nn.Linear(5, 2)),
        SINGLE_PROCESS,
        EngineRecipe(),
        learning_rate=0.1,
    )
    before = [parameter.requires_grad for parameter in network.module.parameters()]
    with frozen([network]):
        assert not any(parameter.requires_grad for parameter in network.module.parameters())
    assert [parameter.requires_grad for parameter in network.module.parameters()] == before
    # Their gradients would count in the norm, and add up over the steps.
    norm, _ = train_step(network)
    trained = network.module[1]
    assert norm.item() == pytest.approx(float(torch.cat([trained.weight.grad.flatten(), trained.bias.grad]).norm()))


def test_prepare_sets_the_memory_format_and_keeps_frozen_parameters():
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3))
    module[0].requires_grad_(False)
    network = prepare(module, SINGLE_PROCESS, EngineRecipe(), learning_rate=0.1)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [parameter.shape for group in network.optimizer.param_groups for parameter in group["params"]] == [
        (2, 5, 3, 3),
        (2,),
    ]
    contiguous = prepare(nn.Conv2d(3, 5, 3), SINGLE_PROCESS, EngineRecipe(channels_last=False), learning_rate=0.1)
    assert contiguous.module.weight.is_contiguous()
