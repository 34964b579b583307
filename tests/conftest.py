"""Shared by all tests: one thread, a fixed seed, a tiny trained run, and no GPU test without a GPU."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Without a GPU, Triton's interpreter runs the kernels; the variable is read when a kernel is first imported.
    os.environ["TRITON_INTERPRET"] = "1"
# What the package keeps for all runs of a user must not come from, or stay after, a run of the tests.
user_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = user_cache.name
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """Compile into one graph, forward and backward, or fail; the graph runs in eager mode, without code generation."""
    torch.compiler.reset()
    return partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture
def device():
    """The device of the kernels: a GPU, or the CPU with Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["oxford_flowers", "birds", "coco_mini"])
def real_sample(request):
    """Folder of a real data set inside the folder given by MIRROR_MODULES_TEST_DATA."""
    folder = os.environ.get("MIRROR_MODULES_TEST_DATA")
    if not folder:
        pytest.skip("MIRROR_MODULES_TEST_DATA names no folder with real samples")
    if not (Path(folder) / request.param).is_dir():
        pytest.skip(f"{folder} has no {request.param}/")
    return Path(folder) / request.param


@pytest.fixture
def tiny_recipe():
    from tests.runs import make_tiny_recipe

    return make_tiny_recipe()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run of `tiny_recipe`, trained once; tests that modify it use `run_copy`."""
    from mirror_modules.training.loop import train
    from tests.runs import make_tiny_recipe

    return train(make_tiny_recipe(), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    return type(tiny_run)(shutil.copytree(tiny_run.path, tmp_path / "copy"))
