"""The two attentions, compared with the paper's sums written as loops."""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from mirror_modules import GlobalLocalAttention, WordAttention
from mirror_modules.functional import global_local_attention, sentence_attention, word_attention
from mirror_modules.glam import _attention

B, L, C, H, W = 2, 11, 3, 5, 7  # different primes: a swapped axis cannot pass
D, E = 13, 17
MODES = [("channels", False), ("channels", True), ("positions", False), ("positions", True)]


def word_attention_by_loops(features, words, word_mask):
    context, weights = torch.zeros(B, C, H, W), torch.zeros(B, L, H, W)
    f, w = features.tolist(), words.tolist()
    for b, y, x in product(range(B), range(H), range(W)):
        real = [l for l in range(L) if word_mask[b, l]]
        scores = {l: sum(f[b][c][y][x] * w[b][l][c] for c in range(C)) for l in real}
        total = sum(math.exp(score) for score in scores.values())
        for l in real:
            weights[b, l, y, x] = math.exp(scores[l]) / total
        for c in range(C):
            context[b, c, y, x] = sum(math.exp(scores[l]) / total * w[b][l][c] for l in real)
    return context, weights


def sentence_attention_by_loops(features, sentence, score_matrix, axis):
    context, weights, scores = torch.zeros(B, C, H, W), torch.zeros(B, C, H, W), torch.zeros(B, C, H, W)
    for b, c, y, x in product(range(B), range(C), range(H), range(W)):
        products = [float(features[b, k, y, x] * sentence[b, k]) for k in range(C)]
        scores[b, c, y, x] = (
            products[c] if score_matrix is None else sum(float(score_matrix[c, k]) * products[k] for k in range(C))
        )
    for b, c, y, x in product(range(B), range(C), range(H), range(W)):
        along_axis = scores[b, :, y, x] if axis == "channels" else scores[b, c].flatten()
        weight = math.exp(scores[b, c, y, x]) / sum(math.exp(score) for score in along_axis.tolist())
        weights[b, c, y, x] = weight
        context[b, c, y, x] = sentence[b, c] * weight * (1 if axis == "channels" else H * W)
    return context, weights


def mask_of(*real_words):
    return torch.arange(L) < torch.tensor(real_words).unsqueeze(1)


def random_leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("real_words", [(11, 11), (11, 4), (1, 11)])
def test_word_attention_matches_the_loops(real_words):
    features, words, mask = torch.randn(B, C, H, W), torch.randn(B, L, C), mask_of(*real_words)
    assert_close(word_attention(features, words, mask), word_attention_by_loops(features, words, mask))


@pytest.mark.parametrize(("axis", "mixed"), MODES)
def test_sentence_attention_matches_the_loops(axis, mixed):
    features, sentence = torch.randn(B, C, H, W), torch.randn(B, C)
    matrix = torch.randn(C, C) if mixed else None
    expected = sentence_attention_by_loops(features, sentence, matrix, axis)
    assert_close(sentence_attention(features, sentence, score_matrix=matrix, axis=axis), expected)


def test_no_mask_means_that_all_words_are_real():
    features, words = torch.randn(B, C, H, W), torch.randn(B, L, C)
    assert_close(word_attention(features, words), word_attention(features, words, mask_of(L, L)))


def test_gradients_of_word_attention():
    inputs = random_leaf(B, C, 2, 3, dtype=torch.float64), random_leaf(B, 5, C, dtype=torch.float64)
    assert gradcheck(word_attention, inputs)
    assert gradcheck(word_attention, (*inputs, mask_of(5, 2)[:, :5]))


@pytest.mark.parametrize(("axis", "mixed"), MODES)
def test_gradients_of_sentence_attention(axis, mixed):
    features, sentence = random_leaf(B, C, 2, 3, dtype=torch.float64), random_leaf(B, C, dtype=torch.float64)
    matrix = random_leaf(C, C, dtype=torch.float64) if mixed else None
    assert gradcheck(lambda f, s, m: sentence_attention(f, s, score_matrix=m, axis=axis), (features, sentence, matrix))


