"""The cascade: any number of stages, any growth, and each image for itself."""

import pytest
import torch
from torch.testing import assert_close

from mirror_modules import CascadedGenerator

B, L, C, Z, D, E = 2, 11, 3, 5, 13, 7
CASCADES = [(4,), (4, 8), (8, 32), (4, 64), (16, 32, 64)]


def make(resolutions=(4, 8, 16), **options):
    return CascadedGenerator(Z, E, D, channels=C, resolutions=resolutions, residual_blocks=1, **options)


def draw_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), torch.randn(batch, L, D)


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


@pytest.mark.parametrize("resolutions", CASCADES)
@pytest.mark.parametrize("attention", ["global-local", "word", "none"])
def test_any_number_of_stages_and_any_growth(resolutions, attention):
    generator = make(resolutions, attention=attention)
    generated = generator(*draw_inputs(), mask_of(4, 11), need_weights=True)
    assert [tuple(images.shape) for images in generated.images] == [(B, 3, size, size) for size in resolutions]
    assert all(images.abs().max() <= 1 for images in generated.images)
    coarse = resolutions[:-1]
    expected_words = [] if attention == "none" else [(B, L, size, size) for size in coarse]
    expected_sentence = [(B, C, size, size) for size in coarse] if attention == "global-local" else []
    assert [tuple(weights.shape) for weights in generated.word_weights] == expected_words
    assert [tuple(weights.shape) for weights in generated.sentence_weights] == expected_sentence


@pytest.mark.parametrize("resolutions", CASCADES)
@pytest.mark.parametrize("mask", [None, mask_of(4)])
def test_a_batch_of_one_trains(resolutions, mask):
    generator = make(resolutions).train()
    generated = generator(*draw_inputs(1), mask)
    sum(images.square().mean() for images in generated.images).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("attention", ["global-local", "word"])
def test_an_image_alone_equals_the_same_image_in_a_batch(attention):
    generator = make(attention=attention).eval()
    noise, condition, words = draw_inputs()
    together = generator(noise, condition, words, mask_of(4, 11), need_weights=True)
    alone = generator(noise[:1], condition[:1], words[:1, :4], need_weights=True)
    for image, images in zip(alone.images, together.images):
        assert_close(image, images[:1], atol=1e-5, rtol=0)
    for weight, weights in zip(alone.word_weights, together.word_weights):
        assert_close(weight, weights[:1, :4], atol=1e-5, rtol=0)


def test_padding_has_no_influence():
    generator = make()
    noise, condition, words = draw_inputs()
    words.requires_grad_()
    padded_words = torch.cat((words.detach(), 100 * torch.randn(B, 2, D)), dim=1).requires_grad_()
    images = generator(noise, condition, words, mask_of(11, 4)).images[-1]
    padded = generator(noise, condition, padded_words, mask_of(11, 4, length=L + 2), need_weights=True)
    grad = torch.randn_like(images)
    images.backward(grad)
    padded.images[-1].backward(grad)
    assert_close(padded.images[-1], images)
    assert_close(padded_words.grad[:, :L], words.grad)
    for weights in padded.word_weights:
        assert (weights[0, 11:] == 0).all()
        assert (weights[1, 4:] == 0).all()
    assert (padded_words.grad[0, 11:] == 0).all()
    assert (padded_words.grad[1, 4:] == 0).all()


def test_weights_come_only_when_asked_for_and_change_nothing():
    generator, inputs = make().eval(), draw_inputs()
    silent, talking = generator(*inputs), generator(*inputs, need_weights=True)
    assert silent.word_weights == silent.sentence_weights == []
    assert_close(silent.images, talking.images, atol=0, rtol=0)


@pytest.mark.parametrize(("attention", "changed"), [("global-local", [False, True, True]), ("none", [False] * 3)])
def test_words_act_from_the_second_stage_on(attention, changed):
    generator = make(attention=attention).eval()
    noise, condition, words = draw_inputs()
    before, after = generator(noise, condition, words).images, generator(noise, condition, words + 1).images
    assert [not torch.equal(*pair) for pair in zip(before, after)] == changed


