"""Expected R-precision of each image, against an enumeration of all draws."""

import importlib
from itertools import combinations

import pytest
import torch

from mirror_modules.metrics import expected_hits, r_precision

N, D, M = 7, 3, 4


def hits_by_all_draws(images, sentences, candidates, class_ids=None, image_ids=None):
    """Enumerate every set of mismatched captions."""
    of_class = range(len(images)) if class_ids is None else class_ids.tolist()
    of_image = range(len(images)) if image_ids is None else image_ids.tolist()
    probabilities = []
    for i, image in enumerate(images):
        scores = [float(torch.cosine_similarity(image, sentence, dim=0)) for sentence in sentences]
        hits = []
        others = [j for j in range(len(images)) if j != i and of_image[j] != of_image[i]]
        if class_ids is not None:
            others = [j for j in others if of_class[j] != of_class[i]]
        for drawn in combinations(others, candidates - 1):
            better = sum(scores[j] > scores[i] + 1e-9 for j in drawn)
            ties = sum(abs(scores[j] - scores[i]) <= 1e-9 for j in drawn)
            hits.append(0.0 if better else 1 / (1 + ties))
        probabilities.append(sum(hits) / len(hits))
    return torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("candidates", [2, M, N])
@pytest.mark.parametrize("distinct", [N, 4, 1])
def test_matches_all_draws(candidates, distinct):
    images = torch.randn(N, D, dtype=torch.float64)
    sentences = (images + 0.7 * torch.randn(N, D, dtype=torch.float64))[torch.arange(N) % distinct]
    expected = hits_by_all_draws(images, sentences, candidates)
    torch.testing.assert_close(expected_hits(images, sentences, candidates=candidates), expected)


