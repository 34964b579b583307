"""The mode-seeking loss against its definition in loops."""

import pytest
import torch
from torch.testing import assert_close

from mirror_modules.functional import mode_seeking_loss

B, N, SHAPE = 5, 3, (2, 7, 11)


def draw(spread=1.0):
    images = torch.randn(B, *SHAPE, dtype=torch.float64)
    return images, images[:N] + spread * torch.randn(N, *SHAPE, dtype=torch.float64)


def by_loops(images, others, target):
    def distance(first, second):
        pairs = list(zip(first.flatten().tolist(), second.flatten().tolist()))
        return sum(abs(x - y) for x, y in pairs) / len(pairs)

    count = len(images)
    between = [distance(images[i], images[j]) for i in range(count) for j in range(count) if i != j]
    mean = sum(between) / len(between)
    within = [distance(image, other) / mean for image, other in zip(images, others)]
    return sum(max(0.0, target - each) for each in within) / len(within)


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.5, 2.0])
@pytest.mark.parametrize("target", [0.25, 0.4])
def test_matches_the_loops(spread, target):
    images, others = draw(spread)
    assert mode_seeking_loss(images, others, target=target).item() == pytest.approx(by_loops(images, others, target))


def test_the_gradient_separates_pairs_that_are_too_close_and_no_others():
    images, others = draw(0.1)
    others[2] += 5
    images.requires_grad_()
    mode_seeking_loss(images, others).backward()
    moved = images.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert moved.tolist() == [True, True, False, False, False]
    # The distance to other captions has no gradient, and a step against the gradient is away from the pair.
    assert_close(images.grad[:2].sign(), (others[:2] - images[:2]).sign())


def test_equal_images_have_a_finite_loss_and_the_scale_does_not_matter():
    images, others = draw(0.2)
    assert mode_seeking_loss(torch.ones(B, 3), torch.ones(N, 3)).item() == 0.25
    assert_close(mode_seeking_loss(3 * images, 3 * others), mode_seeking_loss(images, others))
    assert mode_seeking_loss(images.half(), others.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "others", "target", "message"),
    [
        (
            torch.ones(1, 3),
            torch.ones(1, 3),
            0.25,
            r"images must be two or more, of different captions, but there are 1",
        ),
        (
            torch.ones(2, 3),
            torch.ones(3, 3),
            0.25,
            r"at least 1 and at most 2 of the shape \(3,\), but they are \(3, 3\)",
        ),
        (
            torch.ones(3),
            torch.ones(3),
            0.25,
            r"images must be floats \(B, \.\.\.\), but they are torch\.float32 \(3,\)",
        ),
        (torch.ones(2, 3), torch.ones(2, 3).byte(), 0.25, r"others must be floats .* torch\.uint8 \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(0, 3), 0.25, r"at least 1 and at most 2"),
        (torch.ones(2, 3), torch.ones(2, 4), 0.25, r"of the shape \(3,\), but they are \(2, 4\)"),
        (torch.ones(2, 3), torch.ones(2, 3), -0.1, r"target must be 0 or more, but it is -0\.1"),
    ],
)
def test_errors_name_the_argument(images, others, target, message):
    with pytest.raises(ValueError, match=message):
        mode_seeking_loss(images, others, target=target)
