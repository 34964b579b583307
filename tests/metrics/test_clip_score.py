"""CLIPScore against loops, known values, both published scales, and torchmetrics."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.multimodal import clip_score as clip_score_of_torchmetrics

from mirror_modules.functional import clip_score

B, D = 7, 5


def score_by_loops(images, captions, scale):
    scores = []
    for image, caption in zip(images.double().tolist(), captions.double().tolist()):
        product = sum(p * q for p, q in zip(image, caption))
        scores.append(scale * max(product / math.hypot(*image) / math.hypot(*caption), 0.0))
    return scores


def pairs(size=B, dtype=torch.float64):
    """Features with positive and negative cosines."""
    images, captions = torch.randn(2, size, D, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cosine = F.cosine_similarity(images, captions)
    assert (cosine < 0).any()
    assert (cosine > 0).any()
    return images, captions


@pytest.mark.parametrize("scale", [100.0, 2.5, 1])
def test_matches_the_loops(scale):
    images, captions = pairs()
    assert clip_score(images, captions, scale=scale).tolist() == pytest.approx(score_by_loops(images, captions, scale))


def test_the_default_scale_gives_percent():
    images, captions = pairs()
    assert clip_score(images, captions).tolist() == pytest.approx(score_by_loops(images, captions, 100))


def test_known_answers():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    captions = torch.tensor([[7.0, 0.0], [1.0, math.sqrt(3)], [0.0, 2.0], [-3.0, 0.0]])  # 0, 60, 90 and 180 degrees
    assert clip_score(images, captions).tolist() == pytest.approx([100, 50, 0, 0], abs=1e-5)
    assert clip_score(images, captions, scale=2.5).tolist() == pytest.approx([2.5, 1.25, 0, 0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_features_never_exceed_the_scale(dtype):
    features = torch.randn(101, 17).to(dtype)
    scores = clip_score(features, features)
    assert scores.max() <= 100
    assert scores.min() > 99.999


def stub(images, captions):
    """A model and a processor that give torchmetrics these features, of images and strings that hold their index."""
    model = SimpleNamespace(
        config=SimpleNamespace(),
        get_image_features=lambda pixels: images[pixels[:, 0, 0, 0].long()],
        get_text_features=lambda ids, mask: captions[ids],
    )
    model.to = lambda device: model

    def processor(images=None, text=None, **options):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        ids = torch.tensor([int(word) for word in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return lambda: (model, processor)


def by_torchmetrics(images, captions):
    numbers = range(len(images))
    pixels = [torch.full((3, 2, 2), float(number)) for number in numbers]
    return clip_score_of_torchmetrics(pixels, [str(number) for number in numbers], stub(images, captions))


def test_agrees_with_torchmetrics():
    captions = torch.randn(B, D)
    images = captions + 0.3 * torch.randn(B, D)
    assert (F.cosine_similarity(images, captions) > 0).all()
    torch.testing.assert_close(clip_score(images, captions).mean(), by_torchmetrics(images, captions))


def test_torchmetrics_takes_the_maximum_after_the_mean():
    images, captions = pairs(dtype=torch.float32)
    mean_cosine = F.cosine_similarity(images, captions).mean()
    torch.testing.assert_close(by_torchmetrics(images, captions), 100 * mean_cosine.clamp(min=0))
    assert clip_score(images, captions).mean() > by_torchmetrics(images, captions) + 1


def test_gradients():
    images, captions = (features.requires_grad_() for features in pairs())
    assert torch.autograd.gradcheck(clip_score, (images, captions))


def test_pairs_with_a_negative_cosine_have_no_gradient():
    images, captions = pairs()
    images.requires_grad_()
    clip_score(images, captions).sum().backward()
    is_negative = F.cosine_similarity(images, captions) < 0
    assert (images.grad[is_negative] == 0).all()
    assert (images.grad[~is_negative] != 0).any(dim=1).all()


def test_ascending_the_gradient_raises_the_score():
    captions = torch.randn(B, D)
    images = (captions + torch.randn(B, D)).requires_grad_()
    before = clip_score(images, captions)
    before.sum().backward()
    with torch.no_grad():
        assert clip_score(images + 1e-3 * images.grad, captions).sum() > before.sum()


def test_a_pair_alone_has_the_score_that_it_has_in_a_batch():
    images, captions = pairs()
    alone = torch.cat([clip_score(images[i : i + 1], captions[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(alone, clip_score(images, captions), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-22, 1e30])
def test_extreme_lengths_of_float32_features_change_nothing(scale):
    images, captions = pairs(dtype=torch.float32)
    expected = clip_score(images, captions)
    tolerance = {"rtol": 0, "atol": 1e-3 if scale == 1e-40 else 1e-4}  # 1e-40 is denormal and has few bits
    torch.testing.assert_close(clip_score(images * scale, captions), expected, **tolerance)
    torch.testing.assert_close(clip_score(images, captions * scale), expected, **tolerance)


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32(dtypes, result):
    images, captions = (features.to(dtype) for features, dtype in zip(pairs(), dtypes))
    scores = clip_score(images, captions)
    assert scores.dtype == result
    expected = clip_score(images.double(), captions.double())
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)


def test_compiles_in_one_graph(compiled):
    images, captions = (features.requires_grad_() for features in pairs())
    expected = clip_score(images, captions)
    scores = compiled(clip_score)(images, captions)
    torch.testing.assert_close(scores, expected)
    gradients, expected_gradients = (
        torch.autograd.grad(result.square().sum(), (images, captions)) for result in (scores, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"images and captions must both be \(N, D\), but they are \(7, 5\) and \(3, 5\)",
            lambda: clip_score(torch.ones(B, D), torch.ones(3, D)),
        ),
        (
            r"images and captions must both be \(N, D\), but they are \(5,\) and \(5,\)",
            lambda: clip_score(torch.ones(D), torch.ones(D)),
        ),
        (
            r"images must be \(N, D\) with N at least 1, but they are \(0, 5\)",
            lambda: clip_score(torch.ones(0, D), torch.ones(0, D)),
        ),
        (
            r"captions must be floating point, but they are torch\.int64; convert them",
            lambda: clip_score(torch.ones(B, D), torch.ones(B, D).long()),
        ),
        (
            r"captions must be a tensor, but it is a list; torch\.as_tensor makes one",
            lambda: clip_score(torch.ones(1, D), ["a red flower"]),
        ),
        (
            r"captions contain NaN or infinite values; check how they were computed",
            lambda: clip_score(torch.ones(B, D), torch.full((B, D), math.nan)),
        ),
        (
            r"images contain NaN or infinite values",
            lambda: clip_score(torch.full((B, D), math.inf), torch.ones(B, D)),
        ),
        (
            r"captions\[3\] is zero and has no direction; check how it was computed",
            lambda: clip_score(torch.ones(B, D), (torch.arange(B) != 3).view(B, 1) * torch.ones(D)),
        ),
        (
            r"images\[2\] is zero and has no direction",
            lambda: clip_score((torch.arange(B) != 2).view(B, 1) * torch.ones(D), torch.ones(B, D)),
        ),
        (r"scale must be above 0, but it is 0", lambda: clip_score(torch.ones(B, D), torch.ones(B, D), scale=0)),
        (r"scale must be above 0, but it is -2\.5", lambda: clip_score(torch.ones(B, D), torch.ones(B, D), scale=-2.5)),
        (
            r"scale must be a finite number, but it is inf",
            lambda: clip_score(torch.ones(B, D), torch.ones(B, D), scale=math.inf),
        ),
    ],
)
def test_invalid_arguments_raise(message, call):
    with pytest.raises(ValueError, match="clip_score: .*" + message):
        call()