def test_gradients_of_both_attentions():
    inputs = (
        random_leaf(B, C, 2, 3, dtype=torch.float64),
        random_leaf(B, 5, C, dtype=torch.float64),
        random_leaf(B, C, dtype=torch.float64),
    )
    assert gradcheck(lambda *args: global_local_attention(*args, mask_of(5, 2)[:, :5])[:2], inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_padding_of_any_magnitude_gets_zero_weight(dtype):
    # The scores of the padding are infinite in float16.
    features, words = torch.full((B, C, H, W), 20.0, dtype=dtype), torch.ones(B, L, C, dtype=dtype)
    words[:, 4:] = 6e4
    context, weights = word_attention(features, words, mask_of(4, 4))
    assert (weights[:, 4:] == 0).all()
    assert_close(context, torch.ones_like(context), rtol=1e-2, atol=0)


def whole_numbers(*shape, largest):
    """Random integers: their products and sums are exact in float32, so that only the results are rounded."""
    return torch.randint(-largest, largest + 1, shape)


def assert_exact_up_to_rounding(results, references):
    """The error is at most one unit in the last place of the largest number, or the error of a softmax in float32."""
    for result, reference in zip(results, references, strict=True):
        last_place = torch.finfo(result.dtype).eps * float(reference.detach().abs().max())
        assert_close(result.double(), reference, rtol=0, atol=max(last_place, torch.finfo(torch.float32).eps))


# With 17 channels, the largest scores are 17, 4,352 and 1,062,500; float16 ends at 65,504.
@pytest.mark.parametrize("largest", [1, 16, 250])
@pytest.mark.parametrize("garbage", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("axis", "mixed"), MODES)
def test_half_precision_equals_double_precision_for_scores_of_any_size(axis, mixed, dtype, garbage, largest):
    channels, mask, matrix = 17, mask_of(11, 4), whole_numbers(17, 17, largest=2) if mixed else None
    shapes = (B, channels, H, W), (B, L, channels), (B, channels)
    drawn = [whole_numbers(*shape, largest=largest) for shape in shapes]
    gradients = [1e-2 * torch.randn(B, channels, H, W, dtype=torch.float64).bfloat16() for _ in range(2)]

    def everything(dtype):
        inputs = [tensor.to(dtype) for tensor in drawn]
        inputs[1][~mask] = garbage
        leaves = [tensor.requires_grad_() for tensor in inputs]
        context = global_local_attention(
            *leaves,
            mask,
            need_weights=True,
            sentence_axis=axis,
            score_matrix=None if matrix is None else matrix.to(dtype),
        )
        grads = torch.autograd.grad(context.contexts, leaves, [gradient.to(dtype) for gradient in gradients])
        parts = (
            word_attention(*leaves[:2], mask),
            sentence_attention(
                leaves[0], leaves[2], score_matrix=None if matrix is None else matrix.to(dtype), axis=axis
            ),
        )
        return [*context[:4], *parts[0], *parts[1], *grads]

    assert_exact_up_to_rounding(everything(dtype), everything(torch.float64))


def test_half_precision_averages_over_more_positions_than_its_largest_number():
    # Each weight is 1/66,049, below the normal numbers of float16, whose largest is 65,504.
    features, sentence = torch.zeros(1, 1, 257, 257, dtype=torch.float16), torch.full((1, 1), 0.1, dtype=torch.float16)
    context, _ = sentence_attention(features, sentence, axis="positions")
    assert (context == sentence).all()


def test_equal_scores_beyond_half_precision():
    features, sentence = torch.full((1, 4, 1, 1), 300.0).half(), torch.full((1, 4), 300.0).half()
    context, weights = sentence_attention(features, sentence)
    assert (weights == 0.25).all()
    assert (context == 75).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_the_scores(dtype):
    features, words = whole_numbers(B, C, H, W, largest=250).float(), whole_numbers(B, L, C, largest=250).float()
    matrix = whole_numbers(C, C, largest=2).float()
    with torch.autocast("cpu", dtype=dtype):
        context, weights = word_attention(features, words, mask_of(11, 4))
        by_sentence = sentence_attention(features, words[:, 0], score_matrix=matrix)
    assert context.dtype == weights.dtype == dtype
    assert_exact_up_to_rounding([context, weights], word_attention(features.double(), words.double(), mask_of(11, 4)))
    assert_close(by_sentence, sentence_attention(features, words[:, 0], score_matrix=matrix))


def test_padding_gets_zero_weight():
    _, weights = word_attention(torch.randn(B, C, H, W), torch.randn(B, L, C), mask_of(4, 11))
    assert (weights[0, 4:] == 0).all()
    assert (weights[0, :4] > 0).all()
    assert_close(weights.sum(dim=1), torch.ones(B, H, W))


GARBAGE = [0.0, 1.0, 1e30, float("inf"), float("nan")]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_has_no_influence(garbage):
    features, words, grad = random_leaf(B, C, H, W), random_leaf(B, L, C), torch.randn(B, C, H, W)
    padded_features = features.detach().clone().requires_grad_()
    padded_words = torch.cat((words.detach(), garbage * torch.randn(B, 2, C)), dim=1).requires_grad_()
    padded_mask = torch.cat((mask_of(11, 4), torch.zeros(B, 2, dtype=torch.bool)), dim=1)

    context, weights = word_attention(features, words, mask_of(11, 4))
    padded_context, padded_weights = word_attention(padded_features, padded_words, padded_mask)
    context.backward(grad)
    padded_context.backward(grad)

    assert_close((padded_context, padded_weights[:, :L]), (context, weights))
    assert_close((padded_features.grad, padded_words.grad[:, :L]), (features.grad, words.grad))
    assert (padded_words.grad[~padded_mask] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("tiled", [False, True])
def test_padding_has_no_influence_on_the_gradients_of_a_module(monkeypatch, tiled, garbage):
    if tiled:
        monkeypatch.setattr(_attention, "FEW_ELEMENTS", 0)
        monkeypatch.setattr(_attention, "ELEMENTS_ON_A_CPU", 1)
    features, condition, mask = torch.randn(B, C, H, W), torch.randn(B, E), mask_of(11, 4)
    words = torch.randn(B, L, D)
    padded = words.masked_fill(~mask.unsqueeze(2), garbage)
    for module in (GlobalLocalAttention(C, D, E), WordAttention(C, D, E)):
        results = []
        for each in (words, padded):
            leaf = each.clone().requires_grad_()
            context = module(features, leaf, condition, mask)
            total = sum(part.square().sum() for part in context.contexts)
            results.append((*context.contexts, *torch.autograd.grad(total, (leaf, *module.parameters()))))
        assert_close(results[1], results[0], atol=0, rtol=0)
        assert (results[1][len(context.contexts)][~mask] == 0).all()


def test_a_sample_alone_equals_the_same_sample_in_a_batch():
    attention = GlobalLocalAttention(C, D, E).eval()
    features, words, condition = torch.randn(B, C, H, W), torch.randn(B, L, D), torch.randn(B, E)
    together = attention(features, words, condition, mask_of(4, 11), need_weights=True)
    alone = attention(features[:1], words[:1, :4], condition[:1], need_weights=True)
    expected = (together.word_context, together.sentence_context, together.word_weights[:, :4])
    assert_close(tuple(alone[:3]), tuple(part[:1] for part in expected), atol=1e-5, rtol=0)
    assert_close(alone.sentence_weights, together.sentence_weights[:1], atol=1e-5, rtol=0)


def test_extreme_scores_stay_finite():
    features, words = 1e4 * random_leaf(B, C, H, W), 1e4 * random_leaf(B, L, C)
    for context in global_local_attention(features, words, words[:, 0], mask_of(11, 4))[:2]:
        assert context.isfinite().all()
    (gradient,) = torch.autograd.grad(word_attention(features, words)[0].sum(), features)
    assert gradient.isfinite().all()


def test_half_precision_softmaxes_over_many_entries():
    # Summed in bfloat16, 4099 equal terms would stop growing at 256.
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    _, weights = word_attention(zeros, torch.zeros(1, 4099, 1, dtype=torch.bfloat16))
    assert weights.dtype == torch.bfloat16
    assert_close(weights.float(), torch.full((1, 4099, 1, 1), 1 / 4099), rtol=1e-2, atol=0)


def test_the_joint_operation_equals_the_two_attentions():
    features, words, sentence = torch.randn(B, C, H, W), torch.randn(B, L, C), torch.randn(B, C)
    context = global_local_attention(features, words, sentence, mask_of(4, 11), need_weights=True)
    assert_close((context.word_context, context.word_weights), word_attention(features, words, mask_of(4, 11)))
    assert_close((context.sentence_context, context.sentence_weights), sentence_attention(features, sentence))
    assert context.contexts == context[:2]
    without_maps = global_local_attention(features, words, sentence, mask_of(4, 11))
    assert without_maps.word_weights is None
    assert without_maps.sentence_weights is None
    assert_close(without_maps.contexts, context.contexts)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize(("axis", "mixed"), MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_module_equals_function(axis, mixed, bias, impl):
    module = GlobalLocalAttention(C, D, E, sentence_bias=bias, score_projection=mixed, sentence_axis=axis, impl=impl)
    features, words, condition = torch.randn(B, C, H, W), torch.randn(B, L, D), torch.randn(B, E)
    projected_words, projected_sentence = torch.zeros(B, L, C), torch.zeros(B, C)
    u, v = module.word_projection.weight, module.sentence_projection.weight
    for b, c in product(range(B), range(C)):
        projected_sentence[b, c] = sum(v[c, e] * condition[b, e] for e in range(E))
        projected_sentence[b, c] += module.sentence_projection.bias[c] if bias else 0
        for l in range(L):
            projected_words[b, l, c] = sum(u[c, d] * words[b, l, d] for d in range(D))
    expected = global_local_attention(
        features,
        projected_words,
        projected_sentence,
        mask_of(4, 11),
        need_weights=True,
        score_matrix=module.score_projection.weight if mixed else None,
        sentence_axis=axis,
    )
    assert_close(tuple(module(features, words, condition, mask_of(4, 11), need_weights=True)), tuple(expected))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("axis", ["channels", "positions"])
def test_the_fused_output_is_a_concatenation(axis, need_weights):
    module = GlobalLocalAttention(C, D, E, sentence_axis=axis, fused_output=True)
    inputs = random_leaf(B, C, H, W), random_leaf(B, L, D), random_leaf(B, E)
    result = module(*inputs, mask_of(4, 11), need_weights=need_weights)
    module.fused_output = False
    separate = module(*inputs, mask_of(4, 11), need_weights=need_weights)
    assert separate.fused_output is None
    assert_close(tuple(result[:4]), tuple(separate[:4]), atol=0, rtol=0)
    expected = torch.cat((inputs[0], *separate.contexts), dim=1)
    assert_close(result.fused_output, expected, atol=0, rtol=0)
    weights = torch.randn(expected.shape)
    gradients = [torch.autograd.grad((each * weights).sum(), inputs) for each in (result.fused_output, expected)]
    assert_close(*gradients)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("real_words", [(11, 11), (11, 4), (1, 11)])
def test_word_attention_module_equals_the_function(real_words, need_weights):
    module, features, words = WordAttention(C, D), torch.randn(B, C, H, W), torch.randn(B, L, D)
    projected = torch.zeros(B, L, C)
    for b, l, c in product(range(B), range(L), range(C)):
        projected[b, l, c] = sum(module.word_projection.weight[c, d] * words[b, l, d] for d in range(D))
    mask = mask_of(*real_words)
    context, weights = module(features, words, torch.randn(B, E), mask, need_weights=need_weights)
    expected, expected_weights = word_attention(features, projected, mask)
    assert_close(context, expected)
    if need_weights:
        assert_close(weights, expected_weights)
    else:
        assert weights is None


def test_context_dim_is_the_number_of_channels_of_the_contexts():
    features, words, condition = torch.randn(B, C, H, W), torch.randn(B, L, D), torch.randn(B, E)
    for module in (GlobalLocalAttention(C, D, E), WordAttention(C, D, E)):
        contexts = module(features, words, condition).contexts
        assert torch.cat(contexts, dim=1).shape == (B, module.context_dim, H, W)


def test_word_attention_needs_no_condition():
    module, features, words = WordAttention(C, D), torch.randn(B, C, H, W), torch.randn(B, L, D)
    result = module(features, words, word_mask=mask_of(4, 11))
    assert_close(result.word_context, module(features, words, torch.randn(B, E), mask_of(4, 11)).word_context)
    assert result.sentence_weights is None


@pytest.mark.parametrize("mask", [None, mask_of(11, 4)])
def test_compiles_into_one_graph(compiled, mask):
    module = GlobalLocalAttention(C, D, E, score_projection=True)
    inputs = random_leaf(B, C, H, W), random_leaf(B, L, D), random_leaf(B, E)
    context = compiled(module)(*inputs, mask)
    assert_close(tuple(context), tuple(module(*inputs, mask)))
    context.word_context.sum().backward()
    assert inputs[0].grad.isfinite().all()


def test_a_compiled_graph_returns_zeros_for_a_caption_without_words(compiled):
    features = random_leaf(B, C, H, W)
    context, weights = compiled(word_attention)(features, torch.randn(B, L, C), mask_of(0, 11))
    context.sum().backward()
    assert (context[0] == 0).all()
    assert (weights[0] == 0).all()
    assert (features.grad[0] == 0).all()
    assert features.grad[1].abs().sum() > 0


ERRORS = {
    "a caption has no real word": (r"caption 1 has no real word", {"word_mask": mask_of(3, 0)}),
    "mask is a float": (
        r"word_mask must be bool.* it is torch\.float32; .*attention_mask\.bool\(\)",
        {"word_mask": mask_of(3, 4).float()},
    ),
    "mask holds token ids": (
        r"word_mask has integers from 0 to 7, .*pass attention_mask\.bool\(\), not the token ids",
        {"word_mask": 7 * mask_of(3, 4).long()},
    ),
    "mask has another length": (
        r"word_mask is \(2, 10\) but the captions are \(2, 11\)",
        {"word_mask": mask_of(3, 4)[:, 1:]},
    ),
    "no words at all": (r"captions of length 0 \(\(2, 0, 3\)\)", {"words": torch.zeros(B, 0, C)}),
    "words are not projected": (
        r"words must be \(B, L, C\) with the 3 channels.*words: \(2, 11, 13\).*project them first",
        {"words": torch.zeros(B, L, D)},
    ),
    "words have no axis of words": (r"words must be \(B, L, C\)", {"words": torch.zeros(B, C)}),
    "features are not maps": (
        r"features must be \(B, C, H, W\), but they are \(2, 3, 5\)",
        {"features": torch.zeros(B, C, H)},
    ),
    "precisions disagree": (
        r"the inputs must have one floating point precision \(features: float32, words: float64\)",
        {"words": torch.zeros(B, L, C, dtype=torch.float64)},
    ),
    "batches disagree": (r"batch sizes disagree \(features: \(2, .*words: \(3,", {"words": torch.zeros(3, L, C)}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_word_attention_refuses_invalid_inputs(case):
    message, changed = ERRORS[case]
    arguments = {"features": torch.zeros(B, C, H, W), "words": torch.zeros(B, L, C), "word_mask": None} | changed
    with pytest.raises(ValueError, match="word_attention: " + message):
        word_attention(**arguments)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"sentence must be \(B, C\) with the 3 channels.*\(2, 17\)", {"sentence": torch.zeros(B, E)}),
        (r"axis must be one of 'channels', 'positions', but it is 'words'", {"axis": "words"}),
        (r"score_matrix is \(3, 5\), expected \(3, 3\)", {"score_matrix": torch.zeros(3, 5)}),
        (r"score_matrix must be a tensor, but it is a list", {"score_matrix": [[1.0] * 3] * 3}),
        (r"score_matrix must be floating point, but it is torch\.int64", {"score_matrix": torch.eye(3).long()}),
        (r"features must be floating point, but it is torch\.int64", {"features": torch.zeros(B, C, H, W).long()}),
    ],
)
def test_sentence_attention_refuses_invalid_inputs(message, changed):
    with pytest.raises(ValueError, match="sentence_attention: " + message):
        sentence_attention(**{"features": torch.zeros(B, C, H, W), "sentence": torch.zeros(B, C)} | changed)


def test_sentence_attention_takes_a_score_matrix_of_another_precision():
    features, sentence, matrix = torch.randn(B, C, H, W), torch.randn(B, C), torch.randn(C, C, requires_grad=True)
    expected, _ = sentence_attention(features.double(), sentence.double(), score_matrix=matrix.double())
    for changed in (features.double(), features):
        context, _ = sentence_attention(changed, sentence, score_matrix=matrix)
        assert context.dtype == changed.dtype
        assert_close(context, expected, check_dtype=False)
    context.sum().backward()
    assert matrix.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"sentence_axis must be one of 'channels', 'positions', but it is 'channel'", {"sentence_axis": "channel"}),
        (r"score_matrix is \(1, 3\), expected \(3, 3\)", {"score_matrix": torch.zeros(1, C)}),
        (
            r"one floating point precision \(features: float32, words: float64, sentence: float32\); convert them",
            {"words": torch.zeros(B, L, C, dtype=torch.float64)},
        ),
        (r"one floating point precision .*sentence: int64", {"sentence": torch.zeros(B, C, dtype=torch.int64)}),
        (r"on one device \(features: cpu, words: meta", {"words": torch.zeros(B, L, C, device="meta")}),
        (r"on one device .*word_mask: meta", {"word_mask": torch.ones(B, L, dtype=torch.bool, device="meta")}),
        (r"word_mask must be a bool tensor, but it is a list", {"word_mask": [[True] * L] * B}),
        (r"features have no positions: \(2, 3, 0, 7\)", {"features": torch.zeros(B, C, 0, W)}),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_joint_operation_refuses_invalid_inputs(message, changed, impl):
    given = {"features": torch.zeros(B, C, H, W), "words": torch.zeros(B, L, C), "sentence": torch.zeros(B, C)}
    with pytest.raises(ValueError, match="global_local_attention: .*" + message):
        global_local_attention(**given | changed, impl=impl)


@pytest.mark.parametrize(
    ("message", "features", "words", "condition"),
    [
        (r"features has 5 features but .* feature_dim=3 \(features: \(2, 5,", (B, 5, H, W), (B, L, D), (B, E)),
        (r"words has 300 features but .* word_dim=13 \(words: \(2, 11, 300\)", (B, C, H, W), (B, L, 300), (B, E)),
        (r"condition has 2 features but .* condition_dim=17", (B, C, H, W), (B, L, D), (B, 2)),
        (r"condition must be \(B, D\), but it is \(2, 17, 1\)", (B, C, H, W), (B, L, D), (B, E, 1)),
        (r"batch sizes disagree .*condition: \(1, 17\)", (B, C, H, W), (B, L, D), (1, E)),
    ],
)
def test_module_refuses_invalid_inputs(message, features, words, condition):
    with pytest.raises(ValueError, match="GlobalLocalAttention: " + message):
        GlobalLocalAttention(C, D, E)(torch.zeros(features), torch.zeros(words), torch.zeros(condition))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"feature_dim must be a whole number of at least 1, but it is 0", {"feature_dim": 0}),
        (r"word_dim must be a whole number of at least 1, but it is 2\.5", {"word_dim": 2.5}),
        (r"sentence_axis must be one of", {"sentence_axis": "words"}),
        (r"impl must be one of 'auto', 'torch', 'triton', but it is 'cuda'", {"impl": "cuda"}),
    ],
)
def test_module_refuses_invalid_options(message, options):
    with pytest.raises(ValueError, match="GlobalLocalAttention: " + message):
        GlobalLocalAttention(**{"feature_dim": C, "word_dim": D, "condition_dim": E} | options)


