"""``python -m benchmarks.probe_device``: what the model of docs/kernels.md assumes, measured.

Bandwidths of plain PyTorch operations from memory and from L2, the price of a launch, what the
device says of itself and what plans take from that, and the names of the kernels that PyTorch and
cuDNN run for each shape. It runs no kernel of bnext's. Everything goes into one JSON file.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import make_tensors
from benchmarks.providers import Cudnn, Native
from benchmarks.results import write_whole
from benchmarks.runner import kernel_names, one_line, own_statistics
from benchmarks.shapes import SUITES, Case
from benchmarks.timing import Cpu, Cuda, Device, Timer, cache_bytes, spread
from bnext._extension import _C

MIB = 2**20
# Of one tensor; an operation works on two or three.
SIZES_MIB = (1, 2, 4, 8, 16, 25, 50, 100, 200, 400, 800, 1600)
LAUNCHES = 200  # in one graph, or in one round of plain calls
OPERATIONS: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "copy": (2, lambda x, dy, out: out.copy_(x)),
    "add": (3, lambda x, dy, out: torch.add(x, dy, out=out)),
}
PEERS = {"native": Native, "cudnn": Cudnn}


def measured(device: Device, calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Seconds of one call, median."""
    with device.context():
        runner = device.runner(calls)
        times = Timer(device, seconds, min_rounds=7).measure({"it": runner})["it"]
    return spread(times).median


def clock(device: str, *, graph: bool = True, flush: bool = False) -> Device:
    return Cuda(graph=graph, flush=flush) if device == "cuda" else Cpu()


def bandwidths(device: str, sizes: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """GB/s of copy (2 tensors moved) and add (3), from memory (flushed) and from the cache."""
    rows = []
    for size in sizes:
        number = int(size * MIB) // 4
        tensors = tuple(torch.ones(number, device=device) for _ in range(3))
        for name, (moved, operation) in OPERATIONS.items():
            call = functools.partial(operation, *tensors)
            for cold in (True, False):
                taken = measured(clock(device, flush=cold), [call], seconds)
                gbps = moved * 4 * number / taken / 1e9
                rows.append({"operation": name, "mib": size, "cold": cold, "gbps": round(gbps, 1)})
    return rows


def launches(device: str, seconds: float) -> dict[str, float]:
    """Microseconds of a kernel that does next to nothing: in a graph, and launched by the host."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    return {
        name: round(1e6 * measured(clock(device, graph=graph), [many], seconds) / LAUNCHES, 3)
        for name, graph in (("graph_us", True), ("stream_us", False))
    }


def peers(device: str, deadline: float) -> list[dict[str, Any]]:
    """Kernel names of each peer for each shape of ResNet-50, until the time is up."""
    rows = []
    for dtype in ("float16", "float32", "bfloat16"):
        for layout in ("nchw", "channels_last"):
            for shape in SUITES["resnet50"]:
                if time.perf_counter() > deadline:
                    return rows
                rows += peers_of_shape(Case("resnet50", shape, dtype, layout, device=device))
    return rows


def peers_of_shape(case: Case) -> list[dict[str, Any]]:
    tensors = make_tensors(case)
    rows = []
    for name, kind in PEERS.items():
        row: dict[str, Any] = {"provider": name, "dtype": case.dtype, "layout": case.layout}
        row["shape"] = list(case.shape[:4])
        for direction in ("forward", "backward"):
            one = Case(
                case.suite, case.shape, case.dtype, case.layout, direction, "op", device=case.device
            )
            try:
                reason = kind().why_not(one)
                call = None if reason else kind().prepare(one, own_statistics(tensors))
                row[direction] = reason if call is None else kernel_names(call, case.device)
            except RuntimeError as error:
                row[direction] = one_line(error)
        rows.append(row)
    return rows


def what_it_is(device: str) -> dict[str, Any]:
    """What the device and bnext say of it."""
    if device == "cpu":
        return {"name": "cpu", "cache_mib": cache_bytes("cpu") / MIB}
    properties = torch.cuda.get_device_properties(0)
    names = [name for name in dir(properties) if not name.startswith("_")]
    found = {name: getattr(properties, name) for name in names}
    found = {k: v for k, v in found.items() if isinstance(v, int | float | str)}
    found["bnext"] = _C.cuda_device("cuda")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_device", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("probe.json"))
    parser.add_argument("--seconds", type=float, default=120, help="in all, about; default 120")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES_MIB, metavar="MIB")
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here, or a torch without CUDA", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + a.seconds
    each = a.seconds / 4 / (4 * len(a.sizes) + 2)
    steps: dict[str, Callable[[], Any]] = {
        "device": lambda: what_it_is(a.device),
        "launches": lambda: launches(a.device, each),
        "bandwidths": lambda: bandwidths(a.device, a.sizes, each),
        "peers": lambda: peers(a.device, deadline),
    }
    found: dict[str, Any] = {}
    good = True
    for name, step in steps.items():
        try:
            found[name] = step()
        except Exception as error:  # one that fails should not cost the others
            found[name], good = one_line(error), False
        print(f"{name}: {json.dumps(found[name])[:2000]}", flush=True)
        write_whole(a.output, json.dumps(found, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
