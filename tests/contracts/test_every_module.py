"""Requirements of every module: copies, pickles, meta device, dtypes, memory formats, checkpointing and state."""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

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

B, L, C, D, E, Z, V = 3, 5, 2, 6, 7, 11, 13
MASK = torch.arange(L) < torch.tensor([[5], [2], [1]])
WORDS = ["red", "blue", "green", "white", "a", "flower", "with", "petals", "five", "six"]


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple, dict]]


def images(height=16, width=16):
    return torch.rand(B, 3, height, width) * 2 - 1


def tokens():
    return torch.randint(3, V, (B, L))


def make_captioner():
    return Captioner(ConvBackbone(C, 2), V, embedding_dim=4, hidden_dim=5)


def make_mirrorgan():
    sizes = {"embedding_dim": 5, "word_dim": D, "noise_dim": Z, "condition_dim": E, "channels": C, "residual_blocks": 1}
    captioner = {"captioner_backbone": "conv", "captioner_embedding_dim": 4, "captioner_hidden_dim": 5}
    return MirrorGAN(MirrorGANConfig(resolutions=(4, 8), **sizes, **captioner), Vocabulary(WORDS))


def make_block(sentence_dim):
    block = GlamBlock(C, D, sentence_dim)
    # Zero at the start, when the result is the input.
    nn.init.normal_(block.fusion.weight)
    return block


