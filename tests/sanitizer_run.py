"""A few calls of every kernel family for compute-sanitizer to watch, most of them small.

python tests/sanitizer_run.py [cpu|cuda] [FAMILY ...]

Prints what ran; a result that is not finite is an error. Allocations have to be the device's own
for the tool to see their ends: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

import bnext
from bnext._extension import _C

# Whole packs, odd planes, C = 3, several blocks to a channel, one value for each plane; runs of
# channels (halves); a channel of 384 KiB of x in float32, of which no block holds all; and more
# channels than a GPU has SMs.
SHAPES = ((2, 16, 8, 8), (3, 17, 7, 7), (2, 3, 33, 35), (2, 2, 96, 96), (5, 64, 1, 1))
SHAPES += ((8, 16, 7, 7), (6, 2, 128, 128), (2, 300, 12, 12))
# More channels, and more slabs of them, than GPUs run blocks: persistent ones have several.
PERSISTENT_SHAPES = ((8, 12288, 14, 14),)
# The same with more of a channel than a block has slots for: registers keep some.
KEPT_SHAPES = ((2, 320, 192, 192),)
DTYPES = (torch.float32, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def step(x: torch.Tensor, dy: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """Forward with running statistics and with a cumulative average; backward, and dx over dy."""
    c = x.shape[1]
    mean, var, weight, bias = (torch.rand(c, device=x.device) + 0.5 for _ in range(4))
    y = bnext.batchnorm2d(x, mean, var, weight, bias, training)
    running = () if training else (mean, var)
    gradients = bnext.batchnorm2d_backward(dy, x, weight, *running, training=training)
    layer = bnext.BatchNorm2d(c, momentum=None, device=x.device).train(training)
    in_place = dy.clone(memory_format=torch.preserve_format)
    over_dy = bnext.batchnorm2d_backward(
        in_place, x, weight, *running, training=training, out=in_place
    )
    return [y, mean, var, *gradients, layer(x.detach()), *layer.buffers(), *over_dy]


class Run(NamedTuple):
    """Calls with what BNEXT_CUDA_FAMILY, and BNEXT_CUDA_PERSISTENT and _REGISTERS, say."""

    family: str
    persistent: str = "1"
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    modes: tuple[bool, ...] = (True, False)  # training


RUNS = tuple(Run(family) for family in ("auto", *_C.cuda_families()))
RUNS += (Run("resident", "always", PERSISTENT_SHAPES + KEPT_SHAPES, (True,)),)
RUNS += (Run("cluster", "always", PERSISTENT_SHAPES, (True,)),)


def main(device: str, families: Sequence[str] = ()) -> int:
    for run in RUNS:
        if families and run.family not in families:
            continue
        os.environ |= {"BNEXT_CUDA_FAMILY": run.family, "BNEXT_CUDA_PERSISTENT": run.persistent}
        os.environ["BNEXT_CUDA_REGISTERS"] = run.persistent
        _C.read_environment()
        ran = refused = 0
        for shape, dtype, layout, training in product(run.shapes, DTYPES, LAYOUTS, run.modes):
            x, dy = torch.randn(2, *shape, device=device, dtype=dtype).unbind()
            x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
            try:
                results = step(x, dy, training)
            except RuntimeError as error:
                if "cannot run" not in str(error):
                    raise
                refused += 1
                continue
            ran += 1
            label = f"{run.family}, persistent {run.persistent}: {shape} {dtype} {layout}"
            assert all(bool(t.isfinite().all()) for t in results), label
            if device == "cuda" and run.persistent == "always":
                assert all(plan["persistent"] for plan in _C.cuda_plans(x, device, "", True)), label
        name = f"{run.family}, persistent {run.persistent}"
        print(f"{name}: {ran} steps, {refused} refused", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda", sys.argv[2:]))
