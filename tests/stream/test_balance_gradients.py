"""Balanced gradients: against loops, with zero and missing gradients, and in low precision."""

import math

import pytest
import torch

from mirror_modules.functional import balance_gradients

SHAPE = (5, 3, 7, 11)


def draw(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(ratio, first, second, *, dtype=torch.float32, images=None):
    """The gradient at images whose two copies receive these gradients."""
    images = torch.zeros(first.shape, dtype=dtype) if images is None else images
    images.requires_grad_(True)
    first_view, second_view = balance_gradients(images, ratio)
    torch.autograd.backward((first_view, second_view), (first.to(dtype), second.to(dtype)))
    return images.grad


def test_both_copies_equal_the_images():
    images = draw(0)
    first_view, second_view = balance_gradients(images, 0.25)
    assert torch.equal(first_view, images)
    assert torch.equal(second_view, images)


def test_matches_the_formula_image_by_image():
    first, second = draw(1) * torch.tensor([0.1, 7.0, 1.0, 1e3, 2.0]).view(5, 1, 1, 1), draw(2)
    actual = gradient(0.3, first, second)
    for i in range(5):
        a, b = first[i].flatten().tolist(), second[i].flatten().tolist()
        norm_a, norm_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        expected = [x + 0.3 * norm_a * y / norm_b for x, y in zip(a, b)]
        torch.testing.assert_close(actual[i].flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_the_scale_of_the_second_gradient_has_no_influence():
    first, second = draw(1), draw(2)
    scales = torch.tensor([1e-20, 1e-6, 1.0, 1e6, 1e15]).view(5, 1, 1, 1)
    torch.testing.assert_close(gradient(0.3, first, second * scales), gradient(0.3, first, second))


def test_an_image_alone_equals_the_same_image_in_a_batch():
    first, second = draw(1), draw(2)
    together = gradient(0.5, first, second)
    for i in range(5):
        torch.testing.assert_close(gradient(0.5, first[i : i + 1], second[i : i + 1])[0], together[i])


@pytest.mark.parametrize("ratio", [0.0, 0.7])
def test_a_zero_gradient_stays_zero(ratio):
    first, second = draw(1), draw(2)
    second[2] = 0
    first[3] = 0
    actual = gradient(ratio, first, second)
    assert torch.equal(actual[2], first[2])
    assert not actual[3].any()
    assert torch.equal(gradient(0.0, first, second), first)


def test_an_unused_copy_adds_no_gradient():
    images = draw(0).requires_grad_(True)
    first_view, _ = balance_gradients(images, 0.5)
    first_view.sum().backward()
    assert torch.equal(images.grad, torch.ones(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_neither_overflows_nor_underflows(dtype):
    first, second = draw(1) * 3e3, draw(2) * 1e-4
    actual = gradient(0.25, first, second, dtype=dtype)
    assert actual.dtype == dtype
    expected = gradient(0.25, first.to(dtype).float(), second.to(dtype).float())
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=20.0)


def test_channels_last():
    first, second = draw(1), draw(2)
    expected = gradient(0.25, first, second)
    images, first, second = (x.to(memory_format=torch.channels_last) for x in (torch.zeros(SHAPE), first, second))
    torch.testing.assert_close(gradient(0.25, first, second, images=images), expected)


def test_nan_propagates():
    """A non-finite step must be detected."""
    first, second = draw(1), draw(2)
    second[1, 0, 0, 0] = math.nan
    assert gradient(0.25, first, second)[1].isnan().all()


@pytest.mark.parametrize(("ratio", "message"), [(-0.1, "0 or more"), (math.nan, "finite"), ("1", "finite")])
def test_invalid_ratios_raise(ratio, message):
    with pytest.raises(ValueError, match=f"balance_gradients: ratio must be .*{message}"):
        balance_gradients(draw(0), ratio)


def test_second_derivatives_raise():
    images = draw(0).requires_grad_(True)
    first_view, second_view = balance_gradients(images, 0.25)
    (first_derivative,) = torch.autograd.grad((first_view**2).sum() + (second_view**3).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first_derivative.sum().backward()
