"""Recordings of published networks in tests/parity: how they are read and compared."""

import re
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


def norm_after(name):
    """The batch norm that follows the layer with this bias."""
    layer, number = re.fullmatch(r"(.*?)(\d+)\.bias", name).groups()
    return f"{layer.replace('conv', 'norm')}{number}" if "conv" in layer else f"{layer}{int(number) + 1}"


def load_without_biases(module, state):
    """Load a state whose layers before batch norms have biases, which ours do not.

    Batch norm subtracts them: its recorded running mean is larger by the bias. Returns the biases by the name of their
    norm.
    """
    state = dict(state)
    biases = {name for name in state if name.endswith(".bias")} - set(module.state_dict())
    shifts = {norm_after(name): state.pop(name) for name in biases}
    for norm, bias in shifts.items():
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return shifts


def assert_statistics_recorded(module, recorded, shifts):
    """Compare all running statistics with those of layers with biases, given what `load_without_biases` returned."""
    buffers = dict(module.named_buffers())
    assert set(recorded) == {name for name in buffers if "running" in name}
    for name, values in recorded.items():
        shift = shifts.get(name.removesuffix(".running_mean"), 0) if name.endswith("running_mean") else 0
        assert_recorded(buffers[name] + shift, values, msg=lambda text, name=name: f"{name}: {text}")
