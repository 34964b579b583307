"""Building blocks of the cascade, compared with convolutions written as loops."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mirror_modules import CascadedGenerator, GlobalLocalAttention, WordAttention
from mirror_modules.glam import GlobalLocalContext, stages
from mirror_modules.glam.stages import (
    DoublingConv2d,
    ImageHead,
    InitialStage,
    RefinementStage,
    ResidualBlock,
    UpBlock,
    doubling_kernel,
    gate,
    sums_weights,
)

B, L, C, H, W = 2, 7, 3, 5, 2
Z, D, E = 11, 13, 17
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
ACTIVATIONS = pytest.mark.parametrize("activation", ["glu", "relu"])


def conv_by_loops(features, weight):
    """A 3x3 convolution with zero padding of one pixel."""
    _, channels, height, width = features.shape
    out = torch.zeros(len(features), len(weight), height, width)
    for b, o, y, x in product(range(len(features)), range(len(weight)), range(height), range(width)):
        for c, dy, dx in product(range(channels), (-1, 0, 1), (-1, 0, 1)):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[b, o, y, x] += weight[o, c, dy + 1, dx + 1] * features[b, c, y + dy, x + dx]
    return out


def norm_by_loops(features, norm):
    out = torch.empty_like(features)
    for c in range(features.shape[1]):
        deviation = (norm.running_var[c] + norm.eps) ** 0.5
        out[:, c] = (features[:, c] - norm.running_mean[c]) / deviation * norm.weight[c] + norm.bias[c]
    return out


def gate_by_loops(features):
    half = features.shape[1] // 2
    return torch.stack([features[:, c] * torch.sigmoid(features[:, half + c]) for c in range(half)], dim=1)


def activate_by_loops(features, activation):
    if activation == "glu":
        return gate_by_loops(features)
    return torch.tensor([max(value, 0.0) for value in features.flatten().tolist()]).view(features.shape)


def with_random_statistics(module):
    """Evaluation mode, with random norms instead of the identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            for values in (part.running_mean, part.weight, part.bias):
                nn.init.normal_(values)
    return module.eval().requires_grad_(False)


@ACTIVATIONS
def test_up_block_matches_the_loops(activation):
    block, features = with_random_statistics(UpBlock(C, 2, activation)), torch.randn(1, C, 2, 3)
    doubled = torch.zeros(1, C, 4, 6)
    for y, x in product(range(4), range(6)):
        doubled[:, :, y, x] = features[:, :, y // 2, x // 2]
    expected = activate_by_loops(norm_by_loops(conv_by_loops(doubled, block.conv.weight), block.norm), activation)
    assert_close(block(features), expected)


def test_the_gradient_of_the_gate_is_channels_last():
    features = torch.randn(B, 2 * C, H, W).to(memory_format=torch.channels_last).requires_grad_()
    assert_close(gate(features), F.glu(features, dim=1))
    gradients = [torch.autograd.grad(form.square().sum(), features)[0] for form in (gate(features), F.glu(features, 1))]
    assert_close(gradients[0], gradients[1])
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def upsample_then_convolve(features, weight):
    return F.conv2d(F.interpolate(features, scale_factor=2.0, mode="nearest"), weight, padding=1)


# Maps of both forms: few positions, and at least 256 in one map or in the batch.
SUMMED = [(1, 16, 17), (9, 5, 7), (257, 1, 1)]
UPSAMPLED = [(B, H, W), (1, 1, 1), (3, 1, 7), (1, 15, 17)]


def test_large_maps_and_batches_take_the_summed_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(stages, "doubling_kernel", lambda weight: calls.append(weight) or doubling_kernel(weight))
    conv = DoublingConv2d(C, 4)
    for shape, is_summed in [(each, True) for each in SUMMED] + [(each, False) for each in UPSAMPLED]:
        calls.clear()
        conv(torch.randn(shape[0], C, *shape[1:]))
        assert bool(calls) == is_summed, shape
    assert (sums_weights(255), sums_weights(256)) == (False, True)


def test_doubling_kernel_matches_the_loops():
    weight = torch.randn(5, C, 3, 3)
    expected = torch.zeros(C, 5, 4, 4)
    # A pixel of the small map is at (1, 1), (1, 2), (2, 1) and (2, 2) of the kernel's window of the large map.
    for o, i, y, x, copy_y, copy_x in product(range(5), range(C), range(3), range(3), range(2), range(2)):
        expected[i, o, 2 - y + copy_y, 2 - x + copy_x] += weight[o, i, y, x]
    assert_close(doubling_kernel(weight), expected)


@LAYOUTS
@pytest.mark.parametrize(("batch", "height", "width"), UPSAMPLED + SUMMED)
def test_doubling_convolution_equals_upsampling_then_convolution_up_to_second_derivatives(batch, height, width, layout):
    conv = DoublingConv2d(C, 4).double().to(memory_format=layout)
    features = torch.randn(batch, C, height, width).double().to(memory_format=layout).requires_grad_()
    weights = torch.randn(batch, 4, 2 * height, 2 * width).double()

    def derivatives(result):
        first = torch.autograd.grad((result * weights).tanh().sum(), (features, conv.weight), create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), (features, conv.weight))
        return [result, *first, *second]

    expected = derivatives(upsample_then_convolve(features, conv.weight))
    assert_close(derivatives(conv(features)), expected, atol=1e-10, rtol=1e-10)


