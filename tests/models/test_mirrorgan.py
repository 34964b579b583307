"""The reference model: images are reproducible and independent of their batch; no call changes a part's mode."""

import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mirror_modules import MirrorGAN, MirrorGANConfig, RedescriptionLoss, Vocabulary
from mirror_modules.stream import append_end

CAPTIONS = ["a red flower with five round petals", "blue petals", "a white flower"]
VOCABULARY = Vocabulary.build(CAPTIONS)
CONFIG = MirrorGANConfig(
    embedding_dim=5,
    word_dim=6,
    max_words=7,
    noise_dim=3,
    condition_dim=4,
    channels=2,
    resolutions=(4, 8, 16),
    residual_blocks=1,
    captioner_backbone="conv",
    captioner_embedding_dim=4,
    captioner_hidden_dim=5,
)


def make(**changes):
    return MirrorGAN(MirrorGANConfig(**{**CONFIG.to_dict(), **changes}), VOCABULARY).eval()


def make_noise(batch):
    return {"noise": torch.randn(batch, 3), "condition_noise": torch.randn(batch, 4)}


def test_generate_returns_an_image_per_caption_and_stage():
    generated = make().generate(CAPTIONS, seed=0)
    assert [tuple(images.shape) for images in generated.images] == [(3, 3, size, size) for size in (4, 8, 16)]
    assert generated.word_weights == generated.sentence_weights == []
    assert not generated.images[-1].requires_grad


def test_attention_maps_are_returned_on_request_and_padding_gets_zero_weight():
    generated = make().generate(CAPTIONS, seed=0, need_weights=True)
    assert [tuple(weights.shape) for weights in generated.word_weights] == [(3, 7, 4, 4), (3, 7, 8, 8)]
    for weights in generated.word_weights:
        assert (weights[1, 2:] == 0).all()
        assert (weights[2, 3:] == 0).all()
        assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))


def test_images_depend_on_the_seed_alone():
    model = make()
    first, again, other = (model.generate(CAPTIONS, seed=seed).images[-1] for seed in (5, 5, 6))
    assert_close(again, first, atol=0, rtol=0)
    assert not torch.equal(other, first)


def test_without_a_seed_each_call_samples_new_noise_and_keeps_the_global_random_state():
    model = make()
    before = torch.get_rng_state()
    assert not torch.equal(model.generate(CAPTIONS).images[-1], model.generate(CAPTIONS).images[-1])
    model.generate(CAPTIONS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_generated_alone_equals_the_same_image_in_a_batch_of_other_lengths():
    model = make()
    for caption in CAPTIONS:
        together = model.generate([caption, *CAPTIONS], seed=3).images
        alone = model.generate([caption], seed=3).images
        for image, images in zip(alone, together):
            assert_close(image, images[:1], atol=1e-5, rtol=1e-5)


def test_an_image_at_any_row_equals_the_same_image_alone():
    model, noise = make(), make_noise(3)
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    together = model(tokens, word_mask, **noise).images[-1]
    for i in range(3):
        alone = model(tokens[i : i + 1, word_mask[i]], **{name: rows[i : i + 1] for name, rows in noise.items()})
        assert_close(alone.images[-1], together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_generate_equals_forward_in_evaluation_mode():
    model = make().train()
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    noise, condition_noise = model._sample_noise(3, seed=0)
    generated = model.generate(CAPTIONS, seed=0)
    expected = model.eval()(tokens, word_mask, noise=noise, condition_noise=condition_noise)
    assert_close(generated.images, expected.images)


def test_long_captions_are_truncated():
    model = make(max_words=2)
    generated = model.generate(["a red flower", "a red petals"], seed=0, need_weights=True)
    assert generated.word_weights[0].shape[1] == 2


def test_forward_gives_every_generating_part_a_gradient():
    model = make().train()
    model(*VOCABULARY.encode(CAPTIONS)).images[-1].square().sum().backward()
    for part in (model.text_encoder, model.conditioning, model.generator.initial, model.generator.refinements):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False]])])
