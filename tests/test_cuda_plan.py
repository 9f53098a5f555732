"""make_plan over devices and shapes: every plan is one that the device can run. Needs no GPU."""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import NamedTuple

import pytest
import torch
from simt import library as simt

from bnext._extension import _C

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no C++ compiler here")

RESULTS = (
    *("walk", "vec", "fold", "threads", "num_items", "chunk", "num_splits", "wide_channels"),
    *("num_slabs", "block_packs", "block_rows", "num_blocks", "reduce", "finish", "apply"),
    *("fused", "finish_threads", "reduce_shared_bytes", "apply_shared_bytes"),
    *("finish_shared_bytes", "coefficient_offset", "workspace_bytes", "bytes_moved", "has_error"),
    *("acc_bytes", "same_again", "steps_add_up", "family_chosen", "on_chip", "count_first"),
    *("cluster", "num_steps", "held_steps", "run_length", "slab_channels", "shared_bytes"),
    "tensor_bytes",
)
REQUEST = ("dtype", "backward", "training", "output", "reads_x", "sums", "misaligned")
REQUEST += ("family", "cumulative")


class Device(NamedTuple):
    arch: int
    num_sms: int
    threads_per_sm: int
    l2_bytes: int
    shared_bytes_per_block: int
    shared_bytes_opt_in: int
    shared_bytes_per_sm: int
    memory_gb_per_s: float
    active_clusters: tuple[int, int, int, int]


def named(name: str) -> Device:
    """A kind of device that csrc/cuda/plan_names.cpp knows."""
    fields = _C.cuda_device(name)
    numbers = {
        n: fields[n] if n == "memory_gb_per_s" else int(fields[n]) for n in Device._fields[:-1]
    }
    clusters = tuple(int(fields[f"active_clusters_{size}"]) for size in (2, 4, 8, 16))
    return Device(**numbers, active_clusters=clusters)


DEVICES = {name: named(name) for name in _C.cuda_devices()}


class Query(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in REQUEST),
        *((name, ctypes.c_int64) for name in ("arch", "num_sms", "threads_per_sm")),
        *((name, ctypes.c_int64) for name in ("shared_bytes_per_block", "l2_bytes")),
        *((name, ctypes.c_int64) for name in ("shared_bytes_opt_in", "shared_bytes_per_sm")),
        ("active_clusters", ctypes.c_int64 * 4),
        ("memory_gb_per_s", ctypes.c_double),
        *((name, ctypes.c_int64) for name in RESULTS),
        *((name, ctypes.c_double) for name in ("held", "microseconds")),
        ("text", ctypes.c_char * 512),
    )


@cache
def library() -> ctypes.CDLL:
    lib = simt.compile_library("plan", simt.PLAN_SOURCES)
    for name in ("plan_query_bytes", "plan_unroll", "plan_batches", "plan_knows_family"):
        getattr(lib, name).restype = ctypes.c_int64
    assert lib.plan_query_bytes() == ctypes.sizeof(Query)
    return lib


RESNET50 = (
    *((n, c, hw, hw) for n in (32, 256) for c, hw in ((64, 112), (64, 56), (256, 56), (128, 56))),
    *((n, c, hw, hw) for n in (32, 256) for c, hw in ((128, 28), (512, 28), (256, 28), (256, 14))),
    *((n, c, hw, hw) for n in (32, 256) for c, hw in ((1024, 14), (512, 14), (512, 7), (2048, 7))),
)
FEW_CHANNELS = ((20, 6, 256, 256), (64, 3, 224, 224), (8, 1, 512, 512), (256, 4, 64, 64))
TINY = ((2, 1, 1, 1), (2, 3, 1, 1), (1, 64, 1, 2), (2, 5, 3, 3), (4, 100000, 1, 1))
ODD = ((2, 17, 7, 7), (3, 130, 5, 3), (2, 33, 35, 33), (1, 5, 1, 1999), (7, 65, 13, 11))
HUGE = (
    (2048, 64, 256, 256),
    (1, 1, 1 << 17, 1 << 17),
    (1 << 21, 2048, 1, 1),
    (3, 1 << 16, 129, 129),
)
SHAPES = RESNET50 + FEW_CHANNELS + TINY + ODD + HUGE
LAYOUTS = ("nchw", "channels_last", "transposed_hw", "strided")


def strides(shape: tuple[int, int, int, int], layout: str) -> tuple[int, int, int, int]:
    _, c, h, w = shape
    return {
        "nchw": (c * h * w, h * w, w, 1),
        "channels_last": (h * w * c, 1, w * c, c),
        "transposed_hw": (c * h * w, h * w, 1, h),
        "strided": (2 * c * h * w, 2 * h * w, 2 * w, 2),
    }[layout]


