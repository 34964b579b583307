"""Triton kernels of `word_region_similarity` against its definition: on a GPU, or else in Triton's interpreter."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mirror_modules import ImageFeatures, MatchingLoss, TextFeatures
from mirror_modules.functional import word_region_similarity
from mirror_modules.kernels import similarity
from mirror_modules.kernels._launch import next_power_of_2

I, J, R, L, D = 2, 3, 7, 5, 11  # different primes: a swapped axis cannot pass


class Inputs(NamedTuple):
    regions: Tensor
    words: Tensor
    word_mask: Tensor | None = None

    def leaves(self):
        return self[:2]


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


def draw(device, i=I, j=J, r=R, l=L, d=D, mask=None, dtype=torch.float64):
    # Scaled for scores of a few units.
    leaves = [(d**-0.25 * torch.randn(shape)).to(device, dtype) for shape in ((i, r, d), (j, l, d))]
    return Inputs(*(leaf.requires_grad_() for leaf in leaves), None if mask is None else mask.to(device))


def widest_dtype(device):
    """float64 in the interpreter; on a GPU the kernels support float32 at most."""
    return torch.float32 if device.type == "cuda" else torch.float64


def everything(inputs, impl, **gammas):
    """The similarity and both gradients, given a fixed random gradient of the similarity."""
    result = word_region_similarity(*inputs, impl=impl, **gammas)
    gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result)
    return [result.detach(), *torch.autograd.grad(result, inputs.leaves(), gradient)]


def assert_within_budget(inputs):
    """The kernels' errors are at most twice those of the definition in the same precision, relative to float64."""
    exact = Inputs(*(leaf.detach().double().requires_grad_() for leaf in inputs.leaves()), inputs.word_mask)
    computed = (everything(*case) for case in [(exact, "torch"), (inputs, "triton"), (inputs, "torch")])
    for results in zip(*computed):
        assert_at_most_twice_the_error(*results)


def assert_at_most_twice_the_error(reference, kernel, definition):
    assert kernel.dtype == definition.dtype
    budget = 2 * (definition.double() - reference).abs().max() + 1e-7 * reference.abs().max()
    error = (kernel.double() - reference).abs().max()
    assert error <= budget, f"error {error:.2e}, allowed {budget:.2e}"


@pytest.fixture(params=["fused", "products"])
def path(request, device, monkeypatch):
    """Force one implementation of the forward pass on all sizes and dtypes, whatever the table says."""

    def small_tiles(length, features, *_):
        # So small that the inputs of the tests take several programs and tiles, the last of them partly filled.
        blocks = {"CAPTIONS": 2, "BLOCK_L": next_power_of_2(length), "BLOCK_R": 16}
        return blocks | {"BLOCK_D": next_power_of_2(features)}

    if request.param == "fused" and device.type == "cuda":
        pytest.skip("a GPU takes the tiles of the table only; the interpreter takes all")
    configured = small_tiles if request.param == "fused" else lambda *_: None
    monkeypatch.setattr(similarity, "fused_configuration", configured)
    return request.param


SIZES = {
    "primes": ({}, (5, 2, 1)),
    "no mask": ({}, None),
    "all but one word is padding": ({}, (1, 1, 1)),
    "one of everything": ({"i": 1, "j": 1, "r": 1, "l": 1, "d": 1}, None),
    "one region": ({"r": 1}, (5, 2, 1)),
    "aligned regions": ({"r": 16}, (5, 2, 1)),
    "several blocks of regions and features": ({"r": 1024, "l": 17, "d": 1021}, (17, 2, 1)),
    "long captions": ({"l": 256, "r": 37}, (256, 100, 1)),
}


@pytest.mark.parametrize("case", SIZES)
def test_results_and_gradients_match_the_definition(path, device, case):
    sizes, real_words = SIZES[case]
    mask = None if real_words is None else mask_of(*real_words, length=sizes.get("l", L))
    inputs = draw(device, **sizes, mask=mask, dtype=widest_dtype(device))
    for kernel, definition in zip(everything(inputs, "triton"), everything(inputs, "torch")):
        assert_close(kernel, definition)


@pytest.mark.parametrize("gammas", [(5.0, 1.0), (0.5, 20.0), (1, 1)])
def test_both_gammas(device, gammas):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=widest_dtype(device))
    names = dict(zip(("gamma_attention", "gamma_word"), gammas))
    for kernel, definition in zip(everything(inputs, "triton", **names), everything(inputs, "torch", **names)):
        assert_close(kernel, definition)


