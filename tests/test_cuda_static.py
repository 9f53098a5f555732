"""What ptxas and the machine code say of every CUDA kernel. Needs nvcc, no GPU: kernel_code.py."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
from collections import Counter
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import pytest
from kernel_code import ARCHS, Compiled, asked_for, compile_kernels, toolkit
from simt import library as simt

CLUSTER_ARCH = 90  # the first one with thread-block clusters

# Kernels that load or store no activations in packs, by their mangled names; all others have to.
# Single elements: the pack size, the template's first number, is 1.
SINGLE = re.compile(r"_kernelI[^L]*Li1E")
# The others work on one number for each channel, or on none.
PER_CHANNEL = re.compile(r"finish_kernel|_kernelE")
READS_ONLY = re.compile(r"statistics_kernel|reduce_kernelI\w*?Lb[01]ELb0EE")
# Global memory, 16 bytes or more at a time: into registers, into shared memory, in bulk.
WIDE_LOAD = re.compile(r"LDG(STS)?\.([\w.]*\.)?(128|256)\b|UBLKCP|UTMALDG")
WIDE_STORE = re.compile(r"STG\.([\w.]*\.)?(128|256)\b|UBLKCP|UTMASTG")
LOCAL = re.compile(r"(LDL|STL)\b")
# Where a copy to shared memory has a policy for L2, ptxas of CUDA 13.0 cannot add a uniform
# register to its address, and does so all the same: an H200 stops at that. See async.cuh.
ILLEGAL = re.compile(r"LDGSTS\S* \[R\d+\+UR\d+[^;]*")
WHOLE_ON_CHIP = re.compile(r"on_chip_\w+Li\dELb[01]ELb1ELNS0_6BlocksE")
# Kernels of a grid, and what moves less than 16 bytes of what other blocks look at.
GRID = re.compile(r"on_chip_\w+BlocksE3E")
TORN = re.compile(r"(LDG|STG)\.E\.(?!128\b)\S*STRONG\.GPU")


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest, compilations: dict[int, Future[Compiled]]) -> int:
    if request.param not in asked_for():
        pytest.skip(f"not in BNEXT_STATIC_ARCHS={os.environ['BNEXT_STATIC_ARCHS']}")
    if request.param not in compilations:
        pytest.skip("this nvcc does not know the architecture")
    return request.param


@pytest.fixture
def compiled(arch: int, compilations: dict[int, Future[Compiled]]) -> Compiled:
    return compilations[arch].result()


@cache
def disassembler() -> Path | None:
    """cuobjdump: from PATH, from the toolkit, or from the triton that comes with torch for CUDA."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    with contextlib.suppress(LookupError):
        folders.append(toolkit() / "bin")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = (folder / "cuobjdump" for folder in folders)
    return next((path for path in found if path.is_file()), None)


def illegal_instructions(text: str) -> list[str]:
    """Those of a disassembly, each kind once."""
    return sorted(set(ILLEGAL.findall(text)))