CASES = {
    "ConditioningAugmentation": Case(
        lambda: ConditioningAugmentation(D, E), lambda: ((torch.randn(B, D),), {"noise": torch.randn(B, E)})
    ),
    "ConditioningAugmentation, leaky": Case(
        lambda: ConditioningAugmentation(D, E, activation="leaky_relu"),
        lambda: ((torch.randn(B, D),), {"noise": torch.randn(B, E)}),
    ),
    "SentenceProjection": Case(lambda: SentenceProjection(D, E, batch_norm=True), lambda: ((torch.randn(B, D),), {})),
    "GlobalLocalAttention": Case(
        lambda: GlobalLocalAttention(C, D, E, score_projection=True, sentence_bias=True),
        lambda: ((torch.randn(B, C, 5, 7), torch.randn(B, L, D), torch.randn(B, E), MASK), {}),
    ),
    "WordAttention": Case(
        lambda: WordAttention(C, D),
        lambda: ((torch.randn(B, C, 5, 7), torch.randn(B, L, D), None, MASK), {"need_weights": True}),
    ),
    "GlamBlock": Case(
        lambda: make_block(E),
        lambda: ((torch.randn(B, C, 5, 7), torch.randn(B, L, D), torch.randn(B, E), MASK), {}),
    ),
    "GlamBlock on tokens, with words alone": Case(
        lambda: make_block(None),
        lambda: ((torch.randn(B, 35, C), torch.randn(B, L, D), None, MASK), {"size": (5, 7)}),
    ),
    "CascadedGenerator": Case(
        lambda: CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8), residual_blocks=1),
        lambda: ((torch.randn(B, Z), torch.randn(B, E), torch.randn(B, L, D), MASK), {}),
    ),
    "CascadedGenerator with a factory": Case(
        lambda: CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8), residual_blocks=1, attention=WordAttention),
        lambda: ((torch.randn(B, Z), torch.randn(B, E), torch.randn(B, L, D), MASK), {"need_weights": True}),
    ),
    "CascadedGenerator without words": Case(
        lambda: CascadedGenerator(Z, E, channels=(3, C), resolutions=(4, 8), residual_blocks=1, attention="condition"),
        lambda: ((torch.randn(B, Z), torch.randn(B, E)), {}),
    ),
    "ImageRefinementStage": Case(
        lambda: ImageRefinementStage(E, channels=4, residual_blocks=1), lambda: ((images(), torch.randn(B, E)), {})
    ),
    "DeconvolutionGenerator": Case(
        lambda: DeconvolutionGenerator(Z, E, channels=3, resolution=16, bottlenecks=0),
        lambda: ((torch.randn(B, Z), torch.randn(B, E)), {}),
    ),
    "DeconvolutionGenerator with bottlenecks": Case(
        lambda: DeconvolutionGenerator(Z, E, channels=4, resolution=16),
        lambda: ((torch.randn(B, Z), torch.randn(B, E)), {}),
    ),
    "LocatedGenerator": Case(
        lambda: LocatedGenerator(Z, E, channels=2, hidden_dim=5, upsampled=(3,)),
        lambda: ((torch.randn(B, Z), torch.randn(B, E), torch.rand(B, 4) * 0.4 + 0.1), {}),
    ),
    "KeypointImageGenerator": Case(
        lambda: KeypointImageGenerator(Z, E, L, channels=2, hidden_dim=5, upsampled=(3,)),
        lambda: ((torch.randn(B, Z), torch.randn(B, E), torch.rand(B, L, 16, 16)), {}),
    ),
    "KeypointGenerator": Case(
        lambda: KeypointGenerator(L, Z, E, hidden_dim=6),
        lambda: ((torch.randn(B, Z), torch.randn(B, E), torch.rand(B, L, 3)), {}),
    ),
    "TextPlacer": Case(lambda: TextPlacer(7), lambda: ((torch.randn(B, D), torch.rand(B, 4) * 0.4 + 0.1), {})),
    "KeypointGate": Case(KeypointGate, lambda: ((torch.randn(B, C, 5, 7), torch.rand(B, L, 5, 7)), {})),
    "PairedDiscriminator": Case(
        lambda: PairedDiscriminator(16, D, channels=C), lambda: ((images(), torch.randn(B, D)), {})
    ),
    "PairedDiscriminator without realism": Case(
        lambda: PairedDiscriminator(16, D, channels=C, realism=False, text_projection=5, joint_kernel=1),
        lambda: ((images(), torch.randn(B, D)), {}),
    ),
    "LocatedDiscriminator": Case(
        lambda: LocatedDiscriminator(32, D, channels=C, text_projection=5),
        lambda: ((images(32, 32), torch.randn(B, D), torch.rand(B, 4) * 0.4 + 0.1), {}),
    ),
    "KeypointImageDiscriminator": Case(
        lambda: KeypointImageDiscriminator(32, D, L, channels=C, text_projection=5),
        lambda: ((images(32, 32), torch.randn(B, D), torch.rand(B, L, 16, 16)), {}),
    ),
    "KeypointDiscriminator": Case(
        lambda: KeypointDiscriminator(L, D, hidden_dim=6), lambda: ((torch.rand(B, L, 3), torch.randn(B, D)), {})
    ),
    "TextEncoder": Case(lambda: TextEncoder(V, embedding_dim=5, feature_dim=D), lambda: ((tokens(), MASK), {})),
    "ImageEncoder": Case(lambda: ImageEncoder(ConvBackbone(C), D), lambda: ((images(33, 47),), {})),
    "MatchingLoss": Case(
        MatchingLoss,
        lambda: (
            (
                ImageFeatures(torch.randn(B, 7, D), torch.randn(B, D)),
                TextFeatures(torch.randn(B, L, D), torch.randn(B, D)),
                MASK,
                torch.tensor([4, 4, 9]),
            ),
            {},
        ),
    ),
    "Captioner": Case(make_captioner, lambda: ((images(9, 8), tokens(), MASK), {})),
    "RedescriptionLoss": Case(
        lambda: RedescriptionLoss(make_captioner()), lambda: ((images(9, 8), tokens(), MASK), {})
    ),
    "DenoisingAutoencoder": Case(lambda: DenoisingAutoencoder(D, (5, 3)), lambda: ((torch.randn(B, D),), {})),
    "EncoderPair": Case(
        lambda: EncoderPair(MirrorGANConfig(embedding_dim=5, word_dim=D, image_backbone="conv"), V),
        lambda: ((images(33, 47), tokens(), MASK), {}),
    ),
    "MirrorGAN": Case(
        make_mirrorgan,
        lambda: ((tokens(), MASK), {"noise": torch.randn(B, Z), "condition_noise": torch.randn(B, E)}),
    ),
}
HAS_WEIGHTS = [name for name in CASES if name not in ("MatchingLoss", "TextPlacer", "KeypointGate")]
HAS_MAPS = [name for name in CASES if name not in ("ConditioningAugmentation", "TextEncoder", "MatchingLoss")]