@pytest.mark.parametrize(
    ("message", "features", "words"),
    [
        (r"features has 5 features but .* feature_dim=3 \(features: \(2, 5,", (B, 5, H, W), (B, L, D)),
        (r"words has 300 features but .* word_dim=13 \(words: \(2, 11, 300\)", (B, C, H, W), (B, L, 300)),
    ],
)
def test_word_attention_module_refuses_invalid_inputs(message, features, words):
    with pytest.raises(ValueError, match="WordAttention: " + message):
        WordAttention(C, D)(torch.zeros(features), torch.zeros(words))


@pytest.mark.parametrize(("name", "sizes"), [("feature_dim", (0, D)), ("word_dim", (C, 0))])
def test_word_attention_module_refuses_invalid_options(name, sizes):
    with pytest.raises(ValueError, match=f"WordAttention: {name} must be a whole number of at least 1, but it is 0"):
        WordAttention(*sizes)


def test_a_kernel_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = torch.zeros(B, C, H, W), torch.zeros(B, L, C), torch.zeros(B, C)
    with pytest.raises(NotImplementedError, match=r"global_local_attention: impl='triton' cannot run: .* on 'cpu'"):
        global_local_attention(*arguments, impl="triton")
    module = GlobalLocalAttention(C, D, E, impl="triton")
    with pytest.raises(NotImplementedError, match=r"global_local_attention: impl='triton' cannot run"):
        module(torch.zeros(B, C, H, W), torch.zeros(B, L, D), torch.zeros(B, E))


