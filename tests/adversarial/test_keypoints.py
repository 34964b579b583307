"""The discriminator of key points: against the layers written out."""

import pytest
import torch
from torch.testing import assert_close

from mirror_modules import KeypointDiscriminator
from tests.norms import with_random_norms

B, K, D, HIDDEN = 5, 2, 7, 6


def make():
    return with_random_norms(KeypointDiscriminator(K, D, hidden_dim=HIDDEN))


def layers(sequence, features):
    for linear, norm, _ in zip(*[iter(sequence)] * 3):
        features = norm(features @ linear.weight.T)
        features = features.where(features > 0, 0.2 * features)
    return features


@pytest.mark.parametrize("training", [False, True])
def test_matches_the_layers_written_out(training):
    discriminator = make().double().train(training)
    points, sentence = torch.rand(B, K, 3).double().requires_grad_(), torch.randn(B, D).double().requires_grad_()
    logits = discriminator(points, sentence)
    assert logits.realism is logits.mismatched is None
    hidden = (
        layers(discriminator.points_path, points.reshape(B, 3 * K)),
        layers(discriminator.text_path, sentence),
    )
    hidden = layers(discriminator.joint[:3], torch.cat(hidden, dim=1))
    expected = (hidden @ discriminator.joint[3].weight.T + discriminator.joint[3].bias)[:, 0]
    assert_close(logits.consistency, expected, atol=1e-10, rtol=1e-10)
    leaves = [points, sentence, *discriminator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (logits.consistency, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)


def test_a_batch_of_one_trains():
    discriminator = make().train()
    discriminator(torch.rand(1, K, 3), torch.randn(1, D)).consistency.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


def test_compiles_into_one_graph(compiled):
    discriminator, inputs = make().eval(), (torch.rand(B, K, 3), torch.randn(B, D))
    assert_close(compiled(discriminator)(*inputs).consistency, discriminator(*inputs).consistency)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"point_count must be a whole number of at least 1, but it is 0", {"point_count": 0}),
        (r"hidden_dim must be even, because later layers have half of it, not 3", {"hidden_dim": 3}),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="KeypointDiscriminator: " + message):
        KeypointDiscriminator(**options)


@pytest.mark.parametrize(
    ("message", "points", "sentence"),
    [
        (r"points must be \(B, 2, 3\), .* they are \(5, 3, 3\)", torch.zeros(B, 3, 3), torch.zeros(B, D)),
        (r"sentence has 2 features but .* text_dim=7", torch.zeros(B, K, 3), torch.zeros(B, 2)),
        (r"batch sizes disagree", torch.zeros(B, K, 3), torch.zeros(2, D)),
        (r"the dtype of points is torch.float64", torch.zeros(B, K, 3).double(), torch.zeros(B, D)),
    ],
)
def test_invalid_inputs_are_refused(message, points, sentence):
    with pytest.raises(ValueError, match="KeypointDiscriminator: " + message):
        make()(points, sentence)