def flat(result):
    """All tensors of a nested result."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def convert(inputs, change):
    """Apply a function to the floating point tensors of nested inputs."""
    if inputs is None or isinstance(inputs, int):
        return inputs
    if isinstance(inputs, Tensor):
        return change(inputs) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {name: convert(value, change) for name, value in inputs.items()}
    parts = [convert(part, change) for part in inputs]
    return type(inputs)(*parts) if hasattr(inputs, "_fields") else tuple(parts)


def prepare(name):
    module = CASES[name].make()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return module.eval(), *CASES[name].inputs()


def objective(result):
    return sum(tensor.square().mean() for tensor in flat(result))


@pytest.mark.parametrize("name", CASES)
def test_a_deep_copy_gives_the_same_results_and_shares_no_memory(name):
    module, args, options = prepare(name)
    copied = copy.deepcopy(module)
    expected = flat(module(*args, **options))
    assert_close(flat(copied(*args, **options)), expected, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert_close(flat(module(*args, **options)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_gives_the_same_results(name):
    module, args, options = prepare(name)
    unpickled = pickle.loads(pickle.dumps(module))
    assert_close(flat(unpickled(*args, **options)), flat(module(*args, **options)), atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_module_built_on_the_meta_device_gives_the_same_results_once_loaded(name):
    module, args, options = prepare(name)
    with torch.device("meta"):
        empty = CASES[name].make()
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = empty.to_empty(device="cpu").eval()
    loaded.load_state_dict(module.state_dict())
    assert_close(flat(loaded(*args, **options)), flat(module(*args, **options)), atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_float64_agrees_with_float32(name):
    module, args, options = prepare(name)
    expected = flat(module(*args, **options))
    wide = flat(module.double()(*convert(args, Tensor.double), **convert(options, Tensor.double)))
    assert {tensor.dtype for tensor in wide} == {torch.float64}
    assert_close([tensor.float() for tensor in wide], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_autocast_agrees_with_float32_and_trains(name):
    module, args, options = prepare(name)
    args = convert(args, lambda tensor: tensor.requires_grad_())
    expected = flat(module(*args, **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = flat(module(*args, **options))
    objective(result).backward()
    # bfloat16 has 8 significant bits; rounding errors accumulate, and a softmax amplifies them.
    assert_close([tensor.float() for tensor in result], [tensor.float() for tensor in expected], atol=0.1, rtol=0.1)
    leaves = [tensor for tensor in flat(args) if tensor.requires_grad]
    grads = [leaf.grad for leaf in [*leaves, *module.parameters()] if leaf.requires_grad and leaf.grad is not None]
    assert len(grads) > 0
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", HAS_MAPS)
def test_channels_last_does_not_change_the_results(name):
    module, args, options = prepare(name)
    expected = flat(module(*args, **options))

    def to_channels_last(tensor):
        return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    result = module.to(memory_format=torch.channels_last)(*convert(args, to_channels_last), **options)
    assert_close(flat(result), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_does_not_change_the_gradients(name):
    module, args, options = prepare(name)
    leaves = [tensor for tensor in flat(convert(args, lambda tensor: tensor.requires_grad_())) if tensor.requires_grad]
    leaves += [parameter for parameter in module.parameters() if parameter.requires_grad]

    def gradients(result):
        return [grad for grad in torch.autograd.grad(objective(result), leaves, allow_unused=True) if grad is not None]

    expected = gradients(module(*args, **options))
    assert len(expected) > 0
    assert_close(gradients(checkpoint(module, *args, use_reentrant=False, **options)), expected)


@pytest.mark.parametrize("name", HAS_WEIGHTS)
def test_the_state_consists_of_parameters_and_buffers_only(name):
    module, args, options = prepare(name)
    module.train()
    before = set(module.state_dict())
    module(*args, **options)
    assert set(module.state_dict()) == before
    assert before == {entry for entry, _ in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize("name", HAS_WEIGHTS)
def test_every_child_is_called_so_that_hooks_and_wrappers_act(name):
    module, args, options = prepare(name)
    called = set()
    for child_name, child in module.named_modules():
        child.register_forward_hook(lambda *_, child_name=child_name: called.add(child_name))
    module(*args, **options)
    never_called = {child_name for child_name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    if name == "MirrorGAN":
        never_called |= {child_name for child_name, _ in module.named_modules() if child_name.startswith("captioner")}
    assert called == {child_name for child_name, _ in module.named_modules()} - never_called


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_not_modified(name):
    module, args, options = prepare(name)
    originals = copy.deepcopy((args, options))
    module.train()(*args, **options)
    assert_close(flat(args), flat(originals[0]), atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_inference_mode_gives_finite_results(name):
    module, args, options = prepare(name)
    with torch.inference_mode():
        assert all(tensor.isfinite().all() for tensor in flat(module(*args, **options)))