def plan(
    device: Device,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    **request: int,
) -> Query:
    query = Query()
    query.size = (ctypes.c_int64 * 4)(*shape)
    query.stride = (ctypes.c_int64 * 4)(*strides(shape, layout))
    query.dtype = simt.DTYPES.index(dtype)
    defaults = {"training": 1, "output": 1, "reads_x": 1, "sums": 1}
    for name, value in (defaults | request | device._asdict()).items():
        setattr(query, name, (ctypes.c_int64 * 4)(*value) if name == "active_clusters" else value)
    library().plan_run(ctypes.byref(query))
    return query


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check(q: Query, device: Device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    text = f"{device} {shape} {dtype}: {q.text.decode()}"
    rows = q.walk == 1
    assert not q.has_error, text
    assert q.same_again, text
    assert q.steps_add_up, text
    for threads in (q.threads, q.finish_threads):
        assert 32 <= threads <= 256, text
        assert threads & (threads - 1) == 0, text
    for name in ("reduce_shared_bytes", "apply_shared_bytes", "finish_shared_bytes"):
        assert 0 <= getattr(q, name) <= device.shared_bytes_per_block, text
    assert 1 <= q.num_blocks < 2**31, text
    # Every item is in exactly one block, and no block is empty.
    assert q.chunk * (q.num_splits - 1) < q.num_items <= q.chunk * q.num_splits, text
    assert q.vec in (1, 16 // dtype.itemsize), text
    positions = n * h * w
    if rows:
        assert q.wide_channels == c * q.fold, text
        assert q.num_items * q.fold == positions, text
        assert q.wide_channels % q.vec == 0, text
        assert q.block_packs * q.block_rows <= q.threads, text
        assert q.block_packs * q.vec <= q.threads, text
        packs = q.wide_channels // q.vec
        assert q.block_packs * (q.num_slabs - 1) < packs <= q.block_packs * q.num_slabs, text
        assert q.num_blocks == q.num_slabs * q.num_splits, text
        columns = q.block_packs * q.vec
        assert q.reduce_shared_bytes >= 3 * q.block_rows * columns * q.acc_bytes, text
        steps = q.block_rows
    else:
        assert q.num_items * q.vec >= positions, text
        assert q.num_blocks == c * q.num_splits, text
        steps = q.threads
    # Sums in float32 stay short.
    assert q.chunk <= steps * library().plan_unroll() * library().plan_batches(), text
    # The grid fills the device where there is enough work: with the half of its threads that
    # registers allow, less what whole steps of a block round away.
    work = c * positions // q.vec
    if work >= 8 * device.num_sms * device.threads_per_sm and positions >= 4096:
        assert q.num_blocks * q.threads >= 3 * device.num_sms * device.threads_per_sm // 8, text
    partials = 3 * q.wide_channels * q.num_splits * 8 if q.reduce else 0
    assert q.coefficient_offset == ceil_div(partials, 16) * 16, text
    coefficients = 4 * c * q.acc_bytes if q.finish and q.apply else 0
    assert q.workspace_bytes == q.coefficient_offset + coefficients, text
    if work >= 1 << 20 and q.vec > 1:
        assert q.workspace_bytes <= c * positions * dtype.itemsize // 8, text
    assert not (q.fused and q.finish), text
    assert not (q.fused and q.num_splits > 64), text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DEVICES)
def test_every_plan_is_legal(name: str, layout: str) -> None:
    device = DEVICES[name]
    for shape, dtype, backward, misaligned in itertools.product(
        SHAPES, (torch.float64, torch.float32, torch.float16), (0, 1), (0, 1)
    ):
        q = plan(device, shape, dtype, layout, backward=backward, misaligned=misaligned)
        check(q, device, shape, dtype)


@pytest.mark.parametrize("name", DEVICES)
def test_common_shapes_get_packs(name: str) -> None:
    for shape, dtype, layout in itertools.product(
        RESNET50 + FEW_CHANNELS, (torch.float32, torch.bfloat16), ("nchw", "channels_last")
    ):
        q = plan(DEVICES[name], shape, dtype, layout, backward=1)
        assert q.vec == 16 // dtype.itemsize, q.text.decode()


def moves(**request: int) -> float:
    shape = (32, 64, 56, 56)
    q = plan(DEVICES["h200"], shape, **request)
    return q.bytes_moved / (4 * 32 * 64 * 56 * 56)


def test_bytes() -> None:
    """Activations that each pass moves."""
    assert moves(backward=0) == 3
    assert moves(backward=0, training=0) == 2
    assert moves(backward=0, output=0) == 1
    assert moves(backward=0, training=0, output=0) == 0
    assert moves(backward=1) == 5
    assert moves(backward=1, output=0) == 2
    assert moves(backward=1, output=0, reads_x=0) == 1
    assert moves(backward=1, output=0, reads_x=0, sums=0) == 0
    assert moves(backward=1, training=0) == 3
    assert moves(backward=1, training=0, reads_x=0, sums=0) == 2
    assert moves(backward=1, training=0, reads_x=0) == 2


def test_folded_rows() -> None:
    """Rows that do not fill packs are taken several at a time, where they divide evenly."""
    device = DEVICES["h200"]
    folds = {3: 8, 6: 4, 4: 2, 12: 2, 8: 1, 65: 8}
    for c, fold in folds.items():
        q = plan(device, (4, c, 16, 16), torch.float16, "channels_last")
        assert (q.vec, q.fold) == (8, fold)
    assert plan(device, (1, 3, 5, 5), torch.float16, "channels_last").vec == 1
    assert plan(device, (4, 3, 16, 16), torch.float16, "channels_last", misaligned=1).vec == 1


def test_too_many_blocks_is_an_error() -> None:
    q = plan(DEVICES["h200"], (2, 1 << 31, 2, 2))
    assert q.has_error
    assert b"cannot run" in q.text


def test_text() -> None:
    q = plan(DEVICES["h200"], (32, 64, 56, 56), torch.float16, backward=1)
    text = q.text.decode()
    assert text.startswith("streaming backward, planes of float16 in packs of 16 bytes: reduce ")
    assert "moves 5 tensors, 64.23 MB" in text


def test_families() -> None:
    for name, known in (("auto", 1), ("streaming", 1), ("resident", 0), ("", 0)):
        assert library().plan_knows_family(name.encode()) == known
