from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _measure, profile_demo


def test_calls_are_interleaved(monkeypatch):
    monkeypatch.setattr(_measure, "OBSERVATION", 0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds, _ = _measure.time_interleaved(calls, rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_preparation_is_not_timed_and_repeated_calls_are_summed(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: clock.now)

    def advance(seconds):
        clock.now += seconds

    work = _measure.Work(run=advance, prepare=lambda: (advance(100), (3,))[1])
    seconds, _ = _measure.time_interleaved({"work": work}, rounds=2, repeats=4)
    assert seconds == {"work": [12, 12]}


class Machine:
    """A fake clock, and the load of other programs (busy seconds per second) in each interval."""

    def __init__(self, monkeypatch, *loads):
        self.now = self.own = self.all = 0.0
        self.loads = iter(loads)
        fake = SimpleNamespace(
            sleep=self.sleep, perf_counter=lambda: self.now, monotonic=lambda: self.now, process_time=lambda: self.own
        )
        monkeypatch.setattr(_measure, "time", fake)
        monkeypatch.setattr(_measure, "_processor_seconds", lambda: self.all)
        monkeypatch.setattr(_measure.os, "cpu_count", lambda: 2)

    def sleep(self, seconds):
        self.advance(seconds, own=0)

    def work(self, seconds):
        self.advance(seconds, own=2 * seconds)

    def advance(self, seconds, own):
        self.now += seconds
        self.own += own
        self.all += own + seconds * next(self.loads)


def test_a_disturbed_measurement_is_repeated(monkeypatch):
    # Busy while observed, then quiet; busy during the measurement; quiet in the second attempt.
    machine = Machine(monkeypatch, 0.9, 0.0, 0.5, 0.0, 0.08)
    assert _measure.undisturbed(lambda: machine.work(10), quiet=0.05) == (None, pytest.approx(0.04))
    assert machine.now == 3 * _measure.OBSERVATION + 2 * 10


def test_waiting_for_a_busy_machine_times_out(monkeypatch):
    machine = Machine(monkeypatch, *[0.6] * 1000)
    with pytest.raises(_measure.BusyError, match="other programs use 30% of the processors, more than 5%"):
        _measure.undisturbed(lambda: machine.work(10), quiet=0.05)
    assert machine.now == pytest.approx(_measure.TIMEOUT, abs=3 * _measure.OBSERVATION)


def test_peak_memory_excludes_memory_in_use_before_the_call():
    def build(mebibytes):
        kept = torch.ones(64 * 2**18)
        return lambda: torch.ones(mebibytes * 2**18) + kept[0]

    peak = _measure.peak_memory_here(build, (96,), threads=torch.get_num_threads())
    if peak.call is None:
        pytest.skip("the system does not report memory")
    # Two tensors of 96 MiB; the 64 MiB were allocated before.
    assert 180 < peak.call < 240
    assert peak.process > peak.call + 64


def test_memory_freed_by_an_earlier_call_counts_again():
    kept = []

    def call():
        # Small enough to be allocated on the heap, which cannot shrink below the last tensor that is kept.
        pieces = [torch.ones(2**14) for _ in range(1024)]
        kept.append(torch.ones(2**10))
        return pieces

    first, second = _measure.high_water(call), _measure.high_water(call)
    if first.call is None:
        pytest.skip("the system does not report memory")
    assert first.call > 50
    assert second.call > 50


class Generator:
    def __init__(self, clock):
        self.clock = clock

    def generate(self, caption, *, images):
        self.clock.now += 3 * images
        return f"{images} x {caption}"

    def fail(self):
        self.clock.now += 7
        raise KeyError("no caption")


def test_the_stopwatch_sums_times_and_restores_the_methods(monkeypatch):
    clock = SimpleNamespace(now=0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(profile_demo, "time", clock)
    generator = Generator(clock)
    with profile_demo.Stopwatch() as watch:
        watch.watch("generate", generator, "generate")
        watch.watch("fail", generator, "fail")
        assert [generator.generate("red", images=2), generator.generate("blue", images=1)] == ["2 x red", "1 x blue"]
        with pytest.raises(KeyError, match="no caption"):
            generator.fail()
    assert watch.seconds == {"generate": 9, "fail": 7}
    assert vars(generator) == {"clock": clock}
