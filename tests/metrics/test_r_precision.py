"""R-precision against ranks counted in loops, and against known values."""

import importlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirror_modules.functional import expected_hits, r_precision, r_precision_folds
from mirror_modules.metrics._candidates import draw_captions

N, D = 13, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hits_by_loops(images, sentences, candidates_of):
    """Probability that each image's own caption is among its first k, k = 1, 2, 3; ties in random order."""
    rows = []
    for i, image in enumerate(images):
        own = image @ sentences[i] / (image.norm() * sentences[i].norm())
        better = ties = 0
        for j in candidates_of[i]:
            score = image @ sentences[j] / (image.norm() * sentences[j].norm())
            if abs(score - own) < 1e-9:
                ties += 1
            elif score > own:
                better += 1
        # The own caption ranks after the better ones, at any position among the tied ones.
        ranks = [better + 1 + place for place in range(ties + 1)]
        rows.append([sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 2, 3)])
    return rows


def expected_of(images, sentences, candidates_of):
    rows = hits_by_loops(images.double(), sentences.double(), candidates_of)
    means = [sum(column) / len(rows) for column in zip(*rows)]
    variance = sum((row[0] - means[0]) ** 2 for row in rows) / (len(rows) - 1)
    return [*means, math.sqrt(variance / len(rows))]


@given(st.integers(0, 2**32), st.booleans())
def test_matches_the_loops_where_every_caption_is_a_candidate(seed, coarse):
    images, sentences = torch.randn(N, D, generator=seeded(seed)), torch.randn(N, D, generator=seeded(seed + 1))
    if coarse:  # few distinct captions: many ties
        sentences = sentences[torch.randint(3, (N,), generator=seeded(seed))]
    others = [[j for j in range(N) if j != i] for i in range(N)]
    result = r_precision(images, sentences, candidates=N)
    assert list(result) == pytest.approx(expected_of(images, sentences, others), abs=1e-9)


def test_matches_the_loops_with_classes_of_equal_size():
    images, sentences, classes = torch.randn(12, D), torch.randn(12, D), torch.arange(12) // 3
    others = [[j for j in range(12) if classes[j] != classes[i]] for i in range(12)]
    result = r_precision(images, sentences, classes, candidates=10)
    assert list(result) == pytest.approx(expected_of(images, sentences, others), abs=1e-9)


def test_matches_the_loops_with_several_captions_of_an_image():
    images, sentences, photographs = torch.randn(15, D), torch.randn(15, D), torch.arange(15) % 5
    others = [[j for j in range(15) if photographs[j] != photographs[i]] for i in range(15)]
    result = r_precision(images, sentences, image_ids=photographs, candidates=13)
    assert list(result) == pytest.approx(expected_of(images, sentences, others), abs=1e-9)


def test_matches_the_loops_with_both_image_ids_and_class_ids():
    images, sentences = torch.randn(15, D), torch.randn(15, D)
    photographs, classes = torch.arange(15) % 5, torch.arange(15) // 5
    others = [
        [j for j in range(15) if photographs[j] != photographs[i] and classes[j] != classes[i]] for i in range(15)
    ]
    assert {len(row) for row in others} == {8}
    result = r_precision(images, sentences, classes, image_ids=photographs, candidates=9)
    assert list(result) == pytest.approx(expected_of(images, sentences, others), abs=1e-9)


def test_captions_of_the_same_image_are_never_candidates():
    # Caption i equals all captions of its photograph; only one of them can tie.
    photographs = torch.arange(N) % 3
    features = torch.eye(3)[photographs]
    assert r_precision(features, features, image_ids=photographs, candidates=8).top1 == 1.0
    # A separate class for every row excludes nothing, so only image_ids do.
    assert r_precision(features, features, torch.arange(N), image_ids=photographs, candidates=8).top1 == 1.0
    assert r_precision(features, features, photographs, image_ids=torch.arange(N), candidates=8).top1 == 1.0


@pytest.mark.parametrize("candidates", [4, 11, 80])  # few of the captions, and many
@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_the_block_size_has_no_influence_on_the_draw(monkeypatch, block, candidates):
    images, sentences, classes = torch.randn(101, D), torch.randn(101, D), torch.arange(101) % 7
    expected = r_precision(images, sentences, classes, candidates=candidates, generator=seeded())
    module = importlib.import_module("mirror_modules.metrics.r_precision")
    monkeypatch.setattr(module, "LARGEST_BLOCK", block)
    monkeypatch.setattr(module, "CACHED", block)
    assert r_precision(images, sentences, classes, candidates=candidates, generator=seeded()) == expected


