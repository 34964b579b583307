"""The class-only oracle against simulated draws, an enumeration of all draws, and one-hot classes as features."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from mirror_modules.functional import class_oracle, expected_hits, r_precision

N = 11


def oracle_by_all_draws(class_ids, candidates, image_ids=None):
    """Enumerate every set of mismatched captions: the own caption ties with the drawn ones of its class."""
    probabilities = []
    for i in range(len(class_ids)):
        others = [j for j in range(len(class_ids)) if j != i and (image_ids is None or image_ids[j] != image_ids[i])]
        hits = [
            1 / (1 + sum(class_ids[j] == class_ids[i] for j in drawn)) for drawn in combinations(others, candidates - 1)
        ]
        probabilities.append(sum(hits) / len(hits))
    return torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("candidates", [2, 5, N])
@pytest.mark.parametrize("class_ids", [[0, 1, 1, 2, 2, 2, 2, 2, 5, 5, 3], list(range(N)), [7] * N, [0, 1] * 5 + [0]])
def test_matches_all_draws(class_ids, candidates):
    result = class_oracle(torch.tensor(class_ids), candidates=candidates)
    torch.testing.assert_close(result, oracle_by_all_draws(class_ids, candidates))


@pytest.mark.parametrize("candidates", [2, 3, 7])
def test_captions_of_the_same_image_are_not_drawn(candidates):
    class_ids, image_ids = [0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
    result = class_oracle(torch.tensor(class_ids), torch.tensor(image_ids), candidates=candidates)
    torch.testing.assert_close(result, oracle_by_all_draws(class_ids, candidates, image_ids))


def test_matches_simulated_draws():
    """A guess among the candidates of the own class, which is drawn here as in the metric."""
    random = torch.Generator().manual_seed(3)
    class_ids = torch.randint(10, (211,), generator=random)
    hits = 0
    for _ in range(40):
        for i in range(len(class_ids)):
            order = torch.randperm(len(class_ids), generator=random)
            drawn = order[order != i][:22]
            of_class = [i, *(j for j in drawn.tolist() if class_ids[j] == class_ids[i])]
            hits += of_class[int(torch.randint(len(of_class), (), generator=random))] == i
    share = hits / (40 * len(class_ids))
    expected = float(class_oracle(class_ids, candidates=23).mean())
    # Five standard errors.
    assert share == pytest.approx(expected, abs=5 * (expected * (1 - expected) / (40 * len(class_ids))) ** 0.5)


@pytest.mark.parametrize("with_images", [False, True])
def test_one_hot_classes_as_features_score_the_same(with_images):
    class_ids = torch.randint(7, (97,), generator=torch.Generator().manual_seed(1))
    image_ids = torch.arange(97) // 3 if with_images else None
    features = F.one_hot(class_ids).double()
    expected = expected_hits(features, features, image_ids=image_ids, candidates=23)
    torch.testing.assert_close(class_oracle(class_ids, image_ids, candidates=23), expected)
    measured = r_precision(
        features, features, image_ids=image_ids, candidates=23, generator=torch.Generator().manual_seed(0)
    )
    assert measured.top1 == pytest.approx(float(expected.mean()), abs=5 * measured.standard_error)


def test_known_values():
    torch.testing.assert_close(class_oracle(torch.zeros(997)), torch.full((997,), 0.01, dtype=torch.float64))
    torch.testing.assert_close(class_oracle(torch.arange(997)), torch.ones(997, dtype=torch.float64))
    # Ten classes of 100 images: the mean over a hypergeometric number with mean 9.8.
    assert float(class_oracle(torch.arange(1000) % 10).mean()) == pytest.approx(0.1, abs=0.001)
    # No overflow and no cancellation for as many captions as in the papers.
    few = class_oracle(torch.arange(30_011) % 3000)
    assert bool(few.isfinite().all())
    assert 0.8 < float(few.mean()) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(N, 1), None, 2), r"class_ids must be \(N,\), one per image, but are \(11, 1\)"),
        ((torch.zeros(N), torch.zeros(7), 2), r"image_ids must be \(11,\), one per image, but are \(7,\)"),
        ((torch.zeros(N), None, 12), "captions that every image can rank, 11, but it is 12"),
        ((torch.zeros(N), torch.tensor([0] * 4 + [*range(1, 8)]), 9), "can rank, 8, but it is 9"),
        ((torch.zeros(N), None, 1), "candidates must be from 2"),
        ((torch.zeros(0), None, 2), "can rank, 0, but it is 2"),
        (([0, 1], None, 2), "class_ids must be a tensor, but it is a list"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    class_ids, image_ids, candidates = arguments
    with pytest.raises(ValueError, match="class_oracle: .*" + message):
        class_oracle(class_ids, image_ids, candidates=candidates)
