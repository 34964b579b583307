"""Generators of StackGAN++ as recorded from the published code, in both modes."""

import itertools
import re

import torch

from mirror_modules import CascadedGenerator, ConditioningAugmentation
from mirror_modules.functional import color_consistency_loss, kl_divergence
from tests.recordings import (
    MODES,
    PRECISIONS,
    assert_images_recorded,
    assert_norm_recorded,
    assert_recorded,
    entries,
    read,
)

# The published layers of StackGAN++ themselves, run again in float32, differ from their recordings by 2.3e-5: each
# stage amplifies the rounding of the one before.
FLOAT32_ROUNDING = 5e-5
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


def check_gradient_norms(network, recorded, names=NAMES):
    """Compare the norm of the gradient of every parameter."""
    parameters = dict(network.named_parameters())
    compared = {renamed(name, names): norm for name, norm in recorded.items()}
    assert set(compared) == set(parameters)
    for name, norm in compared.items():
        assert_norm_recorded(parameters[name].grad.norm(), norm, msg=lambda text, name=name: f"{name}: {text}")


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


def test_published_sizes():
    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    with torch.device("meta"):
        stackgan_v2 = {"channels": (64, 32, 16), "attention": "condition"}
        assert count(ConditioningAugmentation(1024, 128), CascadedGenerator(100, 128, **stackgan_v2)) == 21_239_696
        assert count(CascadedGenerator(100, None, **stackgan_v2)) == 16_472_208
