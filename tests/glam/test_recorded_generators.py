"""Generators of StackGAN and StackGAN++ as recorded from the published code, in both modes."""

import itertools
import re

import torch

from mirror_modules import CascadedGenerator, ConditioningAugmentation, ImageRefinementStage, PairedDiscriminator
from mirror_modules.functional import color_consistency_loss, generator_loss, kl_divergence
from tests.adversarial.test_recorded_discriminators import renamed as discriminator_name
from tests.recordings import (
    MODES,
    PRECISIONS,
    assert_images_recorded,
    assert_norm_recorded,
    assert_recorded,
    entries,
    read,
)

# The published layers themselves, run again in float32, differ from their recordings by up to 2.3e-5: each stage
# amplifies the rounding of the one before.
FLOAT32_ROUNDING = 5e-5
# Relative: rounding changes the sign of some values before a ReLU, and with it their gradient.
RELU_ROUNDING = 5e-3
BLOCK = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
LAYER = {"1": "conv", "2": "norm"}
# A pattern of published names of weights, and our name.
NAMES = [
    (r"ca_net\.fc\.", lambda _: "conditioning.linear."),
    (r"h_net1\.fc\.0\.", lambda _: "generator.initial.linear."),
    (r"h_net1\.fc\.1\.", lambda _: "generator.initial.norm."),
    (
        r"h_net1\.upsample(\d)\.(\d)\.",
        lambda match: f"generator.initial.upsample.{int(match[1]) - 1}.{LAYER[match[2]]}.",
    ),
    (
        r"h_net(\d)\.jointConv\.(\d)\.",
        lambda match: f"generator.refinements.{int(match[1]) - 2}.{('joint', 'norm')[int(match[2])]}.",
    ),
    (
        r"h_net(\d)\.residual\.(\d)\.block\.(\d)\.",
        lambda match: f"generator.refinements.{int(match[1]) - 2}.residual.{match[2]}.{BLOCK[match[3]]}.",
    ),
    (
        r"h_net(\d)\.upsample\.(\d)\.",
        lambda match: f"generator.refinements.{int(match[1]) - 2}.upsample.0.{LAYER[match[2]]}.",
    ),
    (r"img_net(\d)\.img\.0\.", lambda match: f"generator.heads.{int(match[1]) - 1}.conv."),
]


def renamed(name, names=NAMES):
    """Our name of a published weight."""
    for pattern, ours in names:
        match = re.match(pattern, name)
        if match:
            return ours(match) + name[match.end() :]
    raise KeyError(name)


STAGE1 = [
    (r"ca_net\.fc\.", lambda _: "conditioning.linear."),
    (r"fc\.0\.", lambda _: "generator.initial.linear."),
    (r"fc\.1\.", lambda _: "generator.initial.norm."),
    (
        r"upsample(\d)\.(\d)\.",
        lambda match: f"generator.initial.upsample.{int(match[1]) - 1}.{LAYER[match[2]]}.",
    ),
    (r"img\.0\.", lambda _: "generator.heads.0.conv."),
]
STAGE2 = [
    (r"ca_net\.fc\.", lambda _: "conditioning.linear."),
    (r"encoder\.", lambda _: "refinement.encoder."),
    (r"hr_joint\.(\d)\.", lambda match: f"refinement.refinement.{('joint', 'norm')[int(match[1])]}."),
    (
        r"residual\.(\d)\.block\.(\d)\.",
        lambda match: f"refinement.refinement.residual.{match[1]}.{BLOCK[match[2]]}.",
    ),
    (
        r"upsample(\d)\.(\d)\.",
        lambda match: f"refinement.refinement.upsample.{int(match[1]) - 1}.{LAYER[match[2]]}.",
    ),
    (r"img\.0\.", lambda _: "refinement.head.conv."),
]


class Network(torch.nn.Module):
    """A generator and its conditioning augmentation, with the weights of a recording."""

    def __init__(self, state, conditioning=None, **parts):
        super().__init__()
        self.conditioning = conditioning
        for name, part in parts.items():
            setattr(self, name, part)
        missing, unexpected = self.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing)


