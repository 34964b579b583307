"""The options `--box` and `--points` of the command `generate`: where to place the subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirror_modules._files import read_json
from mirror_modules._placing import check_box
from mirror_modules.models import TextToImage
from mirror_modules.models.gawwn import HIDDEN


def read_location(model: TextToImage, box: Sequence[float] | None, points: Path | None) -> Tensor | None:
    """The location that the options give, (1, ...); None without them.

    Raises:
        ValueError: The model does not take it, or it is invalid.
    """
    if box is None and points is None:
        return None
    name = "--box" if points is None else "--points"
    if box is not None and points is not None:
        raise ValueError("--box and --points cannot be given together; the model takes one of them.")
    if not model.config.takes_location:
        raise ValueError(f"{name}: a model of the system {model.config.system!r} takes no location; leave it out.")
    # What the model takes if nothing is known of the place: a box, or points that are all missing.
    unknown = model.locate(None, None, 1)
    takes_points = unknown is not None and unknown.ndim == 3
    if takes_points != (points is not None):
        raise ValueError(f"{name}: this model takes {'--points FILE' if takes_points else '--box X Y W H'} instead.")
    if points is not None:
        return _read_points(points, getattr(model.config, "point_names", ()))
    location = torch.tensor([list(box or ())])
    check_box("--box", location)
    return location


def _read_points(path: Path, names: Sequence[str]) -> Tensor:
    """Key points from a JSON file with x and y by name, null for a hidden one; those not in it are missing."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"--points {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"--points: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f'--points {path} must be an object with x and y by name, such as {{"{names[0]}": [0.5, 0.25]}}.'
        )
    location = torch.zeros(1, len(names), 3)
    for name, place in content.items():
        if name not in names:
            raise ValueError(f"--points {path}: unknown key point {name!r}; the model has {', '.join(names)}.")
        if place is not None and not _is_place(place):
            raise ValueError(
                f"--points {path}: {name!r} must be [x, y], shares of the image from 0 to 1, or null for a hidden "
                f"point, but it is {place!r}."
            )
        location[0, list(names).index(name)] = torch.tensor([0.0, 0.0, HIDDEN] if place is None else [*place, 1.0])
    return location


def _is_place(place: Any) -> bool:
    is_pair = isinstance(place, list) and len(place) == 2
    return is_pair and all(type(part) in (int, float) and 0 <= part <= 1 for part in place)
