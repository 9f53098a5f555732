"""The timer of the benchmarks: known ratios on fake clocks, a fake GPU, and a real processor.

No test asserts how long something takes. Where a clock is real, ratios of two things timed in turns
are compared with the spread that the timer itself reports for them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other, and for other programs' turns on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def processor_time() -> timing.Cpu:
    """The timer on this thread's processor time, which goes on only while it runs."""
    return timing.Cpu(time.thread_time)


class FakeClock:
    """A clock that goes on only when somebody works; a work of cost 1 takes `speed` seconds.

    In powers of two, so that sums of times are exact.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.speed = 2**-10

    def __call__(self) -> float:
        return self.now

    def work(self, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.now += cost * self.speed

        return call


def fake_timer(clock: FakeClock, rounds: int = 15, block: float = 2**-10) -> timing.Timer:
    device = timing.Cpu(clock, block)
    return timing.Timer(device, seconds=0.0, min_rounds=rounds, clock=clock)


def test_timer_counts_calls_and_keeps_ratios() -> None:
    """Costs from a 64th of the block to 128 of them, each timed per call."""
    clock = FakeClock()
    timer = fake_timer(clock)
    costs = {"a": 1.0, "b": 1.25, "tiny": 2**-6, "huge": 128.0}
    runners = {name: timer.device.runner([clock.work(cost)]) for name, cost in costs.items()}
    assert runners["tiny"].calls == 64 and runners["huge"].calls == 1
    times = timer.measure(runners)
    for name, cost in costs.items():
        assert len(times[name]) == 15
        ratio = timing.ratios(times[name], times["a"])
        assert ratio.median == pytest.approx(cost, rel=1e-9)
        assert ratio.p20 == pytest.approx(ratio.p80, rel=1e-9)


def test_ratios_survive_a_machine_that_slows_down() -> None:
    """The machine gets slower all the time, tenfold in the end: times spread, ratios do not."""
    clock = FakeClock()
    timer = fake_timer(clock, rounds=21)
    runners = {n: timer.device.runner([clock.work(c)]) for n, c in (("a", 1), ("b", 1.2))}

    start = timer.device.start

    def slower(one: timing.Runner) -> Callable[[], float]:
        clock.speed *= 10 ** (1 / 42)
        return start(one)

    timer.device.start = slower  # type: ignore[method-assign]
    times = timer.measure(runners)
    alone = timing.spread(times["b"])
    ratio = timing.ratios(times["b"], times["a"])
    assert alone.p80 / alone.p20 > 3
    # One step of the slowdown, 5.6 %, lies between two neighbours, to either side by turns.
    assert ratio.p20 >= 1.2 / 1.057 and ratio.p80 <= 1.2 * 1.057


def test_all_inputs_take_their_turn() -> None:
    """Rotated inputs: every copy is used, equally often, in a run that repeats them."""
    clock, used = FakeClock(), [0] * 3
    work = clock.work(1 / 8)

    def copy(number: int) -> Callable[[], None]:
        def call() -> None:
            used[number] += 1
            work()

        return call

    timer = fake_timer(clock, rounds=9)
    timer.measure({"it": timer.device.runner([copy(n) for n in range(3)])})
    assert max(used) - min(used) <= 1 and sum(used) == 3 * 2 + 9 * 8


def test_a_device_that_finishes_later() -> None:
    """Times are asked for only after the device has finished, as CUDA's events demand."""

    class Late:
        finished = 0
        started = 0

        def start(self, one: timing.Runner) -> Callable[[], float]:
            self.started += 1
            number = self.started

            def seconds() -> float:
                assert self.finished >= number, "asked before the end"
                return one.run()

            return seconds

        def finish(self) -> None:
            self.finished = self.started

    late = Late()
    runners = {n: timing.Runner(lambda s=s: s, 1, "events") for n, s in (("a", 1.0), ("b", 3.0))}
    times = timing.Timer(late, seconds=0, min_rounds=5).measure(runners)  # type: ignore[arg-type]
    assert timing.ratios(times["b"], times["a"]).median == 3
    assert late.finished == 10


