"""`torch.export` of every public module: one graph for every batch size and caption length, equal to eager mode."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from mirror_modules import (
    Captioner,
    CascadedGenerator,
    ConditioningAugmentation,
    DeconvolutionGenerator,
    DenoisingAutoencoder,
    GlamBlock,
    GlobalLocalAttention,
    ImageEncoder,
    ImageFeatures,
    ImageRefinementStage,
    KeypointDiscriminator,
    KeypointGate,
    KeypointGenerator,
    KeypointImageDiscriminator,
    KeypointImageGenerator,
    KeypointMaps,
    LocatedDiscriminator,
    LocatedGenerator,
    MatchingLoss,
    MirrorGAN,
    MirrorGANConfig,
    PairedDiscriminator,
    RedescriptionLoss,
    SentenceProjection,
    TextEncoder,
    TextFeatures,
    TextPlacer,
    Vocabulary,
    WordAttention,
)
from mirror_modules.models import EncoderPair
from mirror_modules.stem import ConvBackbone

C, D, E, Z, V = 2, 6, 7, 11, 13
EXAMPLE, OTHERS = (4, 6), [(7, 3), (2, 11), (3, 2), (1, 1)]
WORDS = ["red", "blue", "green", "white", "a", "flower", "with", "petals", "five", "six"]


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    """Arguments by name, for a batch size and a caption length."""
    static: tuple[str, ...] = ()
    """Arguments whose second axis is not a length."""


def images(batch, size=16):
    return torch.rand(batch, 3, size, size) * 2 - 1


def tokens(batch, length):
    return torch.randint(3, V, (batch, length))


def mask(batch, length):
    """Captions of different lengths, the longest of which has no padding."""
    lengths = 1 + torch.arange(batch) % length
    lengths[-1] = length
    return torch.arange(length) < lengths.unsqueeze(1)


def make_captioner():
    return Captioner(ConvBackbone(C, 2), V, embedding_dim=4, hidden_dim=5)


def make_mirrorgan():
    sizes = {"embedding_dim": 5, "word_dim": D, "noise_dim": Z, "condition_dim": E, "channels": C, "residual_blocks": 1}
    captioner = {"captioner_backbone": "conv", "captioner_embedding_dim": 4, "captioner_hidden_dim": 5}
    return MirrorGAN(MirrorGANConfig(resolutions=(4, 8), **sizes, **captioner), Vocabulary(WORDS))


def stage(batch, length):
    return {
        "features": torch.randn(batch, C, 5, 7),
        "words": torch.randn(batch, length, D),
        "condition": torch.randn(batch, E),
        "word_mask": mask(batch, length),
    }


def make_block(sentence_dim=None):
    block = GlamBlock(C, D, sentence_dim)
    # Zero at the start, when the result is the input.
    nn.init.normal_(block.fusion.weight)
    return block


def host(batch, length):
    inputs = stage(batch, length)
    inputs["sentence"] = inputs.pop("condition")
    return inputs


def tokens_of_host(batch, length):
    inputs = stage(batch, length)
    del inputs["condition"]
    return {**inputs, "features": inputs["features"].flatten(2).mT, "size": (5, 7)}


def captioned(batch, length):
    return {"images": images(batch), "tokens": tokens(batch, length), "word_mask": mask(batch, length)}


def matched(batch, length):
    return {
        "image_features": ImageFeatures(torch.randn(batch, 9, D), torch.randn(batch, D)),
        "text_features": TextFeatures(torch.randn(batch, length, D), torch.randn(batch, D)),
        "word_mask": mask(batch, length),
        "class_ids": torch.arange(batch) % 2,
    }


CASES = {
    "ConditioningAugmentation": Case(
        lambda: ConditioningAugmentation(D, E),
        lambda batch, _: {"sentence": torch.randn(batch, D), "noise": torch.randn(batch, E)},
    ),
    "GlobalLocalAttention": Case(lambda: GlobalLocalAttention(C, D, E), stage),
    "GlobalLocalAttention of the published code": Case(
        lambda: GlobalLocalAttention(C, D, E, score_projection=True, sentence_bias=True),
        lambda batch, length: {**stage(batch, length), "need_weights": True},
    ),
    "WordAttention": Case(lambda: WordAttention(C, D), stage),
    "GlamBlock": Case(lambda: make_block(E), host),
    "GlamBlock on tokens, with words alone": Case(make_block, tokens_of_host),
    "CascadedGenerator": Case(
        lambda: CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8), residual_blocks=1),
        lambda batch, length: {
            "noise": torch.randn(batch, Z),
            "condition": torch.randn(batch, E),
            "words": torch.randn(batch, length, D),
            "word_mask": mask(batch, length),
        },
    ),
    "CascadedGenerator without words": Case(
        lambda: CascadedGenerator(Z, E, channels=(3, C), resolutions=(4, 8), residual_blocks=1, attention="condition"),
        lambda batch, _: {"noise": torch.randn(batch, Z), "condition": torch.randn(batch, E)},
    ),
    "ImageRefinementStage": Case(
        lambda: ImageRefinementStage(E, channels=4, residual_blocks=1),
        lambda batch, _: {"images": images(batch), "condition": torch.randn(batch, E)},
    ),
    "DeconvolutionGenerator": Case(
        lambda: DeconvolutionGenerator(Z, E, channels=4, resolution=16),
        lambda batch, _: {"noise": torch.randn(batch, Z), "condition": torch.randn(batch, E)},
    ),
    "LocatedGenerator": Case(
        lambda: LocatedGenerator(Z, E, channels=2, hidden_dim=5, upsampled=(3,)),
        lambda batch, boxes: {
            "noise": torch.randn(batch, Z),
            "condition": torch.randn(batch, E),
            "box": torch.rand(batch, boxes, 4) * 0.4 + 0.1,
        },
    ),
    "KeypointImageGenerator": Case(
        lambda: KeypointImageGenerator(Z, E, 3, channels=2, hidden_dim=5, upsampled=(3,)),
        lambda batch, _: {
            "noise": torch.randn(batch, Z),
            "condition": torch.randn(batch, E),
            "points": torch.rand(batch, 3, 3),
        },
    ),
    "KeypointGenerator": Case(
        lambda: KeypointGenerator(3, Z, E, hidden_dim=6),
        lambda batch, _: {
            "noise": torch.randn(batch, Z),
            "condition": torch.randn(batch, E),
            "given": torch.rand(batch, 3, 3),
        },
    ),
    "LocatedDiscriminator": Case(
        lambda: LocatedDiscriminator(32, D, channels=C, text_projection=5),
        lambda batch, boxes: {
            "images": images(batch, 32),
            "sentence": torch.randn(batch, D),
            "location": torch.rand(batch, boxes, 4) * 0.4 + 0.1,
        },
    ),
    "KeypointImageDiscriminator": Case(
        lambda: KeypointImageDiscriminator(32, D, 3, channels=C, text_projection=5),
        lambda batch, _: {
            "images": images(batch, 32),
            "sentence": torch.randn(batch, D),
            "location": torch.rand(batch, 3, 3),
        },
    ),
    "KeypointDiscriminator": Case(
        lambda: KeypointDiscriminator(3, D, hidden_dim=6),
        lambda batch, _: {"points": torch.rand(batch, 3, 3), "sentence": torch.randn(batch, D)},
    ),
    "PairedDiscriminator": Case(
        lambda: PairedDiscriminator(16, D, channels=C),
        lambda batch, _: {"images": images(batch), "sentence": torch.randn(batch, D)},
    ),
    "PairedDiscriminator of mismatched pairs": Case(
        lambda: PairedDiscriminator(16, D, channels=C, normalization="spectral"),
        lambda batch, length: {
            "images": images(batch),
            "sentence": torch.randn(batch, D),
            "mismatched_sentence": torch.randn(length, D),
            "mismatched_rows": torch.arange(length) % batch,
        },
    ),
    "PairedDiscriminator without realism": Case(
        lambda: PairedDiscriminator(16, D, channels=C, realism=False, text_projection=5, joint_kernel=1),
        lambda batch, _: {"images": images(batch), "sentence": torch.randn(batch, D)},
    ),
    "SentenceProjection": Case(
        lambda: SentenceProjection(D, E, batch_norm=True), lambda batch, _: {"sentence": torch.randn(batch, D)}
    ),
    "TextPlacer": Case(
        lambda: TextPlacer(7),
        lambda batch, boxes: {"text": torch.randn(batch, boxes, D), "box": torch.rand(batch, boxes, 4) * 0.4 + 0.1},
    ),
    "KeypointMaps": Case(
        lambda: KeypointMaps(7),
        lambda batch, points: {"points": torch.rand(batch, points, 2), "visible": mask(batch, points)},
    ),
    "KeypointGate": Case(
        KeypointGate,
        lambda batch, points: {"features": torch.randn(batch, C, 5, 7), "maps": torch.rand(batch, points, 5, 7)},
    ),
    "DenoisingAutoencoder": Case(
        lambda: DenoisingAutoencoder(D, (5, 3)), lambda batch, _: {"latents": torch.randn(batch, D)}
    ),
    "TextEncoder": Case(
        lambda: TextEncoder(V, embedding_dim=5, feature_dim=D),
        lambda batch, length: {"tokens": tokens(batch, length), "word_mask": mask(batch, length)},
    ),
    "TextEncoder without a mask": Case(
        lambda: TextEncoder(V, embedding_dim=5, feature_dim=D), lambda batch, length: {"tokens": tokens(batch, length)}
    ),
    "ImageEncoder": Case(lambda: ImageEncoder(ConvBackbone(C), D), lambda batch, _: {"images": images(batch)}),
    "Captioner": Case(make_captioner, captioned),
    "RedescriptionLoss": Case(lambda: RedescriptionLoss(make_captioner()), captioned),
    "RedescriptionLoss per sentence": Case(
        lambda: RedescriptionLoss(make_captioner(), reduction="sentence"), captioned
    ),
    "MatchingLoss": Case(MatchingLoss, matched),
    "EncoderPair": Case(
        lambda: EncoderPair(MirrorGANConfig(embedding_dim=5, word_dim=D, image_backbone="conv"), V), captioned
    ),
    "MirrorGAN": Case(
        make_mirrorgan,
        lambda batch, length: {
            "tokens": tokens(batch, length),
            "word_mask": mask(batch, length),
            "noise": torch.randn(batch, Z),
            "condition_noise": torch.randn(batch, E),
        },
    ),
}


def dynamic_axes(example, other):
    """Each axis whose size differs between two inputs, as a dynamic one: it must not be specialized."""
    if not isinstance(example, Tensor):
        return None
    return {i: Dim.DYNAMIC for i, (one, two) in enumerate(zip(example.shape, other.shape)) if one != two}


def export(module, case, example=EXAMPLE):
    inputs, others = case.inputs(*example), case.inputs(5, 9)
    return torch.export.export(module, (), inputs, dynamic_shapes=pytree.tree_map(dynamic_axes, inputs, others))


def tensors(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def prepare(name):
    module = CASES[name].make().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return module


@pytest.mark.parametrize("name", CASES)
def test_an_exported_graph_equals_eager_mode_at_other_sizes(name):
    module = prepare(name)
    graph = export(module, CASES[name]).module()
    for sizes in [EXAMPLE, *OTHERS]:
        inputs = CASES[name].inputs(*sizes)
        assert_close(tensors(graph(**inputs)), tensors(module(**inputs)), atol=1e-5, rtol=1e-5, msg=str(sizes))


@pytest.mark.parametrize("name", ["Captioner", "RedescriptionLoss"])
def test_an_exported_graph_is_equal_after_saving_and_loading(name):
    module, file = prepare(name), io.BytesIO()
    torch.export.save(export(module, CASES[name]), file)
    file.seek(0)
    inputs = CASES[name].inputs(*OTHERS[0])
    loaded = torch.export.load(file).module()(**inputs)
    assert_close(tensors(loaded), tensors(module(**inputs)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["GlobalLocalAttention", "GlamBlock", "CascadedGenerator", "PairedDiscriminator", "ImageEncoder"]
)
def test_gradients_flow_through_exported_graphs_without_recurrence(name):
    module = prepare(name)
    graph, inputs = export(module, CASES[name]).module(), CASES[name].inputs(*OTHERS[0])
    sum(tensor.square().sum() for tensor in tensors(graph(**inputs))).backward()
    sum(tensor.square().sum() for tensor in tensors(module(**inputs))).backward()
    expected = dict(module.named_parameters())
    for parameter_name, parameter in graph.named_parameters():
        assert_close(parameter.grad, expected[parameter_name].grad, atol=1e-4, rtol=1e-4, msg=parameter_name)


@pytest.mark.parametrize("name", ["TextEncoder", "Captioner"])
def test_exported_graphs_with_recurrence_are_for_inference(name):
    module = prepare(name)
    graph = export(module, CASES[name]).module()
    result = tensors(graph(**CASES[name].inputs(*OTHERS[0])))[0]
    with pytest.raises(RuntimeError, match=r"mirror_modules.lstm.* no autograd formula"):
        result.sum().backward()
