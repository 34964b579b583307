"""Triton kernels of `global_local_attention` against its definition: on a GPU, or else in Triton's interpreter."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mirror_modules import GlobalLocalAttention
from mirror_modules.functional import global_local_attention
from mirror_modules.kernels import attention

B, L, C, H, W = 2, 11, 3, 5, 7  # different primes: a swapped axis cannot pass


class Inputs(NamedTuple):
    features: Tensor
    words: Tensor
    sentence: Tensor
    word_mask: Tensor | None = None

    def leaves(self):
        return self[:3]


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


def draw(device, b=B, c=C, h=H, w=W, l=L, mask=None, dtype=torch.float64):
    # Scaled for scores of a few units: with larger ones, rounding at a single position dominates the errors.
    scales = [1, 2 / c**0.5, 1]
    shapes = [(b, c, h, w), (b, l, c), (b, c)]
    leaves = [(scale * torch.randn(shape)).to(device, dtype) for scale, shape in zip(scales, shapes)]
    return Inputs(*(leaf.requires_grad_() for leaf in leaves), None if mask is None else mask.to(device))


def widest_dtype(device):
    """float64 in the interpreter; on a GPU the kernels support float32 at most."""
    return torch.float32 if device.type == "cuda" else torch.float64


def run(inputs, impl, *, maps=True, fused=False, weights=(1.0, 1.0, 1.0, 1.0, 1.0)):
    """Results and gradients, given a fixed random gradient of each result, times its weight; 0 omits the result."""
    results = global_local_attention(*inputs, need_weights=maps, fused_output=fused, impl=impl)
    results = [result for result in results if result is not None]
    random = torch.Generator().manual_seed(1)
    used = [
        (result, weight * torch.randn(result.shape, generator=random, dtype=torch.float64).to(result))
        for result, weight in zip(results, weights)
        if weight
    ]
    gradients = torch.autograd.grad([r for r, _ in used], inputs.leaves(), [g for _, g in used], allow_unused=True)
    return [result.detach() for result in results], [torch.zeros(()) if g is None else g for g in gradients]


def everything(inputs, impl, *, maps=True, fused=False):
    results, gradients = run(inputs, impl, maps=maps, fused=fused)
    return results + gradients


def assert_within_budget(inputs, *, maps=True, fused=False):
    """The kernel's error is at most twice that of the definition in the same precision, relative to float64."""
    exact = Inputs(*(leaf.detach().double().requires_grad_() for leaf in inputs.leaves()), inputs.word_mask)
    cases = [(exact, "torch"), (inputs, "triton"), (inputs, "torch")]
    computed = (everything(*case, maps=maps, fused=fused) for case in cases)
    for reference, kernel, definition in zip(*computed):
        assert kernel.dtype == definition.dtype
        budget = 2 * (definition.double() - reference).abs().max() + 1e-7 * reference.abs().max()
        error = (kernel.double() - reference).abs().max()
        assert error <= budget, f"error {error:.2e}, allowed {budget:.2e}"


SIZES = {
    "primes": ({}, (11, 4)),
    "no mask": ({}, None),
    "all but one word is padding": ({}, (1, 1)),
    "one of everything": ({"b": 1, "c": 1, "h": 1, "w": 1, "l": 1}, None),
    "one position": ({"h": 1, "w": 1}, (2, 11)),
    "one row": ({"h": 1}, (2, 11)),
    "one column": ({"w": 1}, (2, 11)),
    "several chunks of words": ({"c": 100, "l": 70, "h": 3}, (70, 40)),
    "several spans and tiles": ({"h": 17, "w": 31}, (11, 4)),
}


@pytest.mark.parametrize("case", SIZES)
def test_results_and_gradients_match_the_definition(device, case):
    sizes, real_words = SIZES[case]
    mask = None if real_words is None else mask_of(*real_words, length=sizes.get("l", L))
    inputs = draw(device, **sizes, mask=mask, dtype=widest_dtype(device))
    for kernel, definition in zip(everything(inputs, "triton"), everything(inputs, "torch")):
        assert_close(kernel, definition)


