"""The CUDA kernels as nvcc compiles them: PTX, machine code, what ptxas says. No torch headers.

One compilation takes half a minute of a core: BNEXT_STATIC_ARCHS="75 90" names the architectures,
"all" stands for all of them, and without it nothing is compiled. `make cuda-check` sets it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import scripts

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (75, 80, 86, 90, 100, 120)
# Those that are run on the shim: from one to the next the kernels ask for something new of the
# architecture, asynchronous copies, and clusters and kernels that overlap.
RUN_ARCHS = (75, 80, 90)


class Kernel(NamedTuple):
    """What ptxas reports of one entry function."""

    name: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


class Compiled(NamedTuple):
    ptx: Path
    cubin: Path
    kernels: list[Kernel]


def toolkit() -> Path:
    """Where nvcc is, found as the build finds it."""
    return scripts.load("setup.py").find_toolkit(os.environ)


def asked_for() -> list[int]:
    text = os.environ.get("BNEXT_STATIC_ARCHS", "")
    if text == "all":
        return list(ARCHS)
    return [int(arch) for arch in text.replace(",", " ").split()]


def parse_ptxas(log: str) -> list[Kernel]:
    """One Kernel for each entry function. Functions that entries call are not looked at alone."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    return [Kernel(m[1], *(int(m[i]) for i in range(2, 6))) for m in pattern.finditer(log)]


def compile_kernels(nvcc: Path, source: Path, arch: int, folder: Path) -> Compiled:
    """With all that nvcc leaves on its way in a folder of their own."""
    kept = folder / f"{source.stem}-{arch}"
    kept.mkdir()
    cubin = kept / f"{source.stem}.cubin"
    command = [str(nvcc), "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"]
    command += ["--keep", "--keep-dir", str(kept), str(source), "-o", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = parse_ptxas(run.stderr)
    assert len(kernels) == run.stderr.count("Compiling entry function")
    return Compiled(kept / f"{source.stem}.ptx", cubin, kernels)
