"""Compiles the SIMT shim and the plan library, and runs batch norm on them through ctypes.

The structs mirror those of driver.cpp and plan_driver.cpp.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # the order of DType
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC"]
# A checked longjmp refuses to leave a fiber's stack.
FLAGS += ["-U_FORTIFY_SOURCE", "-DBNEXT_SIMT", f"-I{ROOT}/csrc", f"-I{ROOT}/tests/simt"]
PLANS = (
    *("csrc/cuda/plan.cpp", "csrc/cuda/plan_cost.cpp", "csrc/cuda/plan_on_chip.cpp"),
    "csrc/layout.cpp",
)
PLAN_SOURCES = (
    *("tests/simt/plan_driver.cpp", "csrc/cuda/plan_cache.cpp", "csrc/cuda/plan_names.cpp"),
    *PLANS,
)
SIMT_SOURCES = (
    *("tests/simt/driver.cpp", "tests/simt/faults.cpp", "tests/simt/ptx.cpp"),
    "tests/simt/simt.cpp",
    *("csrc/cuda/launch.cu", *PLANS),
)
MESSAGE_BYTES = 512


@cache
def compiler() -> list[str] | None:
    """The C++ compiler as a command line, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


def build_library(name: str, sources: tuple[str, ...], flags: tuple[str, ...] = ()) -> Path:
    """A shared library from `sources`, compiled again only when a source has changed."""
    command = compiler()
    assert command is not None
    depends = [ROOT / s for s in sources]
    depends += [path for ext in ("h", "cuh") for path in ROOT.glob(f"csrc/**/*.{ext}")]
    depends += ROOT.glob("tests/simt/*.h")
    state = hashlib.sha256(repr((command, FLAGS, flags)).encode())
    for path in sorted(depends):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "simt"
    target = folder / f"{name}-{state.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            link(command, sources, flags, Path(unfinished) / "library.so")
            for old in folder.glob(f"{name}-*.so"):
                old.unlink(missing_ok=True)
            (Path(unfinished) / "library.so").replace(target)
    return target


def link(command: list[str], sources: tuple[str, ...], flags: tuple[str, ...], to: Path) -> None:
    """Compiles as many sources at a time as there are cores, the longest first."""

    def compile_one(source: str) -> str:
        target = str(to.with_name(source.replace("/", "-") + ".o"))
        include = [flag for flag in flags if flag.startswith("-I")]
        call([*command, *FLAGS, *include, "-c", "-x", "c++", str(ROOT / source), "-o", target])
        return target

    longest_first = sorted(sources, key=lambda source: not source.endswith(".cu"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, longest_first))
    call([*command, "-shared", *objects, *flags, "-o", str(to)])


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_library(name: str, sources: tuple[str, ...]) -> ctypes.CDLL:
    return ctypes.CDLL(str(build_library(name, sources)))


class TensorStruct(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 4),
        ("storage", ctypes.c_void_p),
        ("storage_bytes", ctypes.c_int64),
    )


class VectorStruct(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int64))


TENSORS = ("x", "dy", "out")
VECTORS = (
    *("weight", "bias", "mean", "invstd", "running_mean", "running_var"),
    *("dweight", "dbias", "dmean", "dvar"),
    *("stats_mean", "stats_var", "grad_mean", "grad_var"),
)
FAMILIES = ("auto", "streaming", "resident", "cluster", "grid")  # the order of Family
NEVER, WHERE_FASTER, ALWAYS = range(3)  # the order of Choice
LIMITS = ("num_sms", "threads_per_sm", "threads", "batches", "fused_splits")
LIMITS += ("family", "team", "persistent_limit", "registers_limit", "share_out", "shared_bytes")
RESULTS = ("illegal", "bytes_loaded", "bytes_stored", "planned_bytes", "fused", "vec")
RESULTS += ("num_splits", "run_length", "slab_channels", "slices")
RESULTS += ("num_asked", "num_asked_late", "num_asked_in_vain", "planned_asked")
RESULTS += ("bytes_kept", "bytes_stored_meanwhile")
RESULTS += ("late_threads", "least_late_clocks", "most_late_clocks", "first_late_block")
RESULTS += (
    "planned_late_threads",
    "planned_late_from",
    "persistent",
    "kept_batches",
    "batches_ahead",
)
RESULTS += ("threads_run", "instructions", "most_instructions")


class Call(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("dtype", "backward", "training", "cumulative")),
        *((name, ctypes.c_double) for name in ("momentum", "eps", "running_limit")),
        *((name, TensorStruct) for name in TENSORS),
        *((name, VectorStruct) for name in VECTORS),
        ("num_batches_tracked", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in LIMITS),
        ("seed", ctypes.c_int64),
        ("refused_launch", ctypes.c_int64),
        ("skipped_barriers", ctypes.c_char * 128),
        *((name, ctypes.c_int64) for name in RESULTS),
        *((name, ctypes.c_double) for name in ("held", "late_us")),
        ("plan", ctypes.c_char * MESSAGE_BYTES),
        ("error", ctypes.c_char * 256),
    )


