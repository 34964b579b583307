from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _measure, profile_demo


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = _measure.time_in_turns(calls, rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_memory_counts_what_the_call_takes_and_not_what_was_there():
    def build(mebibytes):
        kept = torch.ones(64 * 2**18)
        return lambda: torch.ones(mebibytes * 2**18) + kept[0]

    peak = _measure.peak_memory_here(build, (96,), threads=torch.get_num_threads())
    if peak.call is None:
        pytest.skip("the system does not tell")
    # The ones and their sum, each 96 MiB; the 64 MiB were there before.
    assert 180 < peak.call < 240
    assert peak.process > peak.call + 64


class Painter:
    def __init__(self, clock):
        self.clock = clock

    def paint(self, color, *, coats):
        self.clock.now += 3 * coats
        return f"{color} x {coats}"

    def fail(self):
        self.clock.now += 7
        raise KeyError("no paint")


def test_the_stopwatch_counts_and_leaves_no_trace(monkeypatch):
    clock = SimpleNamespace(now=0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(profile_demo, "time", clock)
    painter = Painter(clock)
    with profile_demo.Stopwatch() as watch:
        watch.watch("paint", painter, "paint")
        watch.watch("fail", painter, "fail")
        assert [painter.paint("red", coats=2), painter.paint("blue", coats=1)] == ["red x 2", "blue x 1"]
        with pytest.raises(KeyError, match="no paint"):
            painter.fail()
    assert watch.seconds == {"paint": 9, "fail": 7}
    assert vars(painter) == {"clock": clock}