def test_a_batch_of_one_trains_from_caption_to_caption(mask):
    model = make().train()
    tokens = torch.tensor([[3, 4, 0]])
    generated = model(tokens, mask)
    RedescriptionLoss(model.captioner)(generated.images[-1], *append_end(tokens, mask)).backward()
    assert model.text_encoder.lstm.weight_ih_l0.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.captioner.parameters())


def test_unknown_words_cause_one_warning_that_names_them():
    with pytest.warns(UserWarning, match=r"unknown words, encoded as <unknown>: zebra, lilac") as warned:
        make().generate(["a zebra", "a lilac zebra"])
    assert len(warned) == 1


def test_known_words_cause_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().generate(["A RED flower!"])


@pytest.mark.parametrize("caption", ["", "  ", "?!", "🌸"])
def test_an_empty_caption_is_named(caption):
    with pytest.raises(ValueError, match=r"caption 1 \(.*\) has no word; write at least one"):
        make().generate(["a red flower", caption])


def test_a_single_string_is_refused():
    with pytest.raises(ValueError, match=r"captions must be a list of strings, but it is one string"):
        make().generate("a red flower")


def test_describe_returns_a_caption_per_image_in_words_of_the_vocabulary():
    model = make()
    images = torch.rand(2, 3, 17, 23) * 2 - 1
    descriptions = model.describe(images)
    assert descriptions == VOCABULARY.decode(model.captioner.describe(images, beam_width=3, max_words=8))
    assert len(descriptions) == 2
    assert all(word in VOCABULARY.words for description in descriptions for word in description.split())
    assert model.describe(images[:1], beam_width=1) == model.describe(images, beam_width=1)[:1]


@pytest.mark.parametrize("call", [lambda m: m.generate(CAPTIONS), lambda m: m.describe(torch.zeros(2, 3, 16, 16))])
def test_each_part_keeps_its_mode(call):
    model = make().train()
    loss = RedescriptionLoss(model.captioner)
    model.text_encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    call(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2
    assert loss.captioner.lstm.training
    assert_close(model.state_dict(), state, atol=0, rtol=0)


def test_modes_are_restored_after_an_error():
    model = make().train()
    with pytest.raises(ValueError, match="images must be"):
        model.describe(torch.zeros(2, 1, 16, 16))
    assert all(module.training for module in model.modules())


def test_images_have_the_dtype_of_the_weights():
    model = make().double()
    assert {images.dtype for images in model.generate(CAPTIONS, seed=0).images} == {torch.float64}
    assert_close(
        model.generate(CAPTIONS, seed=0).images[-1].float(), model.float().generate(CAPTIONS, seed=0).images[-1]
    )


def test_options_of_the_config_reach_the_parts():
    model = make(attention="word", sentence_bias=True, text_dropout=0.25, resolutions=(8,))
    assert model.text_encoder.dropout.p == 0.25
    assert model.generator.resolutions == (8,)
    release = MirrorGAN(
        MirrorGANConfig.release(**{**CONFIG.to_dict(), "sentence_bias": True, "score_projection": True}), VOCABULARY
    )
    assert release.generator.refinements[0].attention.score_projection is not None
    assert release.generator.refinements[0].attention.sentence_projection.bias is not None
    assert model.captioner.vocabulary_size == model.text_encoder.vocabulary_size == len(VOCABULARY)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1"])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*63 - 1"):
        make().generate(["a red flower"], seed=seed)


def test_a_seed_may_be_a_whole_number_of_numpy():
    model = make()
    first, second = (model.generate(CAPTIONS, seed=seed).images[-1] for seed in (5, np.int64(5)))
    assert torch.equal(first, second)


def test_no_images_have_no_descriptions():
    assert make().describe(torch.zeros(0, 3, 16, 16)) == []


def test_a_model_in_half_precision_describes_float32_images():
    assert len(make().bfloat16().describe(torch.zeros(2, 3, 16, 16))) == 2