@pytest.mark.parametrize(("channels", "dtype"), [*((c, torch.float32) for c in (8, 24, 48, 128)), (256, torch.float16)])
def test_channels(device, channels, dtype):
    inputs = draw(device, c=channels, h=3, mask=mask_of(11, 4), dtype=dtype)
    assert_within_budget(inputs)


@pytest.mark.parametrize("length", [1, 17, 64, 129, 256])
def test_lengths_of_captions(device, length):
    inputs = draw(device, c=24, h=3, l=length, mask=mask_of(length, 1, length=length), dtype=torch.float32)
    assert_within_budget(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_is_within_twice_the_error_of_the_definition(device, dtype):
    assert_within_budget(draw(device, c=24, mask=mask_of(11, 4), dtype=dtype))
    assert_within_budget(draw(device, c=100, l=70, mask=mask_of(70, 40, length=70), dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "length", "side"), [(32, 18, 64), (48, 12, 61), (128, 77, 32), (256, 256, 16)])
def test_on_a_gpu_within_twice_the_error_of_the_definition(device, dtype, channels, length, side):
    channels = min(channels, 128) if dtype == torch.float32 else channels
    mask = mask_of(length, 1, length // 2, length=length)
    inputs = draw(device, b=3, c=channels, h=side, w=side, l=length, mask=mask, dtype=dtype)
    assert_within_budget(inputs, maps=False)
    assert_within_budget(inputs, maps=False, fused=True)


LAYOUTS = {
    "channels last": lambda maps: maps.to(memory_format=torch.channels_last),
    "every second channel": lambda maps: maps.repeat_interleave(2, dim=1)[:, ::2],
    "cropped from a larger map": lambda maps: torch.nn.functional.pad(maps, (2, 3, 1, 1))[:, :, 1:-1, 2:-3],
    "height and width swapped in memory": lambda maps: maps.mT.contiguous().mT,
    "one map for all samples": lambda maps: maps[:1].expand(B, -1, -1, -1),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_any_layout(device, case):
    given = draw(device, mask=mask_of(11, 4), dtype=widest_dtype(device))
    features = LAYOUTS[case](given.features.detach()).requires_grad_()
    words = given.words.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    inputs = Inputs(features, words, given.sentence, given.word_mask)
    plain = Inputs(features.detach().contiguous().requires_grad_(), *given[1:])
    for kernel, definition in zip(everything(inputs, "triton"), everything(plain, "torch")):
        assert_close(kernel, definition)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"c": 100, "l": 70, "h": 3}])
@pytest.mark.parametrize("case", ["channels first", *LAYOUTS])
def test_the_fused_output_holds_features_and_contexts(device, case, sizes, maps):
    given = draw(device, **sizes, mask=mask_of(11, 4, length=sizes.get("l", L)), dtype=widest_dtype(device))
    features = LAYOUTS.get(case, torch.clone)(given.features.detach()).requires_grad_()
    results = {}
    for impl in ("triton", "torch"):
        results[impl] = everything(given._replace(features=features), impl, maps=maps, fused=True)
    assert len(results["triton"]) == (5 if maps else 3) + 3
    assert_close(results["triton"], results["torch"])
    *contexts, fused = results["triton"][:2] + [results["triton"][4 if maps else 2]]
    assert_close(fused, torch.cat((features.detach(), *contexts), dim=1), atol=0, rtol=0)
    assert contexts[0].untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    last = features.is_contiguous(memory_format=torch.channels_last)
    assert fused.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("used", [(0.0, 0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0, 0.0)])
def test_gradients_of_the_fused_output(device, used):
    inputs = draw(device, h=17, w=31, mask=mask_of(11, 4), dtype=widest_dtype(device))
    (_, kernel), (_, definition) = (run(inputs, impl, fused=True, weights=used) for impl in ("triton", "torch"))
    for actual, expected in zip(kernel, definition):
        assert_close(actual, expected.to(actual).expand_as(actual))


