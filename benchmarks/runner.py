"""Runs cases: sets up their data, checks every provider, times those that are right.

The provider classes say how to call, `checks` what is right, `timing` how to time; this file brings
them together and makes the rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.checks import Reference, Tensors, make_tensors
from benchmarks.providers import Provider, floor_call, floor_name
from benchmarks.results import Row, fill_times, new_row
from benchmarks.shapes import Case
from benchmarks.timing import Cpu, Cuda, Device, Runner, Timer, cache_bytes

MAX_COPIES = 32


def one_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def kernel_names(call: Callable[[], Any], device: str) -> str:
    """What a call spends its time in: kernels on a GPU, operators on a CPU."""
    cuda = device == "cuda"

    def times_of_a_call() -> dict[str, float]:
        run: Any
        if cuda:
            run = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        else:
            run = torch.autograd.profiler.profile(use_kineto=False)  # the other one takes 0.1 s
        with run:
            call()
            if cuda:
                torch.cuda.synchronize()
        kind = "self_device_time_total" if cuda else "self_cpu_time_total"
        return {e.key: getattr(e, kind) for e in run.key_averages() if getattr(e, kind) > 0}

    # On a CPU a call may be interrupted, in whatever operator it is: of three, the quickest.
    calls = [times_of_a_call() for _ in range(1 if cuda else 3)]
    times = min(calls, key=lambda found: sum(found.values()))
    total = sum(times.values()) or 1
    names = sorted((n for n, t in times.items() if t >= 0.05 * total), key=lambda n: -times[n])
    return "; ".join(name[:120] for name in names[:5])


def own_statistics(t: Tensors) -> Tensors:
    """The same data with running statistics to write to.

    PyTorch's backward refuses to run after another call has written to those of its forward.
    """
    return t._replace(running_mean=t.running_mean.clone(), running_var=t.running_var.clone())


class Benchmark:
    """The state of a run: inputs of the case at hand, and what is kept from case to case."""

    def __init__(
        self,
        providers: Sequence[Provider],
        seconds: float = 1.0,
        min_rounds: int = 7,
        device: Device | None = None,
        names_kernels: bool = True,
    ) -> None:
        self.providers = providers
        self.seconds = seconds
        self.min_rounds = min_rounds
        self.device = device
        self._key: Any = None
        self.names_kernels = names_kernels
        self._kernels: dict[Any, str] = {}

    def run(self, cases: Iterable[Case]) -> Iterator[tuple[Case, list[Row]]]:
        """The rows of each case: one for the floor, one for every provider."""
        for case in cases:
            yield case, self.run_case(case)
        self._forget()

    def _forget(self) -> None:
        self._key = self.inputs = self.reference = None
        for provider in self.providers:
            provider.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _copies(self, case: Case) -> int:
        """Rotated inputs enough to leave nothing of the last one in the cache, if there is room."""
        if case.cache == "warm":
            return 1
        cache = cache_bytes(case.device)
        wanted = math.ceil(2 * cache / case.tensor_bytes)  # of x alone: some directions read no dy
        if case.device == "cuda":
            # A few calls in each graph, to spread what its launch costs; outputs stay apart there.
            room = torch.cuda.mem_get_info()[0] // 2
            each = case.tensor_bytes * (2 + 2 * len(self.providers))
            wanted = min(max(wanted, 4), max(room // each, 1))
        return min(wanted, MAX_COPIES)

    def _set_up(self, case: Case) -> None:
        if case.data == self._key:
            return
        self._forget()
        self.inputs: list[Tensors] = [
            make_tensors(case, seed) for seed in range(self._copies(case))
        ]
        self.reference = Reference(case, self.inputs[0])
        self._key = case.data

    def _is_cold(self, case: Case) -> bool:
        if case.device == "cuda":
            return case.cache == "cold" and case.level == "op"  # flushed, see _device
        read = 1 if case.direction in ("forward", "inference") else 2
        held = len(self.inputs) * read * case.tensor_bytes
        return case.cache == "cold" and held >= cache_bytes(case.device)

    def _device(self, case: Case) -> Device:
        if self.device is not None:
            return self.device
        if case.device == "cuda":
            # A tiny call as a user makes it is bound by the host: no graph, and nothing to flush.
            return Cuda(graph=case.level == "op", flush=case.level == "op" and case.cache == "cold")
        return Cpu()

    def run_case(self, case: Case) -> list[Row]:
        """Check, then time. Whatever goes wrong for one provider ends up in its own row."""
        device = self._device(case)
        rows = {name: new_row(case, name) for name in (floor_name(case), *self._names())}
        needed = case.tensor_bytes * 8
        if case.device == "cuda" and needed > torch.cuda.get_device_properties(0).total_memory:
            for row in rows.values():
                row.note = f"needs {needed / 2**30:.0f} GiB of memory"
            return list(rows.values())
        with device.context():
            try:
                self._set_up(case)
            except torch.OutOfMemoryError as error:
                self._forget()
                for row in rows.values():
                    row.note = one_line(error)
                return list(rows.values())
            if not self._is_cold(case):
                for row in rows.values():
                    row.cache = "warm"
            runners = {}
            for provider in self.providers:
                row = rows[provider.name]
                try:
                    runner = self._ready(provider, case, row, device)
                except Exception as error:
                    row.note = one_line(error)
                    continue
                if runner:
                    runners[provider.name] = runner
            if runners:
                try:
                    floor = device.runner([floor_call(case, t) for t in self.inputs])
                    self._time(case, {floor_name(case): floor, **runners}, rows, device)
                except Exception as error:  # they take turns: nobody knows whose it is
                    for row in rows.values():
                        row.note = row.note or f"while all were timed: {one_line(error)}"
        return list(rows.values())

    def _names(self) -> list[str]:
        return [provider.name for provider in self.providers]

    def _ready(self, provider: Provider, case: Case, row: Row, device: Device) -> Runner | None:
        row.note = provider.why_not(case)
        if row.note:
            return None
        results = provider.run_once(case, own_statistics(self.inputs[0]))
        device.finish()
        verdict = self.reference.check(case, results, provider.rounds_often(case))
        row.max_error, row.note = verdict
        if row.note:
            return None
        del results
        calls = [provider.prepare(case, own_statistics(tensors)) for tensors in self.inputs]
        runner = device.runner(calls)
        row.method, row.plan = runner.method, provider.plan(case)
        key = (provider.name, case.direction, case.level, case.dtype, case.layout)
        key = (*key, case.shape) if case.device == "cuda" else key
        if self.names_kernels and key not in self._kernels:
            with contextlib.suppress(RuntimeError):
                self._kernels[key] = kernel_names(calls[0], case.device)
        row.kernels = self._kernels.get(key)
        return runner

    def _time(
        self, case: Case, runners: dict[str, Runner], rows: dict[str, Row], device: Device
    ) -> None:
        timer = Timer(device, self.seconds, self.min_rounds)
        times = timer.measure(runners)
        rows[floor_name(case)].method = runners[floor_name(case)].method
        for name, values in times.items():
            fill_times(rows[name], values, times[floor_name(case)], times.get("bnext"))
