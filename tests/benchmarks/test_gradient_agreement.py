import torch
from torch.testing import assert_close

from benchmarks.gradient_agreement import BLOCK, CHUNK, agreement, coarse_share, gradients


def test_a_linear_loss_agrees_and_a_fine_wave_does_not():
    images = torch.rand(7, 3, 8, 8) * 2 - 1
    weights = torch.randn(3, 8, 8)
    assert_close(agreement(lambda chunk, rows: (chunk * weights).sum(dim=(1, 2, 3)), images, 0.1), 1.0)
    assert abs(agreement(lambda chunk, rows: (1000 * chunk).sin().sum(dim=(1, 2, 3)), images, 0.1)) < 0.2


def test_gradients_are_those_of_the_own_rows():
    images, targets = torch.randn(CHUNK + 3, 1, 2, 2), torch.randn(CHUNK + 3)
    found = gradients(lambda chunk, rows: chunk.sum(dim=(1, 2, 3)) * targets[rows], images)
    assert_close(found, targets.view(-1, 1, 1, 1).expand_as(images))


def test_the_coarse_share_is_all_of_a_constant_and_nothing_of_a_checkerboard():
    assert_close(coarse_share(torch.ones(2, 3, 2 * BLOCK, 2 * BLOCK)), 1.0)
    board = (-1.0) ** (torch.arange(2 * BLOCK).view(-1, 1) + torch.arange(2 * BLOCK))
    assert_close(coarse_share(board.expand(2, 3, -1, -1)), 0.0)