def test_an_expanded_gradient_of_the_fused_output(device):
    inputs = draw(device, mask=mask_of(11, 4), dtype=widest_dtype(device))
    gradients = [
        torch.autograd.grad(global_local_attention(*inputs, fused_output=True, impl=impl)[4].sum(), inputs.leaves())
        for impl in ("triton", "torch")
    ]
    assert_close(*gradients)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_configuration_covers_all_channels_words_and_positions(direction, dtype):
    for channels in range(1, 257 if dtype.itemsize == 2 else 129):
        for length in (1, 16, 17, 64, 129, 256):
            sizes = attention.configuration(direction, channels, length, dtype)
            assert max(15, sizes["BLOCK_C"] / 2) < max(16, channels) <= sizes["BLOCK_C"]
            assert sizes["BLOCK_L"] * (sizes["CHUNKS"] - 1) < length <= sizes["BLOCK_L"] * sizes["CHUNKS"]
            # A backward program processes whole tiles, so that no position belongs to two programs.
            assert attention.SMALLEST_SPAN % sizes["BLOCK_N"] == 0


def test_channels_last_and_channels_first_are_not_copied(device):
    maps = torch.randn(B, C, H, W, device=device)
    for same in (maps, maps.to(memory_format=torch.channels_last)):
        assert attention._by_position(same)[0] is same
        assert attention._empty_like(same).stride() == same.stride()


def test_gradients_with_another_layout(device):
    inputs = draw(device, mask=mask_of(11, 4), dtype=widest_dtype(device))
    gradients = {}
    for impl in ("triton", "torch"):
        context = global_local_attention(*inputs, impl=impl)
        # The gradient of a sum is one expanded number, with strides of 0.
        total = context.word_context.mean(dim=1).sum() + context.sentence_context.permute(0, 2, 3, 1)[..., 0].sum()
        gradients[impl] = torch.autograd.grad(total, inputs.leaves())
    assert_close(gradients["triton"], gradients["torch"])


@pytest.mark.parametrize("used", [(1.0, 0.0), (0.0, 1.0)])
def test_gradients_of_one_context_alone(device, used):
    inputs = draw(device, mask=mask_of(11, 4), dtype=widest_dtype(device))
    (_, kernel), (_, definition) = (run(inputs, impl, maps=False, weights=used) for impl in ("triton", "torch"))
    for actual, expected in zip(kernel, definition):
        assert_close(actual, expected.to(actual).expand_as(actual))


