"""Boxes and key points through crops and mirroring, against loops over single numbers."""

import math

import pytest
import torch
from torch.testing import assert_close

from mirror_modules.data.locations import crop_boxes, crop_points, mirror_order
from mirror_modules.data.transforms import Crops, draw_crops

B, K, H, W, R = 23, 5, 31, 37, 19
ORDER = [1, 0, 2, 4, 3]


@pytest.fixture
def crops():
    return draw_crops(B, H, W, R)


def cropped_by_loops(x, y, crops, i):
    """One place of image i within its crop, in shares."""
    x = (x * W - crops.left[i].item()) / R
    y = (y * H - crops.top[i].item()) / R
    return (1 - x if crops.mirrored[i].item() else x), y


def test_boxes_match_the_loops(crops):
    boxes = torch.cat((torch.rand(B, 2) * 0.9, torch.rand(B, 2) * 0.3), dim=1).double()
    boxes[3] = torch.nan
    unknown = 0
    for i, (box, result) in enumerate(zip(boxes.tolist(), crop_boxes(boxes, H, W, R, crops).tolist())):
        x, y, w, h = box
        corners = [cropped_by_loops(a, b, crops, i) for a in (x, x + w) for b in (y, y + h)]
        left, right = min(c[0] for c in corners), max(c[0] for c in corners)
        top, bottom = min(c[1] for c in corners), max(c[1] for c in corners)
        if math.isnan(x) or not (left < 1 and right > 0 and top < 1 and bottom > 0):
            assert all(map(math.isnan, result))
            unknown += 1
        else:
            assert result == pytest.approx((left, top, right - left, bottom - top))
    assert 1 < unknown < B


def test_points_match_the_loops(crops):
    points = torch.rand(B, K, 3).double()
    points[..., 2] = (points[..., 2] > 0.3).double()
    points *= points[..., 2:]
    result = crop_points(points, H, W, R, crops, ORDER)
    for i in range(B):
        for k in range(K):
            source = ORDER[k] if crops.mirrored[i].item() else k
            x, y, visible = points[i, source].tolist()
            x, y = cropped_by_loops(x, y, crops, i)
            is_visible = visible and 0 <= x <= 1 and 0 <= y <= 1
            assert result[i, k].tolist() == pytest.approx((x, y, 1) if is_visible else (0, 0, 0))


def test_mirroring_twice_changes_nothing():
    crops = Crops(torch.zeros(B, 1).long(), torch.zeros(B, 1).long(), torch.ones(B, 1).bool())
    boxes = torch.rand(B, 4).double() / 2 + 0.1
    points = torch.cat((torch.rand(B, K, 2), torch.ones(B, K, 1)), dim=2).double()
    assert_close(crop_boxes(crop_boxes(boxes, R, R, R, crops), R, R, R, crops), boxes)
    twice = crop_points(crop_points(points, R, R, R, crops, ORDER), R, R, R, crops, ORDER)
    assert_close(twice, points)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ((), []),
        (("back", "left eye", "left leg", "right eye", "right leg"), [0, 3, 4, 1, 2]),
        (("Left_wing", "Right_wing", "leftover"), [1, 0, 2]),
        (("eye LEFT", "eye RIGHT", "left paw"), [1, 0, 2]),  # the last has no counterpart
    ],
)
def test_left_and_right_change_places(names, order):
    assert mirror_order(names) == order