def read_sass(text: str) -> dict[str, list[str]]:
    """The instructions of each function, in order, without predicates."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        function = re.match(r"\s*Function : (\w+)", line)
        if function:
            instructions = found.setdefault(function[1], [])
            continue
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*[^;]*)", line)
        if code:
            instructions.append(code[1])
    return found


def parse_sass(text: str) -> dict[str, Counter[str]]:
    """How often each instruction occurs in each function, modifiers included: LDG.E.EF.128."""
    functions = read_sass(text).items()
    return {name: Counter(re.match(r"[\w.]+", i)[0] for i in code) for name, code in functions}


def disassemble(cubin: Path) -> str:
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump in the toolkit, on PATH or in a triton package")
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        [str(tool), "-sass", str(cubin)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def count(instructions: Counter[str], pattern: re.Pattern[str], without: Counter[str]) -> int:
    """Instructions of this pattern, of kinds that `without` does not have."""
    return sum(n for i, n in instructions.items() if pattern.match(i) and i not in without)


def narrow_kernels(functions: dict[str, Counter[str]], arch: int) -> list[str]:
    """Kernels for packs that do not move activations in packs, with the reason."""
    bad = []
    for name, instructions in functions.items():
        if SINGLE.search(name) or PER_CHANNEL.search(name):
            continue
        if "cluster" in name and arch < CLUSTER_ARCH:
            continue  # an empty body
        # What the kernel for single elements loads 16 bytes wide as well is no activation. There
        # are two packs in flight at the least: of x and dy, or of one tensor.
        single = functions.get(re.sub(r"(_kernelI[^L]*)Li\d+E", r"\1Li1E", name), Counter())
        if count(instructions, WIDE_LOAD, single) < 2:
            bad.append(f"{name}: fewer than two loads of 16 bytes")
        if not READS_ONLY.search(name) and count(instructions, WIDE_STORE, single) < 1:
            bad.append(f"{name}: no store of 16 bytes")
    return bad


def early_reads(text: str) -> list[str]:
    """Kernels on chip that wait for what vectors have of their channels, the first that they load,
    before they copy their first packs. (Of whole packs: others load misaligned ones as well.)"""
    bad = []
    for name, code in read_sass(text).items():
        copies = [i for i, instruction in enumerate(code) if "LDGSTS" in instruction]
        if not WHOLE_ON_CHIP.search(name) or not copies:
            continue
        asked: set[str] = set()
        for instruction in code[: copies[0]]:
            load = re.search(r"LDG\.E(?:\.U16)? (R\d+), (.*)", instruction)
            used = re.findall(r"\bR\d+\b", load[2] if load else instruction)
            if asked.intersection(used):
                bad.append(f"{name}: waits before its first copy: {instruction}")
                break
            if load:
                asked.add(load[1])
        if not asked:
            bad.append(f"{name}: asks for its vectors behind its first copy")
    return bad


def torn_letters(functions: dict[str, Counter[str]]) -> list[str]:
    """Kernels of a grid with loads or stores of letters that are not of a whole word: ptxas makes
    loads of 4 bytes of one whose other bytes nobody uses. Forward also loads the number of batches
    from L2, 8 bytes."""
    bad = []
    for name, instructions in functions.items():
        if not GRID.search(name):
            continue
        torn = Counter({i: n for i, n in instructions.items() if TORN.match(i)})
        if "forward" in name:
            torn.subtract(["LDG.E.64.STRONG.GPU"])
        bad += [f"{name}: {n} x {instruction}" for instruction, n in torn.items() if n != 0]
    return bad


def fail_with(lines: list[str], arch: int) -> None:
    if lines:
        pytest.fail("\n".join([f"sm_{arch}:", *lines]), pytrace=False)


def test_nothing_spills(arch: int, compiled: Compiled) -> None:
    assert len({kernel.name for kernel in compiled.kernels}) == len(compiled.kernels) == 187
    bad = [k for k in compiled.kernels if k.stack or k.spill_stores or k.spill_loads]
    fail_with([str(kernel) for kernel in bad], arch)


# On chip, but not grids: pass, dtype, whether the walk is rows, whether no pack is shared, whether
# blocks have one tile, or are persistent, or keep packs in registers as well.
NO_GRID = re.compile(r"on_chip_(\w+)_kernelI(\w+?)Li\dELb(\d)ELb(\d)ELNS0_6BlocksE([012])E")
DTYPES = ("d", "f", "NS_8BFloat16E", "NS_7Float16E")


def test_the_model_knows_the_registers(arch: int, compiled: Compiled) -> None:
    """With more than it thinks, fewer blocks would run on an SM than a plan counts on."""
    lib = simt.compile_library("plan", simt.PLAN_SOURCES)
    lib.plan_registers.argtypes = (ctypes.c_int64,) * 7
    lib.plan_registers.restype = ctypes.c_int64
    lines, found = [], 0
    for kernel in compiled.kernels:
        match = NO_GRID.search(kernel.name)
        if match is None:
            continue
        found += 1
        rows, whole_packs, blocks = map(int, match.groups()[2:])
        kind = (match[1] == "backward", DTYPES.index(match[2]), rows, whole_packs)
        most = lib.plan_registers(*kind, blocks >= 1, blocks == 2, arch)
        if kernel.registers > most:
            lines.append(f"{kernel.name}: {kernel.registers} registers, by the model {most}")
    assert found == 2 * (2 * 3 * len(DTYPES) + 4 + 2)
    fail_with(lines, arch)


def test_machine_code(arch: int, compiled: Compiled) -> None:
    text = disassemble(compiled.cubin)
    functions = parse_sass(text)
    assert functions.keys() >= {kernel.name for kernel in compiled.kernels}
    local = {name: sorted(i for i in f if LOCAL.match(i)) for name, f in functions.items()}
    lines = [f"{name}: {', '.join(found)}" for name, found in local.items() if found]
    lines += [f"illegal: {instruction}" for instruction in illegal_instructions(text)]
    assert sum(1 for name in functions if GRID.search(name)) == 24
    fail_with(
        [*lines, *narrow_kernels(functions, arch), *torn_letters(functions), *early_reads(text)],
        arch,
    )


SPILLING = """
__global__ void local_array_kernel(float* x, int n) {
  float all[64];
  for (int i = 0; i < 64; ++i) all[i] = x[i];
  for (int i = 0; i < n; ++i) all[(i * 7) & 63] += all[i & 63];
  for (int i = 0; i < 64; ++i) x[i] = all[i];
}
template <typename T, int kVec> __global__ void apply_kernel(T* x) { x[threadIdx.x] += T(1); }
template __global__ void apply_kernel<float, 4>(float*);
template __global__ void apply_kernel<float, 1>(float*);
"""


def test_the_gates_can_fail(nvcc: Path, tmp_path: Path) -> None:
    """A kernel with an array that registers cannot hold, and one for packs that moves floats."""
    source = tmp_path / "bad.cu"
    source.write_text(SPILLING)
    compiled = compile_kernels(nvcc, source, 90, tmp_path)
    stacks = {kernel.name: kernel.stack for kernel in compiled.kernels}
    assert sorted(stacks.values()) == [0, 0, 256]
    functions = parse_sass(disassemble(compiled.cubin))
    (name,) = (name for name in functions if "local_array" in name)
    assert [i for i in functions[name] if LOCAL.match(i)]
    bad = narrow_kernels(functions, 90)
    assert [line for line in bad if "apply_kernelIfLi4EE" in line]
    assert not [line for line in bad if "Li1E" in line]


def test_illegal_instructions_are_seen() -> None:
    """Lines of a disassembly: as an H200 refused them, and as it ran them."""
    refused = "LDGSTS.E.BYPASS.128 [R27+UR0], desc[UR1][R12.64] "
    ran = ("[R27], desc[UR10][R20.64]", "[R27+0x200], desc[UR10][R20.64]")
    lines = [refused, *(f"LDGSTS.E.BYPASS.128 {operands} " for operands in ran)]
    text = "".join(f"        /*0d30*/              @!P0 {line};\n" for line in lines)
    assert illegal_instructions(text) == [refused]


def test_early_reads_are_seen() -> None:
    """As ptxas made it of a branch for each size, and as it is."""
    load, copy = "LDG.E R14, desc[UR10][R14.64]", "LDGSTS.E.BYPASS.128 [R25], desc[UR14][R16.64]"
    waits = [load, "IMAD.MOV.U32 R54, RZ, RZ, R14", copy]
    goes_on = [load, "LDG.E.U16 R14, desc[UR10][R18.64]", copy, "IMAD.MOV.U32 R54, RZ, RZ, R14"]
    texts = []
    for code in (waits, goes_on, [copy, load]):
        lines = "".join(f"        /*{16 * i:04x}*/       @!P1 {c} ;\n" for i, c in enumerate(code))
        texts.append(
            f"\n  Function : _Z1on_chip_backward_kernelIfLi4ELb0ELb1ELNS0_6BlocksE0\n{lines}"
        )
    assert [len(early_reads(text)) for text in texts] == [1, 0, 1]


def test_torn_letters_are_seen() -> None:
    """As ptxas loaded a letter of which two parts were not used."""
    whole = Counter({"LDG.E.128.STRONG.GPU": 3, "STG.E.128.STRONG.GPU": 2, "LDG.E": 4})
    narrow = Counter({"LDG.E.STRONG.GPU": 2, "LDG.E.64.STRONG.GPU": 1})
    names = [f"_Z1on_chip_{p}ward_kernelIfLi4ELNS0_6BlocksE3EEE" for p in ("for", "back")]
    forward, backward = names
    fine = {forward: whole + Counter({"LDG.E.64.STRONG.GPU": 1}), backward: whole}
    assert torn_letters(fine) == []
    assert len(torn_letters({forward: whole + narrow, backward: whole + narrow})) == 3
    assert torn_letters({backward.replace("E3E", "E2E"): narrow}) == []


@pytest.mark.parametrize(
    ("name", "single", "reads_only"),
    [
        ("_ZN5bnext4cuda22streaming_apply_kernelINS_7Float16ELi8ELb0EEEvNS0_1AE", False, False),
        ("_ZN5bnext4cuda22streaming_apply_kernelIfLi1ELb1EEEvNS0_13KernelArgsE", True, False),
        ("_ZN5bnext4cuda27streaming_statistics_kernelIdLi2ELb0EEEvNS0_1AE", False, True),
        ("_ZN5b4c32streaming_backward_reduce_kernelIfLi4ELb1ELb0EEEvNS0_1AE", False, True),
        ("_ZN5b4c32streaming_backward_reduce_kernelIfLi4ELb0ELb1EEEvNS0_1AE", False, False),
    ],
)
def test_names_are_understood(name: str, single: bool, reads_only: bool) -> None:
    assert bool(SINGLE.search(name)) == single
    assert bool(READS_ONLY.search(name)) == reads_only
