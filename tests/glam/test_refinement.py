"""Refinement of images: equal to its layers written out, at any size, and samples independent of their batch."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mirror_modules import ImageRefinementStage
from tests.norms import with_random_norms

B, E, C, H, W = 2, 7, 8, 12, 20


def make(**options):
    return with_random_norms(ImageRefinementStage(E, **{"channels": C, "residual_blocks": 1, **options}))


def make_inputs(batch=B, height=H, width=W):
    return torch.rand(batch, 3, height, width) * 2 - 1, torch.randn(batch, E)


def refine_by_hand(stage, images, condition):
    """The layers of StackGAN's second stage, with the condition repeated at every position."""
    first, _, *halvings = stage.encoder
    features = F.relu(F.conv2d(images, first.weight, padding=1))
    for conv, norm in zip(halvings[::3], halvings[1::3]):
        features = F.relu(norm(F.conv2d(features, conv.weight, stride=2, padding=1)))
    inner = stage.refinement
    repeated = condition[:, :, None, None].expand(-1, -1, *features.shape[2:])
    features = F.relu(inner.norm(F.conv2d(torch.cat((features, repeated), dim=1), inner.joint.weight, padding=1)))
    for block in inner.residual:
        residual = F.relu(block.norm1(F.conv2d(features, block.conv1.weight, padding=1)))
        features = F.relu(features + block.norm2(F.conv2d(residual, block.conv2.weight, padding=1)))
    for block in inner.upsample:
        doubled = F.interpolate(features, scale_factor=2.0, mode="nearest")
        features = F.relu(block.norm(F.conv2d(doubled, block.conv.weight, padding=1)))
    return torch.tanh(F.conv2d(features, stage.head.conv.weight, padding=1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("halvings", "doublings", "blocks"), [(2, 4, 2), (1, 1, 0), (2, 1, 1), (1, 3, 1)])
def test_matches_its_layers_written_out(halvings, doublings, blocks, training):
    stage = make(halvings=halvings, doublings=doublings, residual_blocks=blocks).double().train(training)
    images, condition = (tensor.double().requires_grad_() for tensor in make_inputs())
    refined, expected = stage(images, condition), refine_by_hand(stage, images, condition)
    scale = 2.0 ** (doublings - halvings)
    assert refined.shape == (B, 3, int(scale * H), int(scale * W))
    assert_close(refined, expected, atol=1e-10, rtol=1e-10)
    leaves = [images, condition, *stage.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (refined, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_images_alone_equal_the_same_images_in_a_batch():
    stage, (images, condition) = make().eval(), make_inputs(3)
    together = stage(images, condition)
    for i in range(3):
        assert_close(stage(images[i : i + 1], condition[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_of_the_smallest_size_trains():
    stage = make().train()
    refined = stage(*make_inputs(1, 8, 8))
    assert refined.shape == (1, 3, 32, 32)
    refined.square().mean().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_compiles_into_one_graph(compiled):
    stage, inputs = make().eval(), make_inputs()
    refined = compiled(stage)(*inputs)
    assert_close(refined, stage(*inputs))
    refined.sum().backward()
    assert stage.encoder[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"condition_dim must be a whole number of at least 1, but it is 0", {"condition_dim": 0}),
        (r"channels must be a whole number of at least 1, but it is 4\.0", {"channels": 4.0}),
        (r"halvings must be a whole number of at least 1, but it is 0", {"halvings": 0}),
        (r"doublings must be a whole number of at least 1, but it is -1", {"doublings": -1}),
        (r"residual_blocks must be 0 or more, but it is -1", {"residual_blocks": -1}),
        (
            r"channels=6 become 24 by halvings=2, which doublings=4 halve .*; channels must be a multiple of 4",
            {"channels": 6},
        ),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="ImageRefinementStage: " + message):
        ImageRefinementStage(**options)


@pytest.mark.parametrize(
    ("message", "images", "condition"),
    [
        (r"images must be \(B, 3, H, W\), but they are \(2, 4, 8, 8\)", (2, 4, 8, 8), (2, E)),
        (r"images are \(2, 3, 8, 10\); height and width must be multiples of 4", (2, 3, 8, 10), (2, E)),
        (r"images are \(2, 3, 4, 8\); each side needs at least 8 pixels", (2, 3, 4, 8), (2, E)),
        (r"condition has 5 features but .* condition_dim=7", (2, 3, 8, 8), (2, 5)),
        (r"batch sizes disagree \(images: \(2, 3, 8, 8\), condition: \(3, 7\)\)", (2, 3, 8, 8), (3, E)),
    ],
)
def test_invalid_inputs_are_refused(message, images, condition):
    with pytest.raises(ValueError, match="ImageRefinementStage: " + message):
        make()(torch.zeros(images), torch.zeros(condition))


def test_inputs_of_another_precision_are_refused():
    images, condition = make_inputs()
    with pytest.raises(ValueError, match=r"ImageRefinementStage: the dtype of images is torch.float64 but that of the"):
        make()(images.double(), condition)
