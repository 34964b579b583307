"""Mismatched pairs: no row meets its own class where that can be avoided, and none its own caption is valid."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mirror_modules.adversarial import mismatch

layouts = st.lists(st.integers(-3, 4), min_size=1, max_size=13)
seeds = st.integers(0, 2**32)


def pair(classes, seed):
    return mismatch(torch.tensor(classes), generator=torch.Generator().manual_seed(seed))


@given(layouts, seeds)
def test_partners_are_a_permutation(classes, seed):
    assert sorted(pair(classes, seed).partner.tolist()) == list(range(len(classes)))


@given(layouts, seeds)
def test_valid_marks_partners_of_another_class(classes, seed):
    partner, valid = pair(classes, seed)
    for row, other in enumerate(partner.tolist()):
        assert valid[row].item() == (classes[row] != classes[other])


@given(st.lists(st.tuples(st.integers(-3, 4), st.integers(0, 5)), min_size=1, max_size=13), seeds)
def test_valid_marks_partners_of_another_class_with_another_caption(rows, seed):
    """Repeated classes, captions, and images: the same class and caption."""
    classes, captions = (torch.tensor(ids) for ids in zip(*rows))
    pairs = mismatch(classes, captions, generator=torch.Generator().manual_seed(seed))
    for (own_class, own_caption), partner, valid in zip(rows, pairs.partner.tolist(), pairs.valid.tolist()):
        assert valid == (own_class != rows[partner][0] and own_caption != rows[partner][1])
    # Captions do not change the draw.
    assert torch.equal(pairs.partner, pair(classes.tolist(), seed).partner)


@given(layouts, seeds)
def test_the_number_of_valid_partners_is_maximal(classes, seed):
    largest = max(Counter(classes).values())
    # All rows outside the largest class can be valid, and each of them can be the partner of one row inside it.
    possible = min(len(classes), 2 * (len(classes) - largest))
    assert int(pair(classes, seed).valid.sum()) == possible


@given(layouts, seeds)
def test_a_seed_reproduces_the_draw(classes, seed):
    assert_close(tuple(pair(classes, seed)), tuple(pair(classes, seed)), atol=0, rtol=0)


def test_each_allowed_partner_is_drawn_about_equally_often():
    classes, generator = torch.tensor([0, 0, 1, 1, 2, 2]), torch.Generator().manual_seed(0)
    counts = torch.zeros(6, 6)
    for _ in range(600):
        for row, other in enumerate(mismatch(classes, generator=generator).partner.tolist()):
            counts[row, other] += 1
    allowed = torch.tensor([[a != b for b in classes] for a in classes])
    assert (counts[~allowed] == 0).all()
    # 150 expected, standard deviation 11.
    assert (counts[allowed] - 150).abs().max() < 60


def test_one_class_alone_has_no_valid_partner():
    assert not pair([7, 7, 7], 0).valid.any()
    assert not pair([7], 0).valid.any()


def test_a_seed_is_no_generator():
    with pytest.raises(ValueError, match=r"mismatch: generator must be a torch\.Generator or None, but it is a int"):
        mismatch(torch.arange(3), generator=0)


@pytest.mark.parametrize("classes", [torch.zeros(3, 1), torch.zeros(0), torch.tensor(4)])
def test_class_ids_must_be_a_row(classes):
    with pytest.raises(ValueError, match=r"mismatch: class_ids must be \(B,\), one per row, but they are \("):
        mismatch(classes)


@pytest.mark.parametrize("captions", [torch.zeros(3, 1), torch.zeros(2), torch.tensor(4)])
def test_caption_ids_must_be_a_row_of_the_same_length(captions):
    with pytest.raises(ValueError, match=r"mismatch: caption_ids must be \(3,\) \(B,\), as class_ids, but they are \("):
        mismatch(torch.arange(3), captions)
    with pytest.raises(ValueError, match="mismatch: caption_ids must be a tensor"):
        mismatch(torch.arange(3), [0, 1, 2])