@pytest.mark.parametrize("used", [(1.0, 1.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)])
def test_gradients_of_the_maps(device, used):
    inputs = draw(device, mask=mask_of(11, 4), dtype=widest_dtype(device))
    (_, kernel), (_, definition) = (run(inputs, impl, weights=used) for impl in ("triton", "torch"))
    for actual, expected in zip(kernel, definition):
        assert_close(actual, expected.to(actual).expand_as(actual))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_scores(device, scale):
    given = draw(device, mask=mask_of(11, 4), dtype=torch.float32)
    features = (scale * given.features.detach()).requires_grad_()
    for kernel, definition in zip(
        everything(Inputs(features, *given[1:]), "triton"), everything(Inputs(features, *given[1:]), "torch")
    ):
        assert kernel.isfinite().all()
        assert_close(kernel, definition, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("sizes", [{}, {"c": 100, "l": 70, "h": 3}])
def test_padding_has_no_influence_at_all(device, sizes, garbage):
    length = sizes.get("l", L)
    inputs = draw(device, **sizes, mask=mask_of(length, 4, length=length), dtype=torch.float32)
    changed = inputs.words.detach().clone()
    changed[1, 4:] = garbage
    results, gradients = run(inputs, "triton")
    changed_results, changed_gradients = run(inputs._replace(words=changed.requires_grad_()), "triton")
    for before, after in zip(results + gradients, changed_results + changed_gradients):
        assert (before == after).all()
    assert (results[2][1, 4:] == 0).all()
    assert (gradients[1][1, 4:] == 0).all()


# With 17 channels, the largest scores are 17, 4,352 and 1,062,500; float16 ends at 65,504.
@pytest.mark.parametrize("largest", [1, 16, 250])
@pytest.mark.parametrize("garbage", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_equals_double_precision_for_scores_of_any_size(device, dtype, garbage, largest):
    # Scores of integers are exact in float32.
    shapes, mask = ((B, 17, H, W), (B, L, 17), (B, 17)), mask_of(11, 4).to(device)
    drawn = [torch.randint(-largest, largest + 1, shape, device=device) for shape in shapes]

    def everything_in(dtype, impl):
        features, words, sentence = (tensor.to(dtype) for tensor in drawn)
        words[~mask] = garbage
        inputs = Inputs(*(leaf.requires_grad_() for leaf in (features, words, sentence)), mask)
        results, gradients = run(inputs, impl, weights=(2**-7, 2**-7, 0.0, 0.0))
        return results + gradients

    for kernel, exact in zip(everything_in(dtype, "triton"), everything_in(torch.float64, "torch")):
        # The output gradients are rounded too.
        last_place = 2 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert_close(kernel.double(), exact, rtol=0, atol=max(last_place, torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_mask_of_integers(device, dtype):
    inputs = draw(device, mask=mask_of(11, 4), dtype=torch.float32)
    converted = inputs._replace(word_mask=inputs.word_mask.to(dtype))
    for one, other in zip(everything(inputs, "triton"), everything(converted, "triton")):
        assert (one == other).all()


def test_a_sample_alone_equals_the_same_sample_in_a_batch(device):
    inputs = draw(device, b=3, mask=mask_of(11, 4, 7), dtype=torch.float32)
    together, gradients = run(inputs, "triton", maps=False)
    for b in range(3):
        one = Inputs(*(tensor[b : b + 1] for tensor in inputs))
        alone = global_local_attention(*one, fused_output=True, impl="triton")[:2]
        assert_close(tuple(alone), tuple(result[b : b + 1] for result in together), atol=0, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("fused", [False, True])
def test_every_element_is_written(device, monkeypatch, fused):
    """Memory that a kernel does not write keeps its previous content, in this test NaN."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **options):
            memory = allocate(*args, **options)
            return memory.fill_(float("nan")) if memory.is_floating_point() else memory

        return allocate_poisoned

    inputs = draw(device, c=5, h=17, w=31, mask=mask_of(11, 4), dtype=torch.float32)
    expected = everything(inputs, "triton", fused=fused)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    written = everything(inputs, "triton", fused=fused)
    assert attention._empty_like(inputs.features).isnan().all()
    for actual, clean in zip(written, expected):
        assert_close(actual, clean, atol=0, rtol=0)


def test_equal_inputs_give_bitwise_equal_results(device):
    inputs = draw(device, h=17, w=31, mask=mask_of(11, 4), dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = everything(inputs, "triton"), everything(inputs, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second):
        assert (one == other).all()


@pytest.mark.parametrize(("maps", "fused"), [(False, False), (True, False), (True, True)])
def test_gradcheck(device, maps, fused):
    if device.type == "cuda":
        pytest.skip("the kernels have no float64 on a GPU; the interpreter has")
    inputs = draw(device, h=2, w=3, l=5, mask=mask_of(5, 2, length=5))

    def function(*leaves):
        options = {"need_weights": maps, "fused_output": fused, "impl": "triton"}
        results = global_local_attention(*leaves, inputs.word_mask, **options)
        return tuple(result for result in results if result is not None)

    assert gradcheck(function, inputs.leaves(), fast_mode=True)


@pytest.mark.parametrize("options", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mask", [None, mask_of(11, 4)])
def test_opcheck(device, options, mask):
    inputs = draw(device, mask=mask, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mirror_modules.global_local_attention.default, (*inputs, *options))
    last = inputs._replace(features=inputs.features.detach().to(memory_format=torch.channels_last).requires_grad_())
    torch.library.opcheck(torch.ops.mirror_modules.global_local_attention.default, (*last, *options))


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_into_one_graph(device, compiled, fused):
    inputs = draw(device, mask=mask_of(11, 4), dtype=widest_dtype(device))
    options = {"need_weights": True, "fused_output": fused}
    context = compiled(global_local_attention)(*inputs, impl="triton", **options)
    expected = global_local_attention(*inputs, impl="torch", **options)
    assert_close(tuple(context), tuple(expected))
    gradients = []
    for c in (context, expected):
        total = (
            c.word_context.sum() + c.sentence_weights.square().sum() + (c.fused_output.square().sum() if fused else 0)
        )
        gradients.append(torch.autograd.grad(total, inputs.leaves()))
    assert_close(*gradients)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_graph_serves_all_batch_sizes(device, impl):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(global_local_attention, fullgraph=True, backend=counter)
    for batch in (3, 5, 7):
        inputs = draw(device, b=batch, mask=mask_of(*[11] * batch), dtype=torch.float32)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        attend(*inputs, impl=impl).word_context.sum().backward()
    assert counter.frame_count == 1


def test_checkpointing_changes_no_gradient(device):
    inputs = draw(device, mask=mask_of(11, 4), dtype=torch.float32)

    def objective(features, words, sentence):
        context = global_local_attention(features, words, sentence, inputs.word_mask, impl="triton")
        return context.word_context.square().sum() + context.sentence_context.sum()

    plain = torch.autograd.grad(objective(*inputs.leaves()), inputs.leaves())
    again = torch.autograd.grad(checkpoint(objective, *inputs.leaves(), use_reentrant=False), inputs.leaves())
    assert_close(plain, again, atol=0, rtol=0)


def test_autocast_casts_all_inputs(device):
    inputs = draw(device, mask=mask_of(11, 4), dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.float16):
        casts = {impl: global_local_attention(*inputs, impl=impl, need_weights=True) for impl in ("triton", "torch")}
    for kernel, definition in zip(*(cast[:4] for cast in casts.values())):
        assert kernel.dtype == definition.dtype == torch.float16
        assert_close(kernel, definition, atol=5e-3, rtol=5e-3)
    gradients = torch.autograd.grad(casts["triton"].word_context.sum(), inputs.leaves(), allow_unused=True)
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {torch.float32}


def test_a_second_derivative_raises(device):
    inputs = draw(device, mask=mask_of(11, 4), dtype=torch.float32)
    context = global_local_attention(*inputs, impl="triton")
    (gradient,) = torch.autograd.grad(context.word_context.square().sum(), inputs.features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use impl='torch'"):
        gradient.sum().backward()


def test_a_caption_without_words_has_a_context_of_zeros(device):
    """On a CPU every public function raises an error instead; on a GPU none of them checks."""
    inputs = draw(device, mask=mask_of(0, 11), dtype=torch.float32)
    _, context, _, weights, _ = torch.ops.mirror_modules.global_local_attention(*inputs, True, False)
    assert (context[0] == 0).all()
    assert (weights[0] == 0).all()
    gradients = torch.autograd.grad(context.sum() + weights.square().sum(), inputs.leaves()[:2])
    assert all((gradient[0] == 0).all() and gradient[1].abs().sum() > 0 for gradient in gradients)


@pytest.mark.gpu
def test_on_a_gpu_the_mask_forces_no_synchronization(device):
    inputs = draw(device, mask=mask_of(0, 11), dtype=torch.float32)
    global_local_attention(*inputs, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contexts = [global_local_attention(*inputs, impl=impl).word_context for impl in ("triton", "torch")]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((context[0] == 0).all() for context in contexts)


def test_empty_batches(device):
    inputs = draw(device, b=0, dtype=torch.float32)
    context = global_local_attention(*inputs, fused_output=True, impl="triton")
    assert context.word_context.shape == (0, C, H, W)
    assert context.fused_output.shape == (0, 3 * C, H, W)
    context.word_context.sum().backward()
    assert inputs.words.grad.shape == (0, L, C)


def test_the_module_uses_the_kernel(device, monkeypatch):
    calls = []
    kernel = attention.global_local_attention
    monkeypatch.setattr("mirror_modules.kernels.global_local_attention", lambda *a: calls.append(a) or kernel(*a))
    module = GlobalLocalAttention(C, 13, 17, impl="triton").to(device)
    inputs = torch.randn(B, C, H, W), torch.randn(B, L, 13), torch.randn(B, 17), mask_of(11, 4)
    context = module(*(tensor.to(device) for tensor in inputs))
    assert len(calls) == 1
    assert "global_local_attention" in type(context.word_context.grad_fn).__name__
    module.impl = "torch"
    assert_close(tuple(context[:2]), tuple(module(*(tensor.to(device) for tensor in inputs))[:2]))
    assert len(calls) == 1