@pytest.mark.parametrize(
    ("elements", "chunks"),
    [(1, [(1, 1)] * 15), (2 * J * L * 23, [(2, 3), (2, 3), (1, 3)]), (2 * L * 23, [(1, 2), (1, 1)] * 5)],
)
def test_chunks_of_images_and_captions_change_nothing(device, monkeypatch, elements, chunks):
    inputs = draw(device, i=5, mask=mask_of(5, 2, 1), dtype=widest_dtype(device))
    whole = everything(inputs, "triton")
    monkeypatch.setattr(similarity, "ELEMENTS_PER_MAP", elements)
    sizes = [
        (len(range(5)[images]), len(range(J)[captions]))
        for images, captions in similarity._chunks(inputs.regions, inputs.words)
    ]
    assert sizes == chunks
    for one, other in zip(everything(inputs, "triton"), whole):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("length", "features", "dtype", "capability", "expected"),
    [
        (18, 256, torch.bfloat16, (9, 0), (4, 32, 32, 256, 8)),
        (18, 256, torch.bfloat16, (8, 0), None),
        (18, 256, torch.float32, (9, 0), None),
        (18, 128, torch.float16, (8, 6), (2, 32, 32, 128, 4)),
        (18, 272, torch.float16, (9, 0), None),
        (16, 144, torch.float16, (9, 0), (8, 16, 32, 256, 8)),
        (64, 48, torch.float16, (10, 0), (1, 64, 32, 64, 4)),
        (65, 48, torch.float16, (9, 0), None),
        (1, 16, torch.float16, None, (64, 1, 32, 16, 4)),
        (1, 17, torch.float16, None, None),
        (18, 64, torch.float64, None, None),
    ],
)
def test_the_fused_forward_pass_runs_where_the_table_has_an_entry(length, features, dtype, capability, expected):
    configured = similarity.fused_configuration(length, features, dtype, capability)
    names = ("CAPTIONS", "BLOCK_L", "BLOCK_R", "BLOCK_D", "num_warps")
    assert (configured and tuple(configured[name] for name in names)) == expected


@pytest.mark.parametrize(
    ("features", "dtype", "is_fused"),
    [(48, torch.float16, True), (48, torch.float32, False), (49, torch.float16, False)],
)
def test_the_forward_pass_follows_the_table(device, monkeypatch, features, dtype, is_fused):
    calls = []
    by_products = similarity._similarity_by_products
    monkeypatch.setattr(similarity, "_similarity_by_products", lambda *a: calls.append(a) or by_products(*a))
    # Several programs and tiles of the table's size, the last of them partly filled.
    mask = mask_of(*(18 - j for j in range(11)), length=18)
    regions, words, mask = draw(device, i=7, j=11, r=67, l=18, d=features, mask=mask, dtype=dtype)
    assert_at_most_twice_the_error(
        word_region_similarity(regions.double(), words.double(), mask, impl="torch"),
        word_region_similarity(regions, words, mask, impl="triton"),
        word_region_similarity(regions, words, mask, impl="torch"),
    )
    assert bool(calls) != is_fused


def test_a_grid_of_programs_is_within_the_limit_of_cuda():
    regions, words = torch.zeros(1, device="meta").expand(200_000, 49, 8), torch.zeros(1, 5, 8, device="meta")
    assert max(images.stop - images.start for images, _ in similarity._chunks(regions, words)) == 65_535


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [{}, {"r": 53, "l": 18, "d": 64}, {"r": 67, "l": 18, "d": 48}])
def test_low_precision_is_within_twice_the_error_of_the_definition(path, device, dtype, sizes):
    length = sizes.get("l", L)
    # Enough pairs for a comparison of the largest errors.
    mask = mask_of(*(1 + j % length for j in range(11)), length=length)
    assert_within_budget(draw(device, i=7, j=11, **sizes, mask=mask, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "regions", "features"), [(18, 289, 256), (77, 196, 512), (256, 1024, 1024)])
def test_on_a_gpu_within_twice_the_error_of_the_definition(device, dtype, length, regions, features):
    mask = mask_of(*(1 + 29 * j % length for j in range(11)), length=length)
    assert_within_budget(draw(device, i=7, j=11, r=regions, l=length, d=features, mask=mask, dtype=dtype))


def test_any_layout(path, device):
    given = draw(device, mask=mask_of(5, 2, 1), dtype=widest_dtype(device))
    # The layout of an image encoder's output: (I, D, R) in memory, transposed to (I, R, D).
    regions = given.regions.detach().mT.contiguous().mT.requires_grad_()
    words = given.words.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    mask = given.word_mask.mT.contiguous().mT
    for kernel, definition in zip(everything(Inputs(regions, words, mask), "triton"), everything(given, "torch")):
        assert_close(kernel, definition)