def check_gradient_norms(network, recorded, names=NAMES, rtol=1e-4):
    """Compare the norm of the gradient of every parameter."""
    parameters = dict(network.named_parameters())
    compared = {renamed(name, names): norm for name, norm in recorded.items()}
    assert set(compared) == set(parameters)
    for name, norm in compared.items():
        assert_norm_recorded(
            parameters[name].grad.norm(), norm, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_running_statistics(network, recorded, names=NAMES):
    buffers = dict(network.named_buffers())
    assert len(recorded) > 0
    for name, values in recorded.items():
        assert_recorded(buffers[renamed(name, names)], values, msg=lambda text, name=name: f"{name}: {text}")


def check_probe_of_stages(network, record, mode, images, atol):
    """The squares of all images and the differences of their colors, of which the recording has the gradients."""
    for stage, batch in enumerate(images):
        assert_images_recorded(batch, record, f"{mode}/image{stage}", atol)
    consistency = 0
    for stage, (coarser, finer) in enumerate(itertools.pairwise(images), start=1):
        terms = {"mean": (1, 0), "covariance": (0, 1)}
        for term, (mean_weight, covariance_weight) in terms.items():
            value = color_consistency_loss(finer, coarser, mean_weight=mean_weight, covariance_weight=covariance_weight)
            assert_recorded(value, record[f"{mode}/color_{term}_term{stage}"])
        consistency = consistency + color_consistency_loss(finer, coarser)
    assert_recorded(consistency, record[f"{mode}/color_consistency"])
    loss = sum(batch.square().mean() for batch in images) + 50 * consistency
    assert_recorded(loss, record[f"{mode}/probe_loss"])
    loss.backward()
    check_gradient_norms(network, entries(record, f"{mode}/probe_gradient_norm/"))
    if mode == "train":
        check_running_statistics(network, entries(record, "train/after/"))


def convert_stackgan_v2(record, text_dim):
    state = {renamed(name): value for name, value in entries(record, "state/").items()}
    for name in state:
        if name.endswith("joint.weight"):
            # Published convolutions have the condition before the features.
            state[name] = state[name].roll(-text_dim, dims=1)
    return state


@PRECISIONS
@MODES
def test_stackgan_v2(mode, dtype):
    record = read("stackgan_v2_generator")
    state = convert_stackgan_v2(record, text_dim=5)
    generator = CascadedGenerator(6, 5, channels=(4, 2, 1), attention="condition")
    network = Network(state, ConditioningAugmentation(12, 5), generator=generator).to(dtype).train(mode == "train")
    noise, sentence, epsilon = (record[name].to(dtype) for name in ("noise", "sentence", "epsilon"))

    condition = network.conditioning(sentence, noise=epsilon)
    assert_recorded(condition.mean, record[f"{mode}/mean"])
    assert_recorded(condition.log_variance, record[f"{mode}/log_variance"])
    assert_recorded(kl_divergence(condition.mean, condition.log_variance), record[f"{mode}/kl"])
    images = network.generator(noise, condition.sample).images
    check_probe_of_stages(network, record, mode, images, 1e-5 if dtype == torch.float64 else FLOAT32_ROUNDING)


@PRECISIONS
@MODES
def test_stackgan_v2_without_text(mode, dtype):
    record = read("stackgan_v2_unconditional_generator")
    state = convert_stackgan_v2(record, text_dim=6)
    generator = CascadedGenerator(6, None, channels=(4, 2, 1), attention="condition")
    network = Network(state, generator=generator).to(dtype).train(mode == "train")
    images = network.generator(record["noise"].to(dtype)).images
    check_probe_of_stages(network, record, mode, images, FLOAT32_ROUNDING)


def make_stage1(state, channels):
    state = {renamed(name, STAGE1): value for name, value in state.items()}
    # The published first layer has the noise before the condition.
    state["generator.initial.linear.weight"] = state["generator.initial.linear.weight"].roll(-6, dims=1)
    generator = CascadedGenerator(6, 5, channels=channels, resolutions=(64,), activation="relu")
    return Network(state, ConditioningAugmentation(12, 5, activation="relu"), generator=generator)


@PRECISIONS
@MODES
def test_stackgan_first_stage(mode, dtype):
    record = read("stackgan_stage1")
    network = make_stage1(entries(record, "state/generator."), channels=2).to(dtype).train(mode == "train")
    discriminator = PairedDiscriminator(64, 5, channels=2, realism=False)
    discriminator.load_state_dict(
        {discriminator_name(name): value for name, value in entries(record, "state/discriminator.").items()},
        strict=False,
    )
    discriminator.to(dtype).train(mode == "train")
    noise, sentence, epsilon = (record[name].to(dtype) for name in ("noise", "sentence", "epsilon"))

    condition = network.conditioning(sentence, noise=epsilon)
    assert_recorded(condition.mean, record[f"{mode}/mean"])
    assert_recorded(condition.log_variance, record[f"{mode}/log_variance"])
    (images,) = network.generator(noise, condition.sample).images
    assert_images_recorded(images, record, f"{mode}/image")
    logits = discriminator(images, condition.mean.detach())
    if mode == "eval":
        assert_recorded(logits.consistency.sigmoid(), record["eval/probability_fake"])
    loss = generator_loss(logits, weighting="gan-int-cls", through="probabilities")
    assert_recorded(loss, record[f"{mode}/generator_loss"])
    loss = loss + 2 * kl_divergence(condition.mean, condition.log_variance)
    assert_recorded(loss, record[f"{mode}/generator_total"])
    loss.backward()
    check_gradient_norms(network, entries(record, f"{mode}/generator_gradient_norm/"), STAGE1)
    if mode == "train":
        check_running_statistics(network, entries(record, "train/generator_after/"), STAGE1)


@PRECISIONS
@MODES
def test_stackgan_second_stage(mode, dtype):
    record = read("stackgan_stage2_generator")
    state = entries(record, "state/")
    first = make_stage1(entries(state, "STAGE1_G."), channels=4)
    state = {renamed(name, STAGE2): value for name, value in state.items() if not name.startswith("STAGE1_G.")}
    refinement = ImageRefinementStage(5, channels=8, residual_blocks=2)
    second = Network(state, ConditioningAugmentation(12, 5, activation="relu"), refinement=refinement)
    first, second = (network.to(dtype).train(mode == "train") for network in (first, second))
    atol, rtol = (1e-5, 1e-4) if dtype == torch.float64 else (FLOAT32_ROUNDING, RELU_ROUNDING)
    names = ("noise", "sentence", "epsilon_stage1", "epsilon_stage2")
    noise, sentence, epsilon1, epsilon2 = (record[name].to(dtype) for name in names)

    (coarse,) = first.generator(noise, first.conditioning(sentence, noise=epsilon1).sample).images
    assert_images_recorded(coarse, record, f"{mode}/coarse", atol)
    condition = second.conditioning(sentence, noise=epsilon2)
    assert_recorded(condition.mean, record[f"{mode}/mean"])
    assert_recorded(condition.log_variance, record[f"{mode}/log_variance"])
    images = second.refinement(coarse.detach(), condition.sample)
    assert_images_recorded(images, record, f"{mode}/image", atol)
    divergence = kl_divergence(condition.mean, condition.log_variance)
    assert_recorded(divergence, record[f"{mode}/kl"])
    loss = images.square().mean() + 2 * divergence
    assert_recorded(loss, record[f"{mode}/probe_loss"])
    loss.backward()
    check_gradient_norms(second, entries(record, f"{mode}/probe_gradient_norm/"), STAGE2, rtol)
    if mode == "train":
        after = entries(record, "train/after/")
        check_running_statistics(first, entries(after, "STAGE1_G."), STAGE1)
        rest = {name: values for name, values in after.items() if not name.startswith("STAGE1_G.")}
        check_running_statistics(second, rest, STAGE2)


def test_published_sizes():
    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    with torch.device("meta"):
        stackgan_v2 = {"channels": (64, 32, 16), "attention": "condition"}
        assert count(ConditioningAugmentation(1024, 128), CascadedGenerator(100, 128, **stackgan_v2)) == 21_239_696
        assert count(CascadedGenerator(100, None, **stackgan_v2)) == 16_472_208
        # With 192 channels for COCO, and 128 otherwise.
        for channels, blocks, sizes in ((192, 2, (20_020_832, 37_130_480)), (128, 4, (10_301_248, 26_290_080))):
            first = CascadedGenerator(100, 128, channels=channels // 2, resolutions=(64,), activation="relu")
            second = ImageRefinementStage(128, channels=channels, residual_blocks=blocks)
            counts = [count(ConditioningAugmentation(1024, 128, activation="relu"), part) for part in (first, second)]
            assert tuple(counts) == sizes
