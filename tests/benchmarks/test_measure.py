from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _measure, profile_demo


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr(_measure, "LOOK", 0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds, _ = _measure.time_in_turns(calls, rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_preparing_is_not_timed_and_a_round_may_repeat_its_calls(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: clock.now)

    def pass_by(seconds):
        clock.now += seconds

    work = _measure.Work(run=lambda length: pass_by(length), prepare=lambda: (pass_by(100), (3,))[1])
    seconds, _ = _measure.time_in_turns({"work": work}, rounds=2, repeats=4)
    assert seconds == {"work": [12, 12]}


class Machine:
    """A clock, and a neighbor who works so many seconds of each."""

    def __init__(self, monkeypatch, *neighbor):
        self.now = self.own = self.all = 0.0
        self.neighbor = iter(neighbor)
        fake = SimpleNamespace(
            sleep=self.sleep, perf_counter=lambda: self.now, monotonic=lambda: self.now, process_time=lambda: self.own
        )
        monkeypatch.setattr(_measure, "time", fake)
        monkeypatch.setattr(_measure, "_processor_seconds", lambda: self.all)
        monkeypatch.setattr(_measure.os, "cpu_count", lambda: 2)

    def sleep(self, seconds):
        self.pass_by(seconds, own=0)

    def work(self, seconds):
        self.pass_by(seconds, own=2 * seconds)

    def pass_by(self, seconds, own):
        self.now += seconds
        self.own += own
        self.all += own + seconds * next(self.neighbor)


def test_a_disturbed_measurement_is_made_again(monkeypatch):
    # Looking finds a busy neighbor, then none; the neighbor comes back meanwhile; at last all is quiet.
    machine = Machine(monkeypatch, 0.9, 0.0, 0.5, 0.0, 0.08)
    assert _measure.undisturbed(lambda: machine.work(10), quiet=0.05) == (None, pytest.approx(0.04))
    assert machine.now == 3 * _measure.LOOK + 2 * 10


def test_a_machine_that_stays_busy_is_given_up(monkeypatch):
    machine = Machine(monkeypatch, *[0.6] * 1000)
    with pytest.raises(_measure.BusyError, match="other programs use 30% of the processors, more than 5%"):
        _measure.undisturbed(lambda: machine.work(10), quiet=0.05)
    assert machine.now == pytest.approx(_measure.PATIENCE, abs=3 * _measure.LOOK)


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


def test_memory_that_an_earlier_call_gave_back_is_counted_again():
    kept = []

    def call():
        # Pieces so small that they come from the heap, which cannot shrink while one piece above them is there.
        pieces = [torch.ones(2**14) for _ in range(1024)]
        kept.append(torch.ones(2**10))
        return pieces

    first, second = _measure.high_water(call), _measure.high_water(call)
    if first.call is None:
        pytest.skip("the system does not tell")
    assert first.call > 50
    assert second.call > 50


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
