"""Published checkpoints load into our modules, whose outputs equal those recorded in tests/parity."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from mirror_modules.adversarial import PairedLogits, discriminator_loss, generator_loss
from mirror_modules.glam import CascadedGenerator, GlobalLocalAttention, WordAttention
from mirror_modules.models.published import (
    convert_attention,
    convert_captioner,
    convert_discriminator,
    convert_generator,
    load_published_captioner,
    load_published_discriminator,
    load_published_generator,
    load_published_image_encoder,
    load_published_text_encoder,
)
from mirror_modules.stem import ImageFeatures, TextFeatures, kl_divergence, matching_loss, word_region_attention
from mirror_modules.stream import Captioner, redescription_loss
from tests.recordings import PARITY, PRECISIONS, entries, read

LAYOUTS = json.loads((PARITY / "published_layouts.json").read_text())
# Relative where values exceed 1. In float64, what remains is the rounding of the recorded float32, equal on every
# processor: this compares the mathematics. In float32, kernels for different instruction sets differ by some roundings.
assert_equal = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def recorded(name, dtype=torch.float32):
    """The published state, and the recorded inputs and outputs, with floats in the given precision."""
    tensors = read(name)
    state = entries(tensors, "state/")
    record = {key: tensor for key, tensor in tensors.items() if not key.startswith("state/")}
    return state, {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in record.items()}


def mask_of(lengths, longest=11):
    return torch.arange(longest) < lengths.unsqueeze(1)


def release_attention(state, dtype):
    attention = GlobalLocalAttention(4, 16, 100, sentence_bias=True, score_projection=True)
    attention.load_state_dict(convert_attention(state))
    return attention.to(dtype)


# Recorded outputs of the published modules


@PRECISIONS
def test_attention(dtype):
    state, record = recorded("global_local_attention", dtype)
    attention = release_attention(state, dtype)
    result = attention(record["features"], record["words"].mT, record["condition"], need_weights=True)
    for name in ("word_context", "sentence_context", "word_weights", "sentence_weights"):
        assert_equal(getattr(result, name), record[name])


@PRECISIONS
def test_masked_attention(dtype):
    state, record = recorded("global_local_attention_masked", dtype)
    attention, words, mask = release_attention(state, dtype), record["words"].mT, mask_of(record["lengths"])
    result = attention(record["features"], words, record["condition"], mask, need_weights=True)
    for name in ("word_context", "sentence_context", "word_weights"):
        assert_equal(getattr(result, name), record[name])
    for row, length in enumerate(record["lengths"]):
        one = slice(row, row + 1)
        alone = attention(record["features"][one], words[one, :length], record["condition"][one])
        assert_equal(alone.word_context, record["word_context"][one])
        assert_equal(alone.sentence_context, record["sentence_context"][one])


@PRECISIONS
def test_generator(dtype):
    state, record = recorded("generator", dtype)
    conditioning, generator = (module.to(dtype) for module in load_published_generator(state))
    condition, mean, log_variance = conditioning(record["sentence"], noise=record["epsilon"])
    assert_equal(mean, record["mean"])
    assert_equal(log_variance, record["log_variance"])

    images, word_weights, _ = generator(record["noise"], condition, record["words"].mT, need_weights=True)
    assert [image.shape[-1] for image in images] == [64, 128, 256]
    # In this untrained network, a change in the last bit of the noise changes some pixels by 6e-5. The recording
    # differs from float64 by up to 4.2e-5, and from float32 on other instruction sets by up to 1.1e-4.
    errors = (images[0][:2] - record["image0"]).abs().flatten()
    assert errors.quantile(0.95) < 1e-5
    assert errors.max() < (5e-5 if dtype == torch.float64 else 3e-4)
    assert_equal(images[1].mean(dim=(2, 3)), record["image1_mean"])
    assert_equal(images[1][:, :, :8, :8], record["image1_corner"])
    assert_equal(images[2].mean(dim=(2, 3)), record["image2_mean"])
    assert_equal(images[2][:, :, -8:, -8:], record["image2_corner"])
    assert_equal(word_weights[0].mean(dim=(2, 3)), record["word_weights0_mean"])
    assert_equal(word_weights[1][:, :, :4, :4], record["word_weights1_corner"])


@PRECISIONS
@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_discriminator(resolution, dtype):
    state, record = recorded(f"discriminator_{resolution}", dtype)
    discriminator = load_published_discriminator(state).to(dtype)
    assert discriminator.resolution == resolution
    rows = torch.arange(len(record["sentence"]) - 1)
    wrong = {"mismatched_sentence": record["sentence"][1:], "mismatched_rows": rows}
    real = discriminator(record["real"], record["sentence"], **wrong)
    fake = discriminator(record["fake"], record["sentence"])
    assert_equal(real.realism.sigmoid(), record["realism_probability"])
    assert_equal(real.consistency.sigmoid(), record["consistency_probability"])

    release = {"weighting": "release", "through": "probabilities"}
    # Probabilities of 1 - 5e-6, which occur at 256 pixels, are rounded to float32 in steps that change their logarithm
    # by 1 % and the loss by 5e-5 of its value.
    tolerance = {"rtol": 3e-4} if resolution == 256 and dtype == torch.float32 else {}
    assert_equal(discriminator_loss(real, fake, **release), record["discriminator_loss"], **tolerance)
    assert_equal(generator_loss(fake, **release), record["generator_loss"], **tolerance)
    if resolution == 64:  # where no logit is large, rounding makes no difference
        assert_equal(discriminator_loss(real, fake, weighting="release"), record["discriminator_loss"])


@PRECISIONS
def test_text_encoder(dtype):
    state, record = recorded("text_encoder", dtype)
    words, sentence = load_published_text_encoder(state).to(dtype)(record["tokens"], mask_of(record["lengths"]))
    assert_equal(words, record["words"].mT)
    assert_equal(sentence, record["sentence"])


@PRECISIONS
def test_caption_decoder(dtype):
    state, record = recorded("caption_decoder", dtype)
    image_encoder = nn.Identity()
    image_encoder.image_dim = 7
    captioner = Captioner(image_encoder, 37, embedding_dim=12, hidden_dim=24)
    absent = captioner.load_state_dict(convert_captioner({}, state), strict=False)
    assert not absent.unexpected_keys
    assert all(name.startswith("image_") for name in absent.missing_keys)

    captioner.to(dtype)
    logits = captioner.decode(record["features"], record["tokens"])
    packed = partial(pack_padded_sequence, lengths=record["lengths"], batch_first=True)
    assert_equal(packed(logits).data, record["packed_logits"])
    assert torch.equal(packed(record["tokens"]).data, record["packed_targets"])
    assert_equal(redescription_loss(logits, record["tokens"], mask_of(record["lengths"])), record["loss"])
    greedy = captioner.search(record["features"], beam_width=1, max_words=20, end_token=None)
    assert torch.equal(greedy, record["greedy"])


@PRECISIONS
@pytest.mark.parametrize("with_classes", [True, False])
def test_matching(with_classes, dtype):
    _, record = recorded("matching", dtype)
    image_features = ImageFeatures(record["regions"].flatten(2).mT, record["image"])
    text_features = TextFeatures(record["words"].mT, record["sentence"])
    class_ids = record["class_ids"] if with_classes else None
    result = matching_loss(image_features, text_features, mask_of(record["lengths"]), class_ids)
    for value, name in zip(result, ("words_loss0", "words_loss1", "sentence_loss0", "sentence_loss1")):
        assert_equal(value, record[name if with_classes else f"{name}_noclass"])


@PRECISIONS
def test_matching_attention(dtype):
    _, record = recorded("matching", dtype)
    regions, words = record["regions"].flatten(2).mT, record["words"].mT
    attention = word_region_attention(regions, words, mask_of(record["lengths"]))
    assert_equal(attention[0, 0].unflatten(1, (5, 7)), record["attention_first"])


@PRECISIONS
def test_kl_divergence(dtype):
    _, record = recorded("conditioning", dtype)
    assert_equal(kl_divergence(record["mean"], record["log_variance"]), record["kl"])


def test_losses_through_probabilities_are_clipped_at_100_and_have_gradients():
    logits = torch.tensor([-200.0], requires_grad=True)
    paired = PairedLogits(logits, logits)
    with torch.enable_grad():
        loss = generator_loss(paired, weighting="release", through="probabilities")
    assert loss == 200
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert generator_loss(paired, weighting="release") == 400


def test_losses_through_probabilities_keep_float32_under_autocast():
    logits = torch.tensor([-1.5, 0.5, 7.0])
    expected = generator_loss(PairedLogits(logits, logits), through="probabilities")
    half = logits.bfloat16()  # exact for these numbers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(generator_loss(PairedLogits(half, half), through="probabilities"), expected)


@pytest.mark.parametrize("loss", [generator_loss, lambda fake, **options: discriminator_loss(fake, fake, **options)])
def test_unknown_values_of_through_are_refused(loss):
    with pytest.raises(ValueError, match="_loss: through must be one of 'logits', 'probabilities', but it is 'odds'"):
        loss(PairedLogits(torch.ones(2), torch.ones(2)), through="odds")


# From the image on, which has no recording: the published resize before torchvision's own forward is the oracle


@pytest.mark.parametrize("size", [(299, 299), (64, 64), (331, 307)])
def test_image_encoder_equals_inception_of_resized_images(size):
    from torchvision.models import inception_v3

    inception = inception_v3(weights=None, init_weights=False).eval()
    for layer in inception.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # torch's default makes the output of so many layers nearly constant
    to_regions, to_image = nn.Conv2d(768, 7, 1, bias=False), nn.Linear(2048, 7)
    trunk = {k: v for k, v in inception.state_dict().items() if not k.startswith(("AuxLogits", "fc"))}
    state = {**trunk, "emb_features.weight": to_regions.weight, **prefixed("emb_cnn_code.", to_image)}
    inception.fc = nn.Identity()
    maps = []
    inception.Mixed_6e.register_forward_hook(lambda module, inputs, output: maps.append(output))

    image = torch.rand(1, 3, *size) * 2 - 1
    resized = nn.Upsample(size=(299, 299), mode="bilinear")(image)
    result = load_published_image_encoder(state)(image)
    assert_equal(result.image, to_image(inception(resized)))
    assert_equal(result.regions, to_regions(maps[0]).flatten(2).mT)
    if size[0] > 299:
        smooth = nn.functional.interpolate(image, (299, 299), mode="bilinear", antialias=True)
        assert (result.image - to_image(inception(smooth))).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(224, 224), (37, 41), (256, 256)])
def test_captioner_features_equal_resnet_of_resized_images(size):
    from torchvision.models import resnet18

    resnet, linear, norm = resnet18(weights=None), nn.Linear(512, 12), nn.BatchNorm1d(12)
    trunk = nn.Sequential(*list(resnet.children())[:-1]).eval()
    norm.running_mean.uniform_(-1, 1)
    rnn_state, _ = recorded("caption_decoder")
    cnn_state = {**prefixed("resnet.", trunk), **prefixed("linear.", linear), **prefixed("bn.", norm)}
    captioner = load_published_captioner(cnn_state, rnn_state, backbone="resnet18")

    images = torch.rand(2, 3, *size) * 2 - 1
    resized = nn.Upsample(size=(224, 224), mode="bilinear")(images)
    assert_equal(captioner.encode_images(images), norm.eval()(linear(trunk(resized).flatten(1))))
    assert torch.equal(captioner.output.weight, rnn_state["linear.weight"])


def prefixed(prefix, module):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


# Layouts of the public files


def layout(name, variant="as published"):
    """A state of the published sizes, on the meta device."""
    state = {key: torch.empty(shape, device="meta") for key, shape in LAYOUTS[name].items()}
    if variant == "without counters":
        return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    if variant == "DataParallel":
        return {f"module.{key}": tensor for key, tensor in state.items()}
    return state


LOADERS = {
    "attngan_bird_generator": load_published_generator,
    "attngan_coco_generator": load_published_generator,
    "attndcgan_bird_generator": load_published_generator,
    "mirrorgan_bird_generator": load_published_generator,
    "discriminator_64_df64": load_published_discriminator,
    "discriminator_128_df64": load_published_discriminator,
    "discriminator_256_df64": load_published_discriminator,
    "text_encoder_bird": load_published_text_encoder,
    "image_encoder": load_published_image_encoder,
}


def load_layout(name, variant="as published"):
    with torch.device("meta"):
        return LOADERS[name](layout(name, variant))


@pytest.mark.parametrize("variant", ["as published", "without counters", "DataParallel"])
@pytest.mark.parametrize("name", LOADERS)
def test_public_layouts_fill_our_modules(name, variant):
    loaded = load_layout(name, variant)
    modules = loaded if isinstance(loaded, tuple) else (loaded,)
    shapes = [list(tensor.shape) for module in modules for tensor in module.state_dict().values()]
    published = LAYOUTS[name].values()
    assert len(shapes) == len(published)
    assert sum(map(np.prod, shapes)) == sum(map(np.prod, published))
    assert not any(module.training for module in modules)


@pytest.mark.parametrize("variant", ["as published", "without counters", "DataParallel"])
def test_public_captioner_fills_ours(variant):
    with torch.device("meta"):
        captioner = load_published_captioner(layout("caption_cnn", variant), layout("caption_rnn", variant))
    assert len(captioner.state_dict()) == len(LAYOUTS["caption_cnn"]) + len(LAYOUTS["caption_rnn"])
    assert captioner.vocabulary_size == 5450


def test_every_public_layout_has_a_loader():
    assert set(LAYOUTS) == {*LOADERS, "caption_cnn", "caption_rnn"}


@pytest.mark.parametrize(
    ("name", "channels", "residual_blocks", "heads", "attention"),
    [
        ("attngan_bird_generator", 32, 2, 3, WordAttention),
        ("attngan_coco_generator", 48, 3, 3, WordAttention),
        ("attndcgan_bird_generator", 32, 0, 1, WordAttention),
        ("mirrorgan_bird_generator", 32, 2, 3, GlobalLocalAttention),
    ],
)
def test_kinds_of_generators_are_distinguished(name, channels, residual_blocks, heads, attention):
    conditioning, generator = load_layout(name)
    assert (conditioning.text_dim, conditioning.condition_dim) == (256, 100)
    assert (generator.noise_dim, generator.condition_dim, generator.word_dim) == (100, 100, 256)
    assert generator.resolutions == (64, 128, 256)
    assert [head.conv.in_channels for head in generator.heads] == [channels] * heads
    assert [len(stage.residual) for stage in generator.refinements] == [residual_blocks] * 2
    assert all(isinstance(stage.attention, attention) for stage in generator.refinements)


def test_converted_states_fit_modules_built_directly():
    with torch.device("meta"):
        generator = CascadedGenerator(
            attention=partial(GlobalLocalAttention, sentence_bias=True, score_projection=True)
        )
    generator.load_state_dict(convert_generator(layout("mirrorgan_bird_generator")))


# States that do not fit


def bird_generator(**changes):
    return {**layout("mirrorgan_bird_generator"), **changes}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("h_net2.extra.weight", (3,), "'h_net2.extra.weight' is unexpected; does the state belong to another part"),
        ("h_net2.residual.1.conv.weight", (3,), "'h_net2.residual.1.conv.weight' is unexpected"),
        ("h_net2.residual.1.block.0.bias", (3,), "'h_net2.residual.1.block.0.bias' is unexpected in this Cascaded"),
        ("h_net2.att.linear.scale", (3,), "'h_net2.att.linear.scale' is unexpected in this Cascaded"),
        ("h_net3.conv.weight", (64, 95, 1, 1), r"'h_net3.conv.weight' is \(64, 95, 1, 1\), .* \(64, 96, 1, 1\)"),
        ("h_net3.att.conv_context.weight", (32, 256, 3, 3), r"weight' is \(32, 256, 3, 3\), .* \(32, 256\)"),
        ("h_net3.att.conv_context.weight", (32,), r"'h_net3.att.conv_context.weight' is \(32,\), .* \(32, 256\)"),
        ("ca_net.fc.weight", (400,), r"'ca_net.fc.weight' is \(400,\), expected 2 axes"),
        ("ca_net.fc.bias", (401,), r"'ca_net.fc.bias' is \(401,\), which does not fit our 'linear.bias' \(400,\)"),
    ],
)
def test_unexpected_and_misshaped_tensors_are_named(name, shape, message):
    with torch.device("meta"), pytest.raises(ValueError, match=f"load_published_generator: .*{message}"):
        load_published_generator(bird_generator(**{name: torch.empty(shape)}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ca_net.fc.weight", "'ca_net.fc.weight' is missing from the published state"),
        ("img_net1.img.0.weight", "'img_net1.img.0.weight' is missing from the published state"),
        ("h_net1.fc.0.weight", "'h_net1.fc.0.weight' is missing from the published state"),
        ("h_net2.conv.weight", "has no tensor for our 'refinements.0.fusion.weight'; is the file complete"),
        ("h_net3.att.linear.bias", "has no tensor for our 'refinements.1.attention.sentence_projection.bias'"),
        ("ca_net.fc.bias", "has no tensor for our 'linear.bias'"),
    ],
)
def test_missing_tensors_are_named(name, message):
    state = bird_generator()
    del state[name]
    with torch.device("meta"), pytest.raises(ValueError, match=f"load_published_generator: .*{message}"):
        load_published_generator(state)


@pytest.mark.parametrize(
    ("load", "missing"),
    [
        (load_published_generator, "'ca_net.fc.weight'"),
        (load_published_discriminator, "'COND_DNET.jointConv.0.weight'"),
        (load_published_text_encoder, "'encoder.weight'"),
        (load_published_image_encoder, "'emb_features.weight'"),
        (partial(load_published_captioner, {}), "'rnn.embed.weight'"),
    ],
)
def test_a_state_of_another_part_is_refused(load, missing):
    with pytest.raises(ValueError, match=f"{missing} is missing from the published state; does it belong to another"):
        load({"features.0.weight": torch.ones(2, 3)})


def test_another_resnet_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"'cnn\.resnet\.4\.0\.conv1\.weight' is .* does not"):
        load_published_captioner(layout("caption_cnn"), layout("caption_rnn"), backbone="resnet18")


@pytest.mark.parametrize(
    "function", [convert_generator, convert_discriminator, load_published_generator, load_published_text_encoder]
)
@pytest.mark.parametrize("state", ["netG.pth", [], {3: torch.zeros(1)}])
def test_what_is_no_state_is_refused(function, state):
    message = rf"must be a dict of tensors by name, but it is a {type(state).__name__}; `load_published` reads one from"
    with pytest.raises(ValueError, match=message):
        function(state)
    with pytest.raises(ValueError, match=message):
        load_published_captioner(state, {})