@pytest.fixture
def one_row_at_a_time(monkeypatch):
    monkeypatch.setattr(_attention, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(_attention, "ELEMENTS_ON_A_CPU", 1)


@pytest.mark.parametrize(("axis", "mixed"), MODES)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, mask_of(11, 4)])
def test_tiling_does_not_change_the_results(monkeypatch, axis, mixed, need_weights, mask):
    # In float64: in float32, products of other sizes may be rounded differently, which depends on the processor.
    shapes = (B, C, H, W), (B, L, C), (B, C), (C, C)
    inputs = [random_leaf(*shape, dtype=torch.float64) for shape in shapes]
    results = []
    for elements in (2**19, C * H * W, 2 * C * W, 1):
        monkeypatch.setattr(_attention, "FEW_ELEMENTS", elements)
        monkeypatch.setattr(_attention, "ELEMENTS_ON_A_CPU", elements)
        options = {"need_weights": need_weights, "sentence_axis": axis, "score_matrix": inputs[3] if mixed else None}
        context = global_local_attention(*inputs[:3], mask, **options)
        total = sum((i + 2) * part.square().sum() for i, part in enumerate(context) if part is not None)
        results.append((total, *torch.autograd.grad(total, inputs[: 4 if mixed else 3])))
    for tiled in results[1:]:
        assert_close(tiled, results[0])


