"""Features at a place in the image, shared by generators and discriminators: boxes and key points (GAWWN, Sec. 4).

Shape suffixes: B batch, K boxes or key points, C channels, I and J rows and columns of the result, M and N those of the
source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mirror_modules._checks import (
    at_least_float32,
    check_batch,
    check_positive,
    check_tensors,
    is_readable,
    shape_of,
)

# Shares of the image; larger numbers are probably pixels. A crop of the image may leave a box larger than 1.
LARGEST_SHARE = 4.0
# In the published data a part is visible from this value on.
VISIBLE = 0.1


def place_in_box(features: Tensor, box: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Shrink a map into a box of an otherwise empty map (GAWWN, Sec. 4.1).

        placed(u, v) = features((u - y) / h, (v - x) / w)    zero where that is outside the features

    `u` and `v` are shares of the height and of the width: 0 in the middle of the first cell, 1 in the middle of the
    last. Values between the middles of cells are interpolated linearly; beyond the border they fall to zero within one
    cell of the source. Differentiable twice, with respect to the features and to the box.

    Args:
        features: Maps (B, C, M, N), or vectors (B, C) that fill the box. With several boxes, they may differ by box:
            (B, K, C, M, N) or (B, K, C).
        box: Left, top, width and height (x, y, w, h) as shares of the image, (B, 4), or (B, K, 4) for K boxes per
            image. A box may extend beyond the image.
        size: Height and width (I, J) of the result, each at least 2; None keeps that of the features. Needed for
            vectors.

    Returns:
        (B, C, I, J), or (B, K, C, I, J) with K boxes per image, such as for `.mean(dim=1)`.

    Raises:
        ValueError: Sizes disagree, or a box is empty, outside of the image, not finite, or in pixels. Values are
            checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import place_in_box
        >>> right_half = torch.tensor([[0.5, 0.0, 0.5, 1.0]])
        >>> place_in_box(torch.ones(1, 1), right_half, size=(2, 5))[0, 0]
        tensor([[0., 0., 1., 1., 1.],
                [0., 0., 1., 1., 1.]])
    """
    owner = "place_in_box"
    features, box, size = _checked(owner, features, box, size, vectors=True)
    # A vector fills a map as large as the result.
    rows_BIM, columns_BJN = _sampling(
        box, features.shape[-2:] if features.ndim > box.ndim else size, size, inverse=True
    )
    if features.ndim > box.ndim:
        return _sample(features, rows_BIM, columns_BJN)
    coverage = rows_BIM.sum(dim=-1).unsqueeze(-1) * columns_BJN.sum(dim=-1).unsqueeze(-2)
    return features[..., None, None] * coverage.unsqueeze(-3).to(features.dtype)


