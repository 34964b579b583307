"""All systems: images, gradients, files, and parameter counts of the published sizes."""

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
from mirror_modules.glam.stages import DoublingConv2d
from mirror_modules.models import (
    PPGN,
    AttnGAN,
    AttnGANConfig,
    EncoderPair,
    GANIntCLSConfig,
    ModelConfig,
    PPGNConfig,
    StackGANConfig,
    StackGANv2Config,
    TextToImage,
    build_model,
    get_system,
    sample_latents,
)
from mirror_modules.models.system import samples_of
from mirror_modules.stem import Condition
from mirror_modules.stream import append_end

CAPTIONS = ["a red flower with five round petals", "blue petals", "a white flower"]
VOCABULARY = Vocabulary.build(CAPTIONS)
SIZES = {
    "embedding_dim": 5,
    "word_dim": 6,
    "max_words": 7,
    "noise_dim": 3,
    "condition_dim": 4,
    "discriminator_channels": 4,
    "image_backbone": "conv",
    "captioner_backbone": "conv",
    "captioner_embedding_dim": 4,
    "captioner_hidden_dim": 5,
}
CONFIGS = {
    "mirrorgan": MirrorGANConfig(**SIZES, channels=2, resolutions=(4, 8, 16), residual_blocks=1),
    "attngan": AttnGANConfig(**SIZES, channels=2, resolutions=(4, 8, 16), residual_blocks=1),
    "stackgan-v2": StackGANv2Config(**SIZES, channels=4, resolutions=(4, 8, 16), residual_blocks=1),
    "stackgan": StackGANConfig(**SIZES, channels=4, resolutions=(8, 16), halvings=1, residual_blocks=1),
    "gan-int-cls": GANIntCLSConfig(**SIZES, channels=4, resolutions=(16,)),
    "ppgn": PPGNConfig(**SIZES, channels=4, resolutions=(4, 8, 16), residual_blocks=1, sampling_steps=3),
}
SYSTEMS = pytest.mark.parametrize("name", CONFIGS)


def make(name, **changes):
    return build_model(dataclasses.replace(CONFIGS[name], **changes), VOCABULARY).eval()


@SYSTEMS
def test_every_system_is_registered_under_its_name(name):
    model = make(name)
    assert model.config.system == name
    assert get_system(name) is type(model)
    assert isinstance(model, TextToImage)


@SYSTEMS
def test_generate_returns_an_image_per_caption_and_stage(name):
    model = make(name)
    generated = model.generate_stages(CAPTIONS, seed=0)
    assert [tuple(images.shape) for images in generated.images] == [
        (3, 3, size, size) for size in model.config.resolutions
    ]
    assert all(images.abs().max() <= 1 and not images.requires_grad for images in generated.images)
    maps = model.generate_stages(CAPTIONS, seed=0, need_weights=True).word_weights
    assert bool(maps) == model.config.attends
    assert len(model.describe(generated.images[-1])) == 3


@SYSTEMS
def test_an_image_depends_on_its_caption_and_seed_alone(name):
    model = make(name)
    together = model.generate(CAPTIONS, seed=[5, 6, 7])
    assert_close(model.generate(CAPTIONS[1], seed=6), together[1:2], atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.generate(CAPTIONS[1], seed=7), together[1:2])
    assert model.generate(CAPTIONS[0], best_of=2, seed=0).shape == together[:1].shape


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ppgn"])
def test_interpolation_ends_at_the_images_of_both_captions(name):
    model = make(name).double()
    images = model.interpolate(*CAPTIONS[:2], steps=3, seed=4)
    assert_close(images[[0, 2]], model.generate(CAPTIONS[:2], seed=[4, 4]), atol=1e-9, rtol=1e-9)


def test_a_system_without_conditions_cannot_interpolate():
    with pytest.raises(ValueError, match=r"PPGN\.interpolate: the system 'ppgn' .* has no condition between two"):
        make("ppgn").interpolate(*CAPTIONS[:2], steps=3, seed=4)


