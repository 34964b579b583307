"""An option of a public call reaches the operation that it controls, through every layer in between."""

import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from mirror_modules import (
    Captioner,
    CascadedGenerator,
    GlamBlock,
    GlobalLocalAttention,
    ImageFeatures,
    MatchingLoss,
    MirrorGAN,
    MirrorGANConfig,
    RedescriptionLoss,
    TextFeatures,
    Vocabulary,
)
from mirror_modules.models import EncoderPair
from mirror_modules.stem import ConvBackbone

B, L, C, D, E, Z, R, V = 2, 5, 3, 6, 7, 11, 13, 17
CAPTIONS = ["a small red flower", "a white flower with petals"]
ATTENTION = "mirror_modules.glam.attention"
MATCHING = "mirror_modules.stem.matching"
SEARCH = "mirror_modules.stream.captioner.Captioner.search"


class Case(NamedTuple):
    call: Callable[[Any], object]
    """The outermost public call, with a value of the option."""
    operation: str
    """The function or method that the option controls."""
    argument: str
    """The argument of the operation that receives the option."""
    values: tuple[Any, Any]
    """Two values, so that a default or a constant on the way cannot pass."""
    received: Callable[[Any], Any] = lambda value: value
    """What the operation receives for a value."""


def make_model(**changes):
    sizes = {"embedding_dim": 5, "word_dim": D, "noise_dim": Z, "condition_dim": E, "channels": C, "residual_blocks": 1}
    captioner = {"captioner_backbone": "conv", "captioner_embedding_dim": 4, "captioner_hidden_dim": 5}
    config = MirrorGANConfig(**{**sizes, **captioner, "resolutions": (4, 8), **changes})
    return MirrorGAN(config, Vocabulary.build(CAPTIONS))


def make_captioner():
    return Captioner(ConvBackbone(C, 2), V, embedding_dim=4, hidden_dim=5)


def images():
    return torch.zeros(B, 3, 16, 16)


def tokens():
    return torch.full((B, L), 3)


def generate(**changes):
    return make_model(**changes).generate(CAPTIONS, seed=0)


def train_generator(**options):
    """Forward and backward pass of a generator in training mode."""
    generator = CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8, 16), residual_blocks=1).train()
    generated = generator(torch.randn(B, Z), torch.randn(B, E), torch.randn(B, L, D), **options)
    sum(batch.square().mean() for batch in generated.images).backward()


def generate_with_attention(**options):
    attention = partial(GlobalLocalAttention, **options)
    generator = CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8, 16), attention=attention)
    return generator(torch.randn(B, Z), torch.randn(B, E), torch.randn(B, L, D))


def attend_in_a_block(**options):
    return GlamBlock(C, D, E, **options)(torch.randn(B, C, 4, 4), torch.randn(B, L, D), torch.randn(B, E))


def match(**options):
    image_features = ImageFeatures(torch.randn(B, R, D), torch.randn(B, D))
    return MatchingLoss(**options)(image_features, TextFeatures(torch.randn(B, L, D), torch.randn(B, D)))


def redescribe(**options):
    return RedescriptionLoss(make_captioner(), **options)(images(), tokens())


