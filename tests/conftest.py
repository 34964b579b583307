"""What all tests share: one thread, the same draws each time, and no GPU test without a GPU."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when a kernel is first imported: without a GPU, the interpreter runs it.
    os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """Compile into one graph, forward and backward, or fail. The graph is run as it is: code generation is torch's."""
    torch.compiler.reset()
    return partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture
def device():
    """Where kernels run: on a GPU, or else in Triton's interpreter on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["oxford_flowers", "birds", "coco_mini"])
def real_sample(request):
    """The folder of a real data set, where MIRROR_MODULES_TEST_DATA names the folder that holds it."""
    folder = os.environ.get("MIRROR_MODULES_TEST_DATA")
    if not folder:
        pytest.skip("MIRROR_MODULES_TEST_DATA names no folder with real samples")
    if not (Path(folder) / request.param).is_dir():
        pytest.skip(f"{folder} has no {request.param}/")
    return Path(folder) / request.param
