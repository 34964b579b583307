"""Chunks of rows: the result of the whole, and no chunk larger than requested.

Tiles that are recomputed in the backward pass are tested with the operations that use them, in `stem` and `glam`.
"""

import pytest
import torch
from torch.testing import assert_close

from mirror_modules._tiles import in_chunks

N, D = 7, 3


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_chunks_give_the_result_of_the_whole(size, lengths):
    rows, scales = torch.randn(N, D), torch.randn(N)
    chunks = []

    def scaled(rows, scales):
        chunks.append(len(rows))
        return rows * scales.unsqueeze(1)

    assert_close(in_chunks(scaled, rows, scales, size=size), rows * scales.unsqueeze(1), atol=0, rtol=0)
    assert chunks == lengths


def test_gradients_flow_through_chunks():
    rows = torch.randn(N, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(in_chunks(torch.square, rows, size=3).sum(), rows)
    assert_close(gradient, 2 * rows)


def test_lists_and_dictionaries_are_concatenated_by_key():
    def measure(rows):
        return {"double": 2 * rows, "names": [str(row) for row in rows.tolist()], "inner": {0: [rows.sum()], 1: -rows}}

    rows = torch.arange(N)
    result = in_chunks(measure, rows, size=3)
    assert result["double"].tolist() == (2 * rows).tolist()
    assert result["names"] == list("0123456")
    assert result["inner"][0] == [3, 12, 6]
    assert result["inner"][1].tolist() == (-rows).tolist()


def test_no_rows_keep_the_shape_of_the_result():
    assert in_chunks(lambda rows: rows.mean(dim=1), torch.zeros(0, D), size=3).shape == (0,)


@pytest.mark.parametrize(
    ("message", "tensors", "size"),
    [
        (r"tensors of equal length; they are \(7, 3\), \(5,\)", (torch.zeros(N, D), torch.zeros(5)), 3),
        (r"one or more tensors of equal length; they are none", (), 3),
        (r"size must be a whole number of at least 1, but it is 0", (torch.zeros(N, D),), 0),
    ],
)
def test_errors(message, tensors, size):
    with pytest.raises(ValueError, match="in_chunks: .*" + message):
        in_chunks(lambda *rows: rows[0], *tensors, size=size)
