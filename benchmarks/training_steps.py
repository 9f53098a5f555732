"""``python -m benchmarks network``: what `bnext.convert` changes in a whole training step.

The same network with the same weights, once with nn.BatchNorm2d and once converted, does forward,
backward and an SGD step, in turns. On a CPU the share of batch norm comes from a profile of the
eager step, on a GPU likewise from its kernels' times; a compiled step fuses batch norm with its
neighbours, and has no such share. Memory: on a CPU the bytes that autograd keeps for backward
(distinct storages other than parameters), on a GPU the peak of a step above what stays.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnext
from benchmarks import results
from benchmarks.networks import NETWORKS
from benchmarks.report import describe, milliseconds
from benchmarks.runner import one_line
from benchmarks.shapes import DTYPES, LAYOUTS
from benchmarks.timing import Cpu, Cuda, Device, Timer, ratios, spread

# (batch, side of the image) that a training would have on a GPU, and that a CPU does in a second.
SIZES = {
    ("resnet50", "cuda"): (128, 224),
    ("detector", "cuda"): (4, 640),
    ("resnet50", "cpu"): (8, 96),
    ("detector", "cpu"): (2, 256),
}


INNERMOST = {
    "native_batch_norm",
    "native_batch_norm_backward",
    "cudnn_batch_norm",
    "cudnn_batch_norm_backward",
    "batchnorm2d_forward",
    "batchnorm2d_eval",
    "batchnorm2d_backward",
}


@dataclass
class Step:
    """One variant of a network's training step."""

    network: str
    mode: str  # eager, compiled, cuda-graph
    variant: str  # torch, bnext
    batch: int
    side: int
    dtype: str
    layout: str
    step: str = "training"
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    rounds: int | None = None
    vs_bnext: float | None = None  # median of the rounds
    batch_norm_share: float | None = None
    memory_mib: float | None = None
    memory: str | None = None  # what memory_mib is
    note: str | None = None


