"""Generator of transposed convolutions: its layers by loops, any resolution, and samples independent of their batch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mirror_modules import DeconvolutionGenerator
from mirror_modules.glam.deconvolution import Bottleneck
from tests.norms import with_random_norms

B, Z, E = 3, 5, 7


def make(resolution=16, channels=4, bottlenecks=2):
    return with_random_norms(
        DeconvolutionGenerator(Z, E, channels=channels, resolution=resolution, bottlenecks=bottlenecks)
    )


def make_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E)


def deconvolve_by_loops(features, weight, stride, padding):
    """Each position adds the kernel, times its value, to the larger map."""
    batch, channels, height, width = features.shape
    size = weight.shape[-1]
    out = features.new_zeros(batch, weight.shape[1], (height - 1) * stride + size, (width - 1) * stride + size)
    for c, y, x in product(range(channels), range(height), range(width)):
        top, left = stride * y, stride * x
        out[:, :, top : top + size, left : left + size] += features[:, c, y, x].view(-1, 1, 1, 1) * weight[c]
    rows, columns = (slice(padding, length - padding) for length in out.shape[2:])
    return out[:, :, rows, columns]


def normalize(features, norm):
    mean, deviation, weight, bias = (
        values.view(1, -1, 1, 1)
        for values in (norm.running_mean, (norm.running_var + norm.eps).sqrt(), norm.weight, norm.bias)
    )
    return (features - mean) / deviation * weight + bias


def generate_by_hand(generator, noise, condition, bottlenecks):
    features = torch.cat((condition, noise), dim=1)[:, :, None, None]
    layers = list(generator.stage.layers)
    for i in range(len(layers) // 3):
        deconvolution, norm, last = layers[3 * i : 3 * i + 3]
        stride, padding = (1, 0) if i == 0 else (2, 1)
        features = normalize(deconvolve_by_loops(features, deconvolution.weight, stride, padding), norm)
        if i < bottlenecks:
            inner = normalize(F.conv2d(features, last.conv1.weight), last.norm1).clamp(min=0)
            inner = normalize(F.conv2d(inner, last.conv2.weight, padding=1), last.norm2).clamp(min=0)
            features = features + normalize(F.conv2d(inner, last.conv3.weight, padding=1), last.norm3)
        features = features.clamp(min=0)
    return torch.tanh(deconvolve_by_loops(features, generator.head.weight, 2, 1))


@pytest.mark.parametrize(("resolution", "channels", "bottlenecks"), [(8, 4, 1), (16, 3, 0), (16, 4, 2), (32, 4, 1)])
def test_matches_the_loops(resolution, channels, bottlenecks):
    generator = make(resolution, channels, bottlenecks).double().eval()
    noise, condition = (tensor.double().requires_grad_() for tensor in make_inputs())
    (images,), *maps = generator(noise, condition)
    assert maps == [[], []]
    assert images.shape == (B, 3, resolution, resolution)
    expected = generate_by_hand(generator, noise, condition, bottlenecks)
    assert_close(images, expected, atol=1e-10, rtol=1e-10)
    leaves = [noise, condition, *generator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (images, expected)]
    assert_close(*grads, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("resolution", "widths"), [(8, [3]), (16, [6, 3]), (64, [24, 12, 6, 3]), (128, [48, 24, 12, 6, 3])]
)
def test_each_doubling_halves_the_channels(resolution, widths):
    generator = make(resolution, 3, bottlenecks=0)
    assert [layer.out_channels for layer in generator.stage.layers[::3]] == widths
    assert generator.resolutions == (resolution,)
    assert generator(*make_inputs()).images[-1].shape == (B, 3, resolution, resolution)


def test_the_first_maps_pass_a_bottleneck():
    layers = make(64, 4, bottlenecks=3).stage.layers
    assert [type(layer) for layer in layers[2::3]] == [Bottleneck] * 3 + [nn.ReLU]
    assert [layer.conv2.weight.shape[:2] for layer in layers[2:9:3]] == [(8, 8), (4, 4), (2, 2)]


def test_no_convolution_has_a_bias():
    convolutions = [part for part in make().modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 9
    assert all(convolution.bias is None for convolution in convolutions)


def test_an_image_alone_equals_the_same_image_in_a_batch():
    generator, (noise, condition) = make().eval(), make_inputs()
    together = generator(noise, condition).images[0]
    for i in range(B):
        alone = generator(noise[i : i + 1], condition[i : i + 1]).images[0]
        assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("resolution", "bottlenecks"), [(8, 1), (16, 0), (32, 3)])
def test_a_batch_of_one_trains(resolution, bottlenecks):
    generator = make(resolution, 8, bottlenecks).train()
    generator(*make_inputs(1)).images[0].square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_compiles_into_one_graph(compiled):
    generator, inputs = make().eval(), make_inputs()
    images = compiled(generator)(*inputs).images[0]
    assert_close(images, generator(*inputs).images[0])
    images.sum().backward()
    assert generator.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"noise_dim must be a whole number of at least 1, but it is 0", {"noise_dim": 0}),
        (r"channels must be a whole number of at least 1, but it is 2\.0", {"channels": 2.0}),
        (r"resolution must be a power of two of at least 8, but it is 4", {"resolution": 4}),
        (r"resolution must be a power of two of at least 8, but it is 24", {"resolution": 24}),
        (r"bottlenecks must be from 0 to 2, .* images of 16 pixels, but it is 3", {"resolution": 16, "bottlenecks": 3}),
        (r"bottlenecks must be from 0 to 4, .*, but it is -1", {"bottlenecks": -1}),
        (
            r"a bottleneck has a quarter of the channels, but map 1 has 6 with channels=3; use more channels or fewer",
            {"channels": 3, "resolution": 32},
        ),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="DeconvolutionGenerator: " + message):
        DeconvolutionGenerator(**options)


@pytest.mark.parametrize(
    ("message", "noise", "condition"),
    [
        (r"noise has 7 features but .* noise_dim=5", (B, E), (B, E)),
        (r"condition must be \(B, D\), but it is \(3, 2, 7\)", (B, Z), (B, 2, E)),
        (r"batch sizes disagree \(noise: \(3, 5\), condition: \(2, 7\)\)", (B, Z), (2, E)),
    ],
)
def test_invalid_inputs_are_refused(message, noise, condition):
    with pytest.raises(ValueError, match="DeconvolutionGenerator: " + message):
        make()(torch.zeros(noise), torch.zeros(condition))