class Machine(NamedTuple):
    """A device small enough for a CPU, and limits that make small tensors take every path."""

    num_sms: int = 4
    threads_per_sm: int = 128
    threads: int = 64
    batches: int = 2
    fused_splits: int = 64
    family: str = "streaming"
    team: int = 0
    persistent_limit: int = NEVER
    registers_limit: int = NEVER
    share_out: int = 0
    shared_bytes: int = 1 << 30


class Schedule(NamedTuple):
    seed: int = 0
    skipped_barriers: tuple[str, ...] = ()
    refused_launch: int = 0


class ShimError(Exception):
    """What the shim caught a kernel at."""


class NoPlanError(Exception):
    """The family that was asked for cannot do this."""


@cache
def library() -> ctypes.CDLL:
    lib = compile_library("simt", SIMT_SOURCES)
    lib.simt_call_bytes.restype = ctypes.c_int64
    lib.simt_num_barriers.restype = ctypes.c_int64
    lib.simt_barrier.restype = ctypes.c_char_p
    lib.simt_barrier.argtypes = (ctypes.c_int64,)
    lib.simt_kernels_run.restype = lib.simt_operations_run.restype = ctypes.c_char_p
    lib.simt_arch.restype = ctypes.c_int64
    lib.simt_load_ptx.restype = ctypes.c_int64
    lib.simt_load_ptx.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
    lib.simt_watch_banks.argtypes = (ctypes.c_int64,)
    pointer = ctypes.POINTER(ctypes.c_int64)
    lib.simt_bank_use.argtypes = (pointer, pointer)
    lib.simt_bank_use_of_lanes.argtypes = (ctypes.c_int64, ctypes.c_int64, pointer, pointer)
    lib.simt_forget_ptx.argtypes = lib.simt_use_ptx.argtypes = (ctypes.c_int64,)
    for name in (
        *("run", "fault", "forget_ptx", "use_ptx"),
        *("watch_banks", "bank_use", "bank_use_of_lanes"),
    ):
        getattr(lib, f"simt_{name}").restype = None
    lib.simt_fault.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)
    assert lib.simt_call_bytes() == ctypes.sizeof(Call)
    return lib


class Ptx:
    """Kernels as nvcc compiled them. Within `with`, they run in place of the sources."""

    def __init__(self, path: Path) -> None:
        self.path = path
        error = ctypes.create_string_buffer(MESSAGE_BYTES)
        self.number = library().simt_load_ptx(os.fsencode(path), error, len(error))
        if self.number == 0:
            raise ValueError(error.value.decode())
        weakref.finalize(self, library().simt_forget_ptx, self.number)

    def __enter__(self) -> Ptx:
        library().simt_use_ptx(self.number)
        return self

    def __exit__(self, *_: object) -> None:
        library().simt_use_ptx(0)


def kernels_run() -> list[str]:
    """Within Ptx: its kernels that have run since it was entered, by name."""
    return library().simt_kernels_run().decode().split()


def operations_run() -> dict[str, int]:
    """Within Ptx: how often threads have executed each instruction since it was entered."""
    lines = library().simt_operations_run().decode().splitlines()
    return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines)}


class BankUse(NamedTuple):
    cycles: int
    least: int


def bank_use() -> BankUse:
    """Within watch_banks: how the kernels of a Ptx have used the banks of shared memory since, in
    cycles of all warps, and how many these were if no bank had to find two words for one turn."""
    cycles, least = ctypes.c_int64(), ctypes.c_int64()
    library().simt_bank_use(ctypes.byref(cycles), ctypes.byref(least))
    return BankUse(cycles.value, least.value)


def bank_use_of_lanes(step: int, nbytes: int) -> BankUse:
    """The same of one warp, whose lanes ask for so many bytes, `step` apart."""
    cycles, least = ctypes.c_int64(), ctypes.c_int64()
    library().simt_bank_use_of_lanes(step, nbytes, ctypes.byref(cycles), ctypes.byref(least))
    return BankUse(cycles.value, least.value)


@contextmanager
def watch_banks() -> Iterator[None]:
    library().simt_watch_banks(1)
    try:
        yield
    finally:
        library().simt_watch_banks(0)


def arch() -> int:
    """What the kernels that run were compiled for: 90 for sm_90, and for the sources."""
    return library().simt_arch()


def barriers() -> list[str]:
    """Barriers and waits that kernels have reached so far, as "file.cuh:line"."""
    lib = library()
    return [lib.simt_barrier(i).decode() for i in range(lib.simt_num_barriers())]