class FakeCuda:
    """As much of torch.cuda as the timer uses, on a fake clock; logs what happens, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, can_capture: bool = True) -> None:
        self.clock = FakeClock()
        self.log: list[str] = []
        self.captured: list[Callable[[], Any]] | None = None
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("event")
                self.at = fake.clock.now

            def elapsed_time(self, end: Event) -> float:
                assert fake.log[-1] == "synchronize"
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.clock.work(4.0)()

        def capture(graph: Graph, stream: object) -> Any:
            assert stream == "stream"
            fake.log.append("capture")
            if not can_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            return contextlib.nullcontext()

        def empty(*shape: int, **options: object) -> Any:
            return SimpleNamespace(zero_=lambda: fake.log.append("flush"))

        monkeypatch.setattr(timing, "_side_stream", lambda: "stream")
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
        monkeypatch.setattr(timing.torch, "empty", empty)
        for name, value in (("Event", Event), ("CUDAGraph", Graph), ("graph", capture)):
            monkeypatch.setattr(torch.cuda, name, value)
        synchronize = lambda: self.log.append("synchronize")  # noqa: E731
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_cuda_replays_a_graph_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rotated calls in one graph, of cost 1 each: the flush comes before the first event."""
    fake = FakeCuda(monkeypatch)
    device = timing.Cuda(graph=True, flush=True)
    runner_ = device.runner([fake.clock.work(1.0)] * 4)
    assert runner_.method == "graph" and runner_.calls == 4
    fake.log.clear()
    times = timing.Timer(device, seconds=0, min_rounds=2).measure({"it": runner_})
    assert fake.log == ["flush", "event", "replay", "event", "synchronize"] * 2
    assert times["it"] == [fake.clock.speed] * 2


def test_cuda_falls_back_to_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be captured is called, often enough for the block, and the row says so."""
    fake = FakeCuda(monkeypatch, can_capture=False)
    device = timing.Cuda(graph=True, flush=False, block=12 * fake.clock.speed)
    runner_ = device.runner([fake.clock.work(1.0)] * 4)
    assert "capture" in fake.log and runner_.method == "events" and runner_.calls == 12
    fake.log.clear()
    times = timing.Timer(device, seconds=0, min_rounds=1).measure({"it": runner_})
    assert fake.log == ["event", "event", "synchronize"]
    assert times["it"] == [fake.clock.speed]


def test_spread() -> None:
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 1.8, 4.2, 5)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0, 1)


def test_real_work_takes_as_long_as_it_is() -> None:
    """Twice as many elements take twice as long, within the spread that the timer measured.

    Each is a call of lgamma, 10 ns and more, on one thread (below 2^15 elements) and near the
    processor. What a call costs beside them, 10 µs beside 100 and more, may pull the ratio
    below 2, so 15 % are allowed at all; beyond them the 20th to 80th percentile of the ratios, once
    more on each side. Another program may disturb some attempts; not ten.
    """
    source = torch.full((2**14,), 2.5)
    target = torch.empty_like(source)
    parts = {n: (source[:s], target[:s]) for n, s in (("half", 2**13), ("whole", 2**14))}
    for _ in range(10):
        device = processor_time()
        calls = {n: (lambda p=p: torch.lgamma(p[0], out=p[1])) for n, p in parts.items()}
        timer = timing.Timer(device, seconds=0.3, min_rounds=31, max_rounds=101)
        times = timer.measure({n: device.runner([call]) for n, call in calls.items()})
        ratio = timing.ratios(times["whole"], times["half"])
        width = ratio.p80 - ratio.p20
        if width < 0.5 and ratio.p20 - width <= 2 * 1.15 and ratio.p80 + width >= 2 / 1.15:
            return
    pytest.fail(f"twice as many take {ratio.median:.2f} ({ratio.p20:.2f} to {ratio.p80:.2f})×")
