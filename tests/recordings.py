"""Recordings of published networks in tests/parity: how they are read and compared."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

PARITY = Path(__file__).parent / "parity"
MODES = pytest.mark.parametrize("mode", ["eval", "train"])
# In float64, what remains is the rounding of the recorded float32.
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
assert_recorded = partial(assert_close, atol=1e-5, rtol=1e-5, check_dtype=False)
assert_norm_recorded = partial(assert_close, atol=1e-5, rtol=1e-4, check_dtype=False)


def read(name):
    with np.load(PARITY / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def image_batch(record, name, resolution, dtype):
    """Images of a data set, which are stored as a coarse image and a tile."""
    small, tile = (record[f"{name}_{part}"].float() for part in ("small", "tile"))
    coarse, repeats = F.interpolate(small, size=resolution, mode="nearest"), resolution // tile.shape[2]
    return (0.5 * coarse + 0.5 * tile.repeat(1, 1, repeats, repeats)).to(dtype)


def entries(record, prefix):
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def assert_images_recorded(images, record, name, atol=1e-5):
    """Compare mean, deviation, two corners and the center of generated images."""
    half = images.shape[-1] // 2
    center = slice(half - 4, half + 4)
    parts = {
        "mean": images.mean(dim=(2, 3)),
        "std": images.std(dim=(2, 3), unbiased=False),
        "corner_first": images[:, :, :8, :8],
        "corner_last": images[:, :, -8:, -8:],
        "center": images[:, :, center, center],
    }
    for part, values in parts.items():
        key = f"{name}_{part}"
        assert_recorded(values, record[key], atol=atol, msg=lambda text, key=key: f"{key}: {text}")
