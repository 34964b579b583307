"""Boxes and key points: placing, cropping and gating against loops, torch's grid sampler, and recorded results."""

import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from mirror_modules import KeypointGate, KeypointMaps, TextPlacer
from mirror_modules.functional import crop_box, keypoint_gate, keypoint_maps, place_in_box

PARITY = Path(__file__).parents[1] / "parity"
B, K, C, M, N, I, J = 2, 3, 5, 7, 11, 13, 17
BOXES = torch.tensor([[0.25, 0.125, 0.5, 0.75], [-0.2, 0.55, 0.7, 0.6]])
MANY_BOXES = torch.stack((BOXES, BOXES.roll(1, dims=0) * 0.9 + 0.01, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)), dim=1)


def recorded(name):
    with np.load(PARITY / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def sample_by_loops(features, box, size, *, inverse):
    """Interpolate between the four cells around each source position, with zeros beyond the border."""
    channels, height, width = features.shape
    x, y, w, h = box.tolist()
    result = torch.zeros(channels, *size, dtype=features.dtype)
    for i, j in product(range(size[0]), range(size[1])):
        u, v = i / (size[0] - 1), j / (size[1] - 1)
        u, v = ((u - y) / h, (v - x) / w) if inverse else (y + h * u, x + w * v)
        row, column = u * (height - 1), v * (width - 1)
        for m, n in product((math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)):
            if 0 <= m < height and 0 <= n < width:
                result[:, i, j] += features[:, m, n] * (1 - abs(row - m)) * (1 - abs(column - n))
    return result


OPERATIONS = pytest.mark.parametrize(("operation", "inverse"), [(place_in_box, True), (crop_box, False)])


@OPERATIONS
@pytest.mark.parametrize("size", [None, (I, J)])
def test_sampling_matches_the_loops(operation, inverse, size):
    features = torch.randn(B, C, M, N, dtype=torch.float64)
    boxes = BOXES.double()
    expected = [
        sample_by_loops(image, box, size or (M, N), inverse=inverse) for image, box in zip(features, boxes, strict=True)
    ]
    assert_close(operation(features, boxes, size), torch.stack(expected))


@OPERATIONS
def test_sampling_equals_the_grid_sampler_of_torch(operation, inverse):
    features = torch.randn(B, C, M, N, dtype=torch.float64)
    x, y, w, h = BOXES.double().unbind(dim=1)
    zero, shift_x, shift_y = torch.zeros_like(x), 2 * x + w - 1, 2 * y + h - 1
    if inverse:
        w, h = 1 / w, 1 / h
        shift_x, shift_y = -shift_x * w, -shift_y * h
    matrix = torch.stack((w, zero, shift_x, zero, h, shift_y), dim=1).view(B, 2, 3)
    grid = F.affine_grid(matrix, [B, C, I, J], align_corners=True)
    expected = F.grid_sample(features, grid, padding_mode="zeros", align_corners=True)
    assert_close(operation(features, BOXES.double(), (I, J)), expected)


@OPERATIONS
def test_several_boxes_give_one_map_each(operation, inverse):
    shared, own = torch.randn(B, C, M, N), torch.randn(B, K, C, M, N)
    for k in range(K):
        assert_close(operation(shared, MANY_BOXES)[:, k], operation(shared, MANY_BOXES[:, k]))
        assert_close(operation(own, MANY_BOXES)[:, k], operation(own[:, k], MANY_BOXES[:, k]))


def test_a_vector_is_placed_as_the_map_that_repeats_it():
    vector, many = torch.randn(B, C), torch.randn(B, K, C)
    filled = vector[..., None, None].expand(-1, -1, I, J)
    assert_close(place_in_box(vector, BOXES, (I, J)), place_in_box(filled, BOXES))
    assert_close(place_in_box(vector, MANY_BOXES, (I, J)), place_in_box(filled, MANY_BOXES))
    filled = many[..., None, None].expand(-1, -1, -1, I, J)
    assert_close(place_in_box(many, MANY_BOXES, (I, J)), place_in_box(filled, MANY_BOXES))


def test_cropping_undoes_placing_inside_the_image():
    """A box on cells of a larger map holds every cell of the smaller one."""
    features, box = torch.randn(1, C, 5, 5), torch.tensor([[0.25, 0.5, 0.5, 0.5]])
    placed = place_in_box(features, box, (9, 9))
    assert_close(placed[:, :, 4:, 2:7], features)
    assert_close(crop_box(placed, box, (5, 5)), features)


def test_recorded_text_and_maps():
    record = recorded("gawwn_text_placer")
    assert_recorded = partial(assert_close, atol=2e-5, rtol=0)
    for dtype in (torch.float32, torch.float64):
        boxes, text, features = (record[name].to(dtype) for name in ("boxes", "text", "features"))
        placed = TextPlacer(size=16)(text, boxes)
        assert_recorded(placed.float(), record["placed_text"])
        constant = text[..., None, None].expand(-1, -1, 16, 16)
        assert_recorded(crop_box(constant, boxes).float(), record["crop_of_constant_text"])
        assert_recorded(place_in_box(features, boxes).float(), record["placed_features"])
        assert_recorded(crop_box(features, boxes).float(), record["cropped_features"])
        elements = TextPlacer(size=16)(record["element_text"].to(dtype), record["element_boxes"].to(dtype))
        assert_recorded(elements.float(), record["element_mean"])


@OPERATIONS
def test_gradients_of_sampling_and_their_gradients(operation, inverse):
    features = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    box = torch.tensor([[0.22, 0.31, 0.47, 0.53]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(operation, (features, box))
    assert gradgradcheck(operation, (features, box))


@OPERATIONS
def test_an_image_alone_equals_the_same_image_in_a_batch(operation, inverse):
    features = torch.randn(B, C, M, N)
    assert_close(operation(features, BOXES)[1:], operation(features[1:], BOXES[1:]), atol=1e-6, rtol=0)


def test_placed_text_compiles_into_one_graph(compiled):
    text = torch.randn(B, C, requires_grad=True)
    placed = compiled(TextPlacer(I))(text, BOXES)
    assert_close(placed, TextPlacer(I)(text, BOXES))
    placed.sum().backward()
    assert (text.grad > 0).all()


@OPERATIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_in_half_precision_take_positions_in_float32(operation, inverse, dtype):
    features = torch.randn(B, C, 61, 67).to(dtype)
    result = operation(features, BOXES)
    assert result.dtype == dtype
    assert_close(result.float(), operation(features.float(), BOXES), atol=0.05, rtol=0.02)


# Key points


def keypoint_maps_by_loops(points, visible, size):
    maps = torch.zeros(*points.shape[:2], size, size)
    for b, k in product(range(points.shape[0]), range(points.shape[1])):
        if visible[b, k] > 0.1:
            column, row = (min(max(math.floor(share * size + 0.5), 1), size) for share in points[b, k].tolist())
            maps[b, k, row - 1, column - 1] = 1
    return maps


def test_keypoint_maps_match_the_loops():
    points, visible = torch.rand(B, K, 2), torch.tensor([[0.1, 0.11, 1.0], [1.0, 0.0, 0.9]])
    points[0, 1] = torch.tensor([0.0, 1.0])
    assert_close(keypoint_maps(points, visible, size=M), keypoint_maps_by_loops(points, visible, M))
    assert_close(keypoint_maps(points, size=M), keypoint_maps_by_loops(points, torch.ones(B, K), M))
    assert torch.equal(KeypointMaps(M)(points, visible), keypoint_maps(points, visible, size=M))


def test_hidden_points_may_have_any_value():
    points = torch.full((1, 2, 2), math.nan)
    points[0, 1] = -37
    assert keypoint_maps(points, torch.zeros(1, 2, dtype=torch.bool)).abs().sum() == 0


def test_the_gate_matches_the_loops():
    maps, features = torch.rand(B, K, M, N), torch.randn(B, C, M, N)
    gated = keypoint_gate(features, maps)
    repeated = keypoint_gate(features[:, :, 0, 0], maps)
    for b, c, i, j in product(range(B), range(C), range(M), range(N)):
        openness = min(sum(float(maps[b, k, i, j]) for k in range(K)), 1.0)
        assert gated[b, c, i, j].item() == pytest.approx(openness * float(features[b, c, i, j]), abs=1e-6)
        assert repeated[b, c, i, j].item() == pytest.approx(openness * float(features[b, c, 0, 0]), abs=1e-6)
    assert torch.equal(KeypointGate()(features, maps), gated)


def test_recorded_keypoints():
    record = recorded("gawwn_keypoint_gate")
    maps = keypoint_maps(record["points_xy"].float(), record["visible"])
    assert_close(maps, record["maps"], atol=0, rtol=0)
    assert_close(keypoint_gate(torch.ones(3, 1), maps), record["gate"], atol=0, rtol=0)
    assert_close(keypoint_gate(record["vector"], maps), record["gated_vector"], atol=0, rtol=0)
    assert_close(keypoint_gate(record["features"], maps), record["gated_features"], atol=0, rtol=0)


def test_gradients_of_the_gate():
    features = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    maps = (torch.rand(1, K, 3, 5, dtype=torch.float64) * 0.3).requires_grad_()
    assert gradcheck(keypoint_gate, (features, maps))


def test_keypoints_compile_into_one_graph(compiled):
    points, features = torch.rand(B, K, 2), torch.randn(B, C)

    def gated(points, features):
        return KeypointGate()(features, KeypointMaps(M)(points))

    assert_close(compiled(gated)(points, features), gated(points, features))


# Errors

MAPS, ONE_BOX = torch.zeros(1, C, M, N), torch.tensor([[0.1, 0.2, 0.3, 0.4]])


@OPERATIONS
@pytest.mark.parametrize(
    ("message", "box"),
    [
        (r"box 0 is empty; width and height must be positive: \(0.1, 0.2, 0, 0.4\)", [0.1, 0.2, 0.0, 0.4]),
        (r"box 0 is empty; .*-0.4\)", [0.1, 0.2, 0.3, -0.4]),
        (r"box 0 is outside of the image, which extends from 0 to 1", [1.0, 0.2, 0.3, 0.4]),
        (r"box 0 is outside of the image", [0.1, -0.4, 0.3, 0.4]),
        (r"box 0 is not finite: \(0.1, nan, 0.3, 0.4\)", [0.1, math.nan, 0.3, 0.4]),
        (r"box 0 seems to be in pixels; divide x and w by the width .*\(31, 40, 50, 60\)", [31.0, 40.0, 50.0, 60.0]),
    ],
)
def test_unsuitable_boxes_raise(operation, inverse, message, box):
    with pytest.raises(ValueError, match=f"{operation.__name__}: " + message):
        operation(MAPS, torch.tensor([box]))


def test_the_error_names_the_image_and_the_box():
    boxes = ONE_BOX.expand(B, K, 4).clone()
    boxes[1, 2, 3] = 0
    with pytest.raises(ValueError, match=r"place_in_box: box \[1, 2\] is empty"):
        place_in_box(torch.zeros(B, C, M, N), boxes)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"place_in_box: box must be a tensor, but it is a list", lambda: place_in_box(MAPS, [[0, 0, 1, 1]])),
        (r"place_in_box: box must be floats .* torch\.int64 \(1, 4\)", lambda: place_in_box(MAPS, ONE_BOX.long())),
        (r"crop_box: box must be floats \(B, 4\) .*\(1, 5\)", lambda: crop_box(MAPS, torch.ones(1, 5))),
        (r"batch sizes disagree \(features: \(1, 5, 7, 11\), box: \(2, 4\)\)", lambda: crop_box(MAPS, BOXES)),
        (
            r"crop_box: with a box \(1, 4\), features must be floats \(B, C, M, N\), but .*\(1, 5\)",
            lambda: crop_box(torch.zeros(1, C), ONE_BOX),
        ),
        (
            r"place_in_box: with a box \(1, 4\), features must be floats \(B, C\) or \(B, C, M, N\), but",
            lambda: place_in_box(torch.zeros(1, K, C, M, N), ONE_BOX),
        ),
        (
            r"features are given for 5 boxes but there are 3",
            lambda: place_in_box(torch.zeros(B, 5, C), MANY_BOXES, (M, N)),
        ),
        (r"place_in_box: vectors have no height and width; pass", lambda: place_in_box(torch.zeros(1, C), ONE_BOX)),
        (
            r"crop_box: size must be a height and a width, each at least 2.*\(1, 5\)",
            lambda: crop_box(MAPS, ONE_BOX, (1, 5)),
        ),
        (r"crop_box: size must be a height and a width, .* it is 16", lambda: crop_box(MAPS, ONE_BOX, 16)),
        (r"place_in_box: size must be a height .* it is \(4\.5, 4\)", lambda: place_in_box(MAPS, ONE_BOX, (4.5, 4))),
        (r"TextPlacer: size must be a height and a width, each at least 2", lambda: TextPlacer(1)),
        (r"TextPlacer: size must be a whole number", lambda: TextPlacer(2.5)),
        (
            r"TextPlacer: text must be \(B, C\) or \(B, K, C\), but .*\(1, 5, 7, 11\)",
            lambda: TextPlacer()(MAPS, ONE_BOX),
        ),
        (r"KeypointMaps: size must be a whole number of at least 1", lambda: KeypointMaps(0)),
        (r"keypoint_maps: points must be floats \(B, K, 2\), .*\(1, 4\)", lambda: keypoint_maps(ONE_BOX)),
        (
            r"point 1 of image 0 is visible at \(9, 8\), outside of the image; give shares",
            lambda: keypoint_maps(torch.tensor([[[0.3, 0.2], [9.0, 8.0]]])),
        ),
        (
            r"visible must be \(B, K\), one per point, but it is \(2,\) and points are \(2, 3, 2\)",
            lambda: keypoint_maps(torch.zeros(B, K, 2), torch.ones(2)),
        ),
        (r"keypoint_gate: maps must be \(B, K, M, N\), .*\(1, 4\)", lambda: keypoint_gate(MAPS, ONE_BOX)),
        (
            r"features must be \(B, C\), or \(B, C, M, N\) as large as the maps, .*\(1, 5, 7, 11\) and .*7, 7\)",
            lambda: keypoint_gate(MAPS, torch.zeros(1, K, M, M)),
        ),
        (r"keypoint_gate: batch sizes disagree", lambda: keypoint_gate(torch.zeros(B, C), torch.zeros(1, K, M, M))),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
