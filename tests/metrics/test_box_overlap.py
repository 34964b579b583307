"""Intersection over union, against a count of cells."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules.functional import box_overlap

N = 37


def overlap_by_counting(box, other, size=40):
    """Boxes whose borders are multiples of 1 / size: count the cells in both and in either."""

    def cells(x, y, w, h):
        columns, rows = range(round(x * size), round((x + w) * size)), range(round(y * size), round((y + h) * size))
        return {(i, j) for i in rows for j in columns}

    one, two = cells(*box), cells(*other)
    return len(one & two) / len(one | two)


def boxes_of(count):
    start, extent = torch.randint(-5, 30, (count, 2)), torch.randint(1, 20, (count, 2))
    return torch.cat((start, extent), dim=1) / 40


def test_matches_the_count():
    boxes, others = boxes_of(N), boxes_of(N)
    expected = [overlap_by_counting(*pair) for pair in zip(boxes.tolist(), others.tolist())]
    assert sum(value > 0 for value in expected) > 5
    assert_close(box_overlap(boxes, others), torch.tensor(expected))


def test_of_equal_boxes_is_1_and_of_an_empty_one_0():
    boxes = boxes_of(N)
    assert_close(box_overlap(boxes, boxes), torch.ones(N))
    assert torch.equal(box_overlap(torch.zeros(N, 4), boxes), torch.zeros(N))
    assert torch.equal(box_overlap(torch.zeros(1, 4), torch.zeros(1, 4)), torch.zeros(1))


def test_does_not_depend_on_the_order():
    boxes, others = boxes_of(N), boxes_of(N)
    assert_close(box_overlap(boxes, others), box_overlap(others, boxes))


def test_is_differentiable():
    boxes, others = (torch.rand(N, 4).double() + 0.5 for _ in range(2))
    assert gradcheck(box_overlap, (boxes.requires_grad_(), others.requires_grad_()))


@pytest.mark.parametrize(
    ("message", "boxes", "others"),
    [
        (r"boxes must be floats \(N, 4\), .* torch.float32 \(4,\)", torch.zeros(4), torch.zeros(1, 4)),
        (r"others must be floats .* torch.int64 \(2, 4\)", torch.zeros(2, 4), torch.zeros(2, 4).long()),
        (r"boxes \(2, 4\) and others \(3, 4\) must be as many", torch.zeros(2, 4), torch.zeros(3, 4)),
        (r"boxes must be a tensor, but it is a list", [[0, 0, 1, 1]], torch.zeros(1, 4)),
    ],
)
def test_invalid_boxes_are_refused(message, boxes, others):
    with pytest.raises(ValueError, match="box_overlap: " + message):
        box_overlap(boxes, others)