def fault(which: int, seed: int) -> str:
    """What the shim says of kernel `which` of faults.cpp."""
    error = ctypes.create_string_buffer(256)
    library().simt_fault(which, seed, error, len(error))
    return error.value.decode()


def tensor_struct(t: Tensor | None) -> TensorStruct:
    if t is None:
        return TensorStruct()
    storage = t.untyped_storage()
    strides = (ctypes.c_int64 * 4)(*t.stride())
    return TensorStruct(t.data_ptr(), strides, storage.data_ptr(), storage.nbytes())


def vector_struct(t: Tensor | None) -> VectorStruct:
    return (
        VectorStruct()
        if t is None
        else VectorStruct(t.data_ptr(), t.stride(0), DTYPES.index(t.dtype))
    )


def run(
    x: Tensor,
    dy: Tensor | None,
    out: Tensor | None,
    vectors: dict[str, Tensor | None],
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    running_limit: float = 0.0,
    num_batches_tracked: Tensor | None = None,
    machine: Machine | None = None,
    schedule: Schedule | None = None,
) -> Call:
    """One pass: forward without `dy`, backward with it. Raises ShimError; returns the results."""
    call = Call()
    call.size = (ctypes.c_int64 * 4)(*x.shape)
    call.dtype = DTYPES.index(x.dtype)
    call.backward, call.training, call.cumulative = dy is not None, training, momentum is None
    call.momentum, call.eps, call.running_limit = momentum or 0.0, eps, running_limit
    call.x, call.dy, call.out = tensor_struct(x), tensor_struct(dy), tensor_struct(out)
    for name in VECTORS:
        setattr(call, name, vector_struct(vectors.get(name)))
    if num_batches_tracked is not None:
        call.num_batches_tracked = num_batches_tracked.data_ptr()
    machine = machine or Machine()
    if machine.family == "cluster" and arch() < 90:
        machine = machine._replace(family="grid")  # teams as large, without clusters
    for name, value in machine._asdict().items():
        setattr(call, name, FAMILIES.index(value) if name == "family" else value)
    schedule = schedule or Schedule()
    call.seed, call.skipped_barriers = schedule.seed, " ".join(schedule.skipped_barriers).encode()
    call.refused_launch = schedule.refused_launch
    library().simt_run(ctypes.byref(call))
    if call.illegal:
        raise NoPlanError(call.plan.decode())
    if call.error:
        raise ShimError(f"{call.error.decode()}; {call.plan.decode()}")
    return call


def guarded(shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...]) -> Tensor:
    """An output full of NaN, with these strides."""
    t = torch.empty_strided(shape, stride, dtype=dtype)
    storage = t.untyped_storage()
    ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
    return t


class Forward(NamedTuple):
    output: Tensor | None
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor
    call: Call


def forward(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *,
    momentum: float | None = 0.1,
    want_output: bool = True,
    machine: Machine | None = None,
    schedule: Schedule | None = None,
) -> Forward:
    """As csrc/api.cpp calls the kernels. The running statistics given are left alone."""
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[1]
    out = guarded(x.shape, x.dtype, torch.empty_like(x).stride()) if want_output else None
    mean, invstd = (guarded((channels,), statistics, (1,)) for _ in range(2))
    stats = [None if t is None else t.clone() for t in (running_mean, running_var)]
    tracked = torch.tensor(2)
    vectors = {"running_mean": stats[0], "running_var": stats[1], "weight": weight, "bias": bias}
    call = run(
        x,
        None,
        out,
        vectors | {"mean": mean, "invstd": invstd},
        training=training,
        momentum=momentum,
        num_batches_tracked=tracked if training else None,
        machine=machine,
        schedule=schedule,
    )
    return Forward(out, mean, invstd, stats[0], stats[1], tracked, call)


class Backward(NamedTuple):
    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    call: Call


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    training: bool = True,
    *,
    want: tuple[bool, bool, bool, bool, bool] = (True,) * 5,
    machine: Machine | None = None,
    schedule: Schedule | None = None,
) -> Backward:
    """dx, dweight, dbias, dmean, dvar: those that are wanted."""
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameters = statistics if weight is None else weight.dtype
    channels = x.shape[1]
    out = guarded(x.shape, x.dtype, torch.empty_like(x).stride()) if want[0] else None
    kinds = (parameters, parameters, statistics, statistics)
    sums = [
        guarded((channels,), kind, (1,)) if wanted else None
        for kind, wanted in zip(kinds, want[1:], strict=True)
    ]
    vectors = {"weight": weight, "mean": mean, "invstd": invstd}
    vectors |= dict(zip(("dweight", "dbias", "dmean", "dvar"), sums, strict=True))
    call = run(x, dy, out, vectors, training=training, machine=machine, schedule=schedule)
    return Backward(out, *sums, call)