CASES = {
    "CascadedGenerator.forward(need_weights)": Case(
        lambda value: train_generator(need_weights=value),
        f"{ATTENTION}.global_local_attention",
        "need_weights",
        (False, True),
    ),
    "MirrorGAN.forward(need_weights)": Case(
        lambda value: make_model()(tokens(), need_weights=value).images[-1].sum().backward(),
        f"{ATTENTION}.global_local_attention",
        "need_weights",
        (False, True),
    ),
    "MirrorGAN.generate_stages(need_weights)": Case(
        lambda value: make_model().generate_stages(CAPTIONS, need_weights=value),
        f"{ATTENTION}.global_local_attention",
        "need_weights",
        (False, True),
    ),
    "MirrorGANConfig(sentence_axis)": Case(
        lambda value: generate(sentence_axis=value),
        "mirror_modules.glam._attention.attend_to_sentence",
        "axis",
        ("channels", "positions"),
    ),
    "MirrorGANConfig(sentence_bias)": Case(
        lambda value: generate(sentence_bias=value),
        f"{ATTENTION}.GlobalLocalAttention.__init__",
        "sentence_bias",
        (False, True),
    ),
    "MirrorGANConfig(score_projection)": Case(
        lambda value: generate(score_projection=value),
        f"{ATTENTION}.GlobalLocalAttention.__init__",
        "score_projection",
        (False, True),
    ),
    "CascadedGenerator(attention=partial(GlobalLocalAttention, impl))": Case(
        lambda value: generate_with_attention(impl=value), "mirror_modules.kernels.choose", "impl", ("auto", "torch")
    ),
    "CascadedGenerator(attention=partial(GlobalLocalAttention, sentence_axis))": Case(
        lambda value: generate_with_attention(sentence_axis=value),
        "mirror_modules.glam._attention.attend_to_sentence",
        "axis",
        ("channels", "positions"),
    ),
    "GlamBlock(impl)": Case(
        lambda value: attend_in_a_block(impl=value), "mirror_modules.kernels.choose", "impl", ("auto", "torch")
    ),
    "MirrorGANConfig(text_dropout)": Case(
        lambda value: make_model(text_dropout=value).train()(tokens()),
        "torch.nn.functional.dropout",
        "p",
        (0.25, 0.75),
    ),
    "MirrorGANConfig(max_words) when generating": Case(
        lambda value: generate(max_words=value), "mirror_modules.stem.Vocabulary.encode", "max_words", (2, 3)
    ),
    # One more for the end token.
    "MirrorGANConfig(max_words) when captioning": Case(
        lambda value: make_model(max_words=value).describe(images()), SEARCH, "max_words", (2, 3), lambda n: n + 1
    ),
    "MirrorGAN.describe(beam_width)": Case(
        lambda value: make_model().describe(images(), beam_width=value), SEARCH, "beam_width", (1, 4)
    ),
    "Captioner.describe(beam_width)": Case(
        lambda value: make_captioner().describe(images(), beam_width=value), SEARCH, "beam_width", (2, 4)
    ),
    "Captioner.describe(max_words)": Case(
        lambda value: make_captioner().describe(images(), max_words=value), SEARCH, "max_words", (2, 4)
    ),
    "Captioner.describe(end_token)": Case(
        lambda value: make_captioner().describe(images(), end_token=value), SEARCH, "end_token", (None, 4)
    ),
    "MirrorGANConfig(captioner_backbone)": Case(
        lambda value: make_model(captioner_backbone=value),
        "mirror_modules.models.config.build_backbone",
        "backbone",
        ("conv", "resnet18"),
    ),
    "MirrorGANConfig(image_backbone)": Case(
        lambda value: EncoderPair(MirrorGANConfig(word_dim=D, image_backbone=value), V),
        "mirror_modules.models.config.build_backbone",
        "backbone",
        ("conv", "resnet18"),
    ),
    "MatchingLoss(gamma_attention)": Case(
        lambda value: match(gamma_attention=value),
        f"{MATCHING}.word_region_similarity",
        "gamma_attention",
        (2.0, 3.0),
    ),
    "MatchingLoss(gamma_word)": Case(
        lambda value: match(gamma_word=value), f"{MATCHING}.word_region_similarity", "gamma_word", (2.0, 3.0)
    ),
    "MatchingLoss(impl)": Case(
        lambda value: match(impl=value), f"{MATCHING}.word_region_similarity", "impl", ("auto", "torch")
    ),
    "MatchingLoss(gamma_loss)": Case(
        lambda value: match(gamma_loss=value), f"{MATCHING}.contrastive_terms", "gamma_loss", (2.0, 3.0)
    ),
    "RedescriptionLoss(reduction)": Case(
        lambda value: redescribe(reduction=value),
        "mirror_modules.stream.redescription.redescription_loss",
        "reduction",
        ("word", "sentence"),
    ),
}


def spy_on(monkeypatch, operation):
    """Record the arguments of each call of an operation by name, defaults included."""
    owner, _, name = operation.rpartition(".")
    original = getattr(pkgutil.resolve_name(owner), name)
    signature, calls = inspect.signature(original), []

    def spy(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(operation, spy)
    return calls


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_option_reaches_its_operation(monkeypatch, name, second):
    case = CASES[name]
    value = case.values[second]
    calls = spy_on(monkeypatch, case.operation)
    case.call(value)
    assert len(calls) > 0
    assert [call[case.argument] for call in calls] == [case.received(value)] * len(calls)


@pytest.mark.parametrize("call", [generate_with_attention, attend_in_a_block, match])
def test_a_named_kernel_that_cannot_run_raises(monkeypatch, call):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=r"impl='triton' cannot run: .* on 'cpu'"):
        call(impl="triton")
