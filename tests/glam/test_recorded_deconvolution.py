"""Generators of GAN-INT-CLS: of its layer list, run in PyTorch, and of a published implementation without mixtures.

The recordings have losses and gradients through a discriminator, which is written out here.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from mirror_modules import DeconvolutionGenerator, SentenceProjection
from tests.recordings import (
    MODES,
    PRECISIONS,
    assert_images_recorded,
    assert_norm_recorded,
    assert_recorded,
    entries,
    image_batch,
    read,
)

BODY = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3", "7": "norm3"}


def halving(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)


class Generator(nn.Module):
    """The projection of the sentence, and the generator."""

    def __init__(self, projection, generator):
        super().__init__()
        self.projection, self.generator = projection, generator

    def forward(self, sentence, noise):
        return self.generator(noise, self.projection(sentence)).images[-1]


def load(module, state):
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return module


def renamed(name, head):
    """Our name of a weight; `head` is the number of the last layer."""
    if name.startswith(("text.", "projection.")):
        _, layer, kind = name.split(".")
        return f"projection.{('linear', 'norm')[int(layer)]}.{kind}"
    match = re.fullmatch(r"net(?:G)?\.(\d+)(?:\.body\.(\d))?\.(\w+)", name)
    if int(match[1]) == head:
        return f"generator.head.{match[3]}"
    return f"generator.stage.layers.{match[1]}." + (f"{BODY[match[2]]}." if match[2] else "") + match[3]


def make_generator(record, *, head, noise_first, batch_norm, **options):
    state = {renamed(name, head): value for name, value in entries(record, "state/generator.").items()}
    if noise_first:
        first = "generator.stage.layers.0.weight"
        state[first] = state[first].roll(-6, dims=0)
    generator = DeconvolutionGenerator(6, 5, **options)
    return load(Generator(SentenceProjection(12, 5, batch_norm=batch_norm), generator), state)


def check_generator(network, record, mode, after, head):
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    norms = entries(record, f"{mode}/generator_gradient_norm/")
    assert {renamed(name, head) for name in norms} == set(parameters)
    for name, norm in norms.items():
        assert_norm_recorded(parameters[renamed(name, head)].grad.norm(), norm, msg=lambda text, n=name: f"{n}: {text}")
    if mode == "train":
        for name, values in entries(record, f"train/{after}/").items():
            assert_recorded(buffers[renamed(name, head)], values)


class Residual(nn.Module):
    def __init__(self, channels, narrow):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, narrow, 3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features):
        return F.leaky_relu(features + self.body(features), 0.2)


class Discriminator(nn.Module):
    """The discriminator of GAN-INT-CLS."""

    def __init__(self, n=3, text=5):
        super().__init__()
        self.image = nn.Sequential(
            *(halving(3, n), nn.LeakyReLU(0.2), halving(n, 2 * n), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2)),
            *(halving(2 * n, 4 * n), nn.BatchNorm2d(4 * n), halving(4 * n, 8 * n), nn.BatchNorm2d(8 * n)),
            Residual(8 * n, 2 * n),
        )
        self.text = nn.Sequential(nn.Linear(12, text), nn.BatchNorm1d(text), nn.LeakyReLU(0.2))
        self.joint = nn.Sequential(
            *(nn.Conv2d(8 * n + text, 8 * n, 1, bias=False), nn.BatchNorm2d(8 * n), nn.LeakyReLU(0.2)),
            nn.Conv2d(8 * n, 1, 4, bias=False),
        )

    def forward(self, images, sentence):
        text = self.text(sentence)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint(torch.cat((self.image(images), text), dim=1)).flatten()


@PRECISIONS
@MODES
def test_gan_int_cls(mode, dtype):
    record = read("gan_int_cls_derived")
    network = make_generator(record, head=12, noise_first=True, batch_norm=False, channels=2)
    discriminator = load(Discriminator(), entries(record, "state/discriminator."))
    network.to(dtype).train(mode == "train")
    discriminator.to(dtype).train(mode == "train")
    sentence, noise = record["sentence"].to(dtype), record["noise"].to(dtype)

    images = network(sentence, noise)
    assert_images_recorded(images, record, f"{mode}/image")
    logits = discriminator(images, sentence)
    # The logits of a network that was never trained are large.
    assert_recorded(logits, record[f"{mode}/logits_fake"], rtol=1e-4)
    loss = F.softplus(-logits).mean()
    assert_recorded(loss, record[f"{mode}/generator_loss"])
    loss.backward()
    check_generator(network, record, mode, "generator_after", head=12)


class PlainDiscriminator(nn.Module):
    """The discriminator of the published implementation: features of images, and a probability."""

    def __init__(self, n=2, text=5):
        super().__init__()
        layers = [halving(3, n), nn.LeakyReLU(0.2)]
        for width in (n, 2 * n, 4 * n):
            layers += [halving(width, 2 * width), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
        self.netD_1 = nn.Sequential(*layers)
        self.projection = nn.Sequential(nn.Linear(12, text), nn.BatchNorm1d(text), nn.LeakyReLU(0.2))
        self.netD_2 = nn.Sequential(nn.Conv2d(8 * n + text, 1, 4, bias=False))

    def forward(self, images, sentence):
        features = self.netD_1(images)
        text = self.projection(sentence)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.netD_2(torch.cat((features, text), dim=1)).flatten(), features


@PRECISIONS
@MODES
def test_gan_cls_of_a_published_implementation(mode, dtype):
    record = read("gan_cls_reimplementation")
    network = make_generator(record, head=12, noise_first=False, batch_norm=True, channels=4, bottlenecks=0)
    state = entries(record, "state/discriminator.")
    state = {name.removeprefix("projector."): value for name, value in state.items()}
    discriminator = load(PlainDiscriminator(), state)
    network.to(dtype).train(mode == "train")
    discriminator.to(dtype).train(mode == "train")
    sentence, real = record["sentence"].to(dtype), image_batch(record, "real", 64, dtype)

    # A step of the discriminator, then one of the generator with noise of its own.
    fake = network(sentence, record["noise"].to(dtype))
    assert_images_recorded(fake, record, f"{mode}/image")
    assert_recorded(discriminator(fake, sentence)[0].sigmoid(), record[f"{mode}/probability_fake"])
    generated = network(sentence, record["noise_generator_step"].to(dtype))
    logits, features = discriminator(generated, sentence)
    with torch.no_grad():
        _, real_features = discriminator(real, sentence)
    terms = {
        "generator_loss_cross_entropy": F.softplus(-logits).mean(),
        "generator_feature_matching": F.mse_loss(features.mean(dim=0), real_features.mean(dim=0)),
        "generator_l1": F.l1_loss(generated, real),
    }
    for name, term in terms.items():
        assert_recorded(term, record[f"{mode}/{name}"])
    loss = sum(weight * term for weight, term in zip((1, 100, 50), terms.values()))
    assert_recorded(loss, record[f"{mode}/generator_loss_reimplementation"])
    # The recorded gradients are those of this term.
    terms["generator_loss_cross_entropy"].backward()
    check_generator(network, record, mode, "generator_after_two_forwards", head=12)


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_published_sizes():
    with torch.device("meta"):
        published = count(DeconvolutionGenerator(), SentenceProjection(1024, 128))
        plain = DeconvolutionGenerator(channels=64, bottlenecks=0)
        assert count(plain, SentenceProjection(1024, 128, batch_norm=True)) == 4_756_736
    # The published convolutions have biases, which are reset to zero before each step.
    biases = (1024 + 512 + 256 + 128 + 3) + (256 + 256 + 1024) + (128 + 128 + 512)
    assert published + biases == 18_909_699