@contextlib.contextmanager
def count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd saves inside, parameters excepted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def make_step(model: nn.Module, x: Tensor, amp: torch.dtype | None, compiled: bool) -> Callable:
    """A function that does one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    device = x.device.type

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)  # in place, as a graph's replay needs it
        context = torch.autocast(device, amp) if amp else contextlib.nullcontext()
        with context:
            loss = loss_of(x)
        loss.backward()
        optimizer.step()

    return step


def batch_norm_share(step: Callable[[], None], device: str) -> float:
    """The part of a step's operator or kernel time that is under batch norm's operators."""
    cuda = device == "cuda"
    run: Any
    if cuda:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        run = torch.profiler.profile(activities=activities)
    else:
        run = torch.autograd.profiler.profile(use_kineto=False)
    with run:
        step()
        if cuda:
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    kind = "device_time_total" if cuda else "cpu_time_total"
    total = norm = 0.0
    for event in run.key_averages():
        # On a GPU a kernel is an event of its own, and also counted for the operator that ran it.
        if event.device_type == on_device:
            total += getattr(event, f"self_{kind}")
        # The innermost of the operators that call each other: its total holds all below.
        if event.key.removeprefix("aten::").removeprefix("bnext::") in INNERMOST:
            norm += getattr(event, kind)
    return norm / total if total else 0.0


def memory_of(model: nn.Module, step: Callable[[], None], x: Tensor) -> tuple[float, str]:
    """MiB, and what they are."""
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        stays = torch.cuda.memory_allocated()  # the other model's gradients among it
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - stays
        return peak / 2**20, "peak of a step, above what stays"
    with count_saved(model) as kept:
        step()
    return sum(kept.values()) / 2**20, "saved for backward"


def run_network(
    name: str,
    mode: str,
    device_name: str,
    batch: int,
    side: int,
    dtype: str,
    layout: str,
    seconds: float,
    device: Device | None = None,
) -> list[Step]:
    """Both variants of one network, in turns."""
    cuda = device_name == "cuda"
    # Wide (float32) parameters, and autocast for the 16-bit types.
    amp = DTYPES[dtype] if dtype in ("bfloat16", "float16") else None
    rows = [Step(name, mode, v, batch, side, dtype, layout) for v in ("torch", "bnext")]
    device = device or (Cuda(graph=mode == "cuda-graph", flush=False) if cuda else Cpu(block=0))
    torch.manual_seed(0)
    first = NETWORKS[name]().to(device_name, memory_format=LAYOUTS[layout]).train()
    models = {"torch": first, "bnext": bnext.convert(copy.deepcopy(first))}
    x = torch.randn(batch, 3, side, side, device=device_name).to(memory_format=LAYOUTS[layout])
    runners = {}
    with device.context():
        for row in rows:
            try:
                step = make_step(models[row.variant], x, amp, mode == "compiled")
                step()
                row.memory_mib, row.memory = memory_of(models[row.variant], step, x)
                if mode == "eager":
                    shares = [batch_norm_share(step, device_name) for _ in range(3)]
                    row.batch_norm_share = spread(shares).median
                runner = device.runner([step])
                if mode == "cuda-graph" and runner.method != "graph":
                    raise RuntimeError("the step could not be captured")
                runners[row.variant] = runner
            except Exception as error:
                row.note = one_line(error)
        times = Timer(device, seconds, min_rounds=5).measure(runners)
    for row in rows:
        if row.variant in times:
            alone = spread([1e3 * t for t in times[row.variant]])
            row.ms, row.ms_p20, row.ms_p80, row.rounds = alone
            if "bnext" in times:
                row.vs_bnext = ratios(times[row.variant], times["bnext"]).median
    if mode == "compiled":
        torch._dynamo.reset()
    return rows


def show(rows: Sequence[Step]) -> None:
    """Two lines: with nn.BatchNorm2d, and converted."""
    for row in rows:
        head = f"{row.network} {row.batch}×3×{row.side}² {row.dtype} {row.layout} {row.mode}"
        what = "nn.BatchNorm2d" if row.variant == "torch" else "bnext.convert"
        if row.note or row.ms is None:
            print(f"{head:<44} {what:<15} not timed: {row.note}", flush=True)
            continue
        share = "" if row.batch_norm_share is None else f"{100 * row.batch_norm_share:5.1f} % in it"
        speed = f"{row.vs_bnext:.2f}×" if row.vs_bnext else ""
        print(
            f"{head:<44} {what:<15}{milliseconds(row.ms):>10}{speed:>7}  {share:<14} "
            f"{row.memory_mib:7.1f} MiB {row.memory}",
            flush=True,
        )


def main(argv: Sequence[str]) -> int:
    """Measure the networks that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: both")
    add("--mode", nargs="+", choices=("eager", "compiled", "cuda-graph"), help="default: eager, "
        "compiled; on a GPU all")  # fmt: skip
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="16-bit types by "
        "autocast; default float32, on a GPU float32 and bfloat16")  # fmt: skip
    add("--layout", nargs="+", choices=LAYOUTS, help="default nchw; on a GPU both")
    add("--batch", type=int, help="default: by network and device")
    add("--side", type=int, help="of the image; default likewise")
    add("--threads", type=int, help="of the CPU")
    add("--seconds", type=float, default=8.0, help="for each pair of lines; default 8")
    add("--output", type=Path, metavar="FILE", help="write environment and rows as JSON")
    a = parser.parse_args(argv)
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"
    modes = a.mode or (["eager", "compiled", *(["cuda-graph"] if cuda else [])])
    if "cuda-graph" in modes and not cuda:
        parser.error("a CUDA graph needs a GPU")
    if a.threads:
        torch.set_num_threads(a.threads)
    environment = results.environment(device)
    print(describe(environment), flush=True)
    print("Forward, backward and SGD; 'in it': the share of batch norm in the step.\n", flush=True)
    rows: list[Step] = []
    for network in a.network:
        batch, side = SIZES[network, device]
        for dtype in a.dtype or (["float32", "bfloat16"] if cuda else ["float32"]):
            for layout in a.layout or (["nchw", "channels_last"] if cuda else ["nchw"]):
                for mode in modes:
                    size = (a.batch or batch, a.side or side)
                    found = run_network(network, mode, device, *size, dtype, layout, a.seconds)
                    show(found)
                    rows += found
                    if cuda:
                        torch.cuda.empty_cache()
    if a.output:
        results.save(a.output, environment, [asdict(row) for row in rows])
        print(f"\n{len(rows)} rows in {a.output}")
    return 0
