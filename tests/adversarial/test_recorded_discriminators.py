"""Discriminators and losses as recorded, in both modes.

Those of StackGAN and StackGAN++ are recorded from the published code, that of GAN-INT-CLS from its layer list.
"""

import pytest
import torch

from mirror_modules import AdversarialWeights, PairedDiscriminator, PairedLogits
from mirror_modules.functional import discriminator_loss, generator_loss
from mirror_modules.models.published import convert_discriminator
from tests.glam.test_recorded_deconvolution import make_generator
from tests.recordings import MODES, PRECISIONS, assert_norm_recorded, assert_recorded, entries, image_batch, read

REALISM_ALONE = AdversarialWeights(0, 0, 0, 1, 1, 0)


def renamed(name):
    """Our name of a published weight."""
    for old, new in (
        ("encode_img.", "trunk."),
        ("get_uncond_logits.outlogits.0.", "realism_head."),
        ("get_cond_logits.outlogits.3.", "consistency_head."),
        ("get_cond_logits.outlogits.", "joint."),
        ("uncond_logits.0.", "realism_head."),
        ("jointConv.", "joint."),
        ("logits.0.", "consistency_head."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return next(iter(convert_discriminator({name: torch.zeros(1)})))


def load(record, resolution, text_dim, mode, dtype, *, condition_first=False, **options):
    """Build a discriminator of a published state, whose joint convolution may take the condition before the image."""
    state = {renamed(key.removeprefix("state/")): value for key, value in record.items() if key.startswith("state/")}
    if condition_first:
        state["joint.0.weight"] = state["joint.0.weight"].roll(-text_dim, dims=1)
    discriminator = PairedDiscriminator(resolution, text_dim, channels=len(state["trunk.0.weight"]), **options)
    missing, unexpected = discriminator.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") or "joint" in name or "consistency" in name for name in missing)
    return discriminator.to(dtype).train(mode == "train")


def check_gradient_norms(discriminator, record, mode):
    names = [key.removeprefix(f"{mode}/gradient_norm/") for key in record if key.startswith(f"{mode}/gradient_norm/")]
    parameters = dict(discriminator.named_parameters())
    for name in names:
        assert_norm_recorded(parameters[renamed(name)].grad.norm(), record[f"{mode}/gradient_norm/{name}"], msg=name)


def check_running_statistics(discriminator, record):
    buffers = dict(discriminator.named_buffers())
    after = "train/after_discriminator_loss/"
    for key in record:
        if key.startswith(after):
            assert_recorded(buffers[renamed(key.removeprefix(after))], record[key], msg=key)


def norms_of_images(gradient):
    return gradient.flatten(1).norm(dim=1)


@PRECISIONS
@MODES
@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_stackgan_v2(resolution, mode, dtype):
    record = read(f"stackgan_v2_discriminator_{resolution}")
    condition = record["condition"].to(dtype).requires_grad_()
    discriminator = load(record, resolution, condition.shape[1], mode, dtype, condition_first=True)
    images = {name: image_batch(record, name, resolution, dtype) for name in ("real", "wrong", "fake")}

    # Wrong images are judged with the same sentences, in a forward of their own.
    real, wrong, fake = (discriminator(images[name], condition.detach()) for name in ("real", "wrong", "fake"))
    loss = discriminator_loss(real, fake, wrong, weighting="stackgan++", through="probabilities")
    assert_recorded(loss, record[f"{mode}/discriminator_loss"])
    loss.backward()
    check_gradient_norms(discriminator, record, mode)
    if mode == "train":
        check_running_statistics(discriminator, record)
    else:
        assert_recorded(real.consistency.sigmoid(), record["eval/consistency_probability"])
        assert_recorded(real.realism.sigmoid(), record["eval/realism_probability"])
        loss = discriminator_loss(real, fake, wrong, weighting="gan-int-cls", through="probabilities")
        assert_recorded(loss, record["eval/discriminator_loss_without_unconditional"])

    generated = images["fake"].requires_grad_()
    loss = generator_loss(discriminator(generated, condition), weighting="stackgan++", through="probabilities")
    assert_recorded(loss, record[f"{mode}/generator_loss"])
    for_images, for_condition = torch.autograd.grad(loss, (generated, condition))
    assert_norm_recorded(norms_of_images(for_images), record[f"{mode}/generator_loss_image_gradient_norm"])
    assert_recorded(for_condition, record[f"{mode}/generator_loss_condition_gradient"])


@PRECISIONS
@MODES
@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_stackgan_v2_without_text(resolution, mode, dtype):
    """Features and realism alone: the same weights, and a weighting that leaves out consistency."""
    record = read(f"stackgan_v2_unconditional_discriminator_{resolution}")
    record = {key.replace("/logits.0.", "/uncond_logits.0."): value for key, value in record.items()}
    discriminator = load(record, resolution, 1, mode, dtype)
    images = {name: image_batch(record, name, resolution, dtype) for name in ("real", "fake")}

    def realism(batch):
        return PairedLogits(discriminator.realism_head(discriminator.features(batch)), torch.zeros(len(batch)))

    real, fake = realism(images["real"]), realism(images["fake"])
    loss = discriminator_loss(real, fake, weighting=REALISM_ALONE, through="probabilities")
    assert_recorded(loss, record[f"{mode}/discriminator_loss"])
    loss.backward()
    check_gradient_norms(discriminator, record, mode)
    if mode == "train":
        check_running_statistics(discriminator, record)
    else:
        assert_recorded(real.realism.sigmoid(), record["eval/realism_probability"])

    generated = images["fake"].requires_grad_()
    loss = generator_loss(realism(generated), weighting=REALISM_ALONE, through="probabilities")
    assert_recorded(loss, record[f"{mode}/generator_loss"])
    (gradient,) = torch.autograd.grad(loss, generated)
    assert_norm_recorded(norms_of_images(gradient), record[f"{mode}/generator_loss_image_gradient_norm"])


@PRECISIONS
@MODES
def test_stackgan_second_stage(mode, dtype):
    record = read("stackgan_stage2_discriminator")
    condition = record["condition"].to(dtype)
    discriminator = load(record, 256, condition.shape[1], mode, dtype)
    images = {name: image_batch(record, name, 256, dtype) for name in ("real", "fake")}

    rows = torch.arange(len(condition) - 1)
    real = discriminator(images["real"], condition, mismatched_sentence=condition[1:], mismatched_rows=rows)
    fake = discriminator(images["fake"], condition)
    loss = discriminator_loss(real, fake, weighting="release", through="probabilities")
    assert_recorded(loss, record[f"{mode}/discriminator_loss"])
    loss.backward()
    check_gradient_norms(discriminator, record, mode)
    if mode == "train":
        check_running_statistics(discriminator, record)
    else:
        assert_recorded(real.consistency.sigmoid(), record["eval/consistency_probability"])
        assert_recorded(real.realism.sigmoid(), record["eval/realism_probability"])

    generated = images["fake"].requires_grad_()
    loss = generator_loss(discriminator(generated, condition), weighting="release", through="probabilities")
    assert_recorded(loss, record[f"{mode}/generator_loss"])
    (gradient,) = torch.autograd.grad(loss, generated)
    assert_norm_recorded(norms_of_images(gradient), record[f"{mode}/generator_loss_image_gradient_norm"])


@PRECISIONS
@MODES
def test_stackgan_first_stage(mode, dtype):
    """Real and wrong pairs: the generated images are those of its generator."""
    record = read("stackgan_stage1")
    prefix = "state/discriminator."
    record |= {key.replace(prefix, "state/"): value for key, value in record.items() if key.startswith(prefix)}
    record = {key: value for key, value in record.items() if not key.startswith(("state/generator", prefix))}
    condition = record[f"{mode}/mean"].to(dtype)
    discriminator = load(record, 64, condition.shape[1], mode, dtype, realism=False)

    rows = torch.arange(len(condition) - 1)
    images = image_batch(record, "real", 64, dtype)
    real = discriminator(images, condition, mismatched_sentence=condition[1:], mismatched_rows=rows)
    if mode == "eval":
        assert_recorded(real.consistency.sigmoid(), record["eval/probability_real"])
    for name, weights in (("real", (1, 0, 0)), ("wrong", (0, 0, 1))):
        weighting = AdversarialWeights(*weights, 0, 0, 0)
        loss = discriminator_loss(real, real, weighting=weighting, through="probabilities")
        assert_recorded(loss, record[f"{mode}/loss_{name}"])


# GAN-INT-CLS

INNER = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3", "7": "norm3"}


def renamed_of_layer_list(name):
    """Our name of a weight of GAN-INT-CLS's layer list."""
    part, layer, *inner = name.split(".")
    if part == "text":
        return f"text_projection.{layer}.{inner[0]}"
    if part == "joint":
        return f"consistency_head.{inner[0]}" if layer == "3" else f"joint.{layer}.{inner[0]}"
    path = f"trunk.{layer}."
    return path + (f"{INNER[inner[1]]}.{inner[2]}" if inner[0] == "body" else inner[0])


@PRECISIONS
@MODES
def test_gan_int_cls(mode, dtype):
    record = read("gan_int_cls_derived")
    state = entries(record, "state/discriminator.")
    state = {renamed_of_layer_list(name): value for name, value in state.items()}
    state["consistency_head.bias"] = torch.zeros(1)
    options = {"realism": False, "text_projection": 5, "joint_kernel": 1, "residual_block": True}
    discriminator = PairedDiscriminator(64, 12, channels=3, **options)
    missing, unexpected = discriminator.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    discriminator.to(dtype).train(mode == "train")

    generator = make_generator(record, head=12, noise_first=True, batch_norm=False, channels=2)
    generator.to(dtype).train(mode == "train")
    sentence = record["sentence"].to(dtype)
    images = {name: image_batch(record, name, 64, dtype) for name in ("real", "wrong")}
    images["fake"] = generator(sentence, record["noise"].to(dtype)).detach()

    # The images of mismatched pairs have a forward of their own, as their batch statistics show.
    real, wrong, fake = (discriminator(images[name], sentence) for name in ("real", "wrong", "fake"))
    for name, logits in (("real", real), ("wrong", wrong), ("fake", fake)):
        # The logits of a network that was never trained are large.
        assert_recorded(logits.consistency, record[f"{mode}/logits_{name}"], rtol=1e-4)
    loss = discriminator_loss(real, fake, wrong.consistency, weighting="gan-int-cls")
    assert_recorded(loss, record[f"{mode}/discriminator_loss"])
    loss.backward()
    parameters, buffers = dict(discriminator.named_parameters()), dict(discriminator.named_buffers())
    norms = entries(record, f"{mode}/discriminator_gradient_norm/")
    assert {renamed_of_layer_list(name) for name in norms} == set(parameters) - {"consistency_head.bias"}
    for name, norm in norms.items():
        gradient = parameters[renamed_of_layer_list(name)].grad
        assert_norm_recorded(gradient.norm(), norm, msg=lambda text, n=name: f"{n}: {text}")
    if mode == "train":
        for name, values in entries(record, "train/discriminator_after_real_wrong_fake/").items():
            assert_recorded(buffers[renamed_of_layer_list(name)], values)


def test_published_size_of_gan_int_cls():
    options = {"realism": False, "text_projection": 128, "joint_kernel": 1, "residual_block": True}
    with torch.device("meta"):
        discriminator = PairedDiscriminator(64, 1024, **options)
    size = sum(parameter.numel() for parameter in discriminator.parameters())
    # The published convolutions have biases, which are reset to zero before each step.
    assert size + (64 + 128 + 256 + 512) + (128 + 128 + 512) + 512 == 4_032_321
