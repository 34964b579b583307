"""GAWWN: generators with a box and with key points.

Recorded from GAWWN's layer lists, whose convolutions and linear layers have biases before a batch norm as well.
"""

import re

import pytest
import torch

from mirror_modules import KeypointImageGenerator, LocatedGenerator
from tests.recordings import (
    MODES,
    PRECISIONS,
    assert_images_recorded,
    assert_statistics_recorded,
    entries,
    load_without_biases,
    read,
)

BODY = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3", "7": "norm3"}


def renamed_with_box(name):
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


def renamed_with_points(name):
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


def state_of(record, rename, transposed):
    """The recorded state under our names; the layers named in `transposed` are transposed convolutions of stride 1."""
    state = {rename(name): value for name, value in entries(record, "state/generator.").items()}
    for layer in transposed:
        # Equal to a convolution with the turned kernel.
        state[f"{layer}.weight"] = state[f"{layer}.weight"].flip(2, 3).transpose(0, 1)
    return state


def load_with_box(record):
    """The recorded generator, and the biases that ours does not have, by the norm that subtracts them."""
    generator = LocatedGenerator(6, 12, channels=2, hidden_dim=8, upsampled=(2, 3))
    return generator, load_without_biases(generator, state_of(record, renamed_with_box, ["merge.0"]))


def load_with_points(record):
    """The same with key points."""
    generator = KeypointImageGenerator(6, 12, 5, channels=2, hidden_dim=8, upsampled=(4, 2))
    state = state_of(record, renamed_with_points, ["local_path.0", "merge.0", "merge.3"])
    return generator, load_without_biases(generator, state)


@PRECISIONS
@MODES
@pytest.mark.parametrize(
    ("name", "place", "load", "rename"),
    [
        ("gawwn_box_derived", "boxes", load_with_box, renamed_with_box),
        ("gawwn_keypoints_derived", "maps", load_with_points, renamed_with_points),
    ],
)
def test_gawwn(name, place, load, rename, mode, dtype):
    record = read(name)
    generator, shifts = load(record)
    generator.to(dtype).train(mode == "train")
    images = generator(*(record[key].to(dtype) for key in ("noise", "sentence", place))).images[-1]
    assert_images_recorded(images, record, f"{mode}/image")
    if mode == "train":
        after = {rename(key): values for key, values in entries(record, "train/generator_after/").items()}
        assert_statistics_recorded(generator, after, shifts)


def test_published_size_with_boxes():
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in LocatedGenerator().parameters())
    bottlenecks = (256 + 256 + 1024) + (128 + 128 + 512)
    paths = 2 * (1024 + 512 + 256) + bottlenecks
    assert size + 3 * 512 + paths + (256 + 128 + 32) == 73_545_699


def test_published_size_with_key_points():
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in KeypointImageGenerator().parameters())
    points, to_maps = 128 + 256 + 512, 512 + 256 + 128
    local, merge = 512 + 512 + 512, 512 + 512 + (128 + 128 + 512) + 256 + 128
    assert size + points + to_maps + local + merge == 26_471_043