@LAYOUTS
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 1), (5, 7), (16, 17)])
def test_bilinear_doubling_mixes_each_pixel_with_its_nearest_neighbors(height, width, layout):
    conv = DoublingConv2d(C, 4, "bilinear").double().to(memory_format=layout)
    features = torch.randn(B, C, height, width).double().to(memory_format=layout)
    large = torch.zeros(B, C, 2 * height, 2 * width).double()
    for y, x in product(range(2 * height), range(2 * width)):
        # The center of a pixel of the large map is a quarter of a pixel before or behind that of the small one.
        near_y, near_x = y // 2, x // 2
        far_y = min(max(near_y + (1 if y % 2 else -1), 0), height - 1)
        far_x = min(max(near_x + (1 if x % 2 else -1), 0), width - 1)
        for (i, weight_y), (j, weight_x) in product([(near_y, 0.75), (far_y, 0.25)], [(near_x, 0.75), (far_x, 0.25)]):
            large[:, :, y, x] += weight_y * weight_x * features[:, :, i, j]
    assert_close(conv(features), F.conv2d(large, conv.weight, padding=1), atol=1e-10, rtol=1e-10)


@LAYOUTS
@pytest.mark.parametrize("shape", [UPSAMPLED[0], SUMMED[0]])
def test_the_weights_determine_the_layout_of_a_doubled_map(shape, layout):
    conv = DoublingConv2d(C, 4).to(memory_format=layout)
    assert conv(torch.randn(shape[0], C, *shape[1:])).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_doubling_convolution_under_autocast_is_as_exact_as_upsampling_then_convolution(dtype):
    conv, features = DoublingConv2d(13, 7), torch.randn(2, 13, 17, 11)
    exact = upsample_then_convolve(features.double(), conv.weight.double())
    with torch.autocast("cpu", dtype):
        ours, plain = conv(features), upsample_then_convolve(features, conv.weight)
    assert ours.dtype == plain.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("shape", [UPSAMPLED[0], SUMMED[0]])
