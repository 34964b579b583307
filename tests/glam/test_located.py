"""Images with their subject in a box: against the layers written out, and a recording of GAWWN's layer list."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mirror_modules import LocatedGenerator
from mirror_modules.functional import place_in_box
from tests.norms import with_random_norms
from tests.recordings import MODES, PRECISIONS, assert_images_recorded, assert_recorded, entries, read

B, Z, E, C, HIDDEN = 3, 5, 7, 8, 11
BODY = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3", "7": "norm3"}


def make(**options):
    return with_random_norms(
        LocatedGenerator(Z, E, **{"channels": C, "hidden_dim": HIDDEN, "upsampled": (3,), **options})
    )


def boxes_of(*shape):
    return torch.cat((torch.rand(*shape, 2) * 0.5, torch.rand(*shape, 2) * 0.4 + 0.1), dim=-1)


def make_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), boxes_of(batch)


def generate_by_hand(generator, noise, condition, box):
    """The layers of GAWWN in the order of their description; boxes one after another, without `TextPlacer`."""
    boxes = (box if box.ndim == 3 else box.unsqueeze(1)).unbind(1)
    text = condition @ generator.text.weight.T + generator.text.bias
    repeated = text[:, :, None, None].expand(-1, -1, 16, 16)
    placed = sum(place_in_box(repeated, one) for one in boxes) / len(boxes)
    for conv, norm in zip(generator.placed_text[::3], generator.placed_text[1::3]):
        placed = F.relu(norm(F.conv2d(placed, conv.weight, stride=conv.stride, padding=conv.padding)))
    noise_global = noise @ generator.noise_global.weight.T + generator.noise_global.bias
    noise_local = noise @ generator.noise_local.weight.T + generator.noise_local.bias
    whole = generator.global_path.layers(F.relu(torch.cat((noise_global, placed[:, :, 0, 0]), 1))[:, :, None, None])
    part = generator.local_path.layers(F.relu(torch.cat((noise_local, text), dim=1))[:, :, None, None])
    part = F.relu(sum(place_in_box(part, one) for one in boxes) / len(boxes))
    merged = generator.merge(torch.cat((whole, part), dim=1))
    return torch.tanh(F.conv_transpose2d(merged, generator.head.weight, generator.head.bias, stride=2, padding=1))


@pytest.mark.parametrize("box_shape", [(B,), (B, 1), (B, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_matches_the_layers_written_out(box_shape, training):
    generator = make().double().train(training)
    inputs = [
        tensor.double().requires_grad_() for tensor in (torch.randn(B, Z), torch.randn(B, E), boxes_of(*box_shape))
    ]
    (images,), *maps = generator(*inputs)
    assert maps == [[], []]
    expected = generate_by_hand(generator, *inputs)
    assert_close(images, expected, atol=1e-10, rtol=1e-10)
    leaves = [*inputs, *generator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (images, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_the_local_map_is_zero_outside_the_box():
    generator, (noise, condition, _) = make().eval(), make_inputs()
    merged = []
    generator.merge.register_forward_hook(lambda _, inputs, __: merged.append(inputs[0]))
    generator(noise, condition, torch.tensor([0.5, 0.25, 0.5, 0.5]).expand(B, 4))
    whole, local = merged[0].split(2 * C, dim=1)
    rows, columns = local.abs().sum(dim=(0, 1, 3)) > 0, local.abs().sum(dim=(0, 1, 2)) > 0
    assert rows.nonzero().flatten().tolist() == list(range(4, 12))
    assert columns.nonzero().flatten().tolist() == list(range(7, 16))  # the slope at the border
    assert (whole.abs().sum(dim=(0, 1)) > 0).all()


def test_local_path_does_not_see_the_box():
    generator, (noise, condition, box) = make().eval(), make_inputs()
    local = []
    generator.local_path.register_forward_hook(lambda _, __, output: local.append(output))
    generator(noise, condition, box)
    generator(noise, condition, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(B, 4))
    assert_close(local[0], local[1], atol=0, rtol=0)


@pytest.mark.parametrize(("upsampled", "resolution"), [((), 32), ((5,), 64), ((5, 2), 128)])
def test_each_further_width_doubles_the_resolution(upsampled, resolution):
    generator = make(upsampled=upsampled)
    assert generator.resolutions == (resolution,)
    assert generator(*make_inputs()).images[-1].shape == (B, 3, resolution, resolution)


def test_an_image_alone_equals_the_same_image_in_a_batch():
    generator, inputs = make().eval(), make_inputs()
    together = generator(*inputs).images[0]
    for i in range(B):
        alone = generator(*(tensor[i : i + 1] for tensor in inputs)).images[0]
        assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_trains():
    generator = make(channels=8).train()
    generator(*make_inputs(1)).images[0].square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


def test_compiles_into_one_graph(compiled):
    generator, inputs = make().eval(), make_inputs()
    assert_close(compiled(generator)(*inputs).images[0], generator(*inputs).images[0])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"noise_dim must be a whole number of at least 1, but it is 0", {"noise_dim": 0}),
        (r"hidden_dim must be a whole number of at least 1, but it is -1", {"hidden_dim": -1}),
        (r"upsampled\[1\] must be a whole number of at least 1, but it is 0", {"upsampled": (4, 0)}),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="LocatedGenerator: " + message):
        LocatedGenerator(**options)


@pytest.mark.parametrize(
    ("message", "noise", "condition", "box"),
    [
        (r"noise has 7 features but .* noise_dim=5", (B, E), (B, E), (B, 4)),
        (r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, 4)),
        (r"box must be \(B, 4\) or \(B, K, 4\), but it is \(3, 5\)", (B, Z), (B, E), (B, 5)),
        (r"box must be \(B, 4\) or \(B, K, 4\), but it is \(4,\)", (B, Z), (B, E), (4,)),
        (r"batch sizes disagree \(.*box: \(2, 4\)\)", (B, Z), (B, E), (2, 4)),
    ],
)
def test_invalid_inputs_are_refused(message, noise, condition, box):
    with pytest.raises(ValueError, match="LocatedGenerator: " + message):
        make()(torch.zeros(noise), torch.zeros(condition), torch.full(box, 0.5))


# A recording of the layer list, whose convolutions have biases


def renamed(name):
    """Our name of a recorded weight."""
    direct = re.fullmatch(r"(noise_global|noise_local|text)\.(weight|bias)", name)
    if direct:
        return name
    part, rest = name.split(".", 1)
    if part == "text_global":
        return f"placed_text.{rest}"
    if part == "merge":
        return f"head.{rest[2:]}" if rest.startswith("9.") else f"merge.{rest}"
    layer, *body, kind = rest.split(".")
    path = {"path_global": "global_path", "path_local": "local_path"}[part]
    return f"{path}.layers.{layer}." + (f"{BODY[body[1]]}." if body else "") + kind


def load_recorded(record):
    state = {renamed(name): value for name, value in entries(record, "state/generator.").items()}
    # A transposed convolution of stride 1 is a convolution with the turned kernel.
    state["merge.0.weight"] = state["merge.0.weight"].flip(2, 3).transpose(0, 1)
    generator = LocatedGenerator(6, 12, channels=2, hidden_dim=8, upsampled=(2, 3))
    biases = {name for name in state if name.endswith(".bias")} - set(generator.state_dict())
    shifts = {norm_after(name): state.pop(name) for name in biases}
    # Batch norm subtracts the bias of the convolution before it, which ours do not have.
    for norm, bias in shifts.items():
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias
    missing, unexpected = generator.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return generator, shifts


def norm_after(name):
    """The batch norm that follows the convolution with this bias."""
    layer, number = re.fullmatch(r"(.*?)(\d+)\.bias", name).groups()
    return f"{layer.replace('conv', 'norm')}{number}" if "conv" in layer else f"{layer}{int(number) + 1}"


@PRECISIONS
@MODES
def test_gawwn_with_boxes(mode, dtype):
    record = read("gawwn_box_derived")
    generator, shifts = load_recorded(record)
    generator.to(dtype).train(mode == "train")
    images = generator(*(record[name].to(dtype) for name in ("noise", "sentence", "boxes"))).images[-1]
    assert_images_recorded(images, record, f"{mode}/image")
    if mode == "train":
        buffers = dict(generator.named_buffers())
        after = {renamed(name): values for name, values in entries(record, "train/generator_after/").items()}
        assert len(after) == len([name for name in buffers if "running" in name])
        for name, values in after.items():
            shift = shifts[name.removesuffix(".running_mean")] if name.endswith("running_mean") else 0
            assert_recorded(buffers[name] + shift, values, msg=lambda text, name=name: f"{name}: {text}")


def test_published_size():
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in LocatedGenerator().parameters())
    bottlenecks = (256 + 256 + 1024) + (128 + 128 + 512)
    paths = 2 * (1024 + 512 + 256) + bottlenecks
    assert size + 3 * 512 + paths + (256 + 128 + 32) == 73_545_699
