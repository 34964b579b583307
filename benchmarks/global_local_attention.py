"""Benchmark of `functional.global_local_attention`: word and sentence attention of a stage, without attention maps.

Shape suffixes: B images, C channels, N = H * W positions, L words.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks._operation import Implementation, Inputs, Operation, Shape
from benchmarks.published import published_attention
from mirror_modules import functional


def _shape(name: str, batch: int, channels: int, side: int, words: int, *, cuda_only: bool = False) -> Shape:
    sizes = {"batch": batch, "channels": channels, "height": side, "width": side, "words": words}
    return Shape(name, sizes, ("cuda",) if cuda_only else ("cpu", "cuda"))


SHAPES = (
    _shape("headline", 64, 32, 128, 18, cuda_only=True),
    _shape("paper128", 16, 32, 128, 18),
    _shape("modern", 16, 128, 64, 77),
    _shape("large", 64, 32, 256, 18, cuda_only=True),
    _shape("paper64", 16, 32, 64, 18),
    _shape("coco128", 16, 48, 128, 12),
    _shape("coco64", 16, 48, 64, 12),
)


def make_inputs(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    """Features of unit variance, scores of variance 4, so that the softmax is neither one-hot nor uniform."""
    batch, channels, words = sizes["batch"], sizes["channels"], sizes["words"]
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    features = normal(batch, channels, sizes["height"], sizes["width"])
    leaves = (features, normal(batch, words, channels, scale=2 * channels**-0.5), normal(batch, channels, scale=2.0))
    gradients = (normal(*features.shape), normal(*features.shape))
    return Inputs(tuple(leaf.requires_grad_() for leaf in leaves), word_mask(batch, words, device), gradients)


def word_mask(captions: int, words: int, device: torch.device) -> Tensor:
    """Mask of captions with a third to all of the words, from a fixed seed; the first has all words."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(max(1, words // 3), words + 1, (captions, 1), generator=random)
    lengths[0] = words
    return (torch.arange(words) < lengths).to(device)


def definition(features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor) -> tuple[Tensor, ...]:
    scores_BLN = (words @ features.flatten(2)).masked_fill(~word_mask.unsqueeze(2), float("-inf"))
    word_context = (words.mT @ torch.softmax(scores_BLN, dim=1)).view_as(features)
    sentence_BC11 = sentence.unsqueeze(2).unsqueeze(3)
    return word_context, sentence_BC11 * torch.softmax(features * sentence_BC11, dim=1)


def published(features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor) -> tuple[Tensor, ...]:
    """The published formulation with correct masks; the published mask order is wrong for different lengths."""
    row_mask = word_mask.repeat_interleave(features.shape[2] * features.shape[3], dim=0)
    return published_attention(features, words, sentence, row_mask)[:2]


def ours(features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor, *, impl: str) -> tuple[Tensor, ...]:
    return functional.global_local_attention(features, words, sentence, word_mask, impl=impl)[:2]


def plain(features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor) -> tuple[Tensor, ...]:
    """Plain PyTorch, to be compiled."""
    return (
        functional.word_attention(features, words, word_mask)[0],
        functional.sentence_attention(features, sentence)[0],
    )


def sdpa(features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor) -> tuple[Tensor, ...]:
    """`scaled_dot_product_attention` with positions as queries and words as keys and values.

    The queries are copied, because the fused kernels need features last; the context is not copied back.
    """
    queries, keys = features.flatten(2).mT.contiguous().unsqueeze(1), words.unsqueeze(1)
    context = F.scaled_dot_product_attention(queries, keys, keys, attn_mask=word_mask[:, None, None], scale=1.0)
    return context.squeeze(1).mT.unflatten(2, features.shape[2:]), functional.sentence_attention(features, sentence)[0]


def flex(features: Tensor, words: Tensor, sentence: Tensor, word_mask: Tensor) -> tuple[Tensor, ...]:
    """`flex_attention` for the words; the sentence attention and the copies are compiled with it."""

    def without_padding(score: Tensor, b: Tensor, head: Tensor, position: Tensor, word: Tensor) -> Tensor:
        return torch.where(word_mask[b, word], score, float("-inf"))

    queries, keys = features.flatten(2).mT.contiguous().unsqueeze(1), words.unsqueeze(1)
    context = flex_attention(queries, keys, keys, score_mod=without_padding, scale=1.0)
    return context.squeeze(1).mT.unflatten(2, features.shape[2:]), functional.sentence_attention(features, sentence)[0]


def implementations(device: str) -> dict[str, Implementation]:
    known: dict[str, Implementation] = {"published": published, "torch": partial(ours, impl="torch")}
    if device != "cpu":
        known["triton"] = partial(ours, impl="triton")
    known |= {"sdpa": sdpa, "compiled": torch.compile(plain, fullgraph=True, dynamic=False)}
    if device == "cuda":
        # Slow compilation comes last, in case the time budget runs out.
        known["flex"] = torch.compile(flex, fullgraph=True, dynamic=False)
    return known


def least_bytes(sizes: dict[str, int], direction: str, element: int) -> int:
    """Minimum memory traffic.

    Forward reads the features and writes two contexts. Backward reads the features and the gradients of both contexts
    and writes the gradient of the features. Both also read words, sentence and mask; backward writes the gradients of
    words and sentence.
    """
    if direction == "both":
        return least_bytes(sizes, "forward", element) + least_bytes(sizes, "backward", element)
    features = sizes["batch"] * sizes["channels"] * sizes["height"] * sizes["width"] * element
    text = sizes["batch"] * (sizes["words"] + 1) * sizes["channels"] * element
    mask = sizes["batch"] * sizes["words"]
    return 3 * features + text + mask if direction == "forward" else 4 * features + 2 * text + mask


def least_operations(sizes: dict[str, int], direction: str) -> int:
    """Matrix products of words and positions: two forward, four backward; recomputation does not count."""
    products = {"forward": 2, "backward": 4, "both": 6}[direction]
    positions = sizes["batch"] * sizes["height"] * sizes["width"]
    return products * 2 * positions * sizes["words"] * sizes["channels"]


OPERATION = Operation(
    name="global_local_attention",
    shapes=SHAPES,
    quick=_shape("quick", 3, 32, 32, 18),
    tiny=_shape("tiny", 2, 5, 7, 3),
    make_inputs=make_inputs,
    definition=definition,
    implementations=implementations,
    checked=3,
    block=lambda samples: (samples,),
    least_bytes=least_bytes,
    least_operations=least_operations,
)