@pytest.mark.parametrize("class_ids", [None, torch.arange(N) % 2])
@pytest.mark.parametrize("image_ids", [None, torch.arange(N) // 2])
@pytest.mark.parametrize("distinct", [N, 4])
def test_excluded_captions_are_not_drawn(class_ids, image_ids, distinct):
    images = torch.randn(N, D, dtype=torch.float64)
    sentences = (images + 0.7 * torch.randn(N, D, dtype=torch.float64))[torch.arange(N) % distinct]
    expected = hits_by_all_draws(images, sentences, 3, class_ids, image_ids)
    result = expected_hits(images, sentences, class_ids, image_ids=image_ids, candidates=3)
    torch.testing.assert_close(result, expected)


def test_the_mean_over_draws_converges_to_it():
    sentences = torch.randn(97, 5)
    images = sentences + torch.randn(97, 5)
    draws = [
        r_precision(images, sentences, candidates=11, generator=torch.Generator().manual_seed(i)).top1
        for i in range(99)
    ]
    expected = float(expected_hits(images, sentences, candidates=11).mean())
    assert sum(draws) / len(draws) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("block", [1, 200, 2**24])
def test_the_block_size_has_no_influence(monkeypatch, block):
    images, sentences = torch.randn(97, 5), torch.randn(97, 5)[torch.arange(97) % 31]
    expected = expected_hits(images, sentences, candidates=11)
    monkeypatch.setattr(importlib.import_module("mirror_modules.metrics.expected_hits"), "LARGEST_BLOCK", block)
    torch.testing.assert_close(expected_hits(images, sentences, candidates=11), expected)


def test_at_most_one_block_of_scores_is_in_memory(monkeypatch):
    module = importlib.import_module("mirror_modules.metrics.expected_hits")
    monkeypatch.setattr(module, "LARGEST_BLOCK", 200)
    sizes, excluded_captions = [], module.excluded_captions

    def record(*arguments):
        sizes.append(excluded_captions(*arguments).numel())
        return excluded_captions(*arguments)

    monkeypatch.setattr(module, "excluded_captions", record)
    expected_hits(torch.randn(97, 5), torch.randn(97, 5), candidates=11)
    assert sum(sizes) == 97 * 97
    assert max(sizes) <= 200


def test_more_ties_than_candidates_are_not_summed(monkeypatch):
    """At most `candidates - 1` captions are drawn; the time would be quadratic in the number of ties."""
    module = importlib.import_module("mirror_modules.metrics.expected_hits")
    drawn, log_choose = [], module.log_choose

    def record(n, k):
        drawn.append(k)
        return log_choose(n, k)

    monkeypatch.setattr(module, "log_choose", record)
    constant = torch.ones(97, 3)
    torch.testing.assert_close(expected_hits(constant, constant, candidates=M).mean(), torch.tensor(1 / M).double())
    assert max(drawn) == M - 1


def test_features_that_require_gradients_are_accepted():
    features = torch.randn(N, D, requires_grad=True)
    assert not expected_hits(features, features, candidates=M).requires_grad


@pytest.mark.parametrize("scale", [1e-300, 1e-22, 1e200])
def test_lengths_of_features_have_no_influence(scale):
    images, sentences = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    scaled = expected_hits(images * scale, sentences * scale, candidates=M)
    torch.testing.assert_close(scaled, expected_hits(images, sentences, candidates=M))


def test_known_values():
    features = torch.randn(211, 5)
    torch.testing.assert_close(expected_hits(features, features), torch.ones(211, dtype=torch.float64))
    constant = torch.ones(211, 5)
    torch.testing.assert_close(expected_hits(constant, constant), torch.full((211,), 0.01, dtype=torch.float64))
    opposite = expected_hits(features, -features)
    assert opposite.max() < 1e-9
    assert float(expected_hits(torch.randn(997, 64), torch.randn(997, 64)).mean()) == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize(
    ("images", "sentences", "candidates", "message"),
    [
        (torch.ones(5, 3), torch.ones(5, 2), 2, r"must both be \(N, D\), but they are \(5, 3\) and \(5, 2\)"),
        (torch.full((5, 3), float("nan")), torch.ones(5, 3), 2, "images contain NaN or infinite values"),
        (
            torch.ones(5, 3),
            torch.ones(5, 3),
            6,
            "candidates must be from 2 to the number of captions .* can rank, 5, but it is 6",
        ),
        (torch.ones(5, 3), torch.ones(5, 3), 1, "candidates must be from 2"),
        (torch.ones(5, 3), torch.ones(5, 3), 4.5, r"candidates must be a whole number of at least 1, but it is 4\.5"),
        (torch.ones(5, 3).int(), torch.ones(5, 3), 2, "images must be floating point, but they are torch.int32"),
        (torch.ones(5, 3), torch.ones(5, 3).bool(), 2, "sentences must be floating point, but they are torch.bool"),
        (torch.ones(5, 3).to_sparse(), torch.ones(5, 3), 2, r"images must be a dense tensor .* are torch\.sparse_coo"),
        (torch.ones(5, 3, device="meta"), torch.ones(5, 3), 2, "images must be a dense .* they are on the meta device"),
        (
            torch.ones(5, 3),
            torch.ones(5, 3).to(torch.float8_e5m2),
            2,
            "sentences must be floating point, .*float8_e5m2",
        ),
        ([[1.0]], torch.ones(5, 3), 2, "images must be a tensor, but it is a list; torch.as_tensor makes one"),
    ],
)
def test_invalid_inputs_raise(images, sentences, candidates, message):
    with pytest.raises(ValueError, match="expected_hits: .*" + message):
        expected_hits(images, sentences, candidates=candidates)


@pytest.mark.parametrize(
    ("ids", "candidates", "message"),
    [
        ({"class_ids": torch.tensor([0, 0, 0, 0, 1])}, 3, "captions that every image can rank, 2, but it is 3"),
        ({"image_ids": torch.tensor([0, 0, 0, 1, 2])}, 4, "captions that every image can rank, 3, but it is 4"),
        ({"class_ids": torch.zeros(4)}, 2, r"class_ids must be \(5,\), one per image, but are \(4,\)"),
        ({"image_ids": torch.zeros(5, 1)}, 2, r"image_ids must be \(5,\), one per image, but are \(5, 1\)"),
    ],
)
def test_invalid_ids_raise(ids, candidates, message):
    with pytest.raises(ValueError, match="expected_hits: .*" + message):
        expected_hits(torch.ones(5, 3), torch.ones(5, 3), candidates=candidates, **ids)
