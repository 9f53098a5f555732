"""Every instruction set that this processor has computes the same; BNEXT_CPU_ISA forces one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("generic", "avx2", "avx512")

# Planes and rows, whole vectors and odd lengths, runs shorter than a vector, runs of planes, folded
# rows, slices.
PROGRAM = """
import sys, torch, bnext

torch.manual_seed(0)
results = {}
shapes = [(2, 3, 5, 7), (3, 16, 7, 7), (9, 17, 7, 7), (2, 17, 12, 12), (4, 6, 33, 35)]
shapes += [(9, 40, 1, 1), (2, 4, 3, 1)]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    found = results[dtype] = []
    for shape in shapes:
        for layout in ("nchw", "channels_last", "sliced"):
            x, dy = torch.randn(2, *shape, dtype=torch.float64).mul(2).add(1).to(dtype)
            if layout == "channels_last":
                x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
            elif layout == "sliced":
                x = torch.cat([x, x], 1)[:, ::2]
            weight, bias = torch.randn(2, shape[1]).to(dtype)
            found.append(bnext.batchnorm2d(x, None, None, weight, bias, training=True))
            for training in (True, False):
                running = (None, None) if training else (bias, weight.abs())
                found += bnext.batchnorm2d_backward(dy, x, weight, *running, training=training)
torch.save({d: [r.contiguous() for r in found] for d, found in results.items()}, sys.argv[1])
"""


def run(isa: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BNEXT_CPU_ISA": isa}
    command = [sys.executable, "-c", PROGRAM, str(path)]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, list[torch.Tensor]]:
    path = tmp_path_factory.mktemp("isa") / "generic.pt"
    done = run("generic", path)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("isa", ISAS[1:])
def test_same_results(
    isa: str, generic: dict[torch.dtype, list[torch.Tensor]], tmp_path: Path
) -> None:
    done = run(isa, tmp_path / "results.pt")
    if "this processor or build has only" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    computed = torch.load(tmp_path / "results.pt")
    for dtype, expected in generic.items():
        # Sums are float64 and differ in their order only; elementwise work is float32 with or
        # without fused multiply-adds. So results differ by a rounding of their own dtype, and by
        # a few roundings of float32 (float64) where large terms cancel. float64 sums of a few
        # thousand terms keep more of what cancels: some tens of roundings.
        cancelled = 64 * 2.0**-52 if dtype == torch.float64 else 4 * 2.0**-24
        # Of 16-bit elements eight terms are summed in float32: with 0.4 * 2**-24 of a running sum
        # for each rounding, that is 0.84 * 2**-24 of what the terms come to as a rule. Two orders
        # differ by 1.2, and these are five such standard errors.
        if dtype.itemsize == 2:
            cancelled += 6 * 2.0**-24
        for ours, reference in zip(computed[dtype], expected, strict=True):
            largest = reference.double().abs().max().item()
            torch.testing.assert_close(
                ours, reference, rtol=torch.finfo(ours.dtype).eps, atol=cancelled * largest
            )


def test_unknown_is_refused(tmp_path: Path) -> None:
    done = run("sse9", tmp_path / "results.pt")
    assert done.returncode != 0
    message = "BNEXT_CPU_ISA should be generic, avx2 or avx512, not sse9"
    assert message in done.stderr
    environment = {**os.environ, "BNEXT_CPU_ISA": "sse9"}
    command = [sys.executable, "-m", "bnext"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"python -m bnext: error: {message}"
