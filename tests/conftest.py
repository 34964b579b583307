"""What all tests share: one thread, the same draws each time, and no GPU test without a GPU."""

from functools import partial

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
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


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
