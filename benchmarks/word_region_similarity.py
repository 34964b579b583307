"""Benchmark of `functional.word_region_similarity`: every image with every caption of a batch.

Shape suffixes: I images, J captions, R regions, L words, D features.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._operation import Implementation, Inputs, Operation, Shape
from benchmarks.global_local_attention import word_mask as make_word_mask
from benchmarks.published import published_similarity
from mirror_modules import functional

GAMMA_ATTENTION, GAMMA_WORD = 4.0, 5.0
LARGEST_PUBLISHED_ON_CPU = 128


def _shape(
    batch: int, *devices: str, name: str = "", regions: int = 289, words: int = 18, features: int = 256
) -> Shape:
    sizes = {"batch": batch, "regions": regions, "words": words, "features": features}
    return Shape(name or f"b{batch}", sizes, devices)


SHAPES = (
    _shape(48, "cpu", "cuda"),
    _shape(1024, "cuda"),
    _shape(128, "cpu", "cuda"),
    _shape(512, "cuda"),
    _shape(2048, "cuda"),
    _shape(256, "cpu"),
)


def make_inputs(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    """Regions of unit variance, scores of variance 4, so that the softmax is neither one-hot nor uniform."""
    batch, features = sizes["batch"], sizes["features"]
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    leaves = (
        normal(batch, sizes["regions"], features),
        normal(batch, sizes["words"], features, scale=2 * features**-0.5),
    )
    word_mask = make_word_mask(batch, sizes["words"], device)
    return Inputs(tuple(leaf.requires_grad_() for leaf in leaves), word_mask, (normal(batch, batch),))


def definition(regions: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, ...]:
    scores_IJLR = torch.einsum("ird,jld->ijlr", regions, words)
    padding_JL = ~word_mask
    share_IJLR = torch.softmax(scores_IJLR.masked_fill(padding_JL.unsqueeze(2), float("-inf")), dim=2)
    attention_IJLR = torch.softmax(GAMMA_ATTENTION * share_IJLR, dim=3)
    context_IJLD = torch.einsum("ijlr,ird->ijld", attention_IJLR, regions)
    cosine_IJL = F.cosine_similarity(context_IJLD, words.unsqueeze(0), dim=3)
    return ((GAMMA_WORD * cosine_IJL).masked_fill(padding_JL, float("-inf")).logsumexp(dim=2),)


def published(regions: Tensor, words: Tensor, word_mask: Tensor, *, copies: bool = True) -> tuple[Tensor, ...]:
    similarity = published_similarity(
        regions, words, word_mask, gamma_attention=GAMMA_ATTENTION, gamma_word=GAMMA_WORD, copies=copies
    )
    return (similarity,)


def ours(regions: Tensor, words: Tensor, word_mask: Tensor, *, impl: str) -> tuple[Tensor, ...]:
    similarity = functional.word_region_similarity(
        regions, words, word_mask, gamma_attention=GAMMA_ATTENTION, gamma_word=GAMMA_WORD, impl=impl
    )
    return (similarity,)


def implementations(device: str) -> dict[str, Implementation]:
    plain = partial(ours, impl="torch")
    loop = partial(published, copies=False)
    known: dict[str, Implementation] = {"published": published, "loop": loop, "torch": plain}
    if device != "cpu":
        known["triton"] = partial(ours, impl="triton")
    return known | {"compiled": torch.compile(plain, fullgraph=True, dynamic=False)}


def too_much(impl: str, sizes: dict[str, int], device: str) -> str | None:
    if impl in ("published", "loop") and device == "cpu" and sizes["batch"] > LARGEST_PUBLISHED_ON_CPU:
        return f"a round takes minutes: the work grows with the square of the batch, here {sizes['batch']}"
    return None


def least_bytes(sizes: dict[str, int], direction: str, element: int) -> int:
    """Minimum memory traffic.

    Forward reads regions and words and writes the similarity. Backward reads both and the gradient of the similarity,
    and writes the gradients of both. The attention maps of all pairs need not be materialized.
    """
    if direction == "both":
        return least_bytes(sizes, "forward", element) + least_bytes(sizes, "backward", element)
    batch = sizes["batch"]
    features = batch * (sizes["regions"] + sizes["words"]) * sizes["features"] * element
    similarity, mask = batch * batch * element, batch * sizes["words"]
    return (1 if direction == "forward" else 2) * features + similarity + mask


def least_operations(sizes: dict[str, int], direction: str) -> int:
    """Matrix products of regions and words for each pair: two forward, four backward; recomputation does not count.

    Padding counts like real words, so an implementation that skips padding reaches a higher share of the matrix rate.
    """
    products = {"forward": 2, "backward": 4, "both": 6}[direction]
    return products * 2 * sizes["batch"] ** 2 * sizes["regions"] * sizes["words"] * sizes["features"]


OPERATION = Operation(
    name="word_region_similarity",
    shapes=SHAPES,
    quick=_shape(5, "cpu", "cuda", name="quick", regions=49, features=64),
    tiny=_shape(2, "cpu", "cuda", name="tiny", regions=7, words=3, features=5),
    make_inputs=make_inputs,
    definition=definition,
    implementations=implementations,
    checked=16,
    block=lambda samples: (samples.unsqueeze(1), samples),
    least_bytes=least_bytes,
    least_operations=least_operations,
    too_much=too_much,
)