def test_a_doubling_convolution_follows_its_weights(shape):
    """However they change, since the sum of weights could be kept from an earlier call."""
    conv, features = DoublingConv2d(C, 4), torch.randn(shape[0], C, *shape[1:])

    def changed(weight):
        with torch.no_grad():
            yield conv.weight.mul_(2)
            yield conv.weight.data.add_(1)
            conv.weight.data = torch.randn_like(conv.weight)
            yield conv.weight
            yield conv.load_state_dict({"weight": weight})
            yield conv.requires_grad_(False)
            yield conv.weight.copy_(2 * weight)

    with torch.no_grad():
        conv(features)
        for _ in changed(torch.randn_like(conv.weight)):
            assert_close(conv(features), upsample_then_convolve(features, conv.weight), atol=1e-5, rtol=1e-5)
        other = torch.randn_like(conv.weight)
        replaced = torch.func.functional_call(conv, {"weight": other}, features)
        assert_close(replaced, upsample_then_convolve(features, other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [4, 16])
def test_a_doubling_convolution_compiles_into_one_graph(size):
    conv = DoublingConv2d(C, 4)
    graph = torch.compile(conv, fullgraph=True, backend="eager", dynamic=True)
    for batch in (3, 67):
        features = torch.randn(batch, C, size, size)
        assert_close(graph(features), conv(features), atol=1e-5, rtol=1e-5)


@ACTIVATIONS
def test_residual_block_matches_the_loops(activation):
    block, features = with_random_statistics(ResidualBlock(C, activation)), torch.randn(1, C, 2, 3)
    inner = activate_by_loops(norm_by_loops(conv_by_loops(features, block.conv1.weight), block.norm1), activation)
    expected = features + norm_by_loops(conv_by_loops(inner, block.conv2.weight), block.norm2)
    if activation == "relu":
        expected = activate_by_loops(expected, activation)
    assert_close(block(features), expected)


def test_image_head_matches_the_loops():
    head, features = ImageHead(C).requires_grad_(False), torch.randn(B, C, 2, 3)
    assert_close(head(features), torch.tanh(conv_by_loops(features, head.conv.weight)))


@ACTIVATIONS
def test_initial_stage_without_doubling_is_a_linear_map_and_an_activation(activation):
    stage = with_random_statistics(InitialStage(Z, E, C, 4, activation))
    noise, condition = torch.randn(B, Z), torch.randn(B, E)
    linear = torch.zeros(B, (2 if activation == "glu" else 1) * C * 16)
    for b, n in product(range(B), range(linear.shape[1])):
        row = stage.linear.weight[n]
        linear[b, n] = sum(row[e] * condition[b, e] for e in range(E)) + sum(row[E + z] * noise[b, z] for z in range(Z))
    gated = activate_by_loops(norm_by_loops(linear, stage.norm), activation)
    expected = torch.zeros(B, C, 4, 4)
    for c, y, x in product(range(C), range(4), range(4)):
        expected[:, c, y, x] = gated[:, 16 * c + 4 * y + x]
    assert_close(stage(noise, condition), expected)


@pytest.mark.parametrize(("resolution", "widths"), [(4, []), (8, [2 * C]), (32, [8 * C, 4 * C, 2 * C])])
def test_initial_stage_halves_the_channels_with_each_doubling(resolution, widths):
    stage = InitialStage(Z, E, C, resolution)
    assert [block.conv.in_channels for block in stage.upsample] == widths
    assert stage(torch.randn(B, Z), torch.randn(B, E)).shape == (B, C, resolution, resolution)


def make_attention(name):
    return {"global-local": GlobalLocalAttention(C, D, E), "word": WordAttention(C, D), "none": None}[name]


@pytest.mark.parametrize(
    ("attention", "maps"), [("global-local", (True, True)), ("word", (True, False)), ("none", (False, False))]
)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("doublings", "blocks"), [(1, 2), (2, 0), (3, 1)])
def test_refinement_stage_upsamples_maps_of_odd_sizes(attention, maps, need_weights, doublings, blocks):
    stage = RefinementStage(C, doublings, blocks, make_attention(attention))
    mask = torch.arange(L) < torch.tensor([[4], [7]])
    inputs = torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D), mask
    features, *weights = stage(*inputs, need_weights=need_weights)
    assert features.shape == (B, C, H * 2**doublings, W * 2**doublings)
    assert [weight is not None for weight in weights] == [need_weights and is_made for is_made in maps]
    for weight, axis in zip(weights, (L, C)):
        assert weight is None or weight.shape == (B, axis, H, W)


def test_refinement_stage_fuses_features_words_and_sentence_in_this_order():
    stage = with_random_statistics(RefinementStage(C, 1, 0, make_attention("global-local")))
    features, condition, words = torch.randn(B, C, 2, 3), torch.randn(B, E), torch.randn(B, L, D)
    context = stage.attention(features, words, condition)
    fused = torch.zeros(B, 2 * C, 2, 3)
    for o, c in product(range(2 * C), range(C)):
        for i, part in enumerate((features, context.word_context, context.sentence_context)):
            fused[:, o] += stage.fusion.weight[o, i * C + c, 0, 0] * part[:, c]
    assert_close(stage(features, condition, words).features, stage.upsample(fused))


@pytest.mark.parametrize(("attention", "inputs"), [("global-local", 3 * C), ("word", None), ("none", C)])
def test_features_and_contexts_of_two_times_c_channels_are_not_projected(attention, inputs):
    fusion = RefinementStage(C, 1, 0, make_attention(attention)).fusion
    if inputs is None:
        assert isinstance(fusion, nn.Identity)
    else:
        assert fusion.weight.shape == (2 * C, inputs, 1, 1)


