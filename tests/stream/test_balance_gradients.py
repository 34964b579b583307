"""Balanced gradients: against loops, with zero and missing gradients, with a reference, and in low precision."""

import math
import warnings

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
    scales = torch.tensor([1e-35, 1e-23, 1.0, 1e6, 1e30]).view(5, 1, 1, 1)
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
    warnings.simplefilter("error")
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


def loss_of(images, **options):
    first_view, second_view = balance_gradients(images, 0.25, **options)
    return (first_view**2).sum() + (second_view**3).sum()


def balanced_by_loops(images, norms=None):
    """The gradient of `loss_of`, image by image."""
    result = torch.empty_like(images)
    for i, image in enumerate(images):
        a, b = 2 * image, 3 * image**2
        norm = math.sqrt(sum(x * x for x in a.flatten().tolist())) if norms is None else norms[i]
        result[i] = a + 0.25 * norm * b / math.sqrt(sum(x * x for x in b.flatten().tolist()))
    return result


def test_second_derivatives_raise():
    images = draw(0).requires_grad_(True)
    (first_derivative,) = torch.autograd.grad(loss_of(images), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="balance_gradients has no second derivative"):
        first_derivative.sum().backward()
    with pytest.raises(NotImplementedError, match="balance_gradients has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss_of)(x).sum())(draw(0))


def test_transforms_of_torch_func():
    batches = torch.stack([draw(seed) for seed in (3, 4)])
    torch.testing.assert_close(torch.func.grad(loss_of)(batches[0]), balanced_by_loops(batches[0]))
    norms = torch.tensor([0.5, 2.0, 0.0, 7.0, 1.0])
    per_batch = torch.func.vmap(torch.func.grad(lambda images: loss_of(images, reference=norms)))(batches)
    for images, actual in zip(batches, per_batch, strict=True):
        torch.testing.assert_close(actual, balanced_by_loops(images, norms.tolist()))
    torch.testing.assert_close(torch.func.vmap(loss_of)(batches), torch.stack([loss_of(images) for images in batches]))


def test_compiles_into_one_graph(compiled):
    images = draw(0).requires_grad_(True)
    compiled(loss_of)(images).backward()
    torch.testing.assert_close(images.grad, balanced_by_loops(images.detach()))


# Several losses


def gradient_of_several(ratios, gradients, **options):
    images = torch.zeros(SHAPE, requires_grad=True)
    copies = balance_gradients(images, ratios, **options)
    pairs = [(copy, gradient) for copy, gradient in zip(copies, gradients, strict=True) if gradient is not None]
    torch.autograd.backward([copy for copy, _ in pairs], [gradient for _, gradient in pairs])
    return images.grad


def test_one_copy_per_ratio_against_loops():
    ratios, gradients = (2.0, 0.5, 0.0, 0.125), [draw(seed) for seed in (1, 2, 3, 4)]
    actual = gradient_of_several(ratios, gradients)
    for i in range(5):
        rows = [gradient[i].flatten().tolist() for gradient in gradients]
        norms = [math.sqrt(sum(x * x for x in row)) for row in rows]
        expected = [ratios[0] * x for x in rows[0]]
        for ratio, row, norm in zip(ratios[1:], rows[1:], norms[1:]):
            expected = [x + ratio * norms[0] * y / norm for x, y in zip(expected, row)]
        torch.testing.assert_close(actual[i].flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_number_is_short_for_a_pair():
    first, second = draw(1), draw(2)
    assert torch.equal(gradient_of_several((1.0, 0.3), [first, second]), gradient(0.3, first, second))
    assert torch.equal(gradient_of_several([1, 0.3], [first, second]), gradient(0.3, first, second))


# A first loss that does not depend on the images


def test_without_a_first_gradient_a_warning_names_the_way_out():
    with pytest.warns(UserWarning, match=r"balance_gradients: the first loss has no gradient .* reference="):
        assert not gradient_of_several((1.0, 0.3), [None, draw(2)]).any()
    with pytest.warns(UserWarning, match=r"balance_gradients: the first loss has no gradient"):
        assert not gradient(0.3, torch.zeros(SHAPE), draw(2)).any()


def test_the_warning_is_shown_once():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            gradient_of_several((1.0, 0.3), [None, draw(2)])
    assert len(shown) == 1


def test_no_warning_where_nothing_is_lost():
    warnings.simplefilter("error")
    gradient_of_several((1.0, 0.3), [draw(1), None])
    gradient_of_several((1.0, 0.0), [None, draw(2)])
    gradient_of_several((1.0, 0.3), [None, draw(2)], reference=1.0)
    gradient(0.3, draw(1)[:0], draw(2)[:0])


@pytest.mark.parametrize(
    ("reference", "norms"),
    [
        (0.5, [0.5] * 5),
        (3, [3] * 5),
        (torch.tensor(0.25), [0.25] * 5),
        (torch.tensor([0.5, 2.0, 0.0, 7.0, 1.0]), [0.5, 2.0, 0.0, 7.0, 1.0]),
        (torch.tensor([0.5, 2.0, 0.0, 7.0, 1.0], dtype=torch.float64), [0.5, 2.0, 0.0, 7.0, 1.0]),
    ],
)
@pytest.mark.parametrize("with_first", [True, False])
def test_a_reference_replaces_the_norm_of_the_first_gradient(reference, norms, with_first):
    first, second = draw(1) if with_first else None, draw(2)
    actual = gradient_of_several((1.0, 0.3), [first, second], reference=reference)
    for i in range(5):
        a = [0.0] * second[i].numel() if first is None else first[i].flatten().tolist()
        b = second[i].flatten().tolist()
        length = math.sqrt(sum(x * x for x in b))
        expected = [x + 0.3 * norms[i] * y / length for x, y in zip(a, b)]
        torch.testing.assert_close(actual[i].flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_losses_none_of_which_is_the_unit():
    """The first copy is not used: each loss has its ratio, over the batch size, as norm at each image."""
    warnings.simplefilter("error")
    gradients = [draw(1) * 1e3, draw(2) * 1e-6]
    actual = gradient_of_several((0, 1, 0.3), [None, *gradients], reference=1 / 5)
    for i in range(5):
        a, b = (gradient[i].flatten().tolist() for gradient in gradients)
        norm_a, norm_b = (math.sqrt(sum(x * x for x in row)) for row in (a, b))
        expected = [(x / norm_a + 0.3 * y / norm_b) / 5 for x, y in zip(a, b)]
        torch.testing.assert_close(actual[i].flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reference", [None, 0.2])
def test_a_factor_on_the_loss_of_an_image_matters_only_if_it_is_zero(reference):
    first, second = draw(1), draw(2)

    def gradient_with(factors):
        images = torch.zeros(SHAPE, requires_grad=True)
        one, other = balance_gradients(images, 0.3, reference=reference)
        losses = (other * second).sum(dim=(1, 2, 3))
        ((one * first).sum() + (torch.tensor(factors) * losses).sum()).backward()
        return images.grad

    plain = gradient_with([1.0] * 5)
    torch.testing.assert_close(gradient_with([1.0, 2.0, 1e-3, 7.0, 1e4]), plain)
    removed = gradient_with([1.0, 0.0, 1.0, 0.0, 0.0])
    for i, is_kept in enumerate([True, False, True, False, False]):
        torch.testing.assert_close(removed[i], plain[i] if is_kept else first[i], rtol=0, atol=0)


def test_a_reference_gets_no_gradient():
    images, reference = torch.zeros(SHAPE, requires_grad=True), torch.ones(5, requires_grad=True)
    _, second_view = balance_gradients(images, 0.3, reference=reference)
    second_view.sum().backward()
    assert reference.grad is None
    assert images.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_reference_in_other_precisions(dtype):
    images = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    _, second_view = balance_gradients(images, 0.25, reference=0.1)
    second_view.backward(draw(2).to(dtype))
    norms = images.grad.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((5,), 0.025, dtype=torch.float64), rtol=1e-2, atol=0)
    if dtype == torch.float64:
        torch.testing.assert_close(norms, torch.full((5,), 0.025, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("message", "reference"),
    [
        (r"reference must be 0 or more, but it is -1\.0", -1.0),
        (r"reference must be a finite number, but it is inf", math.inf),
        (r"reference must be a finite number, but it is '1'", "1"),
        (r"reference must be a number or floats \(B,\), here \(5,\), but it is torch\.float32 \(3,\)", torch.ones(3)),
        (r"reference must be a number or floats \(B,\), .* torch\.float32 \(5, 1\)", torch.ones(5, 1)),
        (r"reference must be a number or floats \(B,\), .* torch\.int64 \(5,\)", torch.ones(5).long()),
    ],
)
def test_invalid_references_raise(message, reference):
    with pytest.raises(ValueError, match="balance_gradients: " + message):
        balance_gradients(draw(0), 0.25, reference=reference)


@pytest.mark.parametrize(
    ("message", "images", "ratios"),
    [
        (r"ratios must hold at least one number", draw(0), ()),
        (r"ratio must be a finite number, but it is None", draw(0), None),
        (r"ratio must be a finite number, but it is tensor\(0\.5", draw(0), torch.tensor(0.5)),
        (r"ratio must be 0 or more, but it is -2", draw(0), (1, -2)),
        (r"images must be \(B, \.\.\.\) with at least two axes, but they are \(5,\)", torch.zeros(5), 0.25),
    ],
)
def test_invalid_arguments_raise(message, images, ratios):
    with pytest.raises(ValueError, match="balance_gradients: " + message):
        balance_gradients(images, ratios)


@pytest.mark.parametrize("ratios", [(1, 0), (0, 1)])
def test_a_disabled_loss_has_no_influence_by_nan(ratios):
    images = draw(0).requires_grad_()
    copies = balance_gradients(images, ratios, reference=1.0)
    sum((copy if ratio else copy * math.nan).sum() for copy, ratio in zip(copies, ratios)).backward()
    assert images.grad.isfinite().all()
    assert images.grad.any()


def test_integer_images():
    with pytest.raises(ValueError, match=r"images must be floating point, but they are torch\.uint8, which has"):
        balance_gradients(torch.zeros(2, 3, dtype=torch.uint8), 0.5)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_reference_with_a_value_that_is_no_norm(value):
    reference = torch.ones(5)
    reference[3] = value
    with pytest.raises(ValueError, match="reference must be 0 or more at every image"):
        balance_gradients(draw(0), 0.5, reference=reference)