def crop_box(features: Tensor, box: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Enlarge what a map shows inside a box (GAWWN, Sec. 4.1): `place_in_box` undoes it.

        cropped(u, v) = features(y + h u, x + w v)    zero where that is outside the features

    Symbols, interpolation and differentiability as in `place_in_box`.

    Args:
        features: Maps (B, C, M, N), or (B, K, C, M, N) for another map per box.
        box: Left, top, width and height (x, y, w, h) as shares of the image, (B, 4), or (B, K, 4) for K boxes per
            image. A box may extend beyond the image.
        size: Height and width (I, J) of the result, each at least 2; None keeps that of the features.

    Returns:
        (B, C, I, J), or (B, K, C, I, J) with K boxes per image.

    Raises:
        ValueError: Sizes disagree, or a box is empty, outside of the image, not finite, or in pixels. Values are
            checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import crop_box
        >>> ramp = torch.arange(5.0).expand(1, 1, 2, 5)
        >>> crop_box(ramp, torch.tensor([[0.5, 0.0, 0.5, 1.0]]))[0, 0, 0].tolist()
        [2.0, 2.5, 3.0, 3.5, 4.0]
    """
    features, box, size = _checked("crop_box", features, box, size, vectors=False)
    return _sample(features, *_sampling(box, features.shape[-2:], size, inverse=False))


def keypoint_maps(points: Tensor, visible: Tensor | None = None, *, size: int = 16) -> Tensor:
    """Mark each visible key point in a map of its own (GAWWN, Sec. 4.2).

        maps[k, i, j] = 1    if point k is visible, i = cell(y_k) and j = cell(x_k), else 0
        cell(x) = min(max(round(x * size), 1), size) - 1    halves are rounded up

    Args:
        points: x and y of K points as shares of the image, (B, K, 2).
        visible: True, or above 0.1, for a visible point, (B, K); None if all are. Other points may have any value.
        size: Height and width M of the maps.

    Returns:
        Zeros and ones, (B, K, M, M), without a gradient.

    Raises:
        ValueError: Sizes disagree, or a visible point is not within the image; the latter is checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import keypoint_maps
        >>> points = torch.tensor([[[1.0, 0.5], [0.2, 0.2]]])
        >>> keypoint_maps(points, torch.tensor([[True, False]]), size=2)[0].tolist()
        [[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    """
    owner = "keypoint_maps"
    check_positive(owner, size=size)
    check_tensors(owner, points=points)
    if points.ndim != 3 or points.shape[2] != 2 or not points.is_floating_point():
        raise ValueError(
            f"{owner}: points must be floats (B, K, 2), x and y as shares of the image, but they are {points.dtype} "
            f"{shape_of(points)}."
        )
    if visible is None:
        visible = torch.ones_like(points[..., 0])
    check_tensors(owner, visible=visible)
    if visible.shape != points.shape[:2]:
        raise ValueError(
            f"{owner}: visible must be (B, K), one per point, but it is {shape_of(visible)} and points are "
            f"{shape_of(points)}."
        )
    check_visible(owner, points, visible)
    is_visible = visible > VISIBLE
    cells_BK2 = (at_least_float32(points.detach()) * size + 0.5).floor().clamp(1, size) - 1
    index = torch.arange(size, device=points.device)
    is_column, is_row = (cells_BK2.unsqueeze(3) == index).unbind(dim=2)
    marked = is_row.unsqueeze(3) & is_column.unsqueeze(2) & is_visible[..., None, None]
    return marked.to(points.dtype)


def keypoint_gate(features: Tensor, maps: Tensor) -> Tensor:
    """Keep features where a key point is, and nowhere else (GAWWN, Sec. 4.2).

        gated = features * min(sum_k maps[k], 1)

    Args:
        features: Maps (B, C, M, N), or vectors (B, C), which are repeated at every position.
        maps: Maps of K key points with values from 0 to 1, (B, K, M, N), such as those of `keypoint_maps`.

    Returns:
        (B, C, M, N).

    Raises:
        ValueError: Sizes disagree.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import keypoint_gate, keypoint_maps
        >>> points = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]])  # two in the same cell
        >>> keypoint_gate(torch.full((1, 1), 7.0), keypoint_maps(points, size=2))[0, 0].tolist()
        [[7.0, 0.0], [0.0, 7.0]]
    """
    owner = "keypoint_gate"
    check_tensors(owner, features=features, maps=maps)
    if maps.ndim != 4:
        raise ValueError(f"{owner}: maps must be (B, K, M, N), one per key point, but they are {shape_of(maps)}.")
    if features.ndim not in (2, 4) or (features.ndim == 4 and features.shape[2:] != maps.shape[2:]):
        raise ValueError(
            f"{owner}: features must be (B, C), or (B, C, M, N) as large as the maps, but they are "
            f"{shape_of(features)} and the maps are {shape_of(maps)}."
        )
    check_batch(owner, features=features, maps=maps)
    gate = maps.sum(dim=1, keepdim=True).clamp(max=1)
    return (features if features.ndim == 4 else features[..., None, None]) * gate.to(features.dtype)


def maps_of(points: Tensor, size: int) -> Tensor:
    """The maps of key points (B, K, 3), x, y and visibility of each; maps (B, K, M, M) stay as they are."""
    return points if points.ndim == 4 else keypoint_maps(points[..., :2], points[..., 2], size=size)


def check_points(owner: str, name: str, points: Tensor, count: int, size: int) -> None:
    """Require `count` key points (B, K, 3), or their maps (B, K, size, size)."""
    check_tensors(owner, **{name: points})
    if points.ndim not in (3, 4) or points.shape[1:] not in ((count, 3), (count, size, size)):
        raise ValueError(
            f"{owner}: {name} must be x, y and visibility of {count} key points, (B, {count}, 3), or their maps, (B, "
            f"{count}, {size}, {size}), but they are {shape_of(points)}."
        )


def check_visible(owner: str, points: Tensor, visible: Tensor) -> None:
    """Require that visible points (B, K, 2) are within the image; `visible` (B, K) is finite. Checked on a CPU only."""
    if not is_readable(points) or points.device.type != "cpu":
        return
    unknown = visible.isnan()
    wrong = unknown | ((visible > VISIBLE) & ~((points >= 0) & (points <= 1)).all(dim=2))
    if not bool(wrong.any()):
        return
    row, point = wrong.nonzero()[0].tolist()
    if bool(unknown[row, point]):
        raise ValueError(f"{owner}: the visibility of point {point} of image {row} is not a number.")
    raise ValueError(
        f"{owner}: point {point} of image {row} is visible at {_numbers(points[row, point])}, outside of the image; "
        "give shares of its width and height, from 0 to 1, and mark points outside as not visible."
    )


def check_shares(owner: str, name: str, points: Tensor) -> None:
    """Require x, y and visibility (B, K, 3) from 0 to 1. Checked on a CPU only; NaN and infinity propagate."""
    if not is_readable(points) or points.device.type != "cpu" or points.numel() == 0:
        return
    low, high = (bound.item() for bound in points.detach().aminmax())
    if math.isfinite(high - low) and (low < 0 or high > 1):
        raise ValueError(
            f"{owner}: {name} range from {low:.4g} to {high:.4g}, but x, y and visibility must be from 0 to 1; divide "
            "x and y by the width and height of the image, and mark points as visible by 1 and as missing by 0."
        )


def _sampling(box: Tensor, source: tuple[int, ...], size: tuple[int, int], *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Interpolation weights of the rows, (..., I, M), and of the columns, (..., J, N).

    As matrices they are differentiable twice, which a gradient penalty needs and `grid_sample` is not.
    """
    left, top, width, height = at_least_float32(box).unsqueeze(-1).unbind(dim=-2)
    weights = []
    for start, extent, cells, count in ((top, height, source[0], size[0]), (left, width, source[1], size[1])):
        share = torch.linspace(0, 1, count, device=box.device, dtype=start.dtype)
        position = (share - start) / extent if inverse else start + extent * share
        index = torch.arange(cells, device=box.device, dtype=start.dtype)
        weights.append((1 - (position.unsqueeze(-1) * (cells - 1) - index).abs()).clamp(min=0))
    return weights[0], weights[1]


