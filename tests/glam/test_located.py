"""Images with their subject in a box or at key points: against the layers written out, position by position."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mirror_modules import KeypointImageGenerator, KeypointMaps, LocatedGenerator
from mirror_modules.functional import place_in_box
from tests.norms import with_random_norms

B, Z, E, K, C, HIDDEN = 3, 5, 7, 2, 8, 11
SIZES = {"channels": C, "hidden_dim": HIDDEN, "upsampled": (3,)}


def make_for_boxes(**options):
    return with_random_norms(LocatedGenerator(Z, E, **{**SIZES, **options}))


def make_for_points(**options):
    return with_random_norms(KeypointImageGenerator(Z, E, K, **{**SIZES, "channels": 6, **options}))


def boxes_of(*shape):
    return torch.cat((torch.rand(*shape, 2) * 0.5, torch.rand(*shape, 2) * 0.4 + 0.1), dim=-1)


def box_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), boxes_of(batch)


def map_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), KeypointMaps(size=16)(torch.rand(batch, K, 2))


GENERATORS = pytest.mark.parametrize(
    ("make", "make_inputs"), [(make_for_boxes, box_inputs), (make_for_points, map_inputs)], ids=["box", "points"]
)


def generate_with_box_by_hand(generator, noise, condition, box):
    """The layers of GAWWN with boxes, in their order; boxes one after another, without `TextPlacer`."""
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


def generate_with_points_by_hand(generator, noise, condition, maps):
    """The layers of GAWWN with key points, in their order, and the gate position by position."""
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


def assert_equals_by_hand(generator, generate_by_hand, inputs):
    """Compare images, and the gradients of all weights and inputs."""
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    (images,), *attention = generator(*inputs)
    assert attention == [[], []]
    expected = generate_by_hand(generator, *inputs)
    assert_close(images, expected, atol=1e-10, rtol=1e-10)
    leaves = [*inputs, *generator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (images, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


@pytest.mark.parametrize("box_shape", [(B,), (B, 1), (B, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_matches_the_layers_written_out_with_boxes(box_shape, training):
    inputs = torch.randn(B, Z), torch.randn(B, E), boxes_of(*box_shape)
    assert_equals_by_hand(make_for_boxes().double().train(training), generate_with_box_by_hand, inputs)


@pytest.mark.parametrize("training", [False, True])
def test_matches_the_layers_written_out_with_key_points(training):
    noise, condition, maps = map_inputs()
    maps[0, 1] = maps[0, 0]  # two points in one cell
    inputs = noise, condition, 0.8 * maps
    assert_equals_by_hand(make_for_points().double().train(training), generate_with_points_by_hand, inputs)


def test_the_local_map_is_zero_outside_the_box():
    generator, (noise, condition, _) = make_for_boxes().eval(), box_inputs()
    merged = []
    generator.merge.register_forward_hook(lambda _, inputs, __: merged.append(inputs[0]))
    generator(noise, condition, torch.tensor([0.5, 0.25, 0.5, 0.5]).expand(B, 4))
    whole, local = merged[0].split(2 * C, dim=1)
    rows, columns = local.abs().sum(dim=(0, 1, 3)) > 0, local.abs().sum(dim=(0, 1, 2)) > 0
    assert rows.nonzero().flatten().tolist() == list(range(4, 12))
    assert columns.nonzero().flatten().tolist() == list(range(7, 16))  # the slope at the border
    assert (whole.abs().sum(dim=(0, 1)) > 0).all()


def test_local_path_does_not_see_the_box():
    generator, (noise, condition, box) = make_for_boxes().eval(), box_inputs()
    local = []
    generator.local_path.register_forward_hook(lambda _, __, output: local.append(output))
    generator(noise, condition, box)
    generator(noise, condition, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(B, 4))
    assert_close(local[0], local[1], atol=0, rtol=0)


def test_the_local_path_is_gated():
    generator, (noise, condition, maps) = make_for_points().eval(), map_inputs()
    gated = []
    generator.local_path.register_forward_hook(lambda _, inputs, __: gated.append(inputs[0]))
    generator(noise, condition, maps)
    assert torch.equal(gated[0].abs().sum(dim=1) > 0, maps.sum(dim=1) > 0)


def test_key_points_equal_their_maps():
    generator, (noise, condition, _) = make_for_points().eval(), map_inputs()
    points = torch.cat((torch.rand(B, K, 2), torch.rand(B, K, 1).round()), dim=2)
    maps = KeypointMaps(size=16)(points[..., :2], points[..., 2])
    one, other = (generator(noise, condition, location).images[0] for location in (points, maps))
    assert_close(one, other, atol=0, rtol=0)


@GENERATORS
@pytest.mark.parametrize(("upsampled", "resolution"), [((), 32), ((5,), 64), ((5, 2), 128)])
def test_each_further_width_doubles_the_resolution(make, make_inputs, upsampled, resolution):
    generator = make(upsampled=upsampled)
    assert generator.resolutions == (resolution,)
    assert generator(*make_inputs()).images[-1].shape == (B, 3, resolution, resolution)


@GENERATORS
def test_an_image_alone_equals_the_same_image_in_a_batch(make, make_inputs):
    generator, inputs = make().eval(), make_inputs()
    together = generator(*inputs).images[0]
    for i in range(B):
        alone = generator(*(tensor[i : i + 1] for tensor in inputs)).images[0]
        assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@GENERATORS
def test_a_batch_of_one_trains(make, make_inputs):
    generator = make().train()
    generator(*make_inputs(1)).images[0].square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


@GENERATORS
def test_compiles_into_one_graph(make, make_inputs, compiled):
    generator, inputs = make().eval(), make_inputs()
    assert_close(compiled(generator)(*inputs).images[0], generator(*inputs).images[0])


@pytest.mark.parametrize("kind", [LocatedGenerator, KeypointImageGenerator])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"noise_dim must be a whole number of at least 1, but it is 0", {"noise_dim": 0}),
        (r"hidden_dim must be a whole number of at least 1, but it is -1", {"hidden_dim": -1}),
        (r"upsampled\[1\] must be a whole number of at least 1, but it is 0", {"upsampled": (4, 0)}),
        (r"upsampled must be a sequence of whole numbers, but it is 4", {"upsampled": 4}),
    ],
)
def test_invalid_options_are_refused(kind, message, options):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**options)


def test_an_invalid_number_of_points_is_refused():
    with pytest.raises(ValueError, match=r"KeypointImageGenerator: point_count must be a whole number .* it is 1\.5"):
        KeypointImageGenerator(point_count=1.5)


@pytest.mark.parametrize(
    ("make", "message", "noise", "condition", "location"),
    [
        (make_for_boxes, r"noise has 7 features but .* noise_dim=5", (B, E), (B, E), (B, 4)),
        (make_for_boxes, r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, 4)),
        (make_for_boxes, r"box must be \(B, 4\) or \(B, K, 4\), but it is \(3, 5\)", (B, Z), (B, E), (B, 5)),
        (make_for_boxes, r"box must be \(B, 4\) or \(B, K, 4\), but it is \(4,\)", (B, Z), (B, E), (4,)),
        (make_for_boxes, r"batch sizes disagree \(.*box: \(2, 4\)\)", (B, Z), (B, E), (2, 4)),
        (make_for_points, r"noise has 7 features but .* noise_dim=5", (B, E), (B, E), (B, K, 16, 16)),
        (make_for_points, r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, K, 16, 16)),
        (make_for_points, r"points must .* \(B, 2, 16, 16\), .* \(3, 3, 16, 16\)", (B, Z), (B, E), (B, 3, 16, 16)),
        (make_for_points, r"points must be .* 2 key points, .* they are \(3, 2, 2\)", (B, Z), (B, E), (B, K, 2)),
        (make_for_points, r"batch sizes disagree \(.*points: \(2, 2, 16, 16\)\)", (B, Z), (B, E), (2, K, 16, 16)),
    ],
)
def test_invalid_inputs_are_refused(make, message, noise, condition, location):
    generator = make()
    with pytest.raises(ValueError, match=f"{type(generator).__name__}: {message}"):
        generator(torch.zeros(noise), torch.zeros(condition), torch.full(location, 0.5))
