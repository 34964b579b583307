"""Which captions may be candidates, and draws of them without replacement, against loops and exact frequencies."""

from collections import Counter
from itertools import combinations
from math import comb

import pytest
import torch

from mirror_modules.metrics._candidates import count_drawable, draw_captions, excluded_captions

N = 13
IDS = {
    "none": (None, None),
    "classes": (torch.arange(N) % 3, None),
    "images": (None, torch.arange(N) // 2),
    "images within classes": (torch.arange(N) // 4, torch.arange(N) // 2),
    "images across classes": (torch.arange(N) % 3, torch.arange(N) // 2),
    "fractions": (torch.linspace(0, 1, N).mul(3).floor().div(7), None),
    "booleans": (None, torch.arange(N) % 2 == 0),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawable_by_loops(class_ids, image_ids):
    return [
        [j for j in range(N) if j != i and all(ids is None or ids[i] != ids[j] for ids in (class_ids, image_ids))]
        for i in range(N)
    ]


@pytest.mark.parametrize("case", IDS)
def test_counts_and_marks_match_the_loops(case):
    drawable = drawable_by_loops(*IDS[case])
    assert count_drawable(N, *IDS[case]).tolist() == [len(others) for others in drawable]
    rows = torch.tensor([2, 11])
    excluded = excluded_captions(rows, torch.arange(N), *IDS[case])
    assert [(~row).nonzero().flatten().tolist() for row in excluded] == [drawable[2], drawable[11]]


@pytest.mark.parametrize("case", IDS)
def test_drawn_captions_are_distinct_and_may_be_drawn(case):
    drawable = drawable_by_loops(*IDS[case])
    drawn = draw_captions(4, torch.arange(N), *IDS[case], seeded())
    assert drawn.shape == (N, 4)
    for captions, others in zip(drawn.tolist(), drawable):
        assert len(set(captions)) == 4
        assert set(captions) <= set(others)


@pytest.mark.parametrize("drawn", [1, 2, 3])
@pytest.mark.parametrize(("class_ids", "image_ids"), [(None, None), (torch.arange(12) % 3, torch.arange(12) % 6)])
def test_all_sets_are_equally_frequent(class_ids, image_ids, drawn):
    generator, rows, counts = seeded(drawn), torch.arange(12), Counter()
    drawable = ~excluded_captions(rows, rows, class_ids, image_ids)
    # The caption as the n-th of those that the image can draw, of which all images have equally many.
    place = drawable.cumsum(dim=1) - 1
    others = int(drawable.sum(dim=1).unique())
    for _ in range(300):
        captions = draw_captions(drawn, rows, class_ids, image_ids, generator)
        counts.update(map(tuple, place.gather(1, captions.long()).tolist()))
    expected = 300 * 12 / comb(others, drawn)
    chi_square = sum((counts[each] - expected) ** 2 / expected for each in combinations(range(others), drawn))
    freedom = comb(others, drawn) - 1
    # Mean and five standard deviations of the chi-square distribution.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_images_draw_independently():
    """Two images draw the same caption with the product of their probabilities."""
    generator = seeded()
    drawn = torch.stack([draw_captions(1, torch.arange(12), None, None, generator)[:, 0] for _ in range(300)])
    same = int((drawn[:, ::2] == drawn[:, 1::2]).sum())
    # 6 pairs of images each time; 10 captions can be drawn by both of a pair, and 11 by each.
    expected = 300 * 6 * 10 / 11**2
    assert abs(same - expected) < 5 * expected**0.5


def test_all_captions_but_excluded_ones_can_be_drawn():
    drawn = draw_captions(N - 1, torch.arange(N), None, None, seeded())
    assert drawn.tolist() == drawable_by_loops(None, None)
