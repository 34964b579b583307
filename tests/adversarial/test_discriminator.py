"""The paired discriminator: two logits per image, only one of which depends on the sentence."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from mirror_modules import PairedDiscriminator
from mirror_modules._sentence_conv import SentenceConv2d
from mirror_modules.adversarial.discriminator import WholeMapConv2d

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
    logits = discriminator(images, sentence)
    assert logits.realism.shape == logits.consistency.shape == (2,)
    assert logits.mismatched is None


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
        assert_close(alone[:2], tuple(logits[i : i + 1] for logits in together[:2]), atol=1e-5, rtol=1e-5)


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
    assert_close(shuffled[:2], tuple(logits[order] for logits in straight[:2]))


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
        (r"text_projection must be a whole number of at least 1, but it is 0", {"resolution": 4, "text_projection": 0}),
        (r"joint_kernel must be odd, so that the map keeps its size, not 2", {"resolution": 4, "joint_kernel": 2}),
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
@pytest.mark.parametrize(("kernel", "out_channels"), [(1, None), (3, 7), (5, None)])
def test_sentence_convolution_equals_one_over_the_repeated_sentence(batch, height, width, layout, kernel, out_channels):
    conv = SentenceConv2d(2, D, kernel, out_channels=out_channels).double().to(memory_format=layout)
    features = torch.randn(batch, 2, height, width).double().to(memory_format=layout).requires_grad_()
    sentence = torch.randn(batch, D).double().requires_grad_()
    joined = torch.cat((features, sentence[:, :, None, None].expand(-1, -1, height, width)), dim=1)
    expected = derivatives(F.conv2d(joined, conv.weight, padding=kernel // 2), features, sentence, conv.weight)
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


# Mismatched pairs


@pytest.mark.parametrize("rows", [None, (2, 0), (1, 1, 2, 0), ()])
def test_mismatched_pairs_are_images_with_the_sentences_given(rows):
    discriminator, (images, sentence) = make().eval(), draw()
    chosen = range(B) if rows is None else rows
    other = torch.randn(len(chosen), D)
    logits = discriminator(
        images,
        sentence,
        mismatched_sentence=other,
        mismatched_rows=None if rows is None else torch.tensor(rows, dtype=torch.long),
    )
    assert logits.mismatched.shape == (len(chosen),)
    for logit, row, words in zip(logits.mismatched, chosen, other, strict=True):
        pair = discriminator(images[row : row + 1], words.unsqueeze(0))
        assert_close(logit, pair.consistency[0], atol=1e-5, rtol=1e-5)
    assert_close(logits[:2], discriminator(images, sentence)[:2], atol=0, rtol=0)


@pytest.mark.parametrize("normalization", ["batch", "spectral", "none"])
def test_one_call_equals_features_and_logits(normalization):
    """In training mode, where batch statistics and estimates of singular values depend on the order of the calls."""
    one, steps = (PairedDiscriminator(16, D, channels=CHANNELS, normalization=normalization) for _ in range(2))
    steps.load_state_dict(one.state_dict())
    (images, sentence), rows = draw(), torch.tensor([2, 0])
    logits = one(images, sentence, mismatched_sentence=sentence[:2], mismatched_rows=rows)
    features = steps.features(images)
    expected = steps.logits(features, sentence)
    assert_close(logits[:2], expected[:2], atol=0, rtol=0)
    joint = steps.joint(features[rows], sentence[:2])
    assert_close(logits.mismatched, steps.consistency_head(joint), atol=0, rtol=0)
    assert_close(one.state_dict(), steps.state_dict(), atol=0, rtol=0)


def test_mismatched_pairs_have_gradients_of_image_sentence_and_weights():
    discriminator, (images, sentence) = make(), draw()
    images.requires_grad_()
    sentence.requires_grad_()
    other = torch.randn(2, D, requires_grad=True)
    rows = torch.tensor([2, 0])
    logits = discriminator.eval()(images, sentence, mismatched_sentence=other, mismatched_rows=rows)
    logits.mismatched.sum().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).tolist() == [True, False, True]
    assert sentence.grad is None
    assert (other.grad.abs().sum(dim=1) > 0).all()
    assert discriminator.joint[0].weight.grad.abs().sum() > 0
    assert discriminator.realism_head.weight.grad is None


def test_the_features_are_computed_once():
    discriminator, (images, sentence) = make(), draw()
    calls = []
    discriminator.trunk.register_forward_hook(lambda *_: calls.append("trunk"))
    discriminator(images, sentence, mismatched_sentence=sentence.roll(1, dims=0))
    assert calls == ["trunk"]


def test_mismatched_pairs_compile_into_one_graph(compiled):
    discriminator, (images, sentence) = make().eval(), draw()
    options = {"mismatched_sentence": sentence[:2], "mismatched_rows": torch.tensor([2, 1])}
    logits = compiled(discriminator)(images, sentence, **options)
    assert_close(tuple(logits), tuple(discriminator(images, sentence, **options)))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"mismatched_rows need the sentences of these rows", {"mismatched_rows": torch.tensor([0])}),
        (
            r"mismatched_sentence has 7 features but .* text_dim=5",
            {"mismatched_sentence": torch.zeros(B, 7)},
        ),
        (
            r"batch sizes disagree \(images: \(3, 4, 4, 4\), mismatched_sentence: \(2, 5\)\)",
            {"mismatched_sentence": torch.zeros(2, D)},
        ),
        (
            r"batch sizes disagree \(mismatched_rows: \(2,\), mismatched_sentence: \(3, 5\)\)",
            {"mismatched_sentence": torch.zeros(B, D), "mismatched_rows": torch.tensor([0, 1])},
        ),
        (
            r"mismatched_rows must be int64 \(K,\), but they are torch\.bool \(3,\); for a mask .*nonzero\(\)",
            {"mismatched_sentence": torch.zeros(B, D), "mismatched_rows": torch.tensor([True, False, True])},
        ),
        (
            r"mismatched_rows must be a tensor, but it is a list",
            {"mismatched_sentence": torch.zeros(2, D), "mismatched_rows": [0, 1]},
        ),
        (
            r"mismatched_rows range from 0 to 3, but the rows of the batch are 0 to 2",
            {"mismatched_sentence": torch.zeros(2, D), "mismatched_rows": torch.tensor([0, 3])},
        ),
        (
            r"mismatched_rows range from -1 to 1, but",
            {"mismatched_sentence": torch.zeros(2, D), "mismatched_rows": torch.tensor([1, -1])},
        ),
        (
            r"the dtype of mismatched_sentence is torch\.float64 but that of the weights is torch\.float32",
            {"mismatched_sentence": torch.zeros(B, D).double()},
        ),
    ],
)
def test_invalid_mismatched_pairs_raise(message, options):
    with pytest.raises(ValueError, match="PairedDiscriminator: " + message):
        make()(*draw(), **options)


def test_features_of_another_size_raise():
    discriminator, (_, sentence) = make(), draw()
    with pytest.raises(
        ValueError, match=r"features are \(3, 4, 8, 8\), expected \(B, F, 4, 4\) as the method `features`"
    ):
        discriminator.logits(torch.zeros(B, discriminator.feature_dim, 8, 8), sentence)


# Children are called, for hooks and wrappers


def test_forward_hooks_of_all_children_run():
    discriminator, (images, sentence) = make(), draw()
    called = set()
    for name, module in discriminator.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    discriminator(images, sentence)
    assert called == {name for name, _ in discriminator.named_modules()}


def test_the_state_has_the_names_of_a_plain_sequence():
    names = [name for name in make().state_dict() if name.startswith("joint")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names == ["joint.0.weight", *(f"joint.1.{name}" for name in norm)]


@pytest.fixture
def process_group():
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pair_loss(logits):
    return logits.realism.sum() + logits.consistency.square().sum() + logits.mismatched.sum()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_wrappers_of_distributed_training_compute_all_logits(process_group, wrap):
    plain, wrapped = make(), make()
    wrapped.load_state_dict(plain.state_dict())
    (images, sentence), options = draw(), {"mismatched_rows": torch.tensor([2, 0])}
    options["mismatched_sentence"] = sentence[:2]
    if wrap == "ddp":
        parallel = nn.parallel.DistributedDataParallel(wrapped)
    else:
        mesh = dist.init_device_mesh("cpu", (1,))
        for unit in (wrapped.trunk, wrapped.joint, wrapped):
            fully_shard(unit, mesh=mesh)
        parallel = wrapped
    expected, logits = plain(images, sentence, **options), parallel(images, sentence, **options)
    assert_close(tuple(logits), tuple(expected))
    pair_loss(expected).backward()
    pair_loss(logits).backward()
    for (name, parameter), other in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        grad = other.grad if wrap == "ddp" else other.grad.full_tensor()
        assert_close(grad, parameter.grad, msg=name)


@pytest.mark.parametrize(
    ("message", "images", "sentence"),
    [
        (
            r"the dtype of images is torch\.float32 but that of the weights is torch\.bfloat16; convert",
            torch.zeros(B, 3, 16, 16),
            torch.zeros(B, D).bfloat16(),
        ),
        (
            r"the dtype of sentence is torch\.float32 but that of the weights is torch\.bfloat16",
            torch.zeros(B, 3, 16, 16).bfloat16(),
            torch.zeros(B, D),
        ),
        (
            r"sentence must be floating point, but its dtype is torch\.int64",
            torch.zeros(B, 3, 16, 16).bfloat16(),
            torch.zeros(B, D).long(),
        ),
    ],
)
@pytest.mark.parametrize("normalization", ["batch", "spectral"])
def test_inputs_in_another_precision_than_the_weights_raise(message, images, sentence, normalization):
    discriminator = PairedDiscriminator(16, D, channels=CHANNELS, normalization=normalization).bfloat16()
    with pytest.raises(ValueError, match="PairedDiscriminator: " + message):
        discriminator(images, sentence)


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
    assert_close(alone[:2], tuple(logits[:1] for logits in together[:2]), atol=1e-5, rtol=1e-5)


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


def test_one_forward_refines_each_singular_value_once():
    discriminator = PairedDiscriminator(16, D, channels=CHANNELS, normalization="spectral", text_projection=7)
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    estimates = []
    for layer in layers:
        layer.parametrizations.weight[0].register_forward_hook(lambda module, *_: estimates.append(module))
    discriminator(*draw())
    assert len(estimates) == len(set(estimates)) == len(layers)


def test_an_unknown_normalization_raises():
    with pytest.raises(ValueError, match="normalization must be one of 'batch', 'spectral', 'none', but it is 'group'"):
        PairedDiscriminator(16, D, normalization="group")


# Discriminators of other systems

OPTIONS = [
    {"realism": False},
    {"text_projection": 7},
    {"joint_kernel": 1},
    {"residual_block": True},
    {"realism": False, "text_projection": 7, "joint_kernel": 1},
]


@pytest.mark.parametrize("normalization", ["batch", "spectral", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_train_every_weight_and_keep_samples_apart(options, normalization):
    discriminator = PairedDiscriminator(16, D, channels=CHANNELS, normalization=normalization, **options)
    images, sentence = draw()
    logits = discriminator(images, sentence, mismatched_sentence=sentence[:2], mismatched_rows=torch.tensor([2, 0]))
    assert (logits.realism is None) == ("realism" in options)
    present = [part for part in logits if part is not None]
    sum(part.square().sum() for part in present).backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name
    together = discriminator.eval()(images, sentence)
    alone = discriminator(images[:1], sentence[:1])
    assert_close(alone.consistency, together.consistency[:1], atol=1e-5, rtol=1e-5)
    steps = discriminator.logits(discriminator.features(images), sentence)
    assert_close(steps.consistency, together.consistency, atol=0, rtol=0)


@pytest.mark.parametrize("normalization", ["batch", "spectral", "none"])
def test_the_projected_sentence_takes_the_place_of_the_sentence(normalization):
    projected = PairedDiscriminator(16, D, channels=CHANNELS, normalization=normalization, text_projection=7).eval()
    plain = PairedDiscriminator(16, 7, channels=CHANNELS, normalization=normalization).eval()
    state = {name: value for name, value in projected.state_dict().items() if not name.startswith("text_projection")}
    plain.load_state_dict(state)
    images, sentence = draw()
    linear = projected.text_projection[0]
    values = sentence @ linear.weight.mT + linear.bias
    if normalization == "batch":
        norm = projected.text_projection[1]
        values = (values - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    expected = plain(images, values.where(values > 0, 0.2 * values))
    assert_close(tuple(projected(images, sentence)[:2]), tuple(expected[:2]), atol=1e-5, rtol=1e-5)


def test_the_sentence_has_no_weight_per_position_with_a_kernel_of_one():
    assert PairedDiscriminator(16, D, channels=CHANNELS, joint_kernel=1).joint[0].weight.shape == (4, 4 + D, 1, 1)


def test_no_realism_compiles_into_one_graph(compiled):
    discriminator, inputs = PairedDiscriminator(16, D, channels=CHANNELS, **OPTIONS[-1]).eval(), draw()
    logits = compiled(discriminator)(*inputs)
    assert_close(logits.consistency, discriminator(*inputs).consistency)
    assert logits.realism is None


@pytest.mark.parametrize("resolution", [4, 8, 32])
def test_a_residual_block_follows_the_last_convolution(resolution):
    discriminator = PairedDiscriminator(resolution, D, channels=4, residual_block=True)
    images, sentence = draw(resolution)
    activations = [layer for layer in discriminator.trunk if isinstance(layer, nn.LeakyReLU)]
    assert len(activations) == 1  # of the first convolution
    inputs = []
    discriminator.trunk[-1].register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    discriminator(images, sentence).consistency.sum().backward()
    assert inputs[0].shape[2:] == (4, 4)
    assert all(parameter.grad is not None for parameter in discriminator.trunk[-1].parameters())


def test_a_residual_block_needs_a_multiple_of_four_channels():
    message = r"PairedDiscriminator: .* the 4 x 4 map has 6 with channels=3; use a multiple of 4"
    with pytest.raises(ValueError, match=message):
        PairedDiscriminator(16, D, channels=3, residual_block=True)
