"""How well boxes agree: intersection over union."""

from __future__ import annotations

from torch import Tensor

from mirror_modules._checks import at_least_float32, check_tensors, shape_of


def box_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the intersection over union of pairs of boxes.

        overlap = |A and B| / |A or B|    1 for equal boxes, 0 for disjoint ones and where a box is empty

    Args:
        boxes: x, y, width and height, (N, 4).
        others: The box to compare each with, (N, 4).

    Returns:
        From 0 to 1, (N,).

    Raises:
        ValueError: Shapes disagree.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import box_overlap
        >>> left_half, top_half = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.5]])
        >>> round(box_overlap(left_half, top_half).item(), 4)
        0.3333
    """
    check_tensors("box_overlap", boxes=boxes, others=others)
    for name, tensor in (("boxes", boxes), ("others", others)):
        if tensor.ndim != 2 or tensor.shape[1] != 4 or not tensor.is_floating_point():
            raise ValueError(
                f"box_overlap: {name} must be floats (N, 4), x, y, width and height, but they are {tensor.dtype} "
                f"{shape_of(tensor)}."
            )
    if boxes.shape != others.shape:
        raise ValueError(f"box_overlap: boxes {shape_of(boxes)} and others {shape_of(others)} must be as many.")
    one, other = at_least_float32(boxes), at_least_float32(others)
    start = one[:, :2].maximum(other[:, :2])
    stop = (one[:, :2] + one[:, 2:]).minimum(other[:, :2] + other[:, 2:])
    common = (stop - start).clamp(min=0).prod(dim=1)
    together = one[:, 2:].prod(dim=1) + other[:, 2:].prod(dim=1) - common
    return common / together.where(together > 0, 1)
