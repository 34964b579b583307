"""The paired discriminator: two logits per image, only one of which depends on the sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mirror_modules import PairedDiscriminator
from mirror_modules.adversarial.discriminator import SentenceConv2d, WholeMapConv2d

B, D, CHANNELS = 3, 5, 2


def make(resolution=16):
    return PairedDiscriminator(resolution, D, channels=CHANNELS)


def draw(resolution=16, batch=B):
    return torch.rand(batch, 3, resolution, resolution) * 2 - 1, torch.randn(batch, D)


@pytest.mark.parametrize(("resolution", "width"), [(4, 1), (8, 1), (16, 2), (32, 4), (64, 8), (128, 8), (256, 8)])
def test_any_resolution_is_downsampled_to_4_by_4(resolution, width):
    discriminator, (images, sentence) = make(resolution), draw(resolution, batch=2)
    features = discriminator.features(images)
    assert features.shape == (2, width * CHANNELS, 4, 4)
    assert discriminator.feature_dim == width * CHANNELS
    assert [logits.shape for logits in discriminator(images, sentence)] == [(2,), (2,)]


def test_features_can_be_reused_with_another_sentence():
    discriminator, (images, sentence) = make().eval(), draw()
    features = discriminator.features(images)
    again = discriminator.logits(features, sentence)
    assert_close(tuple(again), tuple(discriminator(images, sentence)), atol=0, rtol=0)
    other = discriminator.logits(features, -sentence)
    assert_close(other.realism, discriminator(images, sentence).realism, atol=0, rtol=0)
    assert (other.consistency != discriminator(images, sentence).consistency).all()


def test_realism_does_not_depend_on_the_sentence():
    discriminator, (images, sentence) = make(), draw()
    sentence.requires_grad_()
    logits = discriminator(images, sentence)
    assert torch.autograd.grad(logits.realism.sum(), sentence, allow_unused=True, retain_graph=True) == (None,)
    (gradient,) = torch.autograd.grad(logits.consistency.sum(), sentence)
    assert (gradient.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("field", ["realism", "consistency"])
def test_both_logits_depend_on_every_pixel(field):
    discriminator, (images, sentence) = make().eval(), draw()
    images.requires_grad_()
    getattr(discriminator(images, sentence), field).sum().backward()
    assert (images.grad != 0).all()


def test_an_image_alone_equals_the_same_image_in_a_batch():
    discriminator, (images, sentence) = make().eval(), draw()
    together = discriminator(images, sentence)
    for i in range(B):
        alone = discriminator(images[i : i + 1], sentence[i : i + 1])
        assert_close(tuple(alone), tuple(logits[i : i + 1] for logits in together), atol=1e-5, rtol=0)


@pytest.mark.parametrize("resolution", [4, 8, 16, 128])
def test_a_batch_of_one_trains(resolution):
    discriminator = make(resolution).train()
    logits = discriminator(*draw(resolution, batch=1))
    (logits.realism.square() + logits.consistency.square()).sum().backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_rows_of_a_batch_are_independent():
    discriminator, (images, sentence) = make().eval(), draw()
    order = torch.tensor([2, 0, 1])
    shuffled, straight = discriminator(images[order], sentence[order]), discriminator(images, sentence)
    assert_close(tuple(shuffled), tuple(logits[order] for logits in straight))


def test_compiles_into_one_graph(compiled):
    discriminator, inputs = make().eval(), draw()
    logits = compiled(discriminator)(*inputs)
    assert_close(tuple(logits), tuple(discriminator(*inputs)))
    logits.consistency.sum().backward()
    assert discriminator.joint[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("resolution", [2, 3, 12, 100])
def test_resolution_must_be_a_power_of_two(resolution):
    with pytest.raises(ValueError, match=rf"resolution must be a power of two of at least 4, but it is {resolution}\."):
        PairedDiscriminator(resolution)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"resolution must be a whole number of at least 1, but it is 64\.0", {"resolution": 64.0}),
        (r"text_dim must be a whole number of at least 1, but it is 0", {"resolution": 4, "text_dim": 0}),
        (r"channels must be a whole number of at least 1, but it is -2", {"resolution": 4, "channels": -2}),
    ],
)
def test_invalid_sizes_raise(message, options):
    with pytest.raises(ValueError, match="PairedDiscriminator: " + message):
        PairedDiscriminator(**options)


@pytest.mark.parametrize(
    ("message", "images", "sentence"),
    [
        (
            r"images are \(3, 3, 16, 8\) but .* resolution=16; expected \(B, 3, 16, 16\)",
            torch.zeros(B, 3, 16, 8),
            torch.zeros(B, D),
        ),
        (r"images must be \(B, 3, H, W\), but they are \(3, 1, 16, 16\)", torch.zeros(B, 1, 16, 16), torch.zeros(B, D)),
        (
            r"images must be floats .* torch\.uint8; use x / 127\.5 - 1",
            torch.zeros(B, 3, 16, 16).byte(),
            torch.zeros(B, D),
        ),
        (r"sentence has 7 features but .* text_dim=5", torch.zeros(B, 3, 16, 16), torch.zeros(B, 7)),
        (r"batch sizes disagree .*sentence: \(1, 5\)", torch.zeros(B, 3, 16, 16), torch.zeros(1, D)),
    ],
)
def test_invalid_inputs_raise(message, images, sentence):
    with pytest.raises(ValueError, match="PairedDiscriminator: " + message):
        make()(images, sentence)


def derivatives(result, *inputs):
    """The result with its first and second derivatives."""
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
    first = torch.autograd.grad((result * weights).tanh().sum(), inputs, create_graph=True)
    return [result, *first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)]


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@LAYOUTS
@pytest.mark.parametrize(("batch", "height", "width"), [(B, 4, 4), (1, 1, 1), (2, 1, 7), (2, 5, 2)])
def test_sentence_convolution_equals_one_over_the_repeated_sentence(batch, height, width, layout):
    conv = SentenceConv2d(2, D).double().to(memory_format=layout)
    features = torch.randn(batch, 2, height, width).double().to(memory_format=layout).requires_grad_()
    sentence = torch.randn(batch, D).double().requires_grad_()
    joined = torch.cat((features, sentence[:, :, None, None].expand(-1, -1, height, width)), dim=1)
    expected = derivatives(F.conv2d(joined, conv.weight, padding=1), features, sentence, conv.weight)
    actual = derivatives(conv(features, sentence), features, sentence, conv.weight)
    assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@LAYOUTS
@pytest.mark.parametrize("batch", [B, 1])
def test_whole_map_product_equals_the_convolution(batch, layout):
    conv = WholeMapConv2d(2).double().to(memory_format=layout)
    features = torch.randn(batch, 2, 4, 4).double().to(memory_format=layout).requires_grad_()
    inputs = features, conv.weight, conv.bias
    expected = derivatives(F.conv2d(features, conv.weight, conv.bias).flatten(), *inputs)
    assert_close(derivatives(conv(features), *inputs), expected, atol=1e-10, rtol=1e-10)


def test_features_of_another_discriminator_raise():
    with pytest.raises(ValueError, match=r"features has 9 features but .* feature_dim=4"):
        make().logits(torch.zeros(B, 9, 4, 4), torch.zeros(B, D))


@pytest.mark.parametrize("normalization", ["spectral", "none"])
def test_other_normalizations_have_no_batch_statistics(normalization):
    discriminator = PairedDiscriminator(16, D, channels=CHANNELS, normalization=normalization)
    images, sentence = draw()
    discriminator(images, sentence)
    together, alone = discriminator.eval()(images, sentence), discriminator(images[:1], sentence[:1])
    assert not [module for module in discriminator.modules() if "Norm2d" in type(module).__name__]
    assert_close(tuple(alone), tuple(logits[:1] for logits in together), atol=1e-5, rtol=0)


def test_spectral_norm_bounds_each_convolution():
    discriminator = PairedDiscriminator(16, D, channels=CHANNELS, normalization="spectral")
    images, sentence = draw()
    convolutions = [module for module in discriminator.modules() if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for module in convolutions:
            module.parametrizations.weight.original.mul_(37)
        for _ in range(99):
            discriminator(images, sentence)
        for module in convolutions:
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


def test_an_unknown_normalization_raises():
    with pytest.raises(ValueError, match="normalization must be one of 'batch', 'spectral', 'none', but it is 'group'"):
        PairedDiscriminator(16, D, normalization="group")
