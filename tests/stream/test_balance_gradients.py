"""A loss that pulls at each image as hard as it is told: against loops, at its ends, and in low precision."""

import math

import pytest
import torch

from mirror_modules.functional import balance_gradients

SHAPE = (5, 3, 7, 11)


def draw(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(ratio, first, second, *, dtype=torch.float32, images=None):
    """What reaches images whose copies get these gradients."""
    images = torch.zeros(first.shape, dtype=dtype) if images is None else images
    images.requires_grad_(True)
    judged, read = balance_gradients(images, ratio)
    torch.autograd.backward((judged, read), (first.to(dtype), second.to(dtype)))
    return images.grad


def test_both_are_the_images():
    images = draw(0)
    judged, read = balance_gradients(images, 0.25)
    assert torch.equal(judged, images)
    assert torch.equal(read, images)


def test_matches_the_formula_image_by_image():
    first, second = draw(1) * torch.tensor([0.1, 7.0, 1.0, 1e3, 2.0]).view(5, 1, 1, 1), draw(2)
    found = gradient(0.3, first, second)
    for i in range(5):
        a, b = first[i].flatten().tolist(), second[i].flatten().tolist()
        length_a, length_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        expected = [x + 0.3 * length_a * y / length_b for x, y in zip(a, b)]
        torch.testing.assert_close(found[i].flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_the_scale_of_the_second_has_no_influence():
    first, second = draw(1), draw(2)
    scales = torch.tensor([1e-20, 1e-6, 1.0, 1e6, 1e15]).view(5, 1, 1, 1)
    torch.testing.assert_close(gradient(0.3, first, second * scales), gradient(0.3, first, second))


def test_alone_equals_batch():
    first, second = draw(1), draw(2)
    together = gradient(0.5, first, second)
    for i in range(5):
        torch.testing.assert_close(gradient(0.5, first[i : i + 1], second[i : i + 1])[0], together[i])


@pytest.mark.parametrize("ratio", [0.0, 0.7])
def test_where_one_is_silent_the_other_is_left(ratio):
    first, second = draw(1), draw(2)
    second[2] = 0
    first[3] = 0
    found = gradient(ratio, first, second)
    assert torch.equal(found[2], first[2])
    assert not found[3].any()
    assert torch.equal(gradient(0.0, first, second), first)


def test_copies_that_nobody_uses():
    images = draw(0).requires_grad_(True)
    judged, _ = balance_gradients(images, 0.5)
    judged.sum().backward()
    assert torch.equal(images.grad, torch.ones(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_does_not_leave_its_range(dtype):
    first, second = draw(1) * 3e3, draw(2) * 1e-4
    found = gradient(0.25, first, second, dtype=dtype)
    assert found.dtype == dtype
    expected = gradient(0.25, first.to(dtype).float(), second.to(dtype).float())
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=20.0)


def test_channels_last():
    first, second = draw(1), draw(2)
    expected = gradient(0.25, first, second)
    last = torch.channels_last
    images = torch.zeros(SHAPE).to(memory_format=last)
    found = gradient(0.25, first.to(memory_format=last), second.to(memory_format=last), images=images)
    torch.testing.assert_close(found, expected)


def test_not_a_number_is_not_hidden():
    """A step that is not finite must be noticed."""
    first, second = draw(1), draw(2)
    second[1, 0, 0, 0] = math.nan
    assert gradient(0.25, first, second)[1].isnan().all()


@pytest.mark.parametrize(("ratio", "message"), [(-0.1, "0 or more"), (math.nan, "finite"), ("1", "finite")])
def test_errors(ratio, message):
    with pytest.raises(ValueError, match=f"balance_gradients: ratio must be .*{message}"):
        balance_gradients(draw(0), ratio)


def test_second_derivatives_are_refused():
    images = draw(0).requires_grad_(True)
    judged, read = balance_gradients(images, 0.25)
    (found,) = torch.autograd.grad((judged**2).sum() + (read**3).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.sum().backward()