def _sample(features: Tensor, rows_BIM: Tensor, columns_BJN: Tensor) -> Tensor:
    rows, columns = (weights.unsqueeze(-3).to(features.dtype) for weights in (rows_BIM, columns_BJN))
    return rows @ features @ columns.mT


def _checked(
    owner: str, features: Tensor, box: Tensor, size: tuple[int, int] | None, *, vectors: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Features with an axis for the boxes if `box` has one, the box, and the size of the result."""
    check_tensors(owner, features=features, box=box)
    check_box(owner, box)
    layouts = {4: "(B, C, M, N)"} | ({2: "(B, C)"} if vectors else {})
    if box.ndim == 3:
        layouts |= {5: "(B, K, C, M, N)"} | ({3: "(B, K, C)"} if vectors else {})
    if features.ndim not in layouts or not features.is_floating_point():
        raise ValueError(
            f"{owner}: with a box {shape_of(box)}, features must be floats {' or '.join(sorted(layouts.values()))}, "
            f"but they are {features.dtype} {shape_of(features)}."
        )
    check_batch(owner, features=features, box=box)
    if features.ndim in (3, 5) and features.shape[1] != box.shape[1]:
        raise ValueError(
            f"{owner}: features are given for {features.shape[1]} boxes but there are {box.shape[1]} "
            f"(features: {shape_of(features)}, box: {shape_of(box)})."
        )
    if size is None:
        if features.ndim < 4:
            raise ValueError(f"{owner}: vectors have no height and width; pass size=(16, 16), for instance.")
        size = (features.shape[-2], features.shape[-1])
    check_size(owner, size)
    if box.ndim == 3 and features.ndim in (2, 4):
        features = features.unsqueeze(1)
    return features, box, size


def check_size(owner: str, size: tuple[int, int]) -> None:
    """Require a height and a width of at least 2, so that cells have a distance."""
    # In a graph that is being exported, a size may be symbolic.
    is_pair = (
        isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int | torch.SymInt) for side in size)
    )
    if not is_pair or min(size) < 2:
        raise ValueError(
            f"{owner}: size must be a height and a width, each at least 2, such as (16, 16), but it is {size!r}."
        )


def check_box(owner: str, box: Tensor) -> None:
    """Require boxes (B, 4) or (B, K, 4) as shares of the image, of positive size and at least partly inside it."""
    if box.ndim not in (2, 3) or box.shape[-1] != 4 or not box.is_floating_point():
        raise ValueError(
            f"{owner}: box must be floats (B, 4) or (B, K, 4), x, y, width and height as shares of the image, but it "
            f"is {box.dtype} {shape_of(box)}."
        )
    if not is_readable(box) or box.device.type != "cpu":
        return
    boxes = box.detach()
    start, extent = boxes[..., :2], boxes[..., 2:]
    problems = {
        "is not finite": ~boxes.isfinite().all(dim=-1),
        "seems to be in pixels; divide x and w by the width of the image, y and h by its height": (
            boxes.abs() > LARGEST_SHARE
        ).any(dim=-1),
        "is empty; width and height must be positive": (extent <= 0).any(dim=-1),
        "is outside of the image, which extends from 0 to 1": ((start >= 1) | (start + extent <= 0)).any(dim=-1),
    }
    for problem, affected in problems.items():
        if bool(affected.any()):
            place = affected.nonzero()[0].tolist()
            raise ValueError(
                f"{owner}: box {place[0] if len(place) == 1 else place} {problem}: {_numbers(box[tuple(place)])}."
            )


def _numbers(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"
