"""GAWWN: places from data and users, sizes of the published code, files, and errors."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from mirror_modules import MirrorGAN, Vocabulary
from mirror_modules.models import GAWWN, GAWWNConfig, TextToImage, build_model

CAPTIONS = ["a red flower with five round petals", "blue petals", "a white flower"]
VOCABULARY = Vocabulary.build(CAPTIONS)
NAMES = ("center", "petal 1", "petal 2")
SIZES = {
    "embedding_dim": 5,
    "word_dim": 6,
    "max_words": 7,
    "noise_dim": 3,
    "condition_dim": 4,
    "channels": 2,
    "resolutions": (32,),
    "discriminator_channels": 2,
    "text_projection": 3,
    "image_backbone": "conv",
    "captioner_backbone": "conv",
    "captioner_embedding_dim": 4,
    "captioner_hidden_dim": 5,
}
CONFIGS = {"box": GAWWNConfig(**SIZES), "points": GAWWNConfig(**SIZES, place="points", point_names=NAMES)}
PLACES = pytest.mark.parametrize("place", CONFIGS)


def make(place, **changes):
    return build_model(dataclasses.replace(CONFIGS[place], **changes), VOCABULARY).eval()


def locations(place, count=3):
    if place == "box":
        return torch.cat((torch.rand(count, 2) * 0.5, torch.rand(count, 2) * 0.4 + 0.1), dim=1)
    return torch.cat((torch.rand(count, 3, 2), torch.ones(count, 3, 1)), dim=2)


@PLACES
def test_generate_takes_a_location_per_caption(place):
    model, location = make(place), locations(place)
    images = model.generate(CAPTIONS, seed=[5, 6, 7], location=location)
    assert images.shape == (3, 3, 32, 32)
    alone = model.generate(CAPTIONS[1], seed=6, location=location[1:2])
    assert_close(alone, images[1:2], atol=1e-4, rtol=1e-4)
    elsewhere = model.generate(CAPTIONS[1], seed=6, location=locations(place, 1))
    assert not torch.equal(alone, elsewhere)
    pairs = model.generate(CAPTIONS[:2], images_per_caption=2, seed=[5, 9, 6, 9], location=location[:2])
    assert_close(pairs[[0, 2]], images[:2], atol=1e-4, rtol=1e-4)
    assert model.generate(CAPTIONS[0], best_of=2, seed=0, location=location[:1]).shape == images[:1].shape
    assert model.interpolate(*CAPTIONS[:2], steps=3, seed=0, location=location[:1]).shape == images.shape
    assert len(model.describe(images)) == 3


def test_without_a_location_the_box_is_in_the_middle_and_no_point_is_visible():
    for place, default in (("box", torch.tensor([[0.1, 0.1, 0.8, 0.8]])), ("points", torch.zeros(1, 3, 3))):
        model = make(place)
        assert torch.equal(model.locate(None, None, 1), default)
        images = model.generate(CAPTIONS[0], seed=0), model.generate(CAPTIONS[0], seed=0, location=default)
        assert_close(*images, atol=0, rtol=0)


def test_unknown_boxes_become_one_in_the_middle():
    boxes = torch.tensor([[0.2, 0.3, 0.4, 0.5], [torch.nan] * 4])
    expected = torch.tensor([[0.2, 0.3, 0.4, 0.5], [0.1, 0.1, 0.8, 0.8]])
    assert torch.equal(make("box").locate(boxes, torch.zeros(2, 3, 3), 2), expected)


def test_points_of_the_data_are_the_location():
    points = locations("points")
    assert torch.equal(make("points").locate(torch.rand(3, 4), points, 3), points)


@pytest.mark.parametrize(
    ("place", "boxes", "points", "message"),
    [
        ("box", None, torch.zeros(2, 3, 3), r"place='box' needs boxes, but the data have key points alone"),
        ("points", torch.zeros(2, 4), None, r"place='points' needs key points, but the data have boxes alone"),
        ("points", None, torch.zeros(2, 5, 3), r"the data have 5 key points, but point_names names 3: center, petal 1"),
    ],
)
def test_data_without_the_places_are_refused(place, boxes, points, message):
    with pytest.raises(ValueError, match="GAWWN: " + message):
        make(place).locate(boxes, points, 2)


@PLACES
def test_other_locations_are_refused(place):
    other = locations("points" if place == "box" else "box")
    with pytest.raises(ValueError, match=r"box must be|points must be"):
        make(place).generate(CAPTIONS, location=other)
    with pytest.raises(ValueError, match="batch sizes disagree"):
        make(place).generate(CAPTIONS, location=locations(place, 2))


@PLACES
def test_every_generating_part_has_a_gradient_and_discriminators_take_the_location(place):
    model = make(place).train()
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    words, sentence = model.text_encoder(tokens, word_mask)
    (condition,) = model.conditions(sentence, torch.zeros(3, 0))
    assert condition is sentence
    (images,) = model.images(torch.randn(3, 3), [condition], words, word_mask, locations(place)).images
    images.square().sum().backward()
    for part in model.generator_parts().values():
        assert all(parameter.grad is not None for parameter in part.parameters())
    assert list(model.generator_parts()) == ["generator"]
    (discriminator,) = model.discriminators()
    assert discriminator.resolution == 32
    logits = discriminator(images, model.discriminator_text(sentence, [condition]), locations(place))
    assert logits.realism is None
    assert logits.consistency.shape == (3,)
    assert model.config.weighting("glam") == "gan-int-cls"


@PLACES
def test_a_saved_model_is_loaded_by_the_base_class(place, tmp_path):
    model, location = make(place), locations(place)
    model.save_pretrained(tmp_path)
    loaded = TextToImage.from_pretrained(tmp_path)
    assert type(loaded) is GAWWN
    assert loaded.config == model.config
    images = (each.generate(CAPTIONS, seed=1, location=location) for each in (loaded, model))
    assert_close(*images, atol=0, rtol=0)
    with pytest.raises(ValueError, match="holds a model of the system 'gawwn'"):
        MirrorGAN.from_pretrained(tmp_path)


@pytest.mark.parametrize(("resolution", "doublings"), [(32, 0), (64, 1), (128, 2)])
@PLACES
def test_any_power_of_two_from_32_is_generated(place, resolution, doublings):
    model = make(place, resolutions=(resolution,), channels=4)
    assert model.generate(CAPTIONS[0], seed=0).shape == (1, 3, resolution, resolution)
    assert len(model.generator.merge) == {"box": 3, "points": 6}[place] + 3 * doublings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolutions": (16,)}, r"resolutions must be one power of two of at least 32, .* they are \(16,\)"),
        ({"resolutions": (48,)}, r"resolutions must be one power of two"),
        ({"resolutions": (32, 64)}, r"resolutions must be one power of two"),
        ({"place": "circle"}, r"place must be 'box' or 'points', but it is 'circle'"),
    ],
)
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match="GAWWNConfig: " + message):
        GAWWNConfig(**changes)


# Biases before a batch norm, which subtracts them, are in the published counts but not in ours.
BOTTLENECKS = 1024 // 4 * 2 + 1024, 512 // 4 * 2 + 512
GENERATOR_BIASES = {
    "box": 3 * 512 + 2 * (1024 + 512 + 256) + sum(BOTTLENECKS) + (256 + 128 + 32),
    "points": (128 + 256 + 512) + (512 + 256 + 128) + 3 * 512 + 2 * 512 + BOTTLENECKS[1] + (256 + 128),
}
DISCRIMINATOR_BIASES = {
    "box": 4 * 256 + 512 + 1024 + 512 + 128 + 512 + 2 * 128,
    "points": 4 * 256 + 512 + 1024 + 512 + 256,
}


@pytest.mark.parametrize(
    ("place", "generator", "discriminator"), [("box", 73_545_699, 16_763_137), ("points", 26_471_043, 14_667_905)]
)
def test_published_sizes_have_the_published_numbers_of_parameters(place, generator, discriminator):
    with torch.device("meta"):
        model = build_model(GAWWNConfig(place=place, captioner_backbone="conv"), VOCABULARY, pretrained=False)
        counts = [
            sum(each.numel() for each in part.parameters()) for part in (model.generator, *model.discriminators())
        ]
    assert counts[0] + GENERATOR_BIASES[place] == generator
    assert counts[1] + DISCRIMINATOR_BIASES[place] == discriminator
