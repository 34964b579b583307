"""Generation and description, with a MirrorGAN: images depend on their seeds alone, and modes are kept."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mirror_modules import MirrorGAN, MirrorGANConfig, RedescriptionLoss, Vocabulary
from mirror_modules.data import to_float
from mirror_modules.stream import append_end, redescription_loss

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
    generated = make().generate_stages(CAPTIONS, seed=0)
    assert [tuple(images.shape) for images in generated.images] == [(3, 3, size, size) for size in (4, 8, 16)]
    assert generated.word_weights == generated.sentence_weights == []
    assert not generated.images[-1].requires_grad


def test_attention_maps_are_returned_on_request_and_padding_gets_zero_weight():
    generated = make().generate_stages(CAPTIONS, seed=0, need_weights=True)
    assert [tuple(weights.shape) for weights in generated.word_weights] == [(3, 7, 4, 4), (3, 7, 8, 8)]
    for weights in generated.word_weights:
        assert (weights[1, 2:] == 0).all()
        assert (weights[2, 3:] == 0).all()
        assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))


def test_images_depend_on_the_seed_alone():
    model = make()
    first, again, other = (model.generate(CAPTIONS, seed=seed) for seed in (5, 5, 6))
    assert_close(again, first, atol=0, rtol=0)
    assert not torch.equal(other, first)


def test_without_a_seed_each_call_samples_new_noise_and_keeps_the_global_random_state():
    model = make()
    before = torch.get_rng_state()
    assert not torch.equal(model.generate(CAPTIONS), model.generate(CAPTIONS))
    model.generate(CAPTIONS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_generated_alone_equals_the_same_image_in_a_batch_of_other_lengths():
    model = make()
    for caption in CAPTIONS:
        together = model.generate_stages([caption, *CAPTIONS], seed=3).images
        alone = model.generate_stages([caption], seed=3).images
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
    noise, condition_noise = model._sample_noise("", 3, 0, None)
    generated = model.generate_stages(CAPTIONS, seed=0)
    expected = model.eval()(tokens, word_mask, noise=noise, condition_noise=condition_noise)
    assert_close(generated.images, expected.images)


def test_long_captions_are_truncated():
    model = make(max_words=2)
    generated = model.generate_stages(["a red flower", "a red petals"], seed=0, need_weights=True)
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


def test_a_caption_may_be_a_plain_string():
    model = make()
    assert torch.equal(model.generate("a red flower", seed=0), model.generate(["a red flower"], seed=0))


def test_images_of_one_caption_are_adjacent_and_have_the_next_seeds():
    model = make()
    images = model.generate(CAPTIONS[:2], images_per_caption=3, seed=5)
    assert len(images) == 6
    for i, image in enumerate(images):
        alone = model.generate(CAPTIONS[i // 3], seed=5 + i)
        assert_close(alone, image[None], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="images_per_caption must be a whole number of at least 1"):
        model.generate(CAPTIONS, images_per_caption=0)


def test_each_image_may_have_its_own_seed():
    model = make()
    images = model.generate(["a red flower"] * 3, seed=[7, 2, 7])
    assert_close(images[0], images[2], atol=1e-5, rtol=1e-5)
    assert_close(images[1:2], model.generate("a red flower", seed=2), atol=1e-5, rtol=1e-5)
    for seed in ([1, 2], "12"):
        with pytest.raises(ValueError, match=r"or one for each of the 3 images, but it is"):
            model.generate(CAPTIONS, seed=seed)


@pytest.mark.parametrize("as_array", [np.array, torch.tensor])
def test_seeds_may_be_an_array(as_array):
    model = make()
    captions, seeds = ["a red flower"] * 3, [7, 2, 7]
    assert torch.equal(model.generate(captions, seed=as_array(seeds)), model.generate(captions, seed=seeds))
    assert model.best_seeds(captions, 2, seed=as_array(seeds)) == model.best_seeds(captions, 2, seed=seeds)
    for seed in ([1, 2], 1.5, [1.5, 2.0, 3.0], [[1], [2], [3]]):
        with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*63 - 1"):
            model.generate(captions, seed=as_array(seed))


@pytest.mark.parametrize("seed", [5, [5, 50, 500, 0]])
def test_the_best_of_several_images_is_found_by_a_loop(seed):
    model, best, captions = make(), 3, ["a red flower"] * 2 + ["a white flower"] * 2
    seeds = model.best_seeds(captions[::2], best, images_per_caption=2, seed=seed)
    for i, caption in enumerate(captions):
        first = 5 + best * i if isinstance(seed, int) else seed[i]
        tokens, mask = append_end(*model.vocabulary.encode([caption]))
        losses = []
        for candidate in range(first, first + best):
            image = model.generate(caption, seed=candidate)
            with torch.no_grad():
                losses.append(redescription_loss(model.captioner.eval()(image, tokens), tokens, mask).item())
        assert seeds[i] == first + losses.index(min(losses))
    images = model.generate(captions[::2], best_of=best, images_per_caption=2, seed=seed)
    assert_close(images, model.generate(captions, seed=seeds), atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in model.captioner.parameters())


def test_the_best_of_new_noise():
    model = make()
    assert model.generate("a red flower", best_of=2, output="np").shape == (1, 16, 16, 3)
    assert len(model.best_seeds(CAPTIONS, 2)) == len(CAPTIONS)
    with pytest.raises(ValueError, match="best_of must be a whole number of at least 1, but it is 0"):
        model.generate(CAPTIONS, best_of=0)


def test_the_output_is_a_tensor_an_array_or_pillow_images():
    model = make()
    images = model.generate(CAPTIONS, seed=0)
    array = model.generate(CAPTIONS, seed=0, output="np")
    assert (array.shape, array.dtype) == ((3, 16, 16, 3), np.float32)
    assert_close(torch.from_numpy(array).permute(0, 3, 1, 2) * 2 - 1, images, atol=1e-6, rtol=0)
    pictures = model.generate(CAPTIONS, seed=0, output="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (16, 16))] * 3
    assert np.abs(np.stack(pictures) / 255 - array).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="output must be one of 'pt', 'np', 'pil', but it is 'jpg'"):
        model.generate(CAPTIONS, output="jpg")


def test_half_precision_gives_arrays_and_pictures():
    model = make().bfloat16()
    assert model.generate("a red flower", output="np").dtype == np.float32
    assert len(model.generate("a red flower", output="pil")) == 1


def test_each_stage_can_be_generated_alone():
    model = make()
    for images, resolution in zip(model.generate_stages(CAPTIONS, seed=0).images, (4, 8, 16)):
        assert torch.equal(model.generate(CAPTIONS, seed=0, resolution=resolution), images)
    with pytest.raises(ValueError, match="resolution must be one of 4, 8, 16, the stages of this model, but it is 32"):
        model.generate(CAPTIONS, resolution=32)


def test_truncation_changes_the_image_of_a_seed():
    model = make()
    plain, truncated, again = (model.generate(CAPTIONS, seed=0, truncation=bound) for bound in (None, 0.7, 0.7))
    assert torch.equal(truncated, again)
    assert not torch.equal(truncated, plain)


@pytest.mark.parametrize("truncation", [0, -1.0, math.nan, "1"])
def test_a_truncation_out_of_range_is_refused(truncation):
    with pytest.raises(ValueError, match="truncation must be"):
        make().generate("a red flower", truncation=truncation)


@pytest.mark.parametrize("attention", ["global-local", "word", "none"])
def test_interpolation_runs_from_the_image_of_one_caption_to_that_of_the_other(attention):
    model = make(attention=attention).double()
    # Captions of 7 and 2 words.
    images = model.interpolate(CAPTIONS[0], CAPTIONS[1], steps=5, seed=3)
    ends = model.generate(CAPTIONS[:2], seed=[3, 3])
    assert_close(images[[0, -1]], ends, atol=1e-9, rtol=1e-9)
    # No jump: each step is a fraction of the way.
    steps = images.diff(dim=0).flatten(1).norm(dim=1)
    assert (steps > 0).all()
    assert steps.max() < 0.8 * (ends[1] - ends[0]).norm()
    assert len(model.interpolate(*CAPTIONS[:2], output="pil", resolution=8)) == 8
    with pytest.raises(ValueError, match="steps must be at least 2, the images of both captions, but it is 1"):
        model.interpolate(*CAPTIONS[:2], steps=1)


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
    images = model.generate(CAPTIONS, seed=0)
    assert images.dtype == torch.float64
    assert_close(images.float(), model.float().generate(CAPTIONS, seed=0))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1"])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*63 - 1"):
        make().generate(["a red flower"], seed=seed)


def test_a_seed_may_be_a_whole_number_of_numpy():
    model = make()
    first, second = (model.generate(CAPTIONS, seed=seed) for seed in (5, np.int64(5)))
    assert torch.equal(first, second)


def test_images_of_every_form_are_described(tmp_path):
    torch.manual_seed(1)
    model = make()
    # An untrained captioner describes all images alike, unless its image feature dominates.
    with torch.no_grad():
        model.captioner.image_projection.weight.mul_(50)
    pixels = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    pictures = [Image.fromarray(each) for each in pixels.numpy()]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    expected = model.describe(to_float(pixels))
    assert len(set(expected)) > 1
    forms = {
        "bytes": pixels,
        "bytes, channels first": pixels.permute(0, 3, 1, 2),
        "array of bytes": pixels.numpy(),
        "array of floats": pixels.numpy() / 255,
        "Pillow images": pictures,
        "paths": [tmp_path / f"{i}.png" for i in range(3)],
        "names": tuple(str(tmp_path / f"{i}.png") for i in range(3)),
        "mixed": [pictures[0], tmp_path / "1.png", str(tmp_path / "2.png")],
    }
    for form, images in forms.items():
        assert model.describe(images) == expected, form
    for single in (pictures[0], tmp_path / "0.png", pixels[0].numpy()):
        assert model.describe(single) == expected[:1]
    assert model.describe([]) == []
    assert model.describe(pictures[0].resize((64, 32))) == model.describe([pictures[0].resize((64, 32))])


def test_generated_images_of_every_form_are_described():
    model = make()
    expected = model.describe(model.generate(CAPTIONS, seed=0))
    for output in ("np", "pil"):
        assert len(model.describe(model.generate(CAPTIONS, seed=0, output=output))) == len(expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 16, 16) * 255, r"must be finite and in \[-1, 1\]; pass bytes \(uint8\), or x / 127.5 - 1"),
        (torch.full((1, 3, 16, 16), math.nan), r"must be finite and in \[-1, 1\]"),
        (torch.zeros(3, 16, 16), r"but they are \(3, 16, 16\); for one image, pass images\[None\]"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.int64),
            r"floats in \[-1, 1\] or bytes \(uint8\), but they are",
        ),
        (np.full((1, 16, 16, 3), 200.0), r"must be finite and in \[0, 1\]; pass bytes \(uint8\), x / 255, or \(x \+"),
        (np.linspace(-1, 1, 768).reshape(1, 16, 16, 3), r"must be finite and in \[0, 1\]; .* of values in \[-1, 1\]"),
        (np.zeros((1, 3, 16, 16)), r"an array must be \(B, H, W, 3\) or \(H, W, 3\), but it is \(1, 3, 16, 16\)"),
        (np.zeros((16, 16, 3), np.int64), r"floats in \[0, 1\] or bytes \(uint8\), but it holds int64"),
        (7, "but they are of the type int"),
        ([torch.zeros(3, 16, 16)], "but one is of the type Tensor"),
        ("nowhere.png", "nowhere.png cannot be read as an image"),
    ],
)
def test_other_forms_of_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        make().describe(images)


def test_no_images_have_no_descriptions():
    assert make().describe(torch.zeros(0, 3, 16, 16)) == []


def test_a_model_in_half_precision_describes_float32_images():
    assert len(make().bfloat16().describe(torch.zeros(2, 3, 16, 16))) == 2


@pytest.mark.parametrize("captions", [5, None, b"a red flower", [7], {"a red flower": 1}, {"a red flower"}])
def test_captions_that_are_no_strings(captions):
    for call in (make().generate, lambda captions: make().best_seeds(captions, 2)):
        with pytest.raises(ValueError, match="captions must be one string or a list of strings, but they are"):
            call(captions)
