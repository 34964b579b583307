"""The inception score against explicit sums, known values, and torchmetrics."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from mirror_modules.functional import inception_score

N, K = 23, 7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def score_by_loops(probabilities):
    count, classes = len(probabilities), len(probabilities[0])
    marginal = [sum(row[k] for row in probabilities) / count for k in range(classes)]
    divergences = [
        sum(row[k] * math.log(row[k] / marginal[k]) for k in range(classes) if row[k] > 0) for row in probabilities
    ]
    return math.exp(sum(divergences) / count)


def test_matches_the_loops():
    logits = 3 * torch.randn(N, K)
    rows = logits.double().softmax(dim=1).tolist()
    sizes, scores = [5, 5, 5, 4, 4], []
    for split in range(5):
        scores.append(score_by_loops(rows[sum(sizes[:split]) : sum(sizes[: split + 1])]))
    mean = sum(scores) / 5
    result = inception_score(logits, splits=5)
    assert result.mean == pytest.approx(mean, rel=1e-12)
    assert result.standard_deviation == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 5), rel=1e-9)


def test_uninformative_classifiers_score_one():
    assert tuple(inception_score(torch.zeros(N, K), splits=3)) == pytest.approx((1.0, 0.0))
    # Confident about each image, but always of the same class.
    assert inception_score(torch.eye(K)[[2] * N], kind="probabilities", splits=3).mean == pytest.approx(1.0)


@pytest.mark.parametrize("splits", [1, 3])
def test_confident_and_evenly_spread_predictions_score_the_number_of_classes(splits):
    certain = torch.eye(K).repeat(2 * splits, 1)
    assert tuple(inception_score(certain, kind="probabilities", splits=splits)) == pytest.approx((K, 0.0))
    assert tuple(inception_score(1000 * certain, splits=splits)) == pytest.approx((K, 0.0))


@pytest.mark.parametrize("p", [0.5, 0.7, 0.99])
def test_two_classes_match_the_closed_form(p):
    # Each class on half of the images: log 2 minus the entropy of one image.
    probabilities = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).repeat(5, 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    result = inception_score(probabilities, kind="probabilities", splits=1)
    assert tuple(result) == pytest.approx((2 * math.exp(-entropy), 0.0))


def test_logits_and_their_probabilities_score_alike():
    logits = torch.randn(N, K).double()
    expected = inception_score(logits, splits=2)
    assert inception_score(logits + 1000, splits=2) == pytest.approx(expected)
    assert inception_score(logits.softmax(dim=1), kind="probabilities", splits=2) == pytest.approx(expected)


def test_a_generator_shuffles_before_the_split():
    # Sorted by class, each split contains one class and scores 1.
    sorted_by_class = torch.eye(2).repeat_interleave(50, dim=0)
    assert inception_score(sorted_by_class, kind="probabilities", splits=2).mean == pytest.approx(1.0)
    shuffled = [
        inception_score(sorted_by_class, kind="probabilities", splits=2, generator=seeded(seed)) for seed in (1, 1, 2)
    ]
    assert shuffled[0].mean > 1.9
    assert shuffled[0] == shuffled[1] != shuffled[2]


class GivenFeatures(nn.Module):
    """Stands in for Inception: images are predictions (N, K) already."""

    def forward(self, images):
        return images.reshape(len(images), -1)


@pytest.mark.filterwarnings("ignore:Metric", "ignore:std")
@pytest.mark.parametrize("splits", [1, 5])
def test_agrees_with_torchmetrics(splits):
    logits = 2 * torch.randn(1000, 11)
    reference = TorchmetricsInceptionScore(feature=GivenFeatures(), splits=splits)
    reference.update(logits)
    torch.manual_seed(3)
    order = torch.randperm(1000)
    torch.manual_seed(3)
    mean, deviation = reference.compute()
    result = inception_score(logits[order], splits=splits)
    assert result.mean == pytest.approx(float(mean), rel=1e-4)
    if splits > 1:  # torchmetrics reports the sample standard deviation
        assert result.standard_deviation == pytest.approx(float(deviation) * math.sqrt((splits - 1) / splits), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_accumulated_in_float64(dtype):
    logits = torch.randn(N, K).to(dtype).requires_grad_()
    assert inception_score(logits, splits=3) == inception_score(logits.detach().double(), splits=3)
    probabilities = logits.softmax(dim=1)  # rounded: they sum to 1 only approximately
    expected = inception_score(logits, splits=1).mean
    assert inception_score(probabilities, kind="probabilities", splits=1).mean == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"predictions must be \(N, K\), but they are \(13,\)", lambda: inception_score(torch.ones(13))),
        (
            r"predictions must be \(N, K\) with N at least 2, but they are \(1, 7\); pass more of them",
            lambda: inception_score(torch.ones(1, K), splits=1),
        ),
        (r"predictions must be \(N, K\) with K at least 1", lambda: inception_score(torch.ones(N, 0))),
        (r"must be floating point, but they are torch\.int64", lambda: inception_score(torch.ones(N, K).long())),
        (
            r"splits=10 needs 20 images, two in each, but there are 19; pass more images, or lower splits",
            lambda: inception_score(torch.ones(19, K)),
        ),
        (
            r"splits must be a whole number of at least 1, but it is 0",
            lambda: inception_score(torch.ones(N, K), splits=0),
        ),
        (
            r"kind must be one of 'logits', 'probabilities', but it is 'logit'",
            lambda: inception_score(torch.ones(N, K), kind="logit"),
        ),
        (
            r"predictions contain -1, which is not a probability; pass kind=\"logits\" if these are logits",
            lambda: inception_score(-torch.ones(N, K), kind="probabilities"),
        ),
        (
            r"a row of predictions sums to 7, but probabilities sum to 1; pass kind=\"logits\"",
            lambda: inception_score(torch.ones(N, K), kind="probabilities"),
        ),
    ],
)
def test_invalid_predictions_raise(message, call):
    with pytest.raises(ValueError, match="inception_score: .*" + message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_predictions_raise(value):
    logits = torch.randn(N, K)
    logits[3, 2] = value
    with pytest.raises(ValueError, match=r"inception_score: predictions contain NaN or infinite values"):
        inception_score(logits)
