"""What one eager call costs on the host: the tensor is so small that its arithmetic hardly counts.

Owns the comparison with F.batch_norm and nn.BatchNorm2d on the CPU; says nothing about kernels.
Run it with `python -m benchmarks.host_cost`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

import bnext
from benchmarks.timing import cache_bytes

SHAPE = (2, 4, 2, 2)
# Rounds that are not counted: caches, the allocator and the processor's clock settle.
WARMUP = 3
FORWARD, BACKWARD, BOTH, INFERENCE = "forward", "backward", "forward + backward", "inference"


class Subject(NamedTuple):
    """One way to call batch-norm: training and inference forward, and what is differentiated."""

    train: Callable[[Tensor], Tensor]
    infer: Callable[[Tensor], Tensor]
    x: Tensor
    wanted: tuple[Tensor, ...]
    dy: Tensor


class Row(NamedTuple):
    """The microseconds per call of both sides, round by round."""

    interface: str
    part: str
    torch_us: list[float]
    bnext_us: list[float]

    def ratios(self) -> list[float]:
        """Return bnext's time over torch's, each pair from one round."""
        return [b / a for a, b in zip(self.torch_us, self.bnext_us, strict=True)]


def make_functional(batch_norm: Callable[..., Tensor]) -> Subject:
    """Call a function with running statistics, weight and bias."""
    torch.manual_seed(0)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    weight, bias = (torch.randn(SHAPE[1], requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(SHAPE[1]), torch.ones(SHAPE[1])

    def train(x: Tensor) -> Tensor:
        return batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)

    def infer(x: Tensor) -> Tensor:
        return batch_norm(x, mean, var, weight, bias, False, 0.1, 1e-5)

    return Subject(train, infer, x, (x, weight, bias), dy)


def make_module(module: type[nn.BatchNorm2d]) -> Subject:
    """Call a layer in training mode, and another one in eval mode."""
    torch.manual_seed(0)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layer, frozen = module(SHAPE[1]).train(), module(SHAPE[1]).eval()
    return Subject(layer, frozen, x, (x, *layer.parameters()), dy)


def check_agreement(ours: Subject, theirs: Subject) -> None:
    """Refuse to time results that differ: a wrong call gets no time."""
    results = []
    for subject in (theirs, ours):
        y = subject.train(subject.x)
        gradients = grad(y, subject.wanted, subject.dy)
        with torch.no_grad():
            results.append([y, *gradients, subject.infer(subject.x)])
    for a, b in zip(*results, strict=True):
        # A sanity check, not a test of precision: eight values per channel, all near 1.
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def time_part(subject: Subject, part: str, calls: int, flush: Callable[[], object] | None) -> float:
    """Return the microseconds per call of one part; `flush` is called before each and not timed."""
    train, infer, x, wanted, dy = subject
    run: dict[str, Callable[[Tensor], object]] = {
        FORWARD: train,
        BACKWARD: lambda y: grad(y, wanted, dy),
        BOTH: lambda x: grad(train(x), wanted, dy),
        INFERENCE: infer,
    }
    call = run[part]
    arguments = [train(x) for _ in range(calls)] if part == BACKWARD else [x] * calls
    # The processor's time of this process, all its threads: what other processes take of a shared
    # machine is not in it. Nothing here waits, so on a quiet machine it is the wall time.
    clock = time.process_time
    spent = 0.0
    with torch.set_grad_enabled(part != INFERENCE):
        if flush is None:
            start = clock()
            for argument in arguments:
                call(argument)
            spent = clock() - start
        else:
            for argument in arguments:
                flush()
                start = clock()
                call(argument)
                spent += clock() - start
    return 1e6 * spent / calls


def make_flush() -> Callable[[], object]:
    """Return what leaves nothing of a call in the caches: twice the largest one is written."""
    buffer = torch.zeros(2 * cache_bytes("cpu") // 4)
    return lambda: buffer.add_(1)


def measure(
    interface: str,
    theirs: Subject,
    ours: Subject,
    rounds: int,
    calls: int,
    flush: Callable[[], object] | None = None,
) -> list[Row]:
    """Time both sides in turn, pair by pair; who goes first alternates."""
    check_agreement(ours, theirs)
    rows = [Row(interface, part, [], []) for part in (FORWARD, BACKWARD, BOTH, INFERENCE)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(WARMUP + rounds):
            for row in rows:
                sides = [(theirs, row.torch_us), (ours, row.bnext_us)]
                for subject, times in sides if index % 2 else sides[::-1]:
                    microseconds = time_part(subject, row.part, calls, flush)
                    if index >= WARMUP:
                        times.append(microseconds)
    finally:
        if collecting:
            gc.enable()
    return rows


def print_table(rows: list[Row]) -> None:
    """Print microseconds and ratios, a line for each row."""
    print(f"{'':<12}{'part':<20}{'torch, us':>11}{'bnext, us':>11}{'bnext / torch (p20-p80)':>28}")
    interface = ""
    for row in rows:
        label = "" if row.interface == interface else row.interface
        interface = row.interface
        low, *_, high = statistics.quantiles(row.ratios(), n=5)
        ratio = f"{statistics.median(row.ratios()):.2f} ({low:.2f}-{high:.2f})"
        sides = [statistics.median(side) for side in (row.torch_us, row.bnext_us)]
        print(f"{label:<12}{row.part:<20}{sides[0]:>11.1f}{sides[1]:>11.1f}{ratio:>28}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100, help="rounds to time (default 100)")
    parser.add_argument("--calls", type=int, help="calls a round (default 100; cold: 1)")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="flush the caches before every call, as the tensors of a network do",
    )
    args = parser.parse_args()
    if args.calls is None:
        args.calls = 1 if args.cold else 100
    if args.rounds < 2 or args.calls < 1:
        parser.error("--rounds must be at least 2 and --calls at least 1")
    return args


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    # One thread: a pool of threads would add its own wake-up time to both sides.
    torch.set_num_threads(1)
    flush = make_flush() if args.cold else None
    where = ", nothing of them in the caches" if args.cold else ""
    print(
        f"bnext {bnext.__version__}, torch {torch.__version__}: eager calls on a float32 tensor"
        f" {list(SHAPE)}, 1 thread{where}.\nMicroseconds of processor time per call, medians of"
        f" {args.rounds} rounds of {args.calls} calls;\nboth sides in turn, ratios by round.\n"
    )
    rows = measure(
        "functional",
        make_functional(F.batch_norm),
        make_functional(bnext.batchnorm2d),
        args.rounds,
        args.calls,
        flush,
    )
    rows += measure(
        "module",
        make_module(nn.BatchNorm2d),
        make_module(bnext.BatchNorm2d),
        args.rounds,
        args.calls,
        flush,
    )
    print_table(rows)
    print(
        "\nforward builds the autograd graph; backward is torch.autograd.grad for input, weight\n"
        "and bias; inference is a call in eval mode under no_grad. What autograd itself takes is\n"
        "in backward and forward + backward, on both sides."
    )


if __name__ == "__main__":
    main()
