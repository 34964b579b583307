"""Images with their subject at key points: against the layers written out, and a recording of GAWWN's layer list."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mirror_modules import KeypointImageGenerator, KeypointMaps
from tests.glam.test_located import BODY, norm_after
from tests.norms import with_random_norms
from tests.recordings import MODES, PRECISIONS, assert_images_recorded, assert_recorded, entries, read

B, Z, E, K, C, HIDDEN = 3, 5, 7, 2, 6, 11


def make(**options):
    return with_random_norms(
        KeypointImageGenerator(Z, E, K, **{"channels": C, "hidden_dim": HIDDEN, "upsampled": (3,), **options})
    )


def maps_of(batch=B):
    return KeypointMaps(size=16)(torch.rand(batch, K, 2))


def make_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), maps_of(batch)


def generate_by_hand(generator, noise, condition, maps):
    """The layers of GAWWN in the order of their description, with the gate position by position."""
    noise = noise @ generator.noise.weight.T + generator.noise.bias
    text = condition @ generator.text.weight.T + generator.text.bias
    hidden = F.relu(torch.cat((noise, text), dim=1))
    points = maps
    for conv, norm in zip(generator.placed_points[::3], generator.placed_points[1::3]):
        points = F.relu(norm(F.conv2d(points, conv.weight, stride=conv.stride, padding=conv.padding)))
    linear, norm, _ = generator.to_global
    whole = torch.cat((F.relu(norm(hidden @ linear.weight.T)), points[:, :, 0, 0]), dim=1)
    whole = generator.global_path.layers(whole[:, :, None, None])
    linear, norm, _ = generator.to_local
    vector = F.relu(norm(hidden @ linear.weight.T))
    columns = []
    for i in range(16):
        for j in range(16):
            columns.append(vector * maps[:, :, i, j].sum(dim=1, keepdim=True).clamp(max=1))
    part = generator.local_path(torch.stack(columns, dim=2).unflatten(2, (16, 16)))
    merged = generator.merge(torch.cat((whole, part, maps), dim=1))
    return torch.tanh(F.conv_transpose2d(merged, generator.head.weight, generator.head.bias, stride=2, padding=1))


@pytest.mark.parametrize("training", [False, True])
def test_matches_the_layers_written_out(training):
    generator = make().double().train(training)
    noise, condition, maps = (tensor.double() for tensor in make_inputs())
    maps[0, 1] = maps[0, 0]  # two points in one cell
    inputs = [noise.requires_grad_(), condition.requires_grad_(), (0.8 * maps).requires_grad_()]
    (images,), *attention = generator(*inputs)
    assert attention == [[], []]
    expected = generate_by_hand(generator, *inputs)
    assert_close(images, expected, atol=1e-10, rtol=1e-10)
    leaves = [*inputs, *generator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (images, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_the_local_path_is_gated():
    generator, (noise, condition, maps) = make().eval(), make_inputs()
    gated = []
    generator.local_path.register_forward_hook(lambda _, inputs, __: gated.append(inputs[0]))
    generator(noise, condition, maps)
    assert torch.equal(gated[0].abs().sum(dim=1) > 0, maps.sum(dim=1) > 0)


def test_key_points_equal_their_maps():
    generator, (noise, condition, _) = make().eval(), make_inputs()
    points = torch.cat((torch.rand(B, K, 2), torch.rand(B, K, 1).round()), dim=2)
    maps = KeypointMaps(size=16)(points[..., :2], points[..., 2])
    one, other = (generator(noise, condition, location).images[0] for location in (points, maps))
    assert_close(one, other, atol=0, rtol=0)


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
    generator = make().train()
    generator(*make_inputs(1)).images[0].square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


def test_compiles_into_one_graph(compiled):
    generator, inputs = make().eval(), make_inputs()
    assert_close(compiled(generator)(*inputs).images[0], generator(*inputs).images[0])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"noise_dim must be a whole number of at least 1, but it is 0", {"noise_dim": 0}),
        (r"point_count must be a whole number of at least 1, but it is 1.5", {"point_count": 1.5}),
        (r"upsampled\[1\] must be a whole number of at least 1, but it is 0", {"upsampled": (4, 0)}),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="KeypointImageGenerator: " + message):
        KeypointImageGenerator(**options)


@pytest.mark.parametrize(
    ("message", "noise", "condition", "maps"),
    [
        (r"noise has 7 features but .* noise_dim=5", (B, E), (B, E), (B, K, 16, 16)),
        (r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, K, 16, 16)),
        (r"points must be .* 2 key points, .* \(B, 2, 16, 16\), .* \(3, 3, 16, 16\)", (B, Z), (B, E), (B, 3, 16, 16)),
        (r"points must be .* 2 key points, .* they are \(3, 2, 2\)", (B, Z), (B, E), (B, K, 2)),
        (r"batch sizes disagree \(.*points: \(2, 2, 16, 16\)\)", (B, Z), (B, E), (2, K, 16, 16)),
    ],
)
def test_invalid_inputs_are_refused(message, noise, condition, maps):
    with pytest.raises(ValueError, match="KeypointImageGenerator: " + message):
        make()(torch.zeros(noise), torch.zeros(condition), torch.zeros(maps))


# A recording of the layer list, whose convolutions and linear layers have biases


def renamed(name):
    """Our name of a recorded weight."""
    part, rest = name.split(".", 1)
    if part in ("noise", "text", "to_global", "to_local"):
        return name
    if part == "points_global":
        return f"placed_points.{rest}"
    if part == "merge":
        layer, *body, kind = rest.split(".")
        if layer == "12":
            return f"head.{kind}"
        return f"merge.{layer}." + (f"{BODY[body[1]]}." if body else "") + kind
    return f"global_path.layers.{rest}" if part == "path_global" else f"local_path.{rest}"


def load_recorded(record):
    """The recorded generator, and the biases that ours does not have, by the norm that subtracts them."""
    state = {renamed(name): value for name, value in entries(record, "state/generator.").items()}
    # A transposed convolution of stride 1 is a convolution with the turned kernel.
    for name in ("local_path.0.weight", "merge.0.weight", "merge.3.weight"):
        state[name] = state[name].flip(2, 3).transpose(0, 1)
    generator = KeypointImageGenerator(6, 12, 5, channels=2, hidden_dim=8, upsampled=(4, 2))
    biases = {name for name in state if name.endswith(".bias")} - set(generator.state_dict())
    shifts = {norm_after(name): state.pop(name) for name in biases}
    for norm, bias in shifts.items():
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias
    missing, unexpected = generator.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(re.search("num_batches_tracked$", name) for name in missing)
    return generator, shifts


@PRECISIONS
@MODES
def test_gawwn_with_key_points(mode, dtype):
    record = read("gawwn_keypoints_derived")
    generator, shifts = load_recorded(record)
    generator.to(dtype).train(mode == "train")
    images = generator(*(record[name].to(dtype) for name in ("noise", "sentence", "maps"))).images[-1]
    assert_images_recorded(images, record, f"{mode}/image")
    if mode == "train":
        buffers = dict(generator.named_buffers())
        for name, values in entries(record, "train/generator_after/").items():
            name = renamed(name)
            shift = shifts[name.removesuffix(".running_mean")] if name.endswith("running_mean") else 0
            assert_recorded(buffers[name] + shift, values, msg=lambda text, name=name: f"{name}: {text}")


def test_published_size():
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in KeypointImageGenerator().parameters())
    points, to_maps = 128 + 256 + 512, 512 + 256 + 128
    local, merge = 512 + 512 + 512, 512 + 512 + (128 + 128 + 512) + 256 + 128
    assert size + points + to_maps + local + merge == 26_471_043