@pytest.mark.parametrize("attention", ["global-local", "word", "none"])
@pytest.mark.parametrize("text", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("image", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_accepts_inputs_of_any_half_precision(image, text, attention):
    stage = RefinementStage(C, 1, 1, make_attention(attention)).eval()
    features, condition, words = torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D)
    expected = stage(features, condition, words).features
    features = features.to(image).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        refined = stage(features, condition.to(text), words.to(text)).features
        refined.float().square().mean().backward()
    assert_close(refined.float(), expected, rtol=0.05, atol=0.05)
    assert features.grad.dtype == image
    assert features.grad.isfinite().all()
    assert features.grad.any()


@pytest.mark.parametrize("condition_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("noise_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_accepts_noise_of_any_half_precision(noise_dtype, condition_dtype):
    stage = InitialStage(Z, E, C, 4).eval()
    noise, condition = torch.randn(B, Z), torch.randn(B, E)
    expected = stage(noise, condition)
    with torch.autocast("cpu", torch.bfloat16):
        features = stage(noise.to(noise_dtype), condition.to(condition_dtype))
    assert_close(features.float(), expected, rtol=0.05, atol=0.05)


class Result(NamedTuple):
    contexts: tuple[torch.Tensor, ...]
    word_weights: None = None
    sentence_weights: None = None


class ConstantContexts(nn.Module):
    """Contexts of given channels, whatever the text is."""

    def __init__(self, context_dim, channels):
        super().__init__()
        self.context_dim, self.channels = context_dim, channels

    def forward(self, features, words, condition, word_mask=None, *, need_weights=False):
        return Result(tuple(features.new_ones(len(features), c, *features.shape[2:]) for c in self.channels))


@pytest.mark.parametrize("channels", [(7,), (2, 5), (1, 1, 5)])
def test_any_number_of_contexts_is_fused(channels):
    stage = RefinementStage(C, 1, 1, ConstantContexts(7, channels))
    assert stage.fusion.in_channels == C + 7
    refined = stage(torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D))
    assert refined.features.shape == (B, C, 2 * H, 2 * W)


class FusedOutput(ConstantContexts):
    """Writes features and contexts into one tensor, like the Triton kernel."""

    def __init__(self, channels, width):
        super().__init__(channels, (channels,))
        self.width = width

    def forward(self, features, words, condition, word_mask=None, *, need_weights=False):
        fused = features.new_full((len(features), self.width, *features.shape[2:]), 3.0)
        return GlobalLocalContext(fused[:, : self.context_dim], fused[:, :0], None, None, fused)


def test_a_fused_output_is_taken_as_it_is():
    stage = RefinementStage(C, 1, 0, FusedOutput(2 * C, 3 * C)).eval()
    refined = stage(torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D)).features
    assert_close(refined, stage.upsample(stage.fusion(torch.full((B, 3 * C, H, W), 3.0))))


def test_a_fused_output_of_another_size_is_refused():
    stage = RefinementStage(C, 1, 0, FusedOutput(2 * C, 2 * C))
    message = (
        rf"fused_output of FusedOutput must be \({B}, {3 * C}, {H}, {W}\) .*, but it is \({B}, {2 * C}, {H}, {W}\)"
    )
    with pytest.raises(ValueError, match=message):
        stage(torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D))
    stage.attention.forward = lambda features, *_, **__: GlobalLocalContext(features, features, None, None, "fused")
    with pytest.raises(ValueError, match=r"fused_output of FusedOutput must be .* but it is a str\."):
        stage(torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D))


@pytest.mark.parametrize("named", ["global-local", "word"])
def test_the_generator_asks_for_a_fused_output_where_there_is_one(named):
    generator = CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8), attention=named)
    assert getattr(generator.refinements[0].attention, "fused_output", None) is (
        True if named == "global-local" else None
    )


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (nn.Linear(2, 3), r"it is a Linear with context_dim=None"),
        (ConstantContexts(2.0, ()), r"it is a ConstantContexts with context_dim=2\.0"),
        (ConstantContexts(0, ()), r"it is a ConstantContexts with context_dim=0"),
        (ConstantContexts, r"it is a type with context_dim=None"),
        ("word", r"it is a str with context_dim=None"),
    ],
)
def test_an_attention_without_context_dim_is_refused(attention, message):
    expected = r"RefinementStage: attention must be an nn\.Module with a positive int attribute `context_dim`.*"
    with pytest.raises(ValueError, match=expected + message):
        RefinementStage(C, 1, 0, attention)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((2,), r"have 2 channels in all \(\(2, 2, 5, 2\)\)"),
        ((7, 1), r"have 8 channels in all"),
        ((), r"have 0 channels"),
    ],
)
def test_contexts_that_do_not_add_up_are_refused(channels, message):
    stage = RefinementStage(C, 1, 0, ConstantContexts(7, channels))
    expected = rf"RefinementStage: the contexts of ConstantContexts {message}.* but its context_dim is 7"
    with pytest.raises(ValueError, match=expected):
        stage(torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D))


def test_a_result_without_contexts_is_refused():
    class Untyped(ConstantContexts):
        def forward(self, features, *text, need_weights=False):
            return features, None

    stage = RefinementStage(C, 1, 0, Untyped(C, ()))
    with pytest.raises(ValueError, match=r"RefinementStage: Untyped must return an object with `contexts`.* a tuple"):
        stage(torch.randn(B, C, H, W), torch.randn(B, E), torch.randn(B, L, D))
