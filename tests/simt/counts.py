"""What threads of the CUDA kernels execute, counted on the simulated GPU: PTX instructions for
each pack of 16 bytes, and what a thread executes beside its packs.

python tests/simt/counts.py [--arch 90] [--ptx FILE]

Needs nvcc, or the PTX that it has made of csrc/cuda/launch.cu. Each line is a pass of two batch
sizes, from whose difference the count for a pack follows. `shuffles` are of a thread; a
multiprocessor does one of a warp in a clock, and of most other instructions four.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernel_code
import torch
from simt import library as simt

from bnext.__main__ import DTYPES, LAYOUTS

MACHINE = simt.Machine(num_sms=132, threads_per_sm=2048, threads=512, batches=64)
# Layout, family, blocks of a team, and a shape, of which twice as many images have plans of as many
# threads.
ROWS, PLANES, MANY = (4, 64, 16, 16), (16, 16, 32, 32), (32, 64, 32, 32)
KINDS = (
    ("channels_last", "resident", 0, ROWS),
    ("channels_last", "cluster", 2, ROWS),
    ("channels_last", "grid", 4, ROWS),
    ("channels_last", "streaming", 0, MANY),
    ("nchw", "resident", 0, PLANES),
    ("nchw", "cluster", 2, PLANES),
    ("nchw", "streaming", 0, MANY),
)


class Counts(NamedTuple):
    """Of a pass."""

    of_pack: float  # instructions of a thread for each pack of each tensor
    rest: float  # of a thread, beside its packs, in the mean
    longest: int  # of the thread that executes most, in the smaller batch
    shuffles: float  # of a thread, in the mean, in the smaller batch


def count(
    layout: str,
    family: str,
    team: int,
    shape: tuple[int, int, int, int],
    dtype: str,
    backward: bool,
    ptx: simt.Ptx,
) -> Counts | None:
    """None where the larger batch gets another kind of plan."""
    images, channels, height, width = shape
    found = []
    for times in (1, 2):
        batch = images * times * (1 if dtype == "float32" else 2)
        x = torch.randn(batch, channels, height, width).to(DTYPES[dtype])
        x = x.contiguous(memory_format=LAYOUTS[layout])
        ones = torch.ones(channels)
        machine = MACHINE._replace(family=family, team=team)
        with ptx:
            if backward:
                call = simt.backward(x, x, 0 * ones, ones, ones, machine=machine).call
            else:
                statistics = (0 * ones, ones)
                call = simt.forward(x, *statistics, ones, ones, True, machine=machine).call
            operations = simt.operations_run()
        packs = x.numel() * x.element_size() // 16
        shuffles = sum(n for name, n in operations.items() if name.startswith("shfl"))
        found.append((call, packs, shuffles))
    (call, packs, shuffles), (more, more_packs, _) = found
    if call.threads_run != more.threads_run:
        return None
    of_pack = (more.instructions - call.instructions) / (more_packs - packs)
    threads = call.threads_run
    rest = (call.instructions - of_pack * packs) / threads
    return Counts(of_pack, rest, call.most_instructions, shuffles / threads)


def lines(ptx: simt.Ptx) -> Iterator[str]:
    yield (
        f"{'layout':<14} {'family':<10} {'dtype':<9} {'pass':<9} {'of a pack':>9} {'the rest':>9} "
        f"{'longest':>8} {'shuffles':>8}"
    )
    for layout, family, team, shape in KINDS:
        for dtype in ("float32", "float16"):
            for backward in (False, True):
                name = "backward" if backward else "forward"
                begin = f"{layout:<14} {family:<10} {dtype:<9} {name:<9} "
                found = count(layout, family, team, shape, dtype, backward, ptx)
                if found is None:
                    yield begin + "another plan for the larger batch"
                    continue
                numbers = f"{found.of_pack:9.1f} {found.rest:9.0f} {found.longest:8d} "
                yield f"{begin}{numbers}{found.shuffles:8.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, choices=kernel_code.RUN_ARCHS, default=90)
    parser.add_argument("--ptx", type=Path, help="what nvcc has made of csrc/cuda/launch.cu")
    a = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = a.ptx
        if path is None:
            print("compiling, a minute or two ...", file=sys.stderr)
            nvcc = kernel_code.toolkit() / "bin" / "nvcc"
            source = kernel_code.ROOT / "csrc/cuda/launch.cu"
            path = kernel_code.compile_kernels(nvcc, source, a.arch, Path(folder)).ptx
        for line in lines(simt.Ptx(path)):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