@pytest.mark.parametrize("scale", [1e2, 1e-6])
def test_extreme_scores(path, device, scale):
    given = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    inputs = Inputs(*((scale * leaf.detach()).requires_grad_() for leaf in given.leaves()), given.word_mask)
    for kernel, definition in zip(everything(inputs, "triton"), everything(inputs, "torch")):
        assert kernel.isfinite().all()
        assert_close(kernel, definition, atol=1e-4 * float(definition.abs().max()), rtol=1e-3)


def test_similarity_stays_in_its_range_when_regions_cancel(path, device):
    given = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    regions = given.regions.detach() - given.regions.detach().mean(dim=1, keepdim=True)
    words = given.words.detach()[:, :1].expand(-1, L, -1).contiguous()
    result, *gradients = everything(Inputs(regions.requires_grad_(), words.requires_grad_(), given.word_mask), "triton")
    assert (result.abs() <= 5 + torch.tensor(float(L)).log() + 1e-4).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_inputs_propagate(path, device, poison):
    given = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    regions = given.regions.detach().clone()
    regions[1, 2] = poison
    result = word_region_similarity(regions, *given[1:], impl="triton")
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


@pytest.mark.parametrize("gamma", [8.0, -8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sharpest_supported_attention(path, device, gamma, dtype):
    inputs = draw(device, i=5, j=7, r=49, mask=mask_of(5, 2, 1, 3, 4, 5, 2), dtype=dtype)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-3, "rtol": 5e-2}
    for kernel, definition in zip(
        everything(inputs, "triton", gamma_attention=gamma), everything(inputs, "torch", gamma_attention=gamma)
    ):
        assert_close(kernel, definition, **tolerance)
    with pytest.raises(NotImplementedError, match="only impl='torch' supports gamma_attention beyond 8"):
        everything(inputs, "triton", gamma_attention=1.01 * gamma)


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("-inf"), float("nan")])
def test_padding_has_no_influence_at_all(path, device, garbage):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    changed = inputs.words.detach().clone()
    changed[~inputs.word_mask] = garbage
    before, after = everything(inputs, "triton"), everything(inputs._replace(words=changed.requires_grad_()), "triton")
    for one, other in zip(before, after):
        assert (one == other).all()
    assert (before[2][~inputs.word_mask] == 0).all()