@pytest.mark.parametrize("distinct", [101, 7])
@pytest.mark.parametrize("grouped", [False, True])
def test_matches_the_loops_over_few_of_the_captions(monkeypatch, grouped, distinct):
    images = torch.randn(101, D)
    sentences = (images + torch.randn(101, D))[torch.arange(101) % distinct]
    ids = (torch.arange(101) % 5, torch.arange(101) // 2) if grouped else (None, None)
    module = importlib.import_module("mirror_modules.metrics.r_precision")
    drawn = []

    def record(*arguments):
        drawn.append(draw_captions(*arguments))
        return drawn[-1]

    monkeypatch.setattr(module, "draw_captions", record)
    result = r_precision(images, sentences, ids[0], image_ids=ids[1], candidates=4, generator=seeded())
    assert list(result) == pytest.approx(expected_of(images, sentences, drawn[0].tolist()), abs=1e-9)


def test_few_and_many_candidates_have_the_same_expectation(monkeypatch):
    images = torch.randn(997, D, generator=seeded())
    sentences = images + torch.randn(997, D, generator=seeded(1))
    module = importlib.import_module("mirror_modules.metrics.r_precision")
    few = r_precision(images, sentences, candidates=50, generator=seeded())
    monkeypatch.setattr(module, "_score_few", module._score_many)
    many = r_precision(images, sentences, candidates=50, generator=seeded())
    assert few.top1 != many.top1  # other draws
    expected = expected_hits(images, sentences, candidates=50)
    for result in (few, many):
        assert result.top1 == pytest.approx(float(expected.mean()), abs=4 * result.standard_error)


def test_identical_features_are_always_retrieved():
    features = torch.randn(211, 17)
    assert tuple(r_precision(features, features)) == (1.0, 1.0, 1.0, 0.0)


def test_random_features_score_at_chance():
    result = r_precision(torch.randn(2003, 17), torch.randn(2003, 17), candidates=20, generator=seeded())
    for precision, chance in zip(result, (1 / 20, 2 / 20, 3 / 20)):
        assert precision == pytest.approx(chance, abs=4 * math.sqrt(chance / 2003))
    assert result.standard_error == pytest.approx(math.sqrt(result.top1 * (1 - result.top1) / 2003), rel=0.01)


@pytest.mark.parametrize("features", [torch.ones(211, 17), torch.zeros(211, 17), torch.full((211, 17), 1e-3)])
@pytest.mark.parametrize("candidates", [2, 3, 100])
def test_constant_features_score_exactly_at_chance(features, candidates):
    result = r_precision(features, features, candidates=candidates)
    expected = [float(min(Fraction(k, candidates), Fraction(1))) for k in (1, 2, 3)]
    assert list(result[:3]) == pytest.approx(expected, abs=1e-12)
    assert result.standard_error == pytest.approx(0, abs=1e-12)


def test_captions_of_other_images_are_not_retrieved():
    features = torch.eye(N)
    assert r_precision(features, features.roll(1, dims=0), candidates=N).top1 < 2 / N


def test_lengths_of_features_have_no_influence():
    images, sentences = torch.randn(N, D), torch.randn(N, D)
    scaled = r_precision(images * torch.rand(N, 1).add(0.1), 1000 * sentences, candidates=N)
    assert tuple(scaled) == tuple(r_precision(images, sentences, candidates=N))


@pytest.mark.parametrize("scale", [1e-300, 1e-22, 1e200])
def test_extreme_scales_change_nothing(scale):
    images, sentences = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    expected = r_precision(images, sentences, candidates=N)
    assert tuple(r_precision(images * scale, sentences, candidates=N)) == tuple(expected)
    assert tuple(r_precision(images, sentences * scale, candidates=N)) == tuple(expected)


def test_captions_of_the_same_class_are_never_candidates():
    # Caption i equals the captions of its class; only a candidate of the same class can tie.
    classes = torch.arange(N) % 3
    features = torch.eye(3)[classes]
    assert r_precision(features, features, classes, candidates=8).top1 == 1.0
    assert r_precision(features, features, candidates=N).top1 < 0.5


def test_the_defaults_are_the_protocol_of_clip_r_precision():
    # 110 captions of 10 classes: the 99 mismatched captions of each image are all those of the other classes.
    classes = torch.arange(110) % 10
    captions = torch.randn(110, 17, dtype=torch.float64)
    images = captions + 1.5 * torch.randn(110, 17, dtype=torch.float64)
    hits = []
    for i, image in enumerate(images):
        ranked = [i, *(j for j in range(110) if classes[j] != classes[i])]
        assert len(ranked) == 100
        cosines = [float(image @ captions[j] / (image.norm() * captions[j].norm())) for j in ranked]
        hits.append(max(range(100), key=cosines.__getitem__) == 0)
    assert 0.2 < sum(hits) / 110 < 0.9
    assert r_precision(images, captions, classes).top1 == pytest.approx(sum(hits) / 110)
    # Published values are means over ten parts of the same size.
    assert r_precision_folds(images, captions, classes).top1 == pytest.approx(sum(hits) / 110)


def test_more_candidates_lower_the_precision():
    generator = seeded()
    images = torch.randn(503, 7, generator=generator)
    sentences = images + 2 * torch.randn(503, 7, generator=generator)
    few, many = (r_precision(images, sentences, candidates=c, generator=generator).top1 for c in (2, 100))
    assert few > many + 0.1


def test_a_generator_reproduces_the_draw():
    images, sentences = torch.randn(101, 3), torch.randn(101, 3)
    results = [r_precision(images, sentences, candidates=5, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_top_k_increases_with_k():
    result = r_precision(torch.randn(N, D), torch.randn(N, D), candidates=N)
    assert 0 <= result.top1 <= result.top2 <= result.top3 <= 1


def test_half_precision_features_are_ranked_in_float64():
    images, sentences = torch.randn(N, D).bfloat16(), torch.randn(N, D).bfloat16()
    expected = r_precision(images.double(), sentences.double(), candidates=N)
    assert tuple(r_precision(images, sentences, candidates=N)) == tuple(expected)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"images and sentences must both be \(N, D\), but they are \(13, 5\) and \(13, 7\)",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, 7)),
        ),
        (r"must both be \(N, D\), but they are \(13,\)", lambda: r_precision(torch.ones(N), torch.ones(N))),
        (
            r"candidates must be at least 2, but it is 1",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), candidates=1),
        ),
        (
            r"candidates must be a whole number of at least 1, but it is 4\.0",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), candidates=4.0),
        ),
        (
            r"images must be floating point, but they are torch\.int64",
            lambda: r_precision(torch.ones(N, D).long(), torch.ones(N, D)),
        ),
        (
            r"sentences must be floating point, but they are torch\.complex64",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D, dtype=torch.complex64)),
        ),
        (
            r"images must be a tensor, but it is a ndarray; torch\.as_tensor makes one",
            lambda: r_precision(torch.ones(N, D).numpy(), torch.ones(N, D)),
        ),
        (
            r"class_ids must be a tensor, but it is a list; torch\.as_tensor makes one",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), [0] * N),
        ),
        (
            r"candidates=100 needs 99 mismatched captions for each image, but one of the 13 images has 12;",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D)),
        ),
        (
            r"candidates=11 needs 10 mismatched captions .* has 8; evaluate more captions, or lower candidates",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), torch.arange(N) % 3, candidates=11),
        ),
        (
            r"images must be \(N, D\) with N at least 1, but they are \(0, 5\)",
            lambda: r_precision(torch.ones(0, D), torch.ones(0, D), candidates=2),
        ),
        (
            r"class_ids must be \(13,\), one per image, but are \(7,\)",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), torch.zeros(7), candidates=2),
        ),
        (
            r"image_ids must be \(13,\), one per image, but are \(7,\)",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), image_ids=torch.zeros(7), candidates=2),
        ),
        (
            r"candidates=11 needs 10 mismatched captions .* has 8; evaluate more captions, or lower candidates",
            lambda: r_precision(torch.ones(N, D), torch.ones(N, D), image_ids=torch.arange(N) % 3, candidates=11),
        ),
    ],
)
def test_invalid_arguments_raise(message, call):
    with pytest.raises(ValueError, match="r_precision: .*" + message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinite_features_raise(which, value):
    features = [torch.randn(N, D), torch.randn(N, D)]
    features[which][3, 2] = value
    with pytest.raises(
        ValueError, match=rf"r_precision: {('images', 'sentences')[which]} contain NaN or infinite values"
    ):
        r_precision(*features, candidates=5)


def test_one_fold_per_image_gives_the_standard_error_over_images():
    images, sentences = torch.randn(N, D), torch.randn(N, D)
    whole = r_precision(images, sentences, candidates=N)
    result = r_precision_folds(images, sentences, candidates=N, folds=N)
    assert list(result[:3]) == pytest.approx(list(whole[:3]))
    assert result.standard_errors[0] == pytest.approx(whole.standard_error)


def test_folds_match_the_loops():
    images, sentences, folds = torch.randn(N, D), torch.randn(N, D), 5
    hits = hits_by_loops(images.double(), sentences.double(), [[j for j in range(N) if j != i] for i in range(N)])
    generator = seeded(7)
    torch.rand(N, N, generator=generator)  # the candidates are drawn first
    order = torch.randperm(N, generator=generator).tolist()
    sizes, precisions = [3, 3, 3, 2, 2], []
    for fold in range(folds):
        rows = order[sum(sizes[:fold]) : sum(sizes[: fold + 1])]
        precisions.append([sum(hits[i][k] for i in rows) / len(rows) for k in range(3)])
    result = r_precision_folds(images, sentences, candidates=N, folds=folds, generator=seeded(7))
    for k in range(3):
        mean = sum(precision[k] for precision in precisions) / folds
        squares = sum((precision[k] - mean) ** 2 for precision in precisions)
        assert result[k] == pytest.approx(mean)
        assert result.standard_errors[k] == pytest.approx(math.sqrt(squares / (folds - 1) / folds))
        assert result.standard_deviations[k] == pytest.approx(math.sqrt(squares / folds))


@pytest.mark.parametrize("shuffled", [False, True])
def test_folds_of_random_or_shuffled_features_score_at_chance(shuffled):
    count = 2003
    sentences = torch.randn(count, 17)
    images = sentences.roll(1, dims=0) if shuffled else torch.randn(count, 17)
    result = r_precision_folds(images, sentences, generator=seeded())
    for precision, error, chance in zip(result, result.standard_errors, (0.01, 0.02, 0.03)):
        assert abs(precision - chance) < 3 * error
        assert error == pytest.approx(math.sqrt(chance * (1 - chance) / count), rel=0.5)


def test_folds_of_identical_and_of_constant_features():
    features = torch.randn(211, 17)
    zeros = (0.0, 0.0, 0.0)
    assert tuple(r_precision_folds(features, features)) == (1.0, 1.0, 1.0, zeros, zeros)
    constant = r_precision_folds(torch.ones(211, 17), torch.ones(211, 17))
    assert list(constant[:3]) == pytest.approx([0.01, 0.02, 0.03], abs=1e-12)
    assert constant.standard_errors == pytest.approx(zeros, abs=1e-12)


def test_folds_exclude_captions_of_the_same_class_and_image():
    groups = torch.arange(N) % 3
    features = torch.eye(3)[groups]
    for ids in ({"class_ids": groups}, {"image_ids": groups}):
        assert r_precision_folds(features, features, **ids, candidates=8, folds=3).top1 == 1.0


def test_a_generator_reproduces_the_folds():
    images, sentences = torch.randn(101, 3), torch.randn(101, 3)
    results = [r_precision_folds(images, sentences, candidates=101, generator=seeded(seed)) for seed in (1, 1, 2)]
    # All captions are candidates: only the assignment to folds differs.
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_features_that_require_gradients_are_accepted(dtype):
    images, sentences = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(N, D, dtype=dtype)
    result = r_precision_folds(images, sentences, candidates=N, folds=3, generator=seeded())
    assert result == r_precision_folds(
        images.detach().double(), sentences.double(), candidates=N, folds=3, generator=seeded()
    )


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"folds=10 needs at least 10 images, but there are 7; lower folds",
            lambda: r_precision_folds(torch.ones(7, D), torch.ones(7, D), candidates=2),
        ),
        (
            r"folds must be at least 2, but it is 1; r_precision has no folds",
            lambda: r_precision_folds(torch.ones(N, D), torch.ones(N, D), candidates=2, folds=1),
        ),
        (
            r"folds must be a whole number of at least 1, but it is 2\.5",
            lambda: r_precision_folds(torch.ones(N, D), torch.ones(N, D), candidates=2, folds=2.5),
        ),
        (r"must both be \(N, D\), but they are \(\)", lambda: r_precision_folds(torch.ones(()), torch.ones(()))),
        (
            r"candidates=100 needs 99 mismatched captions for each image, but one of the 13 images has 12;",
            lambda: r_precision_folds(torch.ones(N, D), torch.ones(N, D)),
        ),
        (
            r"images contain NaN or infinite values",
            lambda: r_precision_folds(torch.full((N, D), torch.nan), torch.ones(N, D)),
        ),
    ],
)
def test_invalid_arguments_of_folds_raise(message, call):
    with pytest.raises(ValueError, match="r_precision_folds: .*" + message):
        call()