@pytest.mark.parametrize("moved", [0, 1])
def test_noise_and_condition_act_at_each_stage(moved):
    generator, inputs = make().eval(), list(draw_inputs())
    before = generator(*inputs).images
    inputs[moved] = inputs[moved] + 1
    assert not any(torch.equal(*pair) for pair in zip(before, generator(*inputs).images))


def test_without_intermediate_images_the_finest_is_the_same():
    generator, finest_only, inputs = make().eval(), make(intermediate_images=False).eval(), draw_inputs()
    state = {
        name.replace("heads.2.", "heads.0."): value
        for name, value in generator.state_dict().items()
        if not name.startswith(("heads.0.", "heads.1."))
    }
    finest_only.load_state_dict(state)
    (image,) = finest_only(*inputs).images
    assert_close(image, generator(*inputs).images[-1], atol=0, rtol=0)


def test_options_reach_every_refinement_stage():
    generator = make(sentence_bias=True, score_projection=True, sentence_axis="positions", impl="torch")
    assert len(generator.refinements) == 2
    for stage in generator.refinements:
        assert stage.attention.sentence_projection.bias is not None
        assert stage.attention.score_projection is not None
        assert (stage.attention.sentence_axis, stage.attention.impl) == ("positions", "torch")


@pytest.mark.parametrize("mask", [None, mask_of(4, 11)])
def test_compiles_into_one_graph(compiled, mask):
    generator, inputs = make((4, 8)).eval(), draw_inputs()
    images = compiled(generator)(*inputs, mask).images
    assert_close(images, generator(*inputs, mask).images)
    images[-1].sum().backward()
    assert generator.initial.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("resolutions", [(), (2, 4), (8, 8), (8, 4), (4, 12), (0,), (-4,), (4.0, 8.0)])
def test_resolutions_must_be_growing_powers_of_two(resolutions):
    with pytest.raises(ValueError, match=r"resolutions must be growing powers of two from 4 up, .* but they are \("):
        make(resolutions)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"noise_dim must be a whole number of at least 1, but it is 0", {"noise_dim": 0}),
        (r"channels must be a whole number of at least 1, but it is -1", {"channels": -1}),
        (r"residual_blocks must be 0 or more, but it is -1", {"residual_blocks": -1}),
        (r"attention must be one of 'global-local', 'word', 'none', but it is 'all'", {"attention": "all"}),
    ],
)
def test_refuses_what_it_cannot_be(message, options):
    with pytest.raises(ValueError, match="CascadedGenerator: " + message):
        CascadedGenerator(**options)


@pytest.mark.parametrize(
    ("message", "noise", "condition", "words", "mask"),
    [
        (r"noise has 4 features but .* noise_dim=5", (B, 4), (B, E), (B, L, D), None),
        (r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, L, D), None),
        (r"words has 7 features but .* word_dim=13", (B, Z), (B, E), (B, L, E), None),
        (r"words must be \(B, L, D\), but it is \(2, 13\)", (B, Z), (B, E), (B, D), None),
        (r"batch sizes disagree \(noise: \(3, 5\)", (3, Z), (B, E), (B, L, D), None),
        (r"caption 0 has no real word", (B, Z), (B, E), (B, L, D), mask_of(0, 4)),
        (r"word_mask is \(1, 11\)", (B, Z), (B, E), (B, L, D), mask_of(4)),
    ],
)
@pytest.mark.parametrize("attention", ["global-local", "none"])
def test_says_what_is_wrong(attention, message, noise, condition, words, mask):
    with pytest.raises(ValueError, match="CascadedGenerator: " + message):
        make(attention=attention)(torch.zeros(noise), torch.zeros(condition), torch.zeros(words), mask)
