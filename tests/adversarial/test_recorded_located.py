"""GAWWN: discriminators of boxes, of key points in images and of key points alone, and the gradients of generators.

Recorded from GAWWN's layer lists, whose convolutions and linear layers have biases before a batch norm as well.
"""

import pytest
import torch

from mirror_modules import AdversarialWeights, KeypointDiscriminator, KeypointImageDiscriminator, LocatedDiscriminator
from mirror_modules.functional import discriminator_loss, generator_loss
from tests.glam.test_keypoints import load_recorded as load_keypoint_generator
from tests.glam.test_recorded_located import load_with_box, load_with_points, renamed_with_box, renamed_with_points
from tests.recordings import (
    MODES,
    PRECISIONS,
    assert_norm_recorded,
    assert_recorded,
    assert_statistics_recorded,
    entries,
    image_batch,
    load_without_biases,
    read,
)

PARTS = {
    "image": "trunk",
    "text": "text_projection",
    "joint_local": "local_joint",
    "local": "local_path",
    "image_global": "global_path",
    "text_global": "text_path",
    "head": "consistency_head",
}


def renamed(name):
    """Our name of a recorded weight."""
    part, layer, kind = name.split(".")
    if part == "joint_global":
        return f"global_head.{int(layer) - 3}.{kind}" if int(layer) >= 3 else f"global_joint.{layer}.{kind}"
    return f"{PARTS[part]}.{layer}.{kind}"


def renamed_of_points(name):
    """Our name of a recorded weight of the discriminator of key points."""
    part, layer, kind = name.split(".")
    return f"{ {'points': 'points_path', 'text': 'text_path', 'joint': 'joint'}[part] }.{layer}.{kind}"


def load(discriminator, record, rename):
    """Load a recorded discriminator, and return the biases that ours do not have, by the norm that subtracts them."""
    state = {rename(name): value for name, value in entries(record, "state/discriminator.").items()}
    return load_without_biases(discriminator, state)


def check_gradients(network, record, prefix, rename):
    """Compare the norms of the gradients of all weights that ours have."""
    parameters = dict(network.named_parameters())
    norms = {rename(name): norm for name, norm in entries(record, prefix).items()}
    assert set(parameters) <= set(norms)
    for name, parameter in parameters.items():
        assert_norm_recorded(parameter.grad.norm(), norms[name], msg=lambda text, name=name: f"{name}: {text}")


def check_statistics(network, record, prefix, rename, shifts):
    after = {rename(name): values for name, values in entries(record, prefix).items()}
    assert_statistics_recorded(network, after, shifts)


def load_boxes(record):
    sizes = {"channels": 3, "text_projection": 5, "text_map": "cropped"}
    return LocatedDiscriminator(128, 12, **sizes), *load_with_box(record)


def load_maps(record):
    return KeypointImageDiscriminator(128, 12, point_count=5, channels=3, text_projection=5), *load_with_points(record)


@PRECISIONS
@MODES
@pytest.mark.parametrize(
    ("name", "place", "make", "renamed_of_generator"),
    [
        ("gawwn_box_derived", "boxes", load_boxes, renamed_with_box),
        ("gawwn_keypoints_derived", "maps", load_maps, renamed_with_points),
    ],
)
def test_gawwn(name, place, make, renamed_of_generator, mode, dtype):
    record = read(name)
    discriminator, generator, generator_shifts = make(record)
    shifts = load(discriminator, record, renamed)
    for network in (discriminator, generator):
        network.to(dtype).train(mode == "train")
    sentence, wrong_sentence, location = (record[key].to(dtype) for key in ("sentence", "wrong_sentence", place))
    images = image_batch(record, "real", 128, dtype)
    generated = generator(record["noise"].to(dtype), sentence, location).images[-1]

    # Each kind of pair has a forward of its own, as the running statistics show.
    real = discriminator(images, sentence, location)
    wrong = discriminator(images, wrong_sentence, location)
    fake = discriminator(generated.detach(), sentence, location)
    for key, logits in (("real", real), ("wrong", wrong), ("fake", fake)):
        assert_recorded(logits.consistency, record[f"{mode}/logits_{key}"])
    loss = discriminator_loss(real, fake, wrong.consistency, weighting="gan-int-cls")
    assert_recorded(loss, record[f"{mode}/discriminator_loss"])
    loss.backward()
    check_gradients(discriminator, record, f"{mode}/discriminator_gradient_norm/", renamed)
    if mode == "train":
        check_statistics(discriminator, record, "train/discriminator_after_real_wrong_fake/", renamed, shifts)
        check_statistics(generator, record, "train/generator_after/", renamed_of_generator, generator_shifts)

    loss = generator_loss(discriminator(generated, sentence, location), weighting="gan-int-cls")
    assert_recorded(loss, record[f"{mode}/generator_loss"])
    loss.backward()
    check_gradients(generator, record, f"{mode}/generator_gradient_norm/", renamed_of_generator)


@PRECISIONS
@MODES
def test_gawwn_generator_of_key_points(mode, dtype):
    record = read("gawwn_keypoint_generator_derived")
    generator, _ = load_keypoint_generator(record)
    discriminator = KeypointDiscriminator(5, 12, hidden_dim=12)
    load(discriminator, record, renamed_of_points)
    for network in (discriminator, generator):
        network.to(dtype).train(mode == "train")
    sentence, noise, points, given = (record[key].to(dtype) for key in ("sentence", "noise", "points", "given_points"))
    generated = generator(noise, sentence, given)
    assert_recorded(generated, record[f"{mode}/points"])
    real, fake = discriminator(points, sentence), discriminator(generated, sentence)
    assert_recorded(real.consistency, record[f"{mode}/logits_real"])
    assert_recorded(fake.consistency, record[f"{mode}/logits_fake"])
    # Without wrong pairs, generated points have the weight of real ones.
    loss = discriminator_loss(real, fake, weighting=AdversarialWeights(1, 1, 0, 0, 0, 0))
    assert_recorded(loss, record[f"{mode}/discriminator_loss"])
    assert_recorded(generator_loss(fake, weighting="gan-int-cls"), record[f"{mode}/generator_loss"])


@pytest.mark.parametrize(
    ("make", "size", "shifts"),
    [
        (LocatedDiscriminator, 16_763_137, 2 * 256 + 2 * 256 + 512 + 1024 + 512 + 128 + 512 + 128 + 128),
        (KeypointImageDiscriminator, 14_667_905, 2 * 256 + 2 * 256 + 512 + 1024 + 512 + 128 + 128),
        (KeypointDiscriminator, 946_177, 512 + 256 + 512 + 256 + 256),
    ],
)
def test_published_sizes(make, size, shifts):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) + shifts == size
