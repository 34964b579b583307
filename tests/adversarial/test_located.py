"""Discriminators of images with a box or with key points: against the layers written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mirror_modules import KeypointImageDiscriminator, KeypointMaps, LocatedDiscriminator
from mirror_modules.functional import crop_box, place_in_box, r1_penalty
from tests.norms import with_random_norms

B, D, C, E, K = 3, 5, 2, 7, 3
R = 64


def make_located(**options):
    return with_random_norms(LocatedDiscriminator(R, D, channels=C, text_projection=E, **options))


def make_keypoints(**options):
    return with_random_norms(KeypointImageDiscriminator(R, D, K, channels=C, text_projection=E, **options))


def boxes_of(*shape):
    return torch.cat((torch.rand(*shape, 2) * 0.5, torch.rand(*shape, 2) * 0.4 + 0.1), dim=-1)


def maps_of(batch=B):
    return KeypointMaps(size=16)(torch.rand(batch, K, 2))


def draw(batch=B):
    return torch.rand(batch, 3, R, R) * 2 - 1, torch.randn(batch, D)


# Each discriminator with a function that draws its locations.
BOTH = pytest.mark.parametrize(("make", "places"), [(make_located, boxes_of), (make_keypoints, maps_of)])


def through(layers, features, slope=0.2):
    """Convolutions, norms and activations, one after another."""
    for layer in layers:
        if hasattr(layer, "weight") and layer.weight.ndim == 4:
            options = {"stride": layer.stride, "padding": layer.padding}
            features = F.conv2d(features, layer.weight, layer.bias, **options)
        elif hasattr(layer, "running_mean"):
            features = layer(features)
        else:
            features = features.where(features > 0, slope * features)
    return features


def located_by_hand(discriminator, images, sentence, box):
    """The layers of GAWWN in the order of their description; boxes one after another, the sentence laid out."""
    boxes = (box if box.ndim == 3 else box.unsqueeze(1)).unbind(1)
    hidden = through(discriminator.trunk, images)
    linear = discriminator.text_projection[0]
    text = F.leaky_relu(sentence @ linear.weight.T + linear.bias, 0.2)[:, :, None, None].expand(-1, -1, 16, 16)
    joint = through(discriminator.local_joint, torch.cat((hidden, text), dim=1))
    crops = torch.stack([crop_box(joint, one) for one in boxes], dim=1)
    # Batch statistics are those of all boxes together.
    local = through(discriminator.local_path, crops.flatten(0, 1)).mean(dim=(2, 3))
    local = local.where(local > 0, 0.2 * local).reshape(len(images), len(boxes), -1).mean(dim=1)
    sample = place_in_box if discriminator.text_map == "placed" else crop_box
    placed = sum(sample(text, one) for one in boxes) / len(boxes)
    placed = through(discriminator.text_path, placed, slope=0)
    whole = torch.cat((through(discriminator.global_path, hidden), placed), dim=1)
    whole = through(discriminator.global_head, through(discriminator.global_joint, whole))
    return head_by_hand(discriminator, local, whole)


def keypoints_by_hand(discriminator, images, sentence, maps):
    hidden = through(discriminator.trunk, images)
    linear = discriminator.text_projection[0]
    text = F.leaky_relu(sentence @ linear.weight.T + linear.bias, 0.2)[:, :, None, None].expand(-1, -1, 16, 16)
    joint = through(discriminator.local_joint, torch.cat((hidden, text), dim=1))
    gated = torch.stack([feature * maps.sum(dim=1).clamp(max=1) for feature in joint.unbind(1)], dim=1)
    local = through(discriminator.local_path, torch.cat((gated, maps), dim=1)).mean(dim=(2, 3))
    local = local.where(local > 0, 0.2 * local)
    whole = torch.cat((through(discriminator.global_path, hidden), text[:, :, :4, :4]), dim=1)
    whole = through(discriminator.global_head, through(discriminator.global_joint, whole))
    return head_by_hand(discriminator, local, whole)


def head_by_hand(discriminator, local, whole):
    first, norm, _, last = discriminator.consistency_head
    hidden = norm(torch.cat((local, whole[:, :, 0, 0]), dim=1) @ first.weight.T)
    return (hidden.where(hidden > 0, 0.2 * hidden) @ last.weight.T + last.bias)[:, 0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "by_hand", "location"),
    [
        (make_located, located_by_hand, boxes_of(B)),
        (make_located, located_by_hand, boxes_of(B, 2)),
        (lambda: make_located(text_map="cropped"), located_by_hand, boxes_of(B)),
        (make_keypoints, keypoints_by_hand, 0.7 * maps_of()),
    ],
    ids=["box", "boxes", "cropped text", "key points"],
)
def test_matches_the_layers_written_out(make, by_hand, location, training):
    discriminator = make().double().train(training)
    inputs = [tensor.double().requires_grad_() for tensor in (*draw(), location.detach().clone())]
    logits = discriminator(*inputs)
    assert logits.realism is logits.mismatched is None
    expected = by_hand(discriminator, *inputs)
    assert_close(logits.consistency, expected, atol=1e-10, rtol=1e-10)
    leaves = [*inputs, *discriminator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (logits.consistency, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)


@BOTH
@pytest.mark.parametrize("rows", [None, (2, 0), (1, 1, 2, 0), ()])
def test_mismatched_pairs_keep_the_place_of_their_image(make, places, rows):
    discriminator, (images, sentence), location = make().eval(), draw(), places(B)
    chosen = range(B) if rows is None else rows
    other = torch.randn(len(chosen), D)
    row_tensor = None if rows is None else torch.tensor(rows, dtype=torch.long)
    logits = discriminator(images, sentence, location, mismatched_sentence=other, mismatched_rows=row_tensor)
    assert logits.mismatched.shape == (len(chosen),)
    for logit, row, words in zip(logits.mismatched, chosen, other, strict=True):
        pair = discriminator(images[row : row + 1], words.unsqueeze(0), location[row : row + 1])
        assert_close(logit, pair.consistency[0], atol=1e-5, rtol=1e-5)
    features = discriminator.features(images)
    assert features.shape == (B, discriminator.feature_dim, 16, 16)
    assert_close(discriminator.logits(features, sentence, location)[1], logits.consistency, atol=0, rtol=0)


@BOTH
def test_the_logits_depend_on_the_place(make, places):
    discriminator, (images, sentence) = make().eval(), draw()
    one, other = (discriminator(images, sentence, places(B)).consistency for _ in range(2))
    assert (one != other).all()


@pytest.mark.parametrize(("text_map", "sees"), [("placed", True), ("cropped", False)])
def test_the_global_path_sees_the_box_only_if_the_text_is_placed(text_map, sees):
    discriminator, (images, sentence) = make_located(text_map=text_map).eval(), draw()
    maps = []
    discriminator.text_path.register_forward_hook(lambda _, __, output: maps.append(output))
    for box in ([0.1, 0.1, 0.4, 0.4], [0.5, 0.4, 0.4, 0.5]):
        discriminator(images, sentence, torch.tensor(box).expand(B, 4))
    assert (maps[0] != maps[1]).any() == sees


@BOTH
def test_a_sample_alone_equals_the_same_sample_in_a_batch(make, places):
    discriminator, inputs = make().eval(), (*draw(), places(B))
    together = discriminator(*inputs).consistency
    for i in range(B):
        alone = discriminator(*(tensor[i : i + 1] for tensor in inputs)).consistency
        assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("normalization", ["batch", "spectral", "none"])
@pytest.mark.parametrize("batch", [1, B])
def test_every_weight_trains(make, places, normalization, batch):
    discriminator = make(normalization=normalization).train()
    (images, sentence), location = draw(batch), places(batch)
    discriminator(images, sentence, location, mismatched_sentence=-sentence).mismatched.sum().backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    has_statistics = any("running" in name for name, _ in discriminator.named_buffers())
    assert has_statistics == (normalization == "batch")


@BOTH
def test_a_gradient_penalty_has_a_gradient(make, places):
    discriminator, (images, sentence) = make().train(), draw()
    images.requires_grad_()
    r1_penalty(images, discriminator(images, sentence, places(B))).backward()
    weight = discriminator.trunk[0].weight
    assert weight.grad.abs().sum() > 0


@BOTH
def test_compiles_into_one_graph(make, places, compiled):
    discriminator, inputs = make().eval(), (*draw(), places(B))
    assert_close(compiled(discriminator)(*inputs).consistency, discriminator(*inputs).consistency)


@pytest.mark.parametrize("resolution", [32, 128, 256])
def test_any_resolution_becomes_a_map_of_16_by_16(resolution):
    discriminator = LocatedDiscriminator(resolution, D, channels=C, text_projection=E)
    images = torch.rand(2, 3, resolution, resolution) * 2 - 1
    assert discriminator.features(images).shape == (2, 2 * C, 16, 16)
    assert discriminator(images, torch.randn(2, D), boxes_of(2)).consistency.shape == (2,)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"LocatedDiscriminator: resolution must be a power of two .* 32, .* 16", lambda: LocatedDiscriminator(16)),
        (r"LocatedDiscriminator: resolution must be a power of two .* 100", lambda: LocatedDiscriminator(100)),
        (r"LocatedDiscriminator: text_dim must be a whole number", lambda: LocatedDiscriminator(text_dim=0)),
        (r"LocatedDiscriminator: text_map must be one of 'placed', 'cropped'", lambda: make_located(text_map="b")),
        (r"LocatedDiscriminator: normalization must be one of", lambda: make_located(normalization="layer")),
        (r"KeypointImageDiscriminator: point_count must be", lambda: KeypointImageDiscriminator(point_count=0)),
        (r"KeypointImageDiscriminator: channels must be", lambda: KeypointImageDiscriminator(channels=-1)),
    ],
)
def test_invalid_options_are_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("message", "make", "location"),
    [
        (r"LocatedDiscriminator: box must be floats \(B, 4\) .* \(3, 5\)", make_located, torch.zeros(B, 5)),
        (r"LocatedDiscriminator: batch sizes disagree .*location: \(2, 4\)", make_located, boxes_of(2)),
        (r"LocatedDiscriminator: location must be a tensor, but it is a list", make_located, [0.1, 0.1, 0.5, 0.5]),
        (r"LocatedDiscriminator: box 0 is empty", make_located, torch.zeros(B, 4)),
        (
            r"KeypointImageDiscriminator: location must be x, y and visibility of 3 .* \(3, 4\)",
            make_keypoints,
            boxes_of(B),
        ),
        (r"KeypointImageDiscriminator: location must be x, y and", make_keypoints, torch.zeros(B, 2, 16, 16)),
    ],
)
def test_invalid_locations_are_refused(message, make, location):
    with pytest.raises(ValueError, match=message):
        make()(*draw(), location)


@pytest.mark.parametrize(
    ("message", "images", "options"),
    [
        (r"images are \(3, 3, 32, 32\) but it was built with resolution=64", torch.zeros(B, 3, 32, 32), {}),
        (r"mismatched_rows need the sentences", torch.zeros(B, 3, R, R), {"mismatched_rows": torch.tensor([1])}),
        (r"sentence has 4 features", torch.zeros(B, 3, R, R), {"mismatched_sentence": torch.zeros(B, 4)}),
    ],
)
def test_invalid_inputs_are_refused(message, images, options):
    with pytest.raises(ValueError, match="LocatedDiscriminator: " + message):
        make_located()(images, torch.zeros(B, D), boxes_of(B), **options)


@pytest.mark.parametrize("make", [make_located, make_keypoints])
def test_features_of_another_size_are_refused(make):
    discriminator = make()
    with pytest.raises(ValueError, match=r"features are \(3, \d+, 16, 17\), expected \(B, F, 16, 16\)"):
        discriminator.logits(torch.zeros(B, discriminator.feature_dim, 16, 17), torch.zeros(B, D), boxes_of(B))


def test_key_points_equal_their_maps():
    discriminator, (images, sentence) = make_keypoints().eval(), draw()
    points = torch.cat((torch.rand(B, K, 2), torch.rand(B, K, 1).round()), dim=2)
    maps = KeypointMaps(size=16)(points[..., :2], points[..., 2])
    one, other = (discriminator(images, sentence, location).consistency for location in (points, maps))
    assert_close(one, other, atol=0, rtol=0)