@SYSTEMS
def test_each_part_keeps_its_mode_and_weights(name):
    model = make(name).train()
    modes = {part: module.training for part, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    model.generate(CAPTIONS, seed=0)
    assert {part: module.training for part, module in model.named_modules()} == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert_close(model.state_dict(), state, atol=0, rtol=0)


@SYSTEMS
def test_images_give_every_generating_part_a_gradient(name):
    model = make(name).train()
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    words, sentence = model.text_encoder(tokens, word_mask)
    conditions = model.conditions(sentence, torch.randn(3, model.config.condition_noise_dim))
    samples = samples_of(conditions)
    images = model.images(torch.randn(3, 3), samples, words, word_mask).images
    sum(image.square().sum() for image in images).backward()
    for part in model.generator_parts().values():
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())


@SYSTEMS
def test_discriminators_read_images_and_text_of_every_phase(name):
    model = make(name).train()
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    for phase in model.config.adversarial_phases:
        view = model.trained_in(phase)
        words, sentence = view.text_encoder(tokens, word_mask)
        conditions = view.conditions(sentence, torch.randn(3, view.config.condition_noise_dim))
        text = view.discriminator_text(sentence, conditions)
        images = view.images(torch.randn(3, 3), samples_of(conditions), words, word_mask).images
        discriminators = view.discriminators(phase)
        resolutions = view.config.trained_resolutions(phase)
        assert tuple(each.resolution for each in discriminators) == resolutions
        for discriminator, image in zip(discriminators, images[-len(resolutions) :], strict=True):
            assert discriminator(image, text).consistency.shape == (3,)


@SYSTEMS
def test_a_saved_model_is_loaded_by_the_base_class(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = TextToImage.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert_close(loaded.generate(CAPTIONS, seed=1), model.generate(CAPTIONS, seed=1), atol=0, rtol=0)
    assert type(model).from_pretrained(tmp_path).config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["system"] == name


def test_a_class_opens_only_its_own_system(tmp_path):
    make("attngan").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"MirrorGAN\.from_pretrained: .* holds a model of the system 'attngan'; use AttnGAN\.from_pretrained, ",
    ):
        MirrorGAN.from_pretrained(tmp_path)


def test_a_config_without_a_system_is_that_of_a_mirrorgan(tmp_path):
    make("mirrorgan").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("system") == "mirrorgan"
    path.write_text(json.dumps(fields))
    assert type(TextToImage.from_pretrained(tmp_path)) is MirrorGAN
    path.write_text(json.dumps({**fields, "system": "atngan"}))
    with pytest.raises(ValueError, match=r"config\.json: unknown system 'atngan'; there are .* Did you mean 'attngan'"):
        TextToImage.from_pretrained(tmp_path)
    path.write_text(json.dumps({**fields, "system": 3}))
    with pytest.raises(ValueError, match=r"is not a valid model configuration: its system is 3"):
        TextToImage.from_pretrained(tmp_path)


def test_a_system_needs_its_methods():
    class Empty(TextToImage):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define build\(config\)"):
        Empty(ModelConfig(captioner_backbone="conv"), VOCABULARY)
    model = make("attngan")
    with pytest.raises(NotImplementedError, match=r"AttnGAN must define conditions\(sentence, noise\)"):
        TextToImage.conditions(model, torch.zeros(1, 6), torch.zeros(1, 4))
    with pytest.raises(NotImplementedError, match=r"AttnGAN must define images\(noise, samples, words"):
        TextToImage.images(model, torch.zeros(1, 3), [], torch.zeros(1, 2, 6))


def test_options_of_the_config_reach_the_parts():
    model = make("mirrorgan", attention="word", sentence_bias=True, text_dropout=0.25, resolutions=(8,))
    assert model.text_encoder.dropout.p == 0.25
    assert model.generator.resolutions == (8,)
    release = MirrorGAN(MirrorGANConfig.release(**SIZES, channels=2, resolutions=(4, 8)), VOCABULARY)
    assert release.generator.refinements[0].attention.score_projection is not None
    assert release.generator.refinements[0].attention.sentence_projection.bias is not None
    assert model.captioner.vocabulary_size == model.text_encoder.vocabulary_size == len(VOCABULARY)


