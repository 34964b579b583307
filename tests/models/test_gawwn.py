"""GAWWN: places from data and users, sizes of the published code, files, and errors."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from mirror_modules import MirrorGAN, Vocabulary
from mirror_modules.models import GAWWN, GAWWNConfig, TextToImage, build_model, sample_latents
from mirror_modules.stream import RedescriptionScore, append_end

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
    "keypoint_hidden_dim": 8,
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


def test_without_a_location_the_box_is_in_the_middle_and_all_points_are_missing():
    for place, default in (("box", torch.tensor([[0.1, 0.1, 0.8, 0.8]])), ("points", torch.zeros(1, 3, 3))):
        model = make(place)
        assert torch.equal(model.locate(None, None, 1), default)
        images = model.generate(CAPTIONS[0], seed=0), model.generate(CAPTIONS[0], seed=0, location=default)
        assert_close(*images, atol=0, rtol=0)


def test_unknown_boxes_become_one_in_the_middle():
    boxes = torch.tensor([[0.2, 0.3, 0.4, 0.5], [torch.nan] * 4])
    expected = torch.tensor([[0.2, 0.3, 0.4, 0.5], [0.1, 0.1, 0.8, 0.8]])
    assert torch.equal(make("box").locate(boxes, torch.zeros(2, 3, 3), 2), expected)


def test_points_of_the_data_are_the_location_and_those_that_are_not_visible_are_hidden():
    points = locations("points")
    assert torch.equal(make("points").locate(torch.rand(3, 4), points, 3), points)
    points[1, 2] = 0
    expected = points.clone()
    expected[1, 2, 2] = -1
    assert torch.equal(make("points").locate(None, points, 3), expected)


def completed_by_loops(model, location, sentence, noise):
    """The location point by point: given and hidden ones as they are, missing ones from the key-point generator."""
    given = torch.zeros_like(location)
    for row in range(len(location)):
        for point in range(len(NAMES)):
            if location[row, point, 2] > 0:
                given[row, point] = location[row, point]
    drawn = model.keypoint_generator(noise, sentence, given)
    completed = location.clone()
    for row in range(len(location)):
        for point in range(len(NAMES)):
            if location[row, point, 2] == 0:
                x, y, visibility = drawn[row, point].tolist()
                completed[row, point] = torch.tensor([x, y, float(visibility > 0.5)])
    return completed


@torch.no_grad()
def test_missing_points_are_drawn_and_others_are_kept_exactly():
    model, location = make("points"), locations("points")
    location[0, 0], location[2, 1] = torch.zeros(3), torch.tensor([0.25, 0.5, -1.0])
    # Visibilities of generated points on both sides of a half.
    model.keypoint_generator.joint[-2].bias.data = torch.tensor([0.0, 0, 4, 0, 0, -4, 0, 0, 4])
    sentence, noise = torch.randn(3, 6), torch.randn(3, model.config.condition_noise_dim)
    completed = model.complete_location(location, sentence, noise)
    is_given = location[..., 2] != 0
    assert torch.equal(completed[is_given], location[is_given])
    assert_close(completed, completed_by_loops(model, location, sentence, noise))
    drawn = model.complete_location(None, sentence, noise)
    assert_close(drawn, completed_by_loops(model, torch.zeros(3, 3, 3), sentence, noise))
    assert torch.equal(drawn[..., 2], torch.tensor([[1.0, 0, 1]] * 3))
    for row in range(3):
        alone = model.complete_location(location[row : row + 1], sentence[row : row + 1], noise[row : row + 1])
        assert_close(alone, completed[row : row + 1])
    # They follow the sentence, the noise and the points that are given.
    for changed in (
        model.complete_location(location, torch.randn(3, 6), noise),
        model.complete_location(location, sentence, torch.randn_like(noise)),
        model.complete_location(location * torch.tensor([0.9, 1, 1]), sentence, noise),
    ):
        assert not torch.equal(changed[0, 0], completed[0, 0])
    maps = torch.zeros(3, 3, 16, 16)
    assert model.complete_location(maps, sentence, noise) is maps
    assert make("box").complete_location(None, sentence, noise) is None


def test_images_have_the_completed_points():
    model, location = make("points"), locations("points", 1)
    location[0, 1:] = torch.tensor([[0, 0, 0], [0.5, 0.5, -1]])
    # Visible, whatever the noise.
    model.keypoint_generator.joint[-2].bias.data.fill_(5)
    images = model.generate(CAPTIONS[0], seed=4, location=location)
    _, condition_noise = model._sample_noise("test", 1, 4, None)
    tokens, word_mask = VOCABULARY.encode(CAPTIONS[:1])
    completed = model.complete_location(location, model.text_encoder(tokens, word_mask).sentence, condition_noise)
    assert completed[0, :, 2].tolist() == [1, 1, -1]
    assert_close(model.generate(CAPTIONS[0], seed=4, location=completed), images, atol=0, rtol=0)
    hidden = completed.clone()
    hidden[0, 1, 2] = -1
    assert not torch.equal(model.generate(CAPTIONS[0], seed=4, location=hidden), images)
    ways = model.interpolate(*CAPTIONS[:2], steps=3, seed=4, location=location)
    assert_close(ways[:1], images, atol=1e-4, rtol=1e-4)
    last = model.generate(CAPTIONS[1], seed=4, location=location)
    assert_close(ways[2:], last, atol=1e-4, rtol=1e-4)


def test_latents_are_sampled_with_the_points_of_their_noise():
    model = make("points")
    tokens, word_mask = VOCABULARY.encode(CAPTIONS[:1])
    start = torch.randn(1, 3), torch.randn(1, model.config.condition_noise_dim)
    samples = sample_latents(model, tokens, word_mask, *start, steps=2)
    noise, condition_noise = samples.latents.split(3, dim=1)
    images = model(tokens, word_mask, noise=noise, condition_noise=condition_noise).images[-1]
    likelihood = RedescriptionScore(model.captioner, check=False)(images, *append_end(tokens, word_mask))
    assert_close(samples.log_likelihood[-1], likelihood, atol=1e-4, rtol=1e-4)


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
    model, given = make(place), locations(place)
    with pytest.raises(ValueError, match=r"GAWWN\.generate: (box|location) must be"):
        model.generate(CAPTIONS, location=other)
    for wrong in (locations(place, 2), given[0, ..., 0]):
        with pytest.raises(
            ValueError, match=r"GAWWN\.generate: location must have a row for each caption, \(3, \.\.\.\)"
        ):
            model.generate(CAPTIONS, location=wrong)
    with pytest.raises(
        ValueError, match=r"GAWWN\.interpolate: location must have a row for each caption, \(1, \.\.\.\)"
    ):
        model.interpolate(*CAPTIONS[:2], location=locations(place, 2))
    with pytest.raises(ValueError, match=r"GAWWN\.best_seeds: location must be a tensor, but it is a list"):
        model.generate(CAPTIONS, best_of=2, location=given.tolist())
    with pytest.raises(ValueError, match=r"GAWWN\.generate: location must be a tensor, but it is a ndarray"):
        model.generate(CAPTIONS, location=given.numpy())


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("box", lambda box: box[1, 2:].zero_(), r"box 1 is empty"),
        ("box", lambda box: box[1].fill_(torch.nan), r"box 1 is not finite"),
        ("box", lambda box: box.mul_(32), r"box 0 seems to be in pixels"),
        ("points", lambda points: points[1, 2, :2].fill_(3), r"point 2 of image 1 is visible at \(3, 3\), outside"),
        ("points", lambda points: points[1, 2, 0].fill_(torch.nan), r"point 2 of image 1 is visible at \(nan, "),
        ("points", lambda points: points[1, 2, 2].fill_(torch.nan), r"the visibility of point 2 of image 1 is not a"),
    ],
)
def test_values_are_checked_before_a_location_is_moved_to_the_model(place, change, message, monkeypatch):
    location = locations(place)
    change(location)
    model = make(place)
    # As on a GPU, where reading values would force a synchronization.
    monkeypatch.setattr(type(model), "images", None)
    monkeypatch.setattr(type(model), "complete_location", None)
    with pytest.raises(ValueError, match=r"GAWWN\.generate: " + message):
        model.generate(CAPTIONS, location=location)


def test_whole_numbers_are_a_location():
    whole = torch.tensor([[0, 0, 1, 1]])
    model = make("box")
    assert_close(
        model.generate(CAPTIONS[0], seed=0, location=whole),
        model.generate(CAPTIONS[0], seed=0, location=whole.double()),
    )


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
    for given in (location, None):
        images = (each.generate(CAPTIONS, seed=1, location=given) for each in (loaded, model))
        assert_close(*images, atol=0, rtol=0)
    images_alone = TextToImage.from_pretrained(tmp_path, only="images").generate(CAPTIONS, seed=1)
    assert_close(images_alone, model.generate(CAPTIONS, seed=1), atol=0, rtol=0)
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
