"""Images chosen by a score: the best of several, and pairs of a preferred and a rejected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor

from mirror_modules._checks import check_choice, check_number, check_positive, shape_of

Score = Callable[[Tensor, list[str]], Tensor]
"""Images (B, 3, H, W) and their captions -> one number per image, (B,), the higher the better."""
Make = Callable[[list[str], list[int]], Tensor]
"""Captions and a seed for each -> images (B, 3, H, W)."""
Item = TypeVar("Item")


class BestOf(NamedTuple):
    """The best image of each of C captions, and the scores of all n."""

    images: Tensor
    """(C, 3, H, W)."""
    seeds: list[int]
    """Seed of each of these images."""
    scores: Tensor
    """Scores of all images, in the order of their seeds, (C, n)."""
    candidates: Tensor | None = None
    """All images, in the same order, (C, n, 3, H, W); None without `keep_all`."""
    candidate_seeds: list[list[int]] | None = None
    """Their seeds, n per caption; None without `keep_all`."""


@torch.no_grad()
def best_of(
    score: Score,
    make: Make,
    captions: Sequence[str],
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
    keep_all: bool = False,
) -> BestOf:
    """Generate n images of each caption and keep the one with the highest score.

        best_c = argmax_k score(image_ck, caption_c),    k = 0 .. n - 1

    Image k of caption c has the seed `seed + c n + k`, so that the same call gives the same result. Generated again
    alone, or with another `batch_size`, an image is equal up to rounding, since the kernels of a network depend on the
    batch size. Of several images with the same score, the first is kept.

    Args:
        score: Function (images, captions) -> (B,), such as a `RedescriptionScore`, or any other reward.
        make: Function (captions, seeds) -> images (B, 3, H, W), such as
            `lambda captions, seeds: model.generate(captions, seed=seeds)`.
        captions: Strings.
        n: Images per caption.
        seed: Seed of the first image.
        batch_size: Images that are generated and scored at a time. Only the best so far are kept, unless `keep_all`.
        keep_all: Also return all C n images, in `candidates`, on the device where `make` leaves them.

    Returns:
        The best image of each caption with its seed, and all scores; see `BestOf`.

    Raises:
        ValueError: There is no caption, a number is not a whole one or not positive, a score is not finite, or a
            function returns something of another size.

    Examples:
        >>> import torch
        >>> from mirror_modules.stream import best_of
        >>> make = lambda captions, seeds: torch.stack([torch.full((3, 2, 2), seed / 10) for seed in seeds])
        >>> brightest = lambda images, captions: images.mean(dim=(1, 2, 3))
        >>> best_of(brightest, make, ["a red flower", "a blue bird"], 4).seeds
        [3, 7]
        >>> best = best_of(brightest, make, ["a red flower"], 4, keep_all=True)
        >>> ranking = best.scores[0].argsort(descending=True)  # of the candidates of the first caption
        >>> best.candidates[0, ranking].shape, [best.candidate_seeds[0][k] for k in ranking]
        (torch.Size([4, 3, 2, 2]), [3, 2, 1, 0])
    """
    check_positive("best_of", n=n, batch_size=batch_size)
    if not isinstance(seed, SupportsIndex):
        raise ValueError(f"best_of: seed must be a whole number, but it is {seed!r}.")
    if isinstance(captions, str) or not (listed := list(captions)):
        raise ValueError("best_of: captions must be a list of one or more strings; wrap a single one.")
    rows = [caption for caption in listed for _ in range(n)]
    scores, images, seeds = torch.empty(len(rows)), cast(list[Tensor], [None] * len(listed)), [0] * len(listed)
    best = torch.full((len(listed),), -torch.inf)
    kept: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        their_seeds = [seed + start + i for i in range(len(some))]
        made = make(some, their_seeds)
        if not isinstance(made, Tensor) or made.shape[:1] != (len(some),):
            kind = shape_of(made) if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise ValueError(f"best_of: make must return {len(some)} images (B, 3, H, W), but it returned {kind}.")
        values = _scores("best_of", score, made, some)
        scores[start : start + len(some)] = values
        if keep_all:
            kept.append(made)
        for i, value in enumerate(values.tolist()):
            caption = (start + i) // n
            if value > best[caption]:
                # A copy, so that the batch is freed.
                best[caption], images[caption], seeds[caption] = value, made[i].clone(), their_seeds[i]
    chosen = BestOf(torch.stack(images), seeds, scores.view(len(listed), n))
    if not keep_all:
        return chosen
    first_seeds = range(seed, seed + len(rows), n)
    return chosen._replace(
        candidates=torch.cat(kept).unflatten(0, (len(listed), n)),
        candidate_seeds=[list(range(first, first + n)) for first in first_seeds],
    )


class PreferencePair(NamedTuple):
    """Two images of a prompt, as trainers of direct preference optimization read them; `_asdict()` for JSON lines."""

    prompt: str
    chosen: Any
    """The image with the higher score: as it was given, or its number in a tensor."""
    rejected: Any
    chosen_score: float
    rejected_score: float


@torch.no_grad()
def preference_pairs(
    score: Score,
    images_by_caption: Mapping[str, Tensor | Sequence[Any]],
    *,
    margin: float = 0.0,
    pairs: Literal["extremes", "all"] = "extremes",
    load: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
) -> list[PreferencePair]:
    """Pair images of the same caption by their scores, for direct preference optimization.

    Args:
        score: Function (images, captions) -> (B,), such as a `RedescriptionScore`.
        images_by_caption: For each caption a tensor (N, 3, H, W), or a list of whatever `load` reads, such as paths.
        margin: Smallest difference of the two scores; pairs closer than that are skipped, and ties always.
        pairs: "extremes" pairs the best image of a caption with the worst, "all" every two.
        load: Function that turns an element of a list into an image (3, H, W); all of one batch have the same size.
        batch_size: Images that are scored at a time.

    Returns:
        Pairs in the order of the captions, and within one caption by decreasing difference. Each line of a JSONL file
        may be `json.dumps(pair._asdict())` if the images are given as paths.

    Raises:
        ValueError: The images are not given by caption, a list needs `load`, which returns images of one size, a score
            is not finite, or an option is unsuitable.

    Examples:
        >>> import torch
        >>> from mirror_modules.stream import preference_pairs
        >>> brightest = lambda images, captions: images.mean(dim=(1, 2, 3))
        >>> images = torch.tensor([0.5, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
        >>> preference_pairs(brightest, {"a red flower": images})[0][:3]
        ('a red flower', 2, 1)
    """
    owner = "preference_pairs"
    check_number(owner, margin=margin)
    check_choice(owner, "pairs", pairs, ("extremes", "all"))
    check_positive(owner, batch_size=batch_size)
    if not isinstance(images_by_caption, Mapping):
        raise ValueError(
            f"{owner}: images_by_caption must be a dictionary from each caption to its images, but it is a "
            f"{type(images_by_caption).__name__}."
        )
    found: list[PreferencePair] = []
    for caption, images in images_by_caption.items():
        if isinstance(images, str):
            raise ValueError(f"{owner}: the images of {caption!r} are one string, {images!r}; pass a list of paths.")
        if load is None and not isinstance(images, Tensor):
            raise ValueError(
                f"{owner}: the images of {caption!r} are a {type(images).__name__}; pass a tensor (N, 3, H, W), or a "
                "function load= that reads each element."
            )
        values: list[float] = []
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            batch = some if isinstance(some, Tensor) else _loaded(owner, cast(Any, load), some)
            values += _scores(owner, score, batch, [caption] * len(batch)).tolist()
        names = range(len(images)) if isinstance(images, Tensor) else images
        order = sorted(range(len(values)), key=lambda i: -values[i])
        if pairs == "extremes":
            candidates = [(order[0], order[-1])] if order else []
        else:
            candidates = [(i, j) for rank, i in enumerate(order) for j in order[rank + 1 :]]
            candidates.sort(key=lambda pair: values[pair[1]] - values[pair[0]])
        found += [
            PreferencePair(caption, names[i], names[j], values[i], values[j])
            for i, j in candidates
            if values[i] > values[j] and values[i] - values[j] >= margin
        ]
    return found


def _loaded(owner: str, load: Callable[[Any], Tensor], items: Sequence[Any]) -> Tensor:
    images = [load(item) for item in items]
    for item, image in zip(items, images):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape != images[0].shape:
            kind = shape_of(image) if isinstance(image, Tensor) else f"a {type(image).__name__}"
            first = f", and {shape_of(images[0])} of {items[0]!r}" if isinstance(images[0], Tensor) else ""
            raise ValueError(
                f"{owner}: load must return images (3, H, W) of one size, but it returned {kind} of {item!r}{first}; "
                "resize the images, or use batch_size=1."
            )
    return torch.stack(images)


def _scores(owner: str, score: Score, images: Tensor, captions: list[str]) -> Tensor:
    values = score(images, captions)
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        kind = shape_of(values) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(f"{owner}: score must return one number per image, ({len(images)},), but it returned {kind}.")
    values = values.float().cpu()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{owner}: a score is not finite; images with NaN cannot be ranked.")
    return values