def test_without_sentence_noise_the_attention_reads_the_mean_and_the_first_stage_the_sample(tmp_path):
    model = make("mirrorgan", sentence_noise=False)
    read = {}
    model.generator.initial.register_forward_hook(lambda _, inputs, __: read.update(initial=inputs[1]))
    for i, stage in enumerate(model.generator.refinements):
        stage.attention.register_forward_hook(lambda _, inputs, __, i=i: read.update({i: inputs[2]}))
    images = model.generate("a red flower", seed=3)
    condition, mean = model.conditions(
        model.text_encoder(*VOCABULARY.encode(["a red flower"])).sentence, torch.zeros(1, SIZES["condition_dim"])
    )
    assert isinstance(condition, Condition)
    assert_close(mean, condition.mean)
    assert_close([read[0], read[1]], [mean, mean])
    assert not torch.allclose(read["initial"], mean, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert_close(TextToImage.from_pretrained(tmp_path).generate("a red flower", seed=3), images)
    # The first stage still reads the noise.
    assert not torch.allclose(model.generate("a red flower", seed=4), images, atol=1e-3)


@pytest.mark.parametrize("name", ["mirrorgan", "attngan"])
def test_finest_upsampling_of_the_config_reaches_the_generator_and_is_saved(name, tmp_path):
    model = make(name, finest_upsampling="bilinear")
    model.save_pretrained(tmp_path)
    for each in (model, TextToImage.from_pretrained(tmp_path)):
        doublings = [part for part in each.generator.modules() if isinstance(part, DoublingConv2d)]
        assert [part.upsampling for part in doublings] == ["nearest", "bilinear"]
    images = TextToImage.from_pretrained(tmp_path).generate("a red flower", seed=0)
    assert_close(images, model.generate("a red flower", seed=0))


def test_the_config_must_be_that_of_the_system():
    with pytest.raises(ValueError, match=r"MirrorGAN: config must be a MirrorGANConfig, but it is AttnGANConfig\("):
        MirrorGAN(CONFIGS["attngan"], VOCABULARY)


@pytest.mark.parametrize("system", ["attngan", "ppgn"])
def test_a_location_is_refused_where_it_has_no_effect(system):
    model, location = make(system), torch.rand(1, 4)
    encoded = VOCABULARY.encode(CAPTIONS[:1])
    noise = torch.randn(1, 3), torch.randn(1, model.config.condition_noise_dim)
    for call in (
        lambda: model.generate("a red flower", location=location),
        lambda: model.generate_stages("a red flower", location=location),
        lambda: model.best_seeds("a red flower", 2, location=location),
        lambda: model.interpolate("a red flower", "a white flower", location=location),
        lambda: model(*encoded, location=location),
        lambda: sample_latents(model, *encoded, *noise, steps=1, location=location),
    ):
        with pytest.raises(ValueError, match="location has no effect on this system; leave it out"):
            call()


def test_the_vocabulary_must_be_one():
    with pytest.raises(ValueError, match=r"vocabulary must be a Vocabulary, but it is a list; Vocabulary\.build"):
        AttnGAN(CONFIGS["attngan"], ["a", "red", "flower"])
    with pytest.raises(ValueError, match=r"EncoderPair: config must be that of a system, such as .*, not {}"):
        EncoderPair({}, 7)


def test_latents_are_sampled_with_a_captioner_and_noise_for_each_caption(tmp_path):
    model = make("attngan")
    encoded, noise = VOCABULARY.encode(CAPTIONS[:2]), torch.randn(2, 3)
    with pytest.raises(ValueError, match="sample_latents: batch sizes disagree"):
        sample_latents(model, *encoded, noise, torch.randn(1, model.config.condition_noise_dim))
    with pytest.raises(ValueError, match="sample_latents: noise must be a tensor, but it is a list"):
        sample_latents(model, *encoded, [0.5], noise)
    model.save_pretrained(tmp_path)
    without = TextToImage.from_pretrained(tmp_path, only="images")
    for wrong in (without, model.generator):
        with pytest.raises(ValueError, match="sample_latents: model must be a text-to-image system with its captioner"):
            sample_latents(wrong, *encoded, noise, noise)


@pytest.mark.parametrize(
    ("config_type", "fields", "message"),
    [
        (GANIntCLSConfig, {"resolutions": (16, 32)}, r"GANIntCLSConfig: resolutions must be one image size"),
        (StackGANConfig, {"resolutions": (16,)}, r"StackGANConfig: resolutions must be two image sizes"),
        (StackGANConfig, {"resolutions": (16, 48)}, r"StackGANConfig: resolutions must be two .* they are \(16, 48\)"),
        (StackGANConfig, {"resolutions": (32, 16)}, r"StackGANConfig: resolutions must be two image sizes"),
        (StackGANv2Config, {"channels": 6}, r"StackGANv2Config: channels=6 cannot be halved .* a multiple of 4"),
        (PPGNConfig, {"channels": 6}, r"PPGNConfig: channels=6 cannot be halved"),
        (PPGNConfig, {"sampling_steps": 0}, r"PPGNConfig: sampling_steps must be a whole number of at least 1"),
        (PPGNConfig, {"sampling_step_size": -0.5}, r"PPGNConfig: sampling_step_size must be 0 or more, but it is -0.5"),
        (PPGNConfig, {"prior_weight": float("nan")}, r"PPGNConfig: prior_weight must be a finite number"),
        (AttnGANConfig, {"resolutions": ()}, r"AttnGANConfig: resolutions is empty"),
        (AttnGANConfig, {"resolutions": 64}, r"AttnGANConfig: resolutions must be a list of image sizes .* it is 64"),
        (StackGANConfig, {"resolutions": (0, 64)}, r"StackGANConfig: resolutions must be a list .* it is \(0, 64\)"),
        (StackGANv2Config, {"resolutions": "64"}, r"StackGANv2Config: resolutions must be a list .* it is '64'"),
        (AttnGANConfig, {"max_words": 0}, r"AttnGANConfig: max_words must be a whole number of at least 1.* is 0"),
        (AttnGANConfig, {"max_words": None}, r"AttnGANConfig: max_words must be a whole number .* it is None"),
        (GANIntCLSConfig, {"resolutions": [64.0]}, r"GANIntCLSConfig: resolutions must be a list .* it is \[64\.0\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config_type, fields, message):
    with pytest.raises(ValueError, match=message):
        config_type(**fields)


# Of the published code. The biases of GAN-INT-CLS's convolutions before batch norm, which its code sets to zero, are
# left out: 4227 of the generator's 18,909,699 parameters, 2240 of the discriminator's 4,032,321.
COUNTS = [
    (MirrorGANConfig.release(), "glam", 7105392, [6313730, 19424002, 71858946]),
    (AttnGANConfig(), "glam", 7084592, [6313730, 19424002, 71858946]),
    (AttnGANConfig.coco(), "glam", 13811456, [13304450, 42800258, 160774274]),
    (StackGANv2Config(), "glam", 21239696, [5723906, 18834178, 71269122]),
    (StackGANConfig(), "first_stage", 10301248, [5715713]),
    (StackGANConfig(), "glam", 36591328, [71269122]),
    (StackGANConfig.coco(), "first_stage", 20020832, [12407425]),
    (StackGANConfig.coco(), "glam", 57151312, [159889538]),
    (GANIntCLSConfig(), "glam", 18909699 - 4227, [4032321 - 2240]),
    (PPGNConfig(), "glam", 16472208, None),
]


@pytest.mark.parametrize(("config", "phase", "generator", "discriminators"), COUNTS)
def test_published_sizes_have_the_published_numbers_of_parameters(config, phase, generator, discriminators):
    config = dataclasses.replace(config, captioner_backbone="conv")
    with torch.device("meta"):
        model = build_model(config, VOCABULARY, pretrained=False).trained_in(phase)
        found = [sum(each.numel() for each in part.parameters()) for part in model.generator_parts().values()]
        counts = [sum(each.numel() for each in one.parameters()) for one in model.discriminators(phase)]
    assert sum(found) == generator
    assert discriminators is None or counts == discriminators


def test_stackgan_trains_one_stage_after_the_other():
    model = make("stackgan")
    first, second = (model.trained_in(phase) for phase in ("first_stage", "glam"))
    sentence, noise = torch.randn(2, 6), torch.randn(2, 8)
    assert list(first.generator_parts()) == ["first_conditioning", "first_stage"]
    assert set(second.generator_parts()) > set(first.generator_parts())
    (condition,) = first.conditions(sentence, noise)
    frozen, own = second.conditions(sentence, noise)
    assert_close(frozen, condition.sample)
    assert isinstance(own, Condition)
    # Each stage has its own noise.
    assert_close(first.conditions(sentence, torch.cat((noise[:, :4], noise[:, :4]), dim=1))[0], condition)
    assert_close(own.sample, own.mean + (own.log_variance / 2).exp() * noise[:, 4:])
    words = torch.zeros(2, 1, 6)
    coarse = first.images(noise[:, :3], [frozen], words).images
    both = second.images(noise[:, :3], [frozen, own.sample], words).images
    assert_close(both[0], coarse[0])
    assert (len(coarse), len(both)) == (1, 2)
    assert not second.discriminator_text(sentence, [frozen, own]).requires_grad


def test_deviations_of_stackgan_may_be_below_one_unless_published_in_pytorch():
    sentence, noise = torch.randn(500, 6), torch.zeros(500, 8)
    right = make("stackgan").conditions(sentence, noise)[1]
    published = make("stackgan", conditioning="relu").conditions(sentence, noise)[1]
    assert (right.log_variance < 0).any()
    assert (published.log_variance >= 0).all()


def test_the_text_of_stackgan_v2_is_the_mean_of_the_condition_with_a_gradient():
    model = make("stackgan-v2")
    sentence = torch.randn(2, 6)
    conditions = model.conditions(sentence, torch.randn(2, 4))
    text = model.discriminator_text(sentence, conditions)
    assert_close(text, conditions[0].mean)
    assert text.requires_grad


def test_ppgn_raises_the_likelihood_of_the_caption():
    torch.manual_seed(1)
    model = make("ppgn", sampling_steps=30).double()
    with torch.no_grad():
        # An untrained captioner ignores the image, unless its image feature dominates.
        model.captioner.image_projection.weight.mul_(50)
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    noise = torch.randn(3, 3, dtype=torch.float64)
    samples = sample_latents(model, tokens, word_mask, noise, noise[:, :0], steps=30, prior_weight=0.0)
    assert (samples.log_likelihood[-1] > samples.log_likelihood[0]).all()
    images = model(tokens, word_mask, noise=noise).images[-1]
    plain = model.generator(noise).images[-1]
    assert (images - plain).abs().max() > 1e-3
    assert isinstance(model, PPGN)
    without_mask = model(tokens[:1, word_mask[0]], noise=noise[:1]).images[-1]
    assert_close(without_mask, images[:1])
    assert model(tokens, word_mask).images[-1].shape == images.shape


def test_latents_of_any_system_are_sampled_in_evaluation_mode():
    model = make("mirrorgan").train()
    tokens, word_mask = VOCABULARY.encode(CAPTIONS)
    start = torch.randn(3, 3), torch.randn(3, 4)
    samples = sample_latents(model, tokens, word_mask, *start, steps=4)
    assert samples.latents.shape == (3, 7)
    alone = sample_latents(model, tokens[1:2], word_mask[1:2], *(part[1:2] for part in start), steps=4)
    assert_close(alone.latents, samples.latents[1:2], atol=1e-3, rtol=1e-3)
    likelihood = -torch.nn.functional.cross_entropy(
        model.eval()
        .captioner(
            model(tokens, word_mask, noise=start[0], condition_noise=start[1]).images[-1],
            *append_end(tokens, word_mask),
        )
        .transpose(1, 2),
        append_end(tokens, word_mask)[0],
        reduction="none",
    )
    mask = append_end(tokens, word_mask)[1]
    assert_close(samples.log_likelihood[0], (likelihood * mask).sum(dim=1) / mask.sum(dim=1), atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.captioner.embedding.weight.requires_grad