# With 17 features, the largest scores are 17, 4,352 and 1,062,500; float16 ends at 65,504.
@pytest.mark.parametrize("largest", [1, 16, 250])
@pytest.mark.parametrize("garbage", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("gamma", [4.0, -8.0])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_equals_double_precision_for_scores_of_any_size(path, device, dtype, gamma, garbage, largest):
    # Scores of integers are exact in float32.
    drawn = [torch.randint(-largest, largest + 1, (n, m, 17), device=device) for n, m in ((I, R), (J, L))]
    mask = mask_of(5, 2, 1).to(device)

    def everything_in(dtype, impl):
        regions, words = (tensor.to(dtype) for tensor in drawn)
        words[~mask] = garbage
        inputs = Inputs(regions.requires_grad_(), words.requires_grad_(), mask)
        return everything(inputs, impl, gamma_attention=gamma)

    numbers = torch.finfo(dtype)
    for kernel, exact in zip(everything_in(dtype, "triton"), everything_in(torch.float64, "torch")):
        # Two roundings, of the shares and of the context or the gradient; and the gradient of a score, a product with
        # the features, may lie below the normal numbers, where rounding errors are absolute.
        atol = 2 * numbers.eps * float(exact.abs().max()) + largest * numbers.smallest_normal * numbers.eps
        assert_close(kernel.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_float32(device_type, dtype):
    with FakeTensorMode():  # shapes and dtypes alone, which need no GPU
        words, regions = (torch.empty(size, dtype=dtype, device=device_type) for size in ((J, L, D), (I, R, D)))
        scores = similarity._scores(words, regions)
    assert scores.dtype == torch.float32
    assert scores.shape == (J * L, I, R)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_mask_of_integers(device, dtype):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    converted = inputs._replace(word_mask=inputs.word_mask.to(dtype))
    for one, other in zip(everything(inputs, "triton"), everything(converted, "triton")):
        assert (one == other).all()


def test_a_pair_alone_equals_the_same_pair_in_a_batch(path, device):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    together = word_region_similarity(*inputs, impl="triton")
    for i in range(I):
        for j in range(J):
            alone = word_region_similarity(
                inputs.regions[i : i + 1], inputs.words[j : j + 1], inputs.word_mask[j : j + 1], impl="triton"
            )
            assert_close(alone, together[i : i + 1, j : j + 1], atol=1e-5, rtol=0)


def test_every_element_is_written(path, device, monkeypatch):
    """Memory that a kernel does not write keeps its previous content, in this test NaN."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **options):
            memory = allocate(*args, **options)
            return memory.fill_(float("nan")) if memory.is_floating_point() else memory

        return allocate_poisoned

    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    expected = everything(inputs, "triton")
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for actual, clean in zip(everything(inputs, "triton"), expected):
        assert_close(actual, clean, atol=0, rtol=0)


def test_equal_inputs_give_bitwise_equal_results(path, device):
    inputs = draw(device, r=289, l=18, mask=mask_of(18, 2, 1, length=18), dtype=torch.float32)
    for one, other in zip(everything(inputs, "triton"), everything(inputs, "triton")):
        assert (one == other).all()


def test_gradcheck(path, device):
    if device.type == "cuda":
        pytest.skip("the kernels have no float64 on a GPU; the interpreter has")
    inputs = draw(device, r=3, l=4, d=2, mask=mask_of(4, 2, 1, length=4))

    def function(*leaves):
        return word_region_similarity(*leaves, inputs.word_mask, impl="triton")

    assert gradcheck(function, inputs.leaves(), fast_mode=True)


def test_opcheck(path, device):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    torch.library.opcheck(torch.ops.mirror_modules.word_region_similarity.default, (*inputs, 4.0, 5.0))


def test_compiles_into_one_graph(device, compiled):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=widest_dtype(device))
    result = compiled(word_region_similarity)(*inputs, impl="triton")
    expected = word_region_similarity(*inputs, impl="torch")
    assert_close(result, expected)
    gradients = [torch.autograd.grad(r.square().sum(), inputs.leaves()) for r in (result, expected)]
    assert_close(*gradients)


def test_checkpointing_changes_no_gradient(device):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)

    def objective(regions, words):
        return word_region_similarity(regions, words, inputs.word_mask, impl="triton").square().sum()

    plain = torch.autograd.grad(objective(*inputs.leaves()), inputs.leaves())
    again = torch.autograd.grad(checkpoint(objective, *inputs.leaves(), use_reentrant=False), inputs.leaves())
    assert_close(plain, again, atol=0, rtol=0)


def test_autocast_casts_all_inputs(device):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.float16):
        kernel, definition = (word_region_similarity(*inputs, impl=impl) for impl in ("triton", "torch"))
    assert kernel.dtype == definition.dtype == torch.float32
    assert_close(kernel, definition, atol=5e-3, rtol=5e-3)
    assert not torch.equal(kernel, word_region_similarity(*inputs, impl="triton"))
    gradients = torch.autograd.grad(kernel.sum(), inputs.leaves())
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_a_second_derivative_raises(device):
    inputs = draw(device, mask=mask_of(5, 2, 1), dtype=torch.float32)
    result = word_region_similarity(*inputs, impl="triton")
    (gradient,) = torch.autograd.grad(result.square().sum(), inputs.regions, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use impl='torch'"):
        gradient.sum().backward()


def test_a_caption_without_words_matches_no_image(path, device):
    """On a CPU every public function raises an error instead; on a GPU none of them checks."""
    inputs = draw(device, mask=mask_of(5, 0, 1), dtype=torch.float32)
    result = torch.ops.mirror_modules.word_region_similarity(*inputs, 4.0, 5.0)
    assert (result[:, 1] < -1e37).all()
    assert result[:, [0, 2]].isfinite().all()
    grad_regions, grad_words = torch.autograd.grad(result.sum(), inputs.leaves())
    assert grad_regions.isfinite().all()
    assert (grad_words[1] == 0).all()


@pytest.mark.parametrize("empty", [{"i": 0}, {"j": 0}])
def test_empty_batches(path, device, empty):
    inputs = draw(device, **empty, dtype=torch.float32)
    result = word_region_similarity(*inputs, impl="triton")
    assert result.shape == (empty.get("i", I), empty.get("j", J))
    result.sum().backward()
    assert (inputs.regions.grad == 0).all()


def test_the_loss_uses_the_kernel(device, monkeypatch):
    calls = []
    kernel = similarity.word_region_similarity
    monkeypatch.setattr("mirror_modules.kernels.word_region_similarity", lambda *a: calls.append(a) or kernel(*a))
    inputs = draw(device, i=3, mask=mask_of(5, 2, 1), dtype=torch.float32)
    image = ImageFeatures(inputs.regions, torch.randn(3, D, device=device))
    text = TextFeatures(inputs.words, torch.randn(3, D, device=device))
    terms = MatchingLoss(impl="triton")(image, text, inputs.word_mask)
    assert len(calls) == 1
    assert_close(terms.total, MatchingLoss(impl="torch")(image, text, inputs.word_mask).total)
    assert len(calls) == 1
