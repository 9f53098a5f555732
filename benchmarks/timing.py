"""The timer: one loop for all devices, and what a device has to offer it.

The loop goes round by round. In each round every contestant runs once, in an order drawn anew, so
that a machine that slows down for a second slows all of them down. Two contestants are compared by
the median of their ratios round by round; a time on its own is a median with its 20th and 80th
percentile. Nothing here knows what is timed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], Any]


class Spread(NamedTuple):
    """A median between the 20th and 80th percentile, of `rounds` values."""

    median: float
    p20: float
    p80: float
    rounds: int

    @property
    def standard_error(self) -> float:
        """Of the median, relative: p20 and p80 are 1.683 sigma apart, and its own is 1.253/√n."""
        return 1.253 * (self.p80 - self.p20) / 1.683 / math.sqrt(self.rounds) / self.median


def spread(values: Sequence[float]) -> Spread:
    """Median and percentiles, linear between neighbours."""
    ordered = sorted(values)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Spread(at(0.5), at(0.2), at(0.8), len(ordered))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios pair by pair: both of a pair come from one round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def geomean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass
class Runner:
    """A contestant made ready: `run` makes `calls` calls."""

    run: Call
    calls: int
    method: str


class Device(Protocol):
    """What the loop needs of a device."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Where everything that will be timed has to be set up."""

    def runner(self, calls: Sequence[Call]) -> Runner:
        """Make `calls` (the same work on rotated inputs) ready, warmed up."""

    def start(self, runner: Runner) -> Callable[[], float]:
        """Run it. What is returned says, once the device has finished, the seconds per call."""

    def finish(self) -> None:
        """Wait for the device."""


class Cpu:
    """Wall time. Short calls are repeated until one measurement lasts `block` seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, block: float = 1e-3, warmup: int = 2
    ) -> None:
        self.clock = clock
        self.block = block
        self.warmup = warmup

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def runner(self, calls: Sequence[Call]) -> Runner:
        fastest = math.inf
        for _ in range(self.warmup):
            for call in calls:
                begin = self.clock()
                call()
                fastest = min(fastest, self.clock() - begin)
        repeats = max(1, math.ceil(self.block / max(fastest, 1e-9)))
        number = 0

        def run() -> None:
            nonlocal number
            for _ in range(repeats):
                calls[number]()  # the result is dropped here: freeing it is a part of the price
                number = (number + 1) % len(calls)

        return Runner(run, repeats, "wall")

    def start(self, runner: Runner) -> Callable[[], float]:
        begin = self.clock()
        runner.run()
        seconds = (self.clock() - begin) / runner.calls
        return lambda: seconds

    def finish(self) -> None:
        pass


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """The one stream of all measurements: data made for one is there for the next."""
    return torch.cuda.Stream()


class Cuda:
    """Events on one stream, around a graph's replay or around plain calls.

    With `graph`, all rotated calls are captured into one graph whose outputs stay apart: what is
    timed is the kernels and nothing of the host. Where that fails, and without `graph`, plain calls
    are enqueued, and the host's time is included where it is the longer one. With `flush`, a buffer
    of twice the L2 cache is overwritten before each run.
    """

    def __init__(self, graph: bool, flush: bool, block: float = 1e-4) -> None:
        self.graph = graph
        self.block = block
        self.stream = _side_stream()
        self.buffer = None
        if flush:
            self.buffer = torch.empty(2 * cache_bytes("cuda"), dtype=torch.int8, device="cuda")

    def context(self) -> contextlib.AbstractContextManager[Any]:
        # A graph's capture must find the backward nodes on the stream that it captures, which is
        # the one that their forward ran on.
        return torch.cuda.stream(self.stream)

    def runner(self, calls: Sequence[Call]) -> Runner:
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()
        if self.graph:
            try:
                return self._captured(calls)
            except RuntimeError:  # not capturable: synchronises, or allocates elsewhere
                torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        once = max(begin.elapsed_time(end) / 1e3 / len(calls), 1e-7)
        cycles = max(1, math.ceil(self.block / once / len(calls)))

        def run() -> None:
            for _ in range(cycles):
                for call in calls:
                    call()

        return Runner(run, cycles * len(calls), "events")

    def _captured(self, calls: Sequence[Call]) -> Runner:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            kept = [call() for call in calls]  # alive together, so that none is still in L2
        del kept
        graph.replay()
        torch.cuda.synchronize()
        return Runner(graph.replay, len(calls), "graph")

    def start(self, runner: Runner) -> Callable[[], float]:
        if self.buffer is not None:
            self.buffer.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        runner.run()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3 / runner.calls

    def finish(self) -> None:
        torch.cuda.synchronize()


class Timer:
    """Rounds over all contestants for about `seconds`, but never fewer than `min_rounds`."""

    def __init__(
        self,
        device: Device,
        seconds: float = 1.0,
        min_rounds: int = 7,
        max_rounds: int = 100,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self.seconds = seconds
        self.min_rounds = min_rounds
        self.max_rounds = max_rounds
        self.clock = clock

    def measure(self, runners: dict[str, Runner]) -> dict[str, list[float]]:
        """Seconds per call of each contestant in each round."""
        order = list(runners)
        shuffle = random.Random(0).shuffle
        times: dict[str, list[float]] = {name: [] for name in runners}
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            begin = self.clock()
            for number in range(self.max_rounds):
                if number >= self.min_rounds and self.clock() - begin >= self.seconds:
                    break
                shuffle(order)
                waiting = {name: self.device.start(runners[name]) for name in order}
                self.device.finish()
                for name, seconds in waiting.items():
                    times[name].append(seconds())
        finally:
            if collecting:
                gc.enable()
        return times


def cache_bytes(device: str) -> int:
    """The last-level cache: the GPU's L2, or the CPU's largest cache (32 MiB where unknown)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = []
    for index in range(8):
        with contextlib.suppress(OSError, ValueError):
            path = f"/sys/devices/system/cpu/cpu0/cache/index{index}/size"
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
            scale = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
            sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=32 * 2**20)