@pytest.mark.usefixtures("one_row_at_a_time")
def test_first_and_second_derivatives_of_tiles():
    inputs = (
        random_leaf(B, C, 2, 3, dtype=torch.float64),
        random_leaf(B, 5, C, dtype=torch.float64),
        random_leaf(B, C, dtype=torch.float64),
    )

    def both(*args):
        return global_local_attention(*args, mask_of(5, 2)[:, :5])[:2]

    assert "Recomputed" in type(both(*inputs)[0].grad_fn).__name__
    assert gradcheck(both, inputs)
    assert gradgradcheck(both, inputs)


@pytest.mark.parametrize("real_words", [None, (11, 4), (0, 11)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_the_derivative_equals_that_of_autograd(monkeypatch, which, dtype, real_words):
    # As on a GPU, where a caption without words has a context of zero.
    monkeypatch.setattr(_attention, "is_unchecked", lambda word_mask: True)
    mask = None if real_words is None else mask_of(*real_words)
    drawn = torch.randn(B, C, H, W).to(dtype), torch.randn(B, L, C).to(dtype), torch.randn(B, C).to(dtype)
    if mask is not None:
        drawn = drawn[0], drawn[1] * mask.unsqueeze(2), drawn[2]
    gradients = [torch.randn(B, C, H, W).to(dtype) if given else None for given in which]
    leaves = [tensor.double().requires_grad_() for tensor in drawn]
    contexts = (
        _attention.attend_to_words(*leaves[:2], mask)[0],
        _attention.attend_to_sentence(leaves[0], leaves[2], None, "channels")[0],
    )
    total = sum((part * given.double()).sum() for part, given in zip(contexts, gradients) if given is not None)
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    result = _attention.attention_derivative(*drawn, mask, None, gradients=gradients)
    assert_close(tuple(part.double() for part in result[:3]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("one_row_at_a_time")
def test_gradients_of_one_context_alone():
    inputs = random_leaf(B, C, H, W), random_leaf(B, L, C), random_leaf(B, C)
    *gradients, sentence_gradient = torch.autograd.grad(
        global_local_attention(*inputs, mask_of(11, 4)).word_context.sum(), inputs, allow_unused=True
    )
    expected = torch.autograd.grad(word_attention(*inputs[:2], mask_of(11, 4))[0].sum(), inputs[:2])
    assert_close(tuple(gradients), expected)
    assert (sentence_gradient == 0).all()


@pytest.mark.usefixtures("one_row_at_a_time")
@pytest.mark.parametrize("needed", [0, 1, 2])
@pytest.mark.parametrize("context", [0, 1])
def test_gradients_of_one_input_alone(needed, context):
    inputs = [torch.randn(B, C, H, W), torch.randn(B, L, C), torch.randn(B, C)]
    inputs[needed].requires_grad_()
    total = global_local_attention(*inputs, mask_of(11, 4))[context].square().sum()
    (gradient,) = torch.autograd.grad(total, inputs[needed])
    alone = word_attention(*inputs[:2], mask_of(11, 4)) if context == 0 else sentence_attention(inputs[0], inputs[2])
    expected = torch.zeros_like(gradient)
    if alone[0].requires_grad:
        (expected,) = torch.autograd.grad(alone[0].square().sum(), inputs[needed])
    assert_close(gradient, expected)


@pytest.mark.usefixtures("one_row_at_a_time")
def test_a_differentiable_gradient_equals_the_plain_one():
    features = random_leaf(B, C, H, W, dtype=torch.float64)
    # Words and sentence depend on the features: each input must receive its own part of the gradient only.
    words, sentence = 2 * features.flatten(2).mT[:, :L], features.mean(dim=(2, 3))
    total = global_local_attention(features, words, sentence, mask_of(11, 4)).word_context.square().sum()
    (plain,) = torch.autograd.grad(total, features, retain_graph=True)
    (with_graph,) = torch.autograd.grad(total, features, create_graph=True)
    assert_close(with_graph, plain)


@pytest.mark.usefixtures("one_row_at_a_time")
def test_the_transforms_of_torch_func():
    features, words, sentence = torch.randn(B, C, H, W), torch.randn(B, L, C), torch.randn(B, C)

    def total(features):
        return global_local_attention(features, words, sentence, mask_of(11, 4)).word_context.square().sum()

    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    assert_close(torch.func.grad(total)(features), expected)
    tangent = torch.randn_like(features)
    assert_close(torch.func.jvp(total, (features,), (tangent,))[1], (expected * tangent).sum())


@pytest.mark.usefixtures("one_row_at_a_time")
@pytest.mark.parametrize("real_words", [(11, 4), (0, 11)])
def test_each_sample_may_have_its_own_mask_in_vmap(real_words):
    features, words, sentence = torch.randn(B, 1, C, H, W), torch.randn(B, 1, L, C), torch.randn(B, 1, C)

    def total(features, words, sentence, mask):
        context = global_local_attention(features, words, sentence, mask)
        return sum(part.square().sum() for part in context.contexts)

    gradients = torch.func.vmap(torch.func.grad(total, argnums=(0, 1, 2)))
    mask = mask_of(*real_words).unsqueeze(1)
    leaves = [tensor.clone().requires_grad_() for tensor in (features, words, sentence)]
    if min(real_words) > 0:
        expected = sum(total(*parts, each) for *parts, each in zip(*leaves, mask))
    else:
        # The mask is not read here: a caption without a real word has a context of zero.
        expected = (
            total(*(leaf[1] for leaf in leaves), mask[1])
            + sentence_attention(leaves[0][0], leaves[2][0])[0].square().sum()
        )
    assert_close(gradients(features, words, sentence, mask), torch.autograd.grad(expected, leaves))


@pytest.mark.usefixtures("one_row_at_a_time")
def test_inputs_without_requires_grad_get_no_gradient():
    features, words, sentence = random_leaf(B, C, H, W), torch.randn(B, L, C), torch.randn(B, C)
    global_local_attention(features, words, sentence, mask_of(11, 4)).sentence_context.sum().backward()
    expected = torch.autograd.grad(sentence_attention(features, sentence)[0].sum(), features)[0]
    assert_close(features.grad, expected)


@pytest.mark.usefixtures("one_row_at_a_time")
def test_the_backward_pass_computes_in_the_precision_of_the_forward_pass():
    inputs = random_leaf(B, C, H, W), random_leaf(B, L, C), random_leaf(B, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = global_local_attention(*inputs, mask_of(11, 4))
        gradients = torch.autograd.grad(inside.word_context.float().sum(), inputs, retain_graph=True, allow_unused=True)
    outside = torch.autograd.grad(inside.word_context.float().sum(), inputs, allow_unused=True)
    assert inside.word_context.dtype == inside.sentence_context.dtype == torch.bfloat16
    assert_close(gradients, outside, atol=0, rtol=0)
