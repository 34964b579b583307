"""Fixtures of the benchmark tests: a fake GPU and fast compilation."""

from functools import partial

import pytest
import torch


class Event:
    """A fake CUDA event whose clock advances by a quarter of a millisecond with each reading."""

    now = 0.0

    def __init__(self, enable_timing):
        self.enabled = enable_timing

    def record(self):
        Event.now += 0.25
        self.time = Event.now

    def elapsed_time(self, end):
        assert self.enabled
        return end.time - self.time


@pytest.fixture
def fake_gpu(monkeypatch):
    """Run the GPU code with tensors on the CPU, to test that it runs and what it records."""
    from benchmarks import _measure

    monkeypatch.setattr(_measure, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(_measure, "FLUSHED", 16)
    monkeypatch.setattr(_measure, "copy_gb_per_s", lambda: 2000.0)
    monkeypatch.setattr(_measure, "matrix_tflops", lambda dtype: 500.0)
    allocated = iter(range(0, 2**60, 3 * 2**20))
    fakes = {
        "Event": Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(allocated),
        "max_memory_allocated": lambda: next(allocated),
        "is_available": lambda: True,
        "get_device_name": lambda: "Fake GPU",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    _measure._flush_buffer.cache_clear()
    yield
    _measure._flush_buffer.cache_clear()


@pytest.fixture
def quick_compile(monkeypatch):
    """Compile into one graph, but run it in eager mode, without code generation."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
