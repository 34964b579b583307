"""The kernel distance against sums over pairs, known values, and torchmetrics."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from mirror_modules.functional import kernel_distance

N, M, D = 13, 11, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, **options):
    """Normally distributed features in float64, of which every step is computed in float64."""
    return torch.randn(*shape, dtype=torch.float64, **options)


def polynomial(x, y):
    return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3


def rbf(bandwidth):
    return lambda x, y: math.exp(-sum((p - q) ** 2 for p, q in zip(x, y)) / (2 * bandwidth**2))


def discrepancy_by_loops(a, b, kernel=polynomial, estimate="unbiased"):
    a, b = a.double().tolist(), b.double().tolist()
    biased = estimate == "biased"
    pairs_a = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if biased or i != j]
    pairs_b = [kernel(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if biased or i != j]
    between = [kernel(x, y) for x in a for y in b]
    return sum(pairs_a) / len(pairs_a) + sum(pairs_b) / len(pairs_b) - 2 * sum(between) / len(between)


def test_matches_the_loops():
    a, b = draw(N, D), draw(M, D) + 0.5
    draws = seeded(3)
    expected = []
    for _ in range(3):
        rows_a, rows_b = (torch.randperm(count, generator=draws)[:7] for count in (N, M))
        expected.append(discrepancy_by_loops(a[rows_a], b[rows_b]))
    mean = sum(expected) / 3
    result = kernel_distance(a, b, subsets=3, subset_size=7, generator=seeded(3))
    assert result.mean == pytest.approx(mean, rel=1e-10)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in expected) / 3)
    assert result.standard_deviation == pytest.approx(deviation, rel=1e-10)
    assert result.standard_error is None


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_the_error_of_complete_sets_matches_the_loops(kernel, estimate):
    """The jackknife: every estimate without one image, computed anew."""
    a, b = draw(N, D), draw(M, D) + 0.5
    options = {} if kernel == "polynomial" else {"bandwidth": 1.5}
    function = polynomial if kernel == "polynomial" else rbf(1.5)
    result = kernel_distance(a, b, kernel=kernel, estimate=estimate, subset_size=None, scale=10, **options)
    variance = 0.0
    for count, remove in ((N, lambda i: (remove_row(a, i), b)), (M, lambda i: (a, remove_row(b, i)))):
        without = [discrepancy_by_loops(*remove(i), function, estimate) for i in range(count)]
        mean = sum(without) / count
        variance += (count - 1) / count * sum((value - mean) ** 2 for value in without)
    assert result.mean == pytest.approx(10 * discrepancy_by_loops(a, b, function, estimate), rel=1e-10)
    assert result.standard_error == pytest.approx(10 * math.sqrt(variance), rel=1e-8)


def remove_row(x, i):
    return torch.cat((x[:i], x[i + 1 :]))


def test_the_error_of_complete_sets_is_that_of_new_samples():
    results = []
    for i in range(200):
        a, b = torch.randn(101, D, generator=seeded(i)), 0.3 + torch.randn(67, D, generator=seeded(1000 + i))
        results.append(kernel_distance(a, b, subset_size=None))
    spread = torch.tensor([result.mean for result in results]).std()
    error = torch.tensor([result.standard_error for result in results]).square().mean().sqrt()
    assert float(error / spread) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("count", "other"), [(2, N), (N, 2), (2, 2)])
def test_two_images_have_no_error(count, other):
    assert kernel_distance(torch.randn(count, D), torch.randn(other, D), subset_size=None).standard_error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subset_size", [101, None])
def test_features_of_less_precision_lose_nothing_that_matters(dtype, subset_size):
    """Positive features, as those of Inception: the distance is a small difference of large means."""
    a, b = (
        torch.rand(211, 2048, generator=seeded()).to(dtype),
        1.01 * torch.rand(307, 2048, generator=seeded(1)).to(dtype),
    )
    options = {"subsets": 3, "subset_size": subset_size}
    expected = kernel_distance(a.double(), b.double(), **options, generator=seeded())
    result = kernel_distance(a, b, **options, generator=seeded())
    assert result.mean == pytest.approx(expected.mean, abs=1e-6)
    assert result.standard_deviation == pytest.approx(expected.standard_deviation, abs=1e-6)
    if subset_size is None:
        assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-3)


@pytest.mark.parametrize("setting", ["autocast", "precision"])
def test_settings_for_faster_products_have_no_influence(setting):
    a, b = torch.rand(41, 64, generator=seeded()), torch.rand(43, 64, generator=seeded(1))
    expected = kernel_distance(a, b, subset_size=None)
    before = torch.get_float32_matmul_precision()
    try:
        if setting == "precision":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            result = kernel_distance(a, b, subset_size=None)
    finally:
        torch.set_float32_matmul_precision(before)
    assert tuple(result) == pytest.approx(tuple(expected), abs=1e-6)


def test_subsets_of_all_images_equal_the_whole():
    a, b = draw(N, D), draw(N, D)
    result = kernel_distance(a, b, subsets=7, subset_size=N)
    assert tuple(result[:2]) == pytest.approx((discrepancy_by_loops(a, b), 0.0), abs=1e-12)


def test_constant_sets_match_the_closed_form():
    # k(0, 0) = 1, k(x, x) = (1 + 1)^3, k(0, x) = 1.
    zeros, ones = torch.zeros(N, D), torch.ones(M, D)
    assert tuple(kernel_distance(zeros, ones, subset_size=7)[:2]) == pytest.approx((1 + 8 - 2, 0.0))
    assert tuple(kernel_distance(ones, ones, subset_size=7)[:2]) == pytest.approx((0.0, 0.0))


def test_shifted_gaussians_match_the_closed_form():
    # One feature: E (xy + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3, with the moments of N(0, 1) and N(1, 1).
    moments = [
        {1: 0, 2: 1, 3: 0},
        {1: 1, 2: 2, 3: 4},
    ]
    same_a, same_b, between = (
        1 + 3 * x[1] * y[1] + 3 * x[2] * y[2] + x[3] * y[3]
        for x, y in ((moments[0], moments[0]), (moments[1], moments[1]), (moments[0], moments[1]))
    )
    a, b = torch.randn(10007, 1, generator=seeded()), 1 + torch.randn(10007, 1, generator=seeded(1))
    result = kernel_distance(a, b, subsets=53, subset_size=503, generator=seeded(2))
    assert result.mean == pytest.approx(same_a + same_b - 2 * between, rel=0.1)


def test_the_estimate_is_unbiased_at_zero():
    # Around 0, and therefore also negative; a biased estimate would always be positive.
    distances = [
        kernel_distance(torch.randn(101, D, generator=g), torch.randn(101, D, generator=g), subsets=1, subset_size=101)
        for g in map(seeded, range(50))
    ]
    values = torch.tensor([distance.mean for distance in distances])
    assert values.mean().abs() < 3 * values.std() / 50**0.5
    assert (values < 0).any()


def test_a_generator_reproduces_the_draw():
    a, b = torch.randn(N, D), torch.randn(M, D)
    results = [kernel_distance(a, b, subsets=2, subset_size=3, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


CMMD = {"kernel": "rbf", "estimate": "biased", "scale": 1000, "subset_size": None}


def kid_of_one_subset(a, b):
    """KID of two complete sets of the same size, from three kernel matrices."""
    a, b = a.double(), b.double()
    within_a, within_b, between = ((x @ y.mT / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    pairs = len(a) * (len(a) - 1)
    same_a, same_b = ((kernel.sum() - kernel.diagonal().sum()) / pairs for kernel in (within_a, within_b))
    return same_a + same_b - 2 * between.mean()


@pytest.mark.parametrize(("count", "size"), [(2, 2), (N, 7), (211, 101)])
@pytest.mark.parametrize("features", [1, D, 67])
def test_kid_is_that_of_three_kernel_matrices(count, size, features):
    a, b = draw(count, features), draw(count, features) + 0.5
    draws, distances = seeded(5), []
    for _ in range(3):
        rows_a, rows_b = (torch.randperm(count, generator=draws)[:size] for _ in "ab")
        distances.append(kid_of_one_subset(a[rows_a], b[rows_b]))
    expected = torch.stack(distances)
    result = kernel_distance(a, b, subsets=3, subset_size=size, generator=seeded(5))
    moments = (float(expected.mean()), float(expected.std(correction=0)))
    assert tuple(result[:2]) == pytest.approx(moments, rel=1e-10, abs=1e-12)
    assert result.standard_error is None


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"kernel": "polynomial"}, polynomial),
        ({"kernel": "rbf"}, rbf(10)),
        ({"kernel": "rbf", "bandwidth": None}, rbf(10)),
        ({"kernel": "rbf", "bandwidth": 10.0}, rbf(10)),
        ({"kernel": "rbf", "bandwidth": 1}, rbf(1)),
        ({"kernel": "rbf", "bandwidth": 0.3}, rbf(0.3)),
    ],
)
def test_complete_sets_match_the_loops(options, kernel, estimate):
    a, b = draw(N, D), draw(M, D) + 0.5
    expected = discrepancy_by_loops(a, b, kernel, estimate)
    result = kernel_distance(a, b, **options, estimate=estimate, subset_size=None)
    assert tuple(result[:2]) == pytest.approx((expected, 0.0), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
def test_subsets_match_the_loops_under_the_rbf_kernel(estimate):
    a, b = torch.randn(N, D), torch.randn(M, D) + 0.5
    draws, expected = seeded(3), []
    for _ in range(3):
        rows_a, rows_b = (torch.randperm(count, generator=draws)[:7] for count in (N, M))
        expected.append(discrepancy_by_loops(a[rows_a], b[rows_b], rbf(2), estimate))
    options = {"kernel": "rbf", "bandwidth": 2, "estimate": estimate, "subsets": 3, "subset_size": 7}
    result = kernel_distance(a, b, **options, generator=seeded(3))
    mean = sum(expected) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in expected) / 3)
    assert tuple(result[:2]) == pytest.approx((mean, deviation), rel=1e-10)


def test_cmmd_matches_the_loops():
    a, b = (F.normalize(torch.randn(count, D) + shift, dim=1) for count, shift in ((N, 0), (M, 1)))
    expected = 1000 * discrepancy_by_loops(a, b, rbf(10), "biased")
    assert tuple(kernel_distance(a, b, **CMMD)[:2]) == pytest.approx((expected, 0.0), rel=1e-10)


def test_cmmd_of_constant_sets_matches_the_closed_form():
    # Perpendicular features of length 1 have the squared distance 2.
    a, b = torch.eye(D)[0].expand(N, D), torch.eye(D)[1].expand(M, D)
    assert kernel_distance(a, b, **CMMD).mean == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-10)
    assert kernel_distance(a, a, **CMMD).mean == 0.0


def test_shifted_gaussians_match_the_closed_form_under_the_rbf_kernel():
    # E exp(-|x - y|^2 / 2s^2) = (s^2 / (s^2 + 2))^(D/2) exp(-|shift|^2 / (2 (s^2 + 2))) for two normal distributions.
    bandwidth, shift = 2.0, 1.5
    variance = bandwidth**2 + 2
    expected = 2 * (bandwidth**2 / variance) ** (D / 2) * (1 - math.exp(-D * shift**2 / (2 * variance)))
    a, b = torch.randn(2003, D, generator=seeded()), shift + torch.randn(1009, D, generator=seeded(1))
    result = kernel_distance(a, b, kernel="rbf", bandwidth=bandwidth, subset_size=None)
    assert result.mean == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("options", [{"kernel": "polynomial"}, {"kernel": "rbf", "bandwidth": 1}])
def test_the_biased_estimate_is_higher_by_the_pairs_of_an_image_with_itself(options):
    a, b = torch.randn(N, D, dtype=torch.float64), torch.randn(M, D, dtype=torch.float64)
    kernel = polynomial if options["kernel"] == "polynomial" else rbf(1)
    excess = 0
    for rows in (a.tolist(), b.tolist()):
        itself = [kernel(x, x) for x in rows]
        others = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        excess += (sum(itself) / len(itself) - sum(others) / len(others)) / len(rows)
    unbiased, biased = (
        kernel_distance(a, b, **options, estimate=estimate, subset_size=None).mean
        for estimate in ("unbiased", "biased")
    )
    assert biased - unbiased == pytest.approx(excess, rel=1e-9)


def test_the_biased_estimate_is_never_negative():
    for seed in range(50):
        a = torch.randn(17, D, generator=seeded(seed))
        shuffled = a[torch.randperm(17, generator=seeded(seed))]  # the same set, summed in another order
        assert 0 <= kernel_distance(a, shuffled, **CMMD).mean < 1e-10
        assert kernel_distance(a, torch.randn(17, D, generator=seeded(seed + 50)), **CMMD).mean > 0


def test_cmmd_is_nearly_the_distance_between_the_means():
    # k = 1 - |x - y|^2 / 200 to within 0.0002 for features of length 1: the spread hardly counts.
    wide, narrow = (F.normalize(spread * torch.randn(1009, D) + 1, dim=1).double() for spread in (0.8, 0.1))
    shift = (wide.mean(dim=0) - narrow.mean(dim=0)).square().sum()
    assert kernel_distance(wide, narrow, **CMMD).mean == pytest.approx(10 * float(shift), abs=0.4)
    opposite = torch.cat([wide, -wide]), torch.cat([narrow, -narrow])  # both means are zero
    assert kernel_distance(*opposite, **CMMD).mean < 0.05


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
@pytest.mark.parametrize("block", [1, 30, 7 * 101, 2**24])
def test_the_block_size_has_no_influence(monkeypatch, kernel, estimate, block):
    a, b = draw(101, D), draw(53, D) + 1
    options = {"kernel": kernel, "estimate": estimate, "subset_size": None}
    expected = kernel_distance(a, b, **options)
    monkeypatch.setattr(importlib.import_module("mirror_modules.metrics.kernel_distance"), "LARGEST_BLOCK", block)
    assert tuple(kernel_distance(a, b, **options)[:2]) == pytest.approx(tuple(expected[:2]), rel=1e-10)


def test_complete_sets_draw_nothing():
    a, b, random = torch.randn(N, D), torch.randn(M, D), seeded()
    before = random.get_state()
    results = {kernel_distance(a, b, subsets=subsets, subset_size=None, generator=random) for subsets in (1, 100)}
    assert len(results) == 1
    assert torch.equal(random.get_state(), before)


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf", "estimate": "biased"}])
def test_the_scale_is_a_factor_of_mean_and_deviation(options):
    a, b = torch.randn(N, D), torch.randn(M, D)
    options = {**options, "subsets": 3, "subset_size": 7}
    result, scaled = (kernel_distance(a, b, **options, scale=scale, generator=seeded()) for scale in (1.0, 1000))
    assert tuple(scaled[:2]) == pytest.approx([1000 * value for value in result[:2]])
    assert result.standard_deviation > 0


def test_the_rbf_kernel_depends_on_distances_only():
    a, b = torch.randn(N, D, dtype=torch.float64), torch.randn(M, D, dtype=torch.float64)
    options = {"kernel": "rbf", "bandwidth": 1, "subset_size": None}
    expected = kernel_distance(a, b, **options).mean
    assert kernel_distance(a + 100, b + 100, **options).mean == pytest.approx(expected, rel=1e-9)
    scaled = kernel_distance(1e-9 * a, 1e-9 * b, **{**options, "bandwidth": 1e-9}).mean
    assert scaled == pytest.approx(expected, rel=1e-9)


def test_the_rbf_kernel_is_at_most_one_far_from_the_origin():
    # The rounding errors of these squared distances are far above the distances.
    a, b = 1e9 + torch.randn(N, D, dtype=torch.float64), 1e9 + torch.randn(M, D, dtype=torch.float64)
    for estimate in ("unbiased", "biased"):
        assert abs(kernel_distance(a, b, kernel="rbf", bandwidth=1, estimate=estimate, subset_size=None).mean) <= 2


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"kernel must be one of 'polynomial', 'rbf', but it is 'gaussian'", {"kernel": "gaussian"}),
        (r"estimate must be one of 'unbiased', 'biased', but it is 'v-statistic'", {"estimate": "v-statistic"}),
        (r"bandwidth=10\.0 needs kernel='rbf'; the polynomial kernel has none", {"bandwidth": 10.0}),
        (r"bandwidth must be above 0, but it is 0", {"kernel": "rbf", "bandwidth": 0}),
        (r"bandwidth must be above 0, but it is -1\.5", {"kernel": "rbf", "bandwidth": -1.5}),
        (r"bandwidth must be a finite number, but it is nan", {"kernel": "rbf", "bandwidth": math.nan}),
        (r"scale must be above 0, but it is 0\.0", {"scale": 0.0}),
        (r"scale must be a finite number, but it is '1000'", {"scale": "1000"}),
        (r"subsets must be a whole number of at least 1, but it is 0", {"subsets": 0, "subset_size": None}),
        (r"generator must be a torch\.Generator or None", {"generator": 0, "subset_size": None}),
    ],
)
def test_invalid_options_raise(message, options):
    with pytest.raises(ValueError, match="kernel_distance: .*" + message):
        kernel_distance(torch.ones(N, D), torch.ones(M, D), **{"subset_size": 3, **options})


class GivenFeatures(nn.Module):
    """Stands in for Inception: images are features already."""

    def forward(self, images):
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric")
@pytest.mark.parametrize("size", [17, 64])
def test_agrees_with_torchmetrics(size):
    a, b = torch.randn(211, size), 1.3 * torch.randn(211, size) + 0.2
    reference = KernelInceptionDistance(feature=GivenFeatures(), subsets=2, subset_size=211)
    reference.update(a, real=True)
    reference.update(b, real=False)
    mean, _ = reference.compute()
    assert kernel_distance(a, b, subsets=2, subset_size=211).mean == pytest.approx(float(mean), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_float64_for_every_dtype(dtype):
    a, b = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(M, D, dtype=dtype)
    result = kernel_distance(a, b, subset_size=7, generator=seeded())
    expected = kernel_distance(a.detach().double(), b.double(), subset_size=7, generator=seeded())
    assert tuple(result[:2]) == pytest.approx(tuple(expected[:2]), rel=1e-6)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"features_a must be \(N, D\), but they are \(13,\)",
            lambda: kernel_distance(torch.ones(N), torch.ones(N, D)),
        ),
        (
            r"features_b must be \(M, D\) with M at least 2, but they are \(1, 5\); pass more of them",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(1, D)),
        ),
        (
            r"features_a must be floating point, but they are torch\.int64",
            lambda: kernel_distance(torch.ones(N, D).long(), torch.ones(N, D)),
        ),
        (
            r"features_a are \(13, 5\) and features_b \(11, 7\); both need the same number of features",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, 7)),
        ),
        (
            r"subset_size=1000 exceeds the 11 images of the smaller set; pass more images, or lower it",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D)),
        ),
        (
            r"subset_size=12 exceeds the 11 images of the smaller set",
            lambda: kernel_distance(torch.ones(M, D), torch.ones(N, D), subset_size=12),
        ),
        (
            r"subset_size must be at least 2, but it is 1",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subset_size=1),
        ),
        (
            r"subsets must be a whole number of at least 1, but it is 0",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subsets=0),
        ),
        (
            r"subsets must be a whole number of at least 1, but it is 3\.5",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subsets=3.5),
        ),
        (
            r"subset_size must be a whole number of at least 1, but it is 5\.0",
            lambda: kernel_distance(torch.ones(N, D), torch.ones(M, D), subset_size=5.0),
        ),
        (
            r"features_a must be a tensor, but it is a list",
            lambda: kernel_distance([[1.0, 2.0]], torch.ones(M, D)),
        ),
    ],
)
def test_invalid_arguments_raise(message, call):
    with pytest.raises(ValueError, match="kernel_distance: .*" + message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinite_features_raise(which, value):
    features = [torch.randn(N, D), torch.randn(M, D)]
    features[which][3, 2] = value
    name = "features_" + "ab"[which]
    with pytest.raises(ValueError, match=rf"kernel_distance: {name} contain NaN or infinite values"):
        kernel_distance(*features, subset_size=3)
