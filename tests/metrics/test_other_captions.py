"""Queries from the other captions of an image, against loops."""

import pytest
import torch

from mirror_modules.functional import other_captions, r_precision

M, D = 13, 5
IMAGES = torch.tensor([7, 3, 7, 3, 3, 11, 7, 11, 2, 2, 2, 2, 3])


def queries_by_loops(sentences, image_ids):
    queries = []
    for m in range(len(sentences)):
        others = [j for j in range(len(sentences)) if j != m and image_ids[j] == image_ids[m]]
        units = [sentences[j] / sum(float(x) ** 2 for x in sentences[j]) ** 0.5 for j in others]
        queries.append(sum(units) / len(units))
    return torch.stack(queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_loops(dtype):
    sentences = torch.randn(M, D, dtype=dtype) * torch.rand(M, 1, dtype=dtype).exp()
    torch.testing.assert_close(other_captions(sentences, IMAGES), queries_by_loops(sentences.double(), IMAGES))


def test_a_caption_does_not_influence_its_own_query():
    sentences = torch.randn(M, D)
    changed = sentences.clone()
    changed[4] = torch.randn(D)
    before, after = other_captions(sentences, IMAGES), other_captions(changed, IMAGES)
    of_image = IMAGES[4] == IMAGES
    torch.testing.assert_close(before[4], after[4])
    torch.testing.assert_close(before[~of_image], after[~of_image])
    assert not torch.allclose(before[of_image], after[of_image])


def test_captions_that_agree_retrieve_each_other():
    """And captions that have nothing in common are at chance."""
    content = torch.randn(211, 1, 64)
    for noise, lowest, highest in ((0.1, 0.99, 1.0), (1e6, 0.0, 0.15)):
        sentences = content + noise * torch.randn(211, 5, 64)
        queries = other_captions(sentences.flatten(0, 1), torch.arange(211).repeat_interleave(5))
        random = torch.Generator().manual_seed(0)
        result = r_precision(queries[::5], sentences[:, 0].double(), candidates=13, generator=random)
        assert lowest <= result.top1 <= highest


@pytest.mark.parametrize(
    ("sentences", "image_ids", "message"),
    [
        (torch.ones(M, D), torch.zeros(7), r"image_ids must be \(13,\), one per caption, but are \(7,\)"),
        (torch.ones(M, D), torch.tensor([0] * 12 + [5]), "the image with the id 5 has a single caption; leave it out"),
        (torch.ones(M), IMAGES, r"sentences must be \(M, D\), but they are \(13,\)"),
        (torch.zeros(M, D), IMAGES, r"sentences\[0\] is zero and has no direction"),
        (torch.full((M, D), float("nan")), IMAGES, "sentences contain NaN or infinite values"),
        (torch.ones(M, D), [0] * M, "image_ids must be a tensor, but it is a list"),
    ],
)
def test_invalid_arguments_raise(sentences, image_ids, message):
    with pytest.raises(ValueError, match="other_captions: .*" + message):
        other_captions(sentences, image_ids)
