"""The residual block, compared with its definition written as loops, and inside hosts that are not ours."""

import math
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import GlamBlock, GlobalLocalAttention, WordAttention

B, L, C, H, W = 2, 11, 3, 5, 7  # different primes: a swapped axis cannot pass
D, E = 13, 17
SENTENCE_DIMS = [E, None]
HALVES = [torch.float16, torch.bfloat16]


def mask_of(*real_words):
    return torch.arange(L) < torch.tensor(real_words).unsqueeze(1)


MASK = mask_of(11, 4)


def trained(sentence_dim=E):
    """A block after training: no weight is zero or one."""
    block = GlamBlock(C, D, sentence_dim)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def draw(sentence_dim=E, dtype=torch.float32):
    """Features, words and sentence, or None in its place."""
    sentence = None if sentence_dim is None else torch.randn(B, E, dtype=dtype)
    return torch.randn(B, C, H, W, dtype=dtype), torch.randn(B, L, D, dtype=dtype), sentence


def to_tokens(maps):
    return maps.flatten(2).mT.contiguous()


def block_by_loops(block, features, words, sentence, word_mask):
    """The definition, one position at a time, in Python's double precision."""
    state = {name: parameter.tolist() for name, parameter in block.named_parameters()}
    out = torch.zeros(B, C, H, W, dtype=torch.float64)
    for b, y, x in product(range(B), range(H), range(W)):
        f = features[b, :, y, x].tolist()
        mean = sum(f) / C
        deviation = math.sqrt(sum((value - mean) ** 2 for value in f) / C + 1e-5)
        n = [(f[c] - mean) / deviation * state["norm.weight"][c] + state["norm.bias"][c] for c in range(C)]

        u = state["attention.word_projection.weight"]
        projected = {
            l: [sum(u[c][d] * words[b, l, d].item() for d in range(D)) for c in range(C)]
            for l in range(L)
            if word_mask[b, l]
        }
        scores = {l: math.exp(sum(n[c] * word[c] for c in range(C))) for l, word in projected.items()}
        total = sum(scores.values())
        inputs = n + [sum(scores[l] / total * word[c] for l, word in projected.items()) for c in range(C)]

        if sentence is not None:
            v = state["attention.sentence_projection.weight"]
            s = [sum(v[c][e] * sentence[b, e].item() for e in range(E)) for c in range(C)]
            scores = [math.exp(n[c] * s[c]) for c in range(C)]
            inputs += [s[c] * scores[c] / sum(scores) for c in range(C)]

        for c, weights in enumerate(state["fusion.weight"]):
            change = sum(weight[0][0] * value for weight, value in zip(weights, inputs, strict=True))
            out[b, c, y, x] = f[c] + change + state["fusion.bias"][c]
    return out


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
@pytest.mark.parametrize("real_words", [(11, 11), (11, 4), (1, 11)])
def test_matches_the_loops(real_words, sentence_dim):
    block, inputs, mask = trained(sentence_dim), draw(sentence_dim), mask_of(*real_words)
    expected = block_by_loops(block, *inputs, mask)
    assert_close(block(*inputs, mask).double(), expected, atol=1e-5, rtol=1e-5)
    tokens = block(to_tokens(inputs[0]), *inputs[1:], mask, size=(H, W))
    assert_close(tokens.double(), to_tokens(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_no_mask_means_that_all_words_are_real(sentence_dim):
    block, inputs = trained(sentence_dim), draw(sentence_dim)
    assert_close(block(*inputs), block(*inputs, mask_of(L, L)))


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_the_host_is_unchanged_at_the_start(dtype, sentence_dim):
    block, (features, words, sentence) = GlamBlock(C, D, sentence_dim).to(dtype), draw(sentence_dim, dtype)
    result = block(features, words, sentence, MASK)
    assert torch.equal(result, features)
    assert result.data_ptr() != features.data_ptr()  # a host may write into the result
    assert torch.equal(block(to_tokens(features), words, sentence, MASK, size=(H, W)), to_tokens(features))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("host_dtype", [torch.float32, *HALVES])
def test_the_host_is_unchanged_at_the_start_under_autocast(host_dtype, dtype):
    features, words, sentence = draw()
    features = features.to(host_dtype)
    with torch.autocast("cpu", dtype=dtype):
        result = GlamBlock(C, D, E)(features, words, sentence, MASK)
    assert result.dtype == host_dtype
    assert torch.equal(result, features)


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_the_first_step_changes_the_fusion_and_the_second_everything(sentence_dim):
    block, inputs = GlamBlock(C, D, sentence_dim), draw(sentence_dim)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
        optimizer.zero_grad()
        (block(*inputs, MASK) - torch.randn(B, C, H, W)).square().mean().backward()
        optimizer.step()
        moved.append({name for name, parameter in block.named_parameters() if not torch.equal(parameter, before[name])})
    assert moved == [{"fusion.weight", "fusion.bias"}, {name for name, _ in block.named_parameters()}]


@pytest.fixture
def process_group():
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_distributed_training_finds_every_parameter_in_use(sentence_dim):
    block, inputs = GlamBlock(C, D, sentence_dim), draw(sentence_dim)
    parallel = nn.parallel.DistributedDataParallel(block)
    for _ in range(2):  # the second forward fails if a parameter of the first had no gradient
        parallel(*inputs, MASK).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_gradients(sentence_dim):
    block, inputs = trained(sentence_dim).double(), draw(sentence_dim, torch.float64)
    leaves = [tensor[..., :2, :3] if tensor.ndim == 4 else tensor for tensor in inputs if tensor is not None]
    leaves = [tensor.clone().requires_grad_() for tensor in leaves]

    def call(features, words, *sentence):
        return block(features, words, *sentence, word_mask=MASK)

    assert gradcheck(call, leaves)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_result_has_the_layout_of_the_features(layout):
    block, (features, words, sentence) = trained(), draw()
    result = block(features.to(memory_format=layout), words, sentence, MASK)
    assert result.is_contiguous(memory_format=layout)
    assert_close(result, block(features, words, sentence, MASK))
    assert block(to_tokens(features), words, sentence, MASK, size=(H, W)).is_contiguous()


@pytest.mark.parametrize("scale", [10, 1000])
def test_the_change_does_not_depend_on_the_magnitude_of_the_features(scale):
    block, (features, words, sentence) = trained().double(), draw(dtype=torch.float64)
    change = block(features, words, sentence, MASK) - features
    scaled = scale * features + 100
    # Up to the epsilon of the norm, which matters where all channels are almost equal.
    assert_close(block(scaled, words, sentence, MASK) - scaled, change, atol=1e-2, rtol=1e-2)


GARBAGE = [0.0, 1e30, float("inf"), float("nan")]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_padding_has_no_influence(sentence_dim, garbage):
    # In double precision: matrix products of other lengths round differently.
    block, (features, words, sentence) = trained(sentence_dim).double(), draw(sentence_dim, dtype=torch.float64)
    padded = torch.cat(
        (words.masked_fill(~MASK.unsqueeze(2), garbage), torch.full((B, 2, D), garbage, dtype=words.dtype)), dim=1
    )
    padded_mask = torch.cat((MASK, torch.zeros(B, 2, dtype=torch.bool)), dim=1)
    results = []
    for each, mask in ((words, MASK), (padded, padded_mask)):
        leaves = [features.clone().requires_grad_(), each.clone().requires_grad_()]
        result = block(*leaves, sentence, mask)
        gradients = torch.autograd.grad(result.square().sum(), [*leaves, *block.parameters()])
        assert (gradients[1][~mask] == 0).all()
        results.append((result, gradients[0], gradients[1][:, :L], *gradients[2:]))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_a_sample_alone_equals_the_same_sample_in_a_batch(sentence_dim):
    block, (features, words, sentence) = trained(sentence_dim), draw(sentence_dim)
    together = block(features, words, sentence, MASK)
    alone = block(features[1:], words[1:, :4], None if sentence is None else sentence[1:])
    assert_close(alone, together[1:])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_the_attention_mask_of_a_tokenizer_is_a_mask(dtype):
    block, inputs = trained(), draw()
    assert torch.equal(block(*inputs, MASK.to(dtype)), block(*inputs, MASK))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_close_to_double_precision(dtype):
    block, inputs = trained().to(dtype), draw(dtype=dtype)
    result = block(*inputs, MASK)
    expected = block.double()(*(tensor.double() for tensor in inputs), MASK)
    assert result.dtype == dtype
    # Several roundings of numbers up to the largest result.
    atol = 4 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    assert_close(result.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("on_tokens", [False, True])
@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_compiles_into_one_graph(compiled, sentence_dim, on_tokens):
    block, inputs = trained(sentence_dim), draw(sentence_dim)
    options = {"size": (H, W)} if on_tokens else {}
    features = (to_tokens(inputs[0]) if on_tokens else inputs[0]).requires_grad_()
    results = []
    for call in (block, compiled(block)):
        result = call(features, *inputs[1:], MASK, **options)
        results.append((result, *torch.autograd.grad(result.square().sum(), (features, *block.parameters()))))
    assert_close(results[1], results[0])


class Patches(nn.Module):
    """A transformer layer that computes the size of its map."""

    def __init__(self):
        super().__init__()
        self.block = trained()

    def forward(self, maps, words, sentence, word_mask):
        height, width = maps.shape[2:]
        return self.block(maps.flatten(2).mT, words, sentence, word_mask, size=(height, width))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_host_takes_maps_of_any_size(strict):
    host, dynamic = Patches(), torch.export.Dim.DYNAMIC
    axes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic, 1: dynamic}, {0: dynamic}, {0: dynamic, 1: dynamic})
    graph = torch.export.export(host, (*draw(), MASK), dynamic_shapes=axes, strict=strict).module()
    inputs = torch.randn(5, C, 4, 9), torch.randn(5, 6, D), torch.randn(5, E), torch.ones(5, 6, dtype=torch.bool)
    assert_close(graph(*inputs), host(*inputs))


def test_the_second_layer_of_a_transformer_is_unchanged_at_the_start():
    layer = nn.TransformerDecoderLayer(C, 1, 8, batch_first=True).eval()
    block, features, words = GlamBlock(C, C), torch.randn(B, H * W, C), torch.randn(B, L, C)
    expected = layer(layer(features, words), words)
    inserted = layer(block(layer(features, words), words, word_mask=MASK, size=(H, W)), words)
    assert torch.equal(inserted, expected)


def test_the_attention_is_the_one_of_the_package():
    block = GlamBlock(C, D, E, impl="torch")
    assert isinstance(block.attention, GlobalLocalAttention)
    assert block.attention.impl == "torch"
    assert isinstance(GlamBlock(C, D).attention, WordAttention)
    assert "channels=3, word_dim=13, sentence_dim=17" in repr(block)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernel_gives_the_same_result_and_gradients(device, layout):
    block = trained().to(device)
    features, words, sentence = (tensor.to(device).requires_grad_() for tensor in draw())
    mask, target = MASK.to(device), torch.randn(B, C, H, W, device=device)
    results = []
    for impl in ("torch", "triton"):
        block.attention.impl = impl
        result = block(features.to(memory_format=layout), words, sentence, mask)
        leaves = (features, words, sentence, *block.parameters())
        results.append((result, *torch.autograd.grad((result * target).sum(), leaves)))
    assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


FEATURES, WORDS, SENTENCE = torch.zeros(B, C, H, W), torch.zeros(B, L, D), torch.zeros(B, E)
TOKENS = torch.zeros(B, H * W, C)
ERRORS = {
    "features have two axes": (
        r"features must be maps \(B, C, H, W\), or tokens \(B, N, C\) with size=\(H, W\), but they are \(2, 3\)",
        {"features": torch.zeros(B, C)},
    ),
    "features are no tensor": (r"features must be a tensor, but it is a list", {"features": [0.0]}),
    "maps have other channels": (
        r"features has 4 features but the layer was built with channels=3 \(features: \(2, 4, 5, 7\), expected \(B, C,",
        {"features": torch.zeros(B, 4, H, W)},
    ),
    "tokens have other channels": (
        r"features has 4 features but the layer was built with channels=3 \(features: \(2, 35, 4\), expected \(B, N,",
        {"features": torch.zeros(B, H * W, 4), "size": (H, W)},
    ),
    "maps with a size": (r"size=\(5, 7\) is for tokens .*\(2, 3, 5, 7\).*leave size out", {"size": (H, W)}),
    "tokens without a size": (
        r"features are \(2, 35, 3\), which is tokens \(B, N, C\); give .* as size=\(H, W\)",
        {"features": TOKENS},
    ),
    "tokens of another size": (
        r"features have 35 tokens but size=\(5, 6\) has 30 positions .*remove class and register tokens",
        {"features": TOKENS, "size": (H, 6)},
    ),
    "the size is a number": (
        r"size must be a height and a width of at least 1, but it is 35",
        {"features": TOKENS, "size": 35},
    ),
    "the size has three numbers": (
        r"size must be a height and a width of at least 1, but it is \(1, 5, 7\)",
        {"features": TOKENS, "size": (1, H, W)},
    ),
    "the size is negative": (
        r"size must be a height and a width of at least 1, but it is \(-5, -7\)",
        {"features": TOKENS, "size": (-H, -W)},
    ),
    "the size has a fraction": (
        r"size must be a height and a width of at least 1, but it is \(5\.0, 7\)",
        {"features": TOKENS, "size": (5.0, W)},
    ),
    "words of another size": (
        r"words has 300 features but the layer was built with word_dim=13 \(words: \(2, 11, 300\)",
        {"words": torch.zeros(B, L, 300)},
    ),
    "the sentence is missing": (
        r"sentence is missing, but the block was built with sentence_dim=17; .* without sentence_dim",
        {"sentence": None},
    ),
    "a sentence of another size": (
        r"sentence has 4 features but the layer was built with sentence_dim=17",
        {"sentence": torch.zeros(B, 4)},
    ),
    "batches disagree": (
        r"batch sizes disagree \(features: \(2, 3, 5, 7\), words: \(3, 11, 13\), sentence: \(2, 17\)\)",
        {"words": torch.zeros(3, L, D)},
    ),
    "features in another precision": (
        r"the dtype of features is torch\.float64 but that of the weights is torch\.float32",
        {"features": FEATURES.double()},
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refuses_invalid_inputs(case):
    message, changed = ERRORS[case]
    with pytest.raises(ValueError, match="GlamBlock: " + message):
        GlamBlock(C, D, E)(**{"features": FEATURES, "words": WORDS, "sentence": SENTENCE} | changed)


@pytest.mark.parametrize(("given", "shown"), [(SENTENCE, r"\(2, 17\)"), (["red"], "a list")])
def test_words_alone_refuse_a_sentence(given, shown):
    message = (
        rf"GlamBlock: sentence is {shown}, but the block attends to the words alone.*A mask is given as word_mask="
    )
    with pytest.raises(ValueError, match=message):
        GlamBlock(C, D)(FEATURES, WORDS, given)


@pytest.mark.parametrize("sentence_dim", SENTENCE_DIMS)
def test_refuses_a_caption_without_words(sentence_dim):
    sentence = None if sentence_dim is None else SENTENCE
    with pytest.raises(ValueError, match="Attention: caption 1 has no real word"):
        GlamBlock(C, D, sentence_dim)(FEATURES, WORDS, sentence, mask_of(3, 0))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"channels must be a whole number of at least 1, but it is 0", {"channels": 0}),
        (r"word_dim must be a whole number of at least 1, but it is 2\.5", {"word_dim": 2.5}),
        (r"sentence_dim must be a whole number of at least 1, but it is 0", {"sentence_dim": 0}),
        (r"impl must be one of 'auto', 'torch', 'triton', but it is 'cuda'", {"impl": "cuda"}),
    ],
)
def test_refuses_invalid_options(message, options):
    with pytest.raises(ValueError, match="GlamBlock: " + message):
        GlamBlock(**{"channels": C, "word_dim": D, "sentence_dim": E} | options)


def test_words_alone_have_no_kernel():
    with pytest.raises(NotImplementedError, match=r"GlamBlock: impl='triton' cannot run: attention to the words alone"):
        GlamBlock(C, D, impl="triton")
    assert GlamBlock(C, D, E, impl="triton").attention.impl == "triton"
