"""make_plan over devices and shapes: every plan is one that the device can run. Needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import random
import re
import statistics
from functools import cache
from typing import NamedTuple

import pytest
import torch
from simt import library as simt
from simt.overlap import L2_TIME, simulate

from bnext._extension import _C

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no C++ compiler here")

RESULTS = (
    *("walk", "vec", "fold", "threads", "num_items", "chunk", "num_splits", "wide_channels"),
    *("num_slabs", "block_packs", "block_rows", "num_blocks", "reduce", "finish", "apply"),
    *("fused", "finish_threads"),
    *("finish_shared_bytes", "coefficient_offset", "workspace_bytes", "bytes_moved", "has_error"),
    *("acc_bytes", "same_again", "family_chosen", "on_chip", "counts_behind"),
    *("cluster", "num_steps", "held_steps", "run_length", "slab_channels", "shared_bytes"),
    *("tensor_bytes", "kept_batches", "batches_ahead", "num_teams", "persistent", "shares_out"),
    *("late_from", "num_late", "registers", "overlapping"),
    *("early_lines", "early_slabs", "line_packs"),
)
REQUEST = ("dtype", "backward", "training", "output", "reads_x", "sums", "misaligned")
REQUEST += ("family", "cumulative", "no_grid", "no_clusters", "no_overlap")
REQUEST += ("persistent_limit", "registers_limit", "no_late", "no_early")
REQUEST += ("team", "exact_threads")


KB = 1 << 10


class Device(NamedTuple):
    arch: int
    num_sms: int
    threads_per_sm: int
    l2_bytes: int
    shared_bytes_per_block: int
    shared_bytes_opt_in: int
    shared_bytes_per_sm: int
    memory_gb_per_s: float
    cooperative: int
    overlaps: int
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
        ("cooperative", ctypes.c_int64),
        ("overlaps", ctypes.c_int64),
        ("memory_gb_per_s", ctypes.c_double),
        *((name, ctypes.c_int64) for name in RESULTS),
        *((name, ctypes.c_double) for name in ("held", "microseconds", "late_us")),
        ("text", ctypes.c_char * 512),
    )


@cache
def library() -> ctypes.CDLL:
    lib = simt.compile_library("plan", simt.PLAN_SOURCES)
    numbers = (
        "query_bytes",
        "unroll",
        "batches",
        "knows_family",
        "divide",
        "allows_late",
        "cache_keeps",
        "cache_size",
    )
    for name in numbers:
        getattr(lib, f"plan_{name}").restype = ctypes.c_int64
    lib.plan_on_chip_time.restype = ctypes.c_double
    lib.plan_on_chip_time.argtypes = (
        *[ctypes.c_double] * 7,
        *[ctypes.c_int64] * 2,
        ctypes.POINTER(ctypes.c_double),
    )
    for divide in (lib.plan_divide, lib.plan_divide_long):
        divide.argtypes, divide.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
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
ODD += ((32, 56, 9, 9), (32, 112, 9, 9))  # seven packs of halves to a block
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
    defaults |= dict.fromkeys(("persistent_limit", "registers_limit"), simt.WHERE_FASTER)
    for name, value in (defaults | request | device._asdict()).items():
        setattr(query, name, (ctypes.c_int64 * 4)(*value) if name == "active_clusters" else value)
    library().plan_run(ctypes.byref(query))
    return query


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


AUTO, STREAMING, RESIDENT, CLUSTER, GRID = range(5)


def check(q: Query, device: Device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    text = f"{device} {shape} {dtype}: {q.text.decode()}"
    assert not q.has_error, text
    assert q.same_again, text
    assert 1 <= q.num_blocks < 2**31, text
    assert q.vec in (1, 16 // dtype.itemsize), text
    assert q.num_items < 2**31 or q.vec == 1, text
    n, c, h, w = shape
    if q.walk == 1:
        columns = q.wide_channels // q.vec
        assert q.wide_channels % q.vec == 0, text
        assert q.num_items * q.wide_channels == n * c * h * w, text
        assert q.block_packs * q.block_rows <= q.threads, text
        assert q.block_packs * (q.num_slabs - 1) < columns <= q.block_packs * q.num_slabs, text
    else:
        assert q.num_items * q.vec >= n * h * w, text
    if q.on_chip:
        check_on_chip(q, device, c, text)
    else:
        check_streaming(q, device, shape, dtype, text)


def check_on_chip(q: Query, device: Device, channels: int, text: str) -> None:
    tensors = 1 + q.backward
    assert q.persistent == (q.num_teams < q.num_slabs), text
    assert q.vec > 1, text
    assert q.threads in (64, 128, 256, 512), text
    assert (q.cluster > 1) == (q.family_chosen == CLUSTER), text
    assert q.family_chosen == GRID or q.num_splits == q.cluster, text
    slabs = q.num_slabs if q.walk == 1 else channels
    assert 1 <= q.num_teams <= q.num_slabs == slabs, text
    sms = device.num_sms  # that run its blocks
    if q.family_chosen == CLUSTER:
        assert device.arch >= 90, text
        clusters = device.active_clusters[(2, 4, 8, 16).index(q.cluster)]
        assert clusters > 0, text
        sms = min(sms, clusters * q.cluster)
    if q.family_chosen == GRID:
        # All blocks run at once: an SM has memory and registers for its share of them.
        per_sm = ceil_div(q.num_blocks, device.num_sms)
        assert device.cooperative, text
        assert per_sm * q.threads <= 512, text
        assert per_sm * (q.shared_bytes + KB) <= device.shared_bytes_per_sm, text
        # Words of 16 bytes with 12 bytes in each: sums from every block, and coefficients.
        coefficients = ceil_div(4 * q.acc_bytes, 12) if q.shares_out else 0
        assert not (q.shares_out and q.walk == 0), text
        words = ceil_div(24, 12) * q.num_splits + coefficients
        assert q.workspace_bytes == 16 * 2 * q.num_teams * q.slab_channels * words, text
    else:
        # All persistent blocks run at once, and there are no fewer than can.
        assert q.persistent or q.num_teams == slabs, text
        if q.persistent:
            per_sm = ceil_div(q.num_blocks, sms)
            each = ceil_div(q.shared_bytes + KB, 256) * 256

            def have_room(blocks: int) -> bool:
                enough = blocks * q.threads * q.registers <= 2**16
                return enough and blocks * each <= device.shared_bytes_per_sm

            assert per_sm == 1 or have_room(per_sm), text
            assert q.num_blocks % sms > 0 or not have_room(per_sm + 1), text
        assert q.workspace_bytes == 0, text
    # Whole teams begin late, no more than half; and only where an SM has more than one block to do.
    assert (q.num_late > 0) == (q.late_us > 0), text
    assert 0 <= q.late_us <= q.microseconds / 2, text
    if q.num_late > 0:
        assert q.late_from % q.num_splits == q.num_late % q.num_splits == 0, text
        assert 0 < q.num_late <= q.late_from <= q.num_blocks - q.num_late, text
        assert q.num_splits * slabs > sms or q.num_slabs > q.num_teams, text
    # A thread asks L2 for a line at most, of what a later block has; and L2 has room for them all.
    assert 0 <= q.early_lines <= q.threads - (0 if q.walk == 1 else 32), text
    assert q.early_lines == 0 or q.early_slabs < slabs, text
    assert q.early_slabs == q.num_teams or not q.persistent, text
    assert 1 <= q.line_packs <= 8, text
    packs = q.chunk * (q.block_packs if q.walk == 1 else 1)
    assert q.early_lines <= ceil_div(packs, q.line_packs), text
    early = q.early_lines * q.line_packs * 16 * tensors * q.early_slabs * q.num_splits
    again_now = (q.bytes_moved - (tensors + 1) * q.tensor_bytes) * q.early_slabs / q.num_slabs
    assert early == 0 or early <= device.l2_bytes / 4 - again_now, text
    assert early == 0 or q.early_slabs * q.num_splits <= 3 * device.num_sms, text
    # Every item is in exactly one block, and no thread has more steps than it takes.
    assert q.chunk * q.num_splits >= q.num_items >= q.num_splits, text
    at_once = q.block_rows if q.walk == 1 else q.threads
    assert at_once * (q.num_steps - 1) < q.chunk <= at_once * q.num_steps, text
    assert q.num_blocks == q.num_splits * q.num_teams, text
    assert q.slab_channels * (slabs - 1) < channels <= q.slab_channels * slabs, text
    # What is held fits.
    slots = q.held_steps * tensors * q.threads * 16
    assert 0 < slots < q.shared_bytes <= device.shared_bytes_opt_in, text
    assert 0 < q.held <= 1, text
    batches, all_in_slots = ceil_div(q.num_steps, 2), q.held_steps >= q.num_steps
    assert (q.held == 1) == (ceil_div(q.held_steps, 2) + q.kept_batches >= batches), text
    # Slots come in whole batches. A block of one slab that holds all may do without the last one.
    assert q.held_steps % 2 == 0 or (all_in_slots and not q.persistent), text
    assert q.held_steps <= q.num_steps + q.persistent * (q.num_steps % 2), text
    # A place that is copied to is free: behind the one that is used come all others but one.
    assert 1 <= q.batches_ahead <= min(6, batches), text
    assert all_in_slots or q.batches_ahead < q.held_steps // 2, text
    # Registers keep the first ones; when these are mapped, all copies have been asked for.
    assert 0 <= q.kept_batches <= 6 // tensors, text
    if q.kept_batches > 0:
        assert not all_in_slots and q.kept_batches + q.batches_ahead <= batches, text
        assert q.walk == 0 or (q.vec < 8 and device.arch >= 90), text
        assert q.persistent or q.family_chosen == GRID, text
        assert q.registers == 128, text
    # Sums in float32 stay short.
    assert q.num_steps <= library().plan_unroll() * library().plan_batches(), text
    # Everything once, and what is not held, in whole packs, once more.
    packs = q.wide_channels // q.vec if q.walk == 1 else channels
    again = (1 - q.held) * q.num_items * packs * 16 * tensors
    assert q.bytes_moved == pytest.approx((tensors + 1) * q.tensor_bytes + again, rel=1e-9), text


def check_streaming(
    q: Query, device: Device, shape: tuple[int, int, int, int], dtype: torch.dtype, text: str
) -> None:
    n, c, h, w = shape
    rows = q.walk == 1
    assert q.family_chosen == STREAMING, text
    for threads in (q.threads, q.finish_threads):
        assert 32 <= threads <= 256, text
        assert threads & (threads - 1) == 0, text
    for name in ("shared_bytes", "finish_shared_bytes"):
        assert 0 <= getattr(q, name) <= device.shared_bytes_per_block, text
        assert getattr(q, name) <= library().plan_streaming_shared_bytes(), text
    # Every item is in exactly one block, and no block is empty.
    assert q.chunk * (q.num_splits - 1) < q.num_items <= q.chunk * q.num_splits, text
    positions = n * h * w
    if rows:
        assert q.wide_channels == c * q.fold, text
        assert q.num_items * q.fold == positions, text
        assert q.block_packs * q.vec <= q.threads, text
        assert q.num_blocks == q.num_slabs * q.num_splits, text
        parts = q.threads // (32 if 32 % q.block_packs == 0 else q.block_packs)
        columns = q.block_packs * q.vec
        assert q.shared_bytes >= (3 * parts + 4) * columns * q.acc_bytes, text
        steps = q.block_rows
    else:
        assert q.num_blocks == c * q.num_splits, text
        steps = q.threads
    # Sums in float32 stay short.
    assert q.chunk <= steps * library().plan_unroll() * library().plan_batches(), text
    # Blocks fill the device where there is enough work: with the 512 threads of an SM that
    # registers allow, less what whole steps of a block and whole blocks of a channel round away.
    work = c * positions // q.vec
    if work >= 8 * device.num_sms * device.threads_per_sm and positions >= 4096:
        at_once = device.num_sms * min(device.threads_per_sm, 512)
        assert q.num_blocks * q.threads >= at_once // 2, text
    partials = 3 * q.wide_channels * q.num_splits * 8 if q.reduce else 0
    assert q.coefficient_offset == ceil_div(partials, 16) * 16, text
    coefficients = 4 * c * q.acc_bytes if q.finish and q.apply else 0
    assert q.workspace_bytes == q.coefficient_offset + coefficients, text
    if work >= 1 << 20 and q.vec > 1:
        assert q.workspace_bytes <= c * positions * dtype.itemsize // 8, text
    assert not (q.fused and q.finish), text
    assert not (q.fused and q.num_splits * max(8, q.slab_channels) > 512), text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DEVICES)
def test_every_plan_is_legal(name: str, layout: str) -> None:
    device = DEVICES[name]
    for shape, dtype, backward, misaligned in itertools.product(
        SHAPES, (torch.float64, torch.float32, torch.float16), (0, 1), (0, 1)
    ):
        request = {"backward": backward, "misaligned": misaligned}
        auto = plan(device, shape, dtype, layout, **request)
        streaming = plan(device, shape, dtype, layout, **request, family=STREAMING)
        check(auto, device, shape, dtype)
        check(streaming, device, shape, dtype)
        assert auto.microseconds <= streaming.microseconds
        # Registers are for what is faster with them.
        slots = plan(device, shape, dtype, layout, **request, registers_limit=simt.NEVER)
        assert compared(auto) <= compared(slots)
        if slots.family_chosen == GRID:
            pair = [
                plan(device, shape, dtype, layout, **request, family=GRID, registers_limit=limit)
                for limit in (simt.WHERE_FASTER, simt.NEVER)
            ]
            assert pair[0].microseconds <= pair[1].microseconds


def compared(q: Query) -> float:
    """Microseconds with the handicap that a plan has."""
    handicap = 1.03 if q.family_chosen == GRID else 1.02 if q.persistent else 1
    return q.microseconds * handicap


@pytest.mark.parametrize("name", DEVICES)
def test_forced_families(name: str) -> None:
    """A family is what was asked for, or an error says why not; auto is none the worse for it."""
    device, ran = DEVICES[name], set()
    for shape, dtype, backward, layout in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16), (0, 1), ("nchw", "channels_last")
    ):
        auto = plan(device, shape, dtype, layout, backward=backward)
        for family in (RESIDENT, CLUSTER, GRID):
            q = plan(device, shape, dtype, layout, backward=backward, family=family)
            assert q.family_chosen == family
            if q.has_error:
                assert b"cannot run: " in q.text
                continue
            ran.add(family)
            check(q, device, shape, dtype)
            # A grid has to be a good deal better, and persistent blocks a little.
            assert compared(auto) <= compared(q) * (1 + 1e-9)
        request = {"backward": backward, "persistent_limit": simt.NEVER}
        one_slab = plan(device, shape, dtype, layout, **request)
        assert compared(auto) <= compared(one_slab) * (1 + 1e-9)
    assert ran == {RESIDENT, GRID} | ({CLUSTER} if any(device.active_clusters) else set())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forced_blocks_of_streaming(layout: str) -> None:
    """As many blocks share a channel as was asked for, or the nearest number that can; and only
    where streaming is asked for by name."""
    device = DEVICES["h200"]
    for shape, backward, team, threads in itertools.product(
        RESNET50[::5] + FEW_CHANNELS + TINY + ODD, (0, 1), (1, 40, 1 << 20), (64, 128, 512)
    ):
        request = {"backward": backward, "family": STREAMING}
        q = plan(device, shape, layout=layout, **request, team=team, exact_threads=threads)
        assert not q.has_error and q.family_chosen == STREAMING
        assert q.threads == min(threads, 256)
        assert q.chunk * (q.num_splits - 1) < q.num_items <= q.chunk * q.num_splits
        unroll, steps = library().plan_unroll(), q.block_rows if q.walk == 1 else q.threads
        fewest = ceil_div(q.num_items, steps * unroll * library().plan_batches())
        most = ceil_div(q.num_items, steps * unroll)
        wanted = min(max(fewest, team), most)
        # Whole steps: of fewer blocks, with as many steps as those that were wanted.
        assert q.num_splits <= wanted
        assert q.chunk == ceil_div(ceil_div(q.num_items, wanted), steps) * steps
        usual = plan(device, shape, layout=layout, backward=backward, training=0)
        for family in (AUTO, RESIDENT):
            request = {"backward": backward, "training": 0, "family": family}
            q = plan(device, shape, layout=layout, **request, team=team, exact_threads=threads)
            assert q.text == usual.text  # eval is streamed whatever the family


def test_what_runs_where() -> None:
    """A few choices that would be wrong otherwise, whatever the model's constants."""
    h200, a100 = DEVICES["h200"], DEVICES["a100"]
    half = torch.float16
    # One kernel beats two launches where a call is all launch.
    assert plan(h200, (8, 64, 8, 8), backward=1).family_chosen == RESIDENT
    # A channel of 1.6 MB of x and dy needs a cluster or a grid. One block has room for a tenth,
    # which is worth next to nothing.
    shape = (32, 64, 112, 112)
    q = plan(h200, shape, half, backward=1)
    assert q.family_chosen == GRID
    alone, twice = (
        plan(a100, shape, half, backward=1, family=family) for family in (RESIDENT, STREAMING)
    )
    assert 0.09 < alone.held < 0.11 and 0.9 < alone.microseconds / twice.microseconds < 1
    # 12.8 MB fit in no cluster, nor do 6.4 of x alone.
    for backward in (0, 1):
        q = plan(h200, (256, 64, 112, 112), half, backward=backward, no_grid=1)
        assert q.family_chosen == STREAMING or 0 < q.held < 1
    # No share of a channel that leaves a thread too much to sum.
    q = plan(h200, (256, 64, 112, 112), backward=1, family=RESIDENT)
    assert b"too many packs" in q.text
    # Six channels, whole, would leave most of the device idle.
    assert plan(h200, (20, 6, 64, 64), backward=1).cluster > 1
    assert plan(a100, (20, 6, 256, 256), backward=1, no_grid=1).family_chosen == STREAMING
    # Planes of 98 bytes, eight of them one run.
    q = plan(h200, (32, 512, 7, 7), half, backward=1)
    assert (q.run_length, q.slab_channels, q.held) == (49, 8, 1)
    # Sums of a pack's two channels, not of its eight columns: the whole slab has room beside them.
    assert plan(h200, (256, 1024, 14, 14), half, family=RESIDENT).held == 1
    assert plan(h200, (32, 512, 7, 7), half, backward=1, misaligned=1).run_length == 1
    assert plan(h200, (32, 512, 14, 14), torch.float32, backward=1).run_length == 1


def test_a_grid_takes_what_no_cluster_holds() -> None:
    """Rows of 56x56 and more have too many, whatever the slab, for 16 blocks."""
    h100, shape = DEVICES["h100"], (32, 256, 56, 56)
    q = plan(h100, shape, layout="channels_last", backward=1)
    assert (q.family_chosen, q.held > 0.4) == (GRID, True), q.text.decode()
    # One slab after the other, by teams of which one half moves data while the other one meets.
    assert 2 <= q.num_teams < q.num_slabs
    assert plan(h100, shape, backward=1).family_chosen == CLUSTER
    # Not where it is not wanted, or cannot be.
    for device, no_grid in ((h100, 1), (h100._replace(cooperative=0), 0)):
        q = plan(device, shape, layout="channels_last", backward=1, no_grid=no_grid)
        assert q.family_chosen in (STREAMING, CLUSTER)
    q = plan(h100._replace(cooperative=0), shape, backward=1, family=GRID)
    assert b"cannot run: the device has no cooperative launch" in q.text
    # By name, whatever is wanted else.
    assert plan(h100, shape, backward=1, family=GRID, no_grid=1).family_chosen == GRID
    # A batch is counted behind it, so it may be refused.
    large = (256, 64, 112, 112)
    for cumulative in (0, 1):
        assert plan(h100, large, backward=0, cumulative=cumulative).family_chosen == GRID
    # Few channels are little to read for every block, many are not.
    few, many = (20, 6, 256, 256), (256, 64, 112, 112)
    for size, shares_out in ((few, 0), (many, 1)):
        request = {"layout": "channels_last", "backward": 1, "family": GRID}
        assert plan(h100, size, torch.float16, **request).shares_out == shares_out
    # What one block holds is not for all of them.
    for name, size in itertools.product(DEVICES, ((8, 64, 8, 8), (32, 2048, 7, 7))):
        assert plan(DEVICES[name], size, backward=1).family_chosen != GRID


def test_what_is_not_wanted() -> None:
    h100, shape = DEVICES["h100"], (32, 256, 56, 56)
    assert plan(h100, shape, backward=1).family_chosen == CLUSTER
    q = plan(h100, shape, backward=1, no_clusters=1, no_grid=1)
    assert q.family_chosen in (STREAMING, RESIDENT)
    assert plan(h100, shape, no_clusters=1, family=CLUSTER).family_chosen == CLUSTER
    for no_overlap in (0, 1):
        q = plan(h100, shape, family=STREAMING, no_overlap=no_overlap)
        assert q.overlapping == 1 - no_overlap


def test_persistent_blocks() -> None:
    """Where there are more slabs than run at once, and nobody says no."""
    for name, family, backward in itertools.product(DEVICES, (RESIDENT, CLUSTER), (0, 1)):
        device, request = DEVICES[name], {"backward": backward, "family": family}
        shape = (32, 2048, 14, 14)
        q = plan(device, shape, **request, persistent_limit=simt.ALWAYS)
        if q.has_error:
            assert family == CLUSTER and not any(device.active_clusters)
            continue
        assert q.persistent and q.num_teams < q.num_slabs == 2048
        assert q.microseconds > 0
        never = plan(device, shape, **request, persistent_limit=simt.NEVER)
        assert not never.persistent and never.num_teams == 2048
        # No more than slabs: a block for each, that ends after it.
        q = plan(device, (32, 4, 14, 14), **request, persistent_limit=simt.ALWAYS)
        assert not q.persistent and q.num_teams == 4
    q = plan(DEVICES["h200"], (32, 256, 56, 56), backward=1)
    assert (q.family_chosen, q.persistent) == (CLUSTER, 1), q.text.decode()
    assert b" slabs each, " in q.text
    # A grid's teams do so, whatever is said.
    shape = (32, 256, 56, 56)
    request = {"layout": "channels_last", "backward": 1, "persistent_limit": simt.NEVER}
    assert plan(DEVICES["h100"], shape, **request, family=GRID).persistent


def test_packs_in_registers() -> None:
    """Where shared memory has no room for a channel, blocks are persistent, and nobody says no."""
    h200, shape = DEVICES["h200"], (256, 256, 56, 56)
    q = plan(h200, shape, backward=1)
    assert (q.family_chosen, q.persistent, q.kept_batches) == (GRID, 1, 3), q.text.decode()
    assert b" kB in registers per block" in q.text
    without = plan(h200, shape, backward=1, registers_limit=simt.NEVER)
    assert without.kept_batches == 0 and b"registers" not in without.text
    assert q.bytes_moved < without.bytes_moved and q.microseconds < without.microseconds
    # Blocks for one slab each keep none.
    request = {"backward": 1, "family": RESIDENT}
    for limit in (simt.NEVER, simt.WHERE_FASTER):
        q = plan(h200, (2, 320, 144, 144), **request, persistent_limit=limit)
        assert not q.has_error and (q.kept_batches > 0) == (limit == simt.WHERE_FASTER)
    # All of (32, 256, 14, 14) has room.
    assert plan(h200, (32, 256, 14, 14), backward=1).kept_batches == 0
    kept = set()
    for name, side, layout, dtype in itertools.product(
        DEVICES, (56, 55), ("nchw", "channels_last"), (torch.float32, torch.float16)
    ):
        other = (64, 256, side, side)
        request = {"layout": layout, "registers_limit": simt.ALWAYS, "backward": 1}
        for family in (RESIDENT, CLUSTER, GRID):
            found = plan(DEVICES[name], other, dtype, **request, family=family)
            if found.has_error:
                continue
            check(found, DEVICES[name], other, dtype)
            if found.kept_batches > 0:
                kept.add((side, layout, dtype.itemsize))
    # No planes that share packs, and no rows of halves.
    assert kept == {(56, "nchw", 4), (56, "nchw", 2)} | {
        (side, "channels_last", 4) for side in (55, 56)
    }


@pytest.mark.parametrize(
    ("threads", "at_once"),
    [(64, 1), (64, 3), (64, 8), (128, 2), (128, 4), (256, 1), (256, 2), (256, 3), (256, 4)],
)
def test_blocks_that_begin_late(threads: int, at_once: int) -> None:
    """The model is near a simulation, also where L2 is asked for the next slab meanwhile."""
    sms, off, gained, asked, busy_threads = 12, [], [], [], 240
    assert _C.cuda_costs("h200")["l2_time"] == L2_TIME
    for blocks, move, stop, (persistent, early), moved in itertools.product(
        (1.25, 1.5, 2, 2.5, 3, 4, 5.25, 8.25),
        (3, 6, 12),
        (2, 4, 8),
        itertools.product((False, True), (0, 0.25, 0.75)),
        (3, 4),
    ):
        if blocks <= at_once - 1:  # so many are never side by side
            continue
        # What few threads move is less than what L2 fetches besides, which the model does not say.
        if early > 0 and threads * at_once < busy_threads:
            continue
        late, traffic = ctypes.c_double(), move * blocks
        saved = (1 - L2_TIME) * early
        places = (min(at_once, blocks), threads, blocks, busy_threads, saved)
        time = library().plan_on_chip_time(*places, traffic, stop, 1, moved, late)
        run = (sms, at_once, round(sms * blocks), threads, traffic, stop, persistent)
        simulated = functools.partial(simulate, *run, reads=2 / moved, busy_threads=busy_threads)
        found = simulated(late=late.value, early=early)
        together = simulated(late=0.0, early=early)
        text = f"{blocks} blocks of {move}, {stop} us, {early} early: {found}, by the model {time}"
        assert 0.7 < time / found < 1.3, text
        assert found < 1.15 * together, f"{text}; {together} where all begin together"
        off.append(abs(time / found - 1))
        if early == 0:
            gained.append(1 - found / together)
        elif blocks > at_once:
            asked.append(found / simulated(late=late.value))
    assert statistics.mean(off) < 0.15
    # Few threads move no more for being out of step; for many it is worth some time.
    assert statistics.mean(gained) > (0.03 if threads * at_once >= 2 * busy_threads else -0.02)
    # Asking L2 saves time where an SM has few blocks to take turns, and costs little elsewhere.
    if asked:
        assert at_once > 2 or statistics.mean(asked) < 0.98, statistics.mean(asked)
        assert max(asked) < 1.1, max(asked)


def test_a_plan_is_made_once() -> None:
    """Those of a network are kept; and of however many shapes, each call gets its own."""
    assert library().plan_cache_keeps(200) == 3 * 200
    assert library().plan_cache_keeps(2000) >= 0
    assert 0 < library().plan_cache_size() <= 1024


def test_the_environment_is_read_when_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    allows_late = library().plan_allows_late
    monkeypatch.setenv("BNEXT_CUDA_LATE", "1")
    assert allows_late(True) and allows_late(False)
    monkeypatch.setenv("BNEXT_CUDA_LATE", "0")
    assert allows_late(False) and not allows_late(True) and not allows_late(False)
    monkeypatch.undo()
    allows_late(True)


def test_l2_is_asked_for_later_slabs() -> None:
    """Where there are some, as far as L2 has room beside what is read again; or not, if that is not
    wanted, and the plan is the same else."""
    h200, shape = DEVICES["h200"], (64, 1024, 14, 14)
    asked = set()
    for family, layout, limit in itertools.product(
        (RESIDENT, CLUSTER, GRID), ("nchw", "channels_last"), (simt.NEVER, simt.ALWAYS)
    ):
        request = {"layout": layout, "backward": 1, "family": family, "persistent_limit": limit}
        q = plan(h200, shape, **request)
        if q.has_error or q.early_slabs == 0:
            assert q.early_lines == 0
            continue
        assert (q.early_lines > 0) == (b" of a later slab early" in q.text), q.text.decode()
        assert q.early_lines > 0 or q.held < 0.9, q.text.decode()
        asked.add((family, layout, q.persistent))
        without = plan(h200, shape, **request, no_early=1)
        assert without.early_lines == 0
        assert without.text == re.sub(rb", [\d.]+ k?B of a later slab early", b"", q.text)
        # Next to no L2 has no room.
        small = plan(h200._replace(l2_bytes=1 << 14), shape, **request)
        assert small.has_error or small.early_lines == 0
    assert {(RESIDENT, "nchw", 0), (RESIDENT, "nchw", 1), (CLUSTER, "nchw", 1)} <= asked
    assert {(CLUSTER, "channels_last", 1), (GRID, "nchw", 1)} <= asked
    # Rows that begin anywhere have a narrow slab's part in two lines.
    for channels, packs in ((8192, 8), (8200, 4)):
        request = {"layout": "channels_last", "family": CLUSTER, "persistent_limit": simt.ALWAYS}
        q = plan(h200, (16, channels, 14, 14), torch.float16, **request)
        assert q.early_lines > 0 and q.line_packs == packs, q.text.decode()
    # One slab for each block that runs.
    assert plan(h200, (64, 64, 14, 14), backward=1, family=RESIDENT).early_lines == 0


def test_no_block_is_late_where_it_is_not_wanted() -> None:
    """The plan is the same else."""
    request = {"dtype": torch.float16, "backward": 1}
    many, large = (32, 2048, 14, 14), (256, 512, 28, 28)
    for family, shape in ((RESIDENT, many), (CLUSTER, many), (GRID, large)):
        late = plan(DEVICES["h200"], shape, **request, family=family)
        together = plan(DEVICES["h200"], shape, **request, family=family, no_late=1)
        assert late.num_late > 0
        assert together.num_late == 0
        for name in ("threads", "num_blocks", "held_steps", "microseconds"):
            assert getattr(late, name) == getattr(together, name)


def test_only_second_passes_are_kept_on_chip() -> None:
    for request in (
        {"backward": 0, "training": 0},
        {"backward": 1, "training": 0},
        {"backward": 1, "output": 0},
        {"backward": 0, "output": 0},
    ):
        for family in (AUTO, RESIDENT, CLUSTER, GRID):
            q = plan(DEVICES["h200"], (8, 64, 8, 8), **request, family=family)
            assert q.family_chosen == STREAMING


def test_a_kernel_of_its_own_counts_batches_that_all_blocks_read() -> None:
    shape = (8, 64, 8, 8)
    for family, first in (
        (STREAMING, (0, 0)),
        (RESIDENT, (0, 1)),
        (CLUSTER, (0, 1)),
        (GRID, (0, 1)),
    ):
        for cumulative in (0, 1):
            q = plan(DEVICES["h200"], shape, backward=0, cumulative=cumulative, family=family)
            assert q.counts_behind == first[cumulative]
            assert (b", then count; moves" in q.text) == q.counts_behind


@pytest.mark.parametrize("name", DEVICES)
def test_common_shapes_get_packs(name: str) -> None:
    for shape, dtype, layout in itertools.product(
        RESNET50 + FEW_CHANNELS, (torch.float32, torch.bfloat16), ("nchw", "channels_last")
    ):
        q = plan(DEVICES[name], shape, dtype, layout, backward=1)
        assert q.vec == 16 // dtype.itemsize, q.text.decode()


def moves(
    family: int = STREAMING, shape: tuple[int, int, int, int] = (32, 64, 56, 56), **request: int
) -> float:
    q = plan(DEVICES["h200"], shape, family=family, **request)
    return q.bytes_moved / (4 * math.prod(shape))


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
    for family in (AUTO, CLUSTER):
        assert moves(family, backward=0) == 2
        assert moves(family, (32, 256, 14, 14), backward=1) == 3
        assert 3 <= moves(family, backward=1) < 4
    assert 2 < moves(RESIDENT, backward=0) < 2.5


def test_folded_rows() -> None:
    """Rows that do not fill packs are taken several at a time, where they divide evenly."""
    device = DEVICES["h200"]
    folds = {3: 8, 6: 4, 4: 2, 12: 2, 8: 1, 65: 8}
    for c, fold in folds.items():
        q = plan(device, (4, c, 16, 16), torch.float16, "channels_last", family=STREAMING)
        assert (q.vec, q.fold) == (8, fold)
    assert plan(device, (1, 3, 5, 5), torch.float16, "channels_last").vec == 1
    assert plan(device, (4, 3, 16, 16), torch.float16, "channels_last", misaligned=1).vec == 1


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_single_elements_where_packs_are_too_many_to_count(layout: str) -> None:
    """By their distance from the first one, in 32 bits; those of a channel, in an int."""
    device = DEVICES["h200"]
    positions = 1 << 32
    rows = layout == "channels_last"
    for dtype, vec in ((torch.float16, 8), (torch.float32, 4)):
        q = plan(device, (1, 2, 1 << 16, 1 << 16), dtype, layout)
        assert q.num_items == (positions if rows else positions // vec)
        assert q.vec == (1 if rows else vec)
    assert plan(device, (1 << 16, 1 << 10, 16, 16), torch.float32, layout).vec == 4
    assert plan(device, ((1 << 16) + 1, 1 << 10, 16, 16), torch.float32, layout).vec == 1


def test_too_many_blocks_is_an_error() -> None:
    q = plan(DEVICES["h200"], (2, 1 << 31, 2, 2))
    assert q.has_error
    assert b"cannot run" in q.text


def test_text() -> None:
    request = {"dtype": torch.float16, "backward": 1}
    q = plan(DEVICES["h200"], (32, 64, 56, 56), **request, family=STREAMING)
    text = q.text.decode()
    assert text.startswith("streaming backward, planes of float16 in packs of 16 bytes: reduce ")
    assert "moves 5 tensors, 64.23 MB" in text
    text = plan(DEVICES["h200"], (32, 64, 56, 56), **request, family=CLUSTER).text.decode()
    assert text.startswith("cluster backward, planes of float16 in packs of 16 bytes: ")
    assert " in clusters of " in text
    assert "all on chip" in text
    assert "moves 3 tensors, 38.54 MB, workspace 0 B" in text
    shape = (32, 256, 56, 56)
    text = plan(DEVICES["h200"], shape, **request, family=GRID).text.decode()
    assert re.search(r": \d+ x \d+ in \d+ teams?, \d+ slabs each, all on chip", text), text
    assert re.search(r" per block\), [\d.]+ kB of a later slab early[;,]", text), text
    text = plan(DEVICES["h200"], (256, 256, 28, 28), **request, family=CLUSTER).text.decode()
    assert re.search(r" early, half of the first ones [\d.]+ us late; moves", text), text
    text = plan(DEVICES["h200"], (32, 64, 7, 7), **request).text.decode()
    assert "runs of channels of float16" in text
    assert "late" not in text


def test_families() -> None:
    for name, known in (*((name, 1) for name in simt.FAMILIES), ("rows", 0), ("", 0), ("?", 0)):
        assert library().plan_knows_family(name.encode()) == known


@pytest.mark.parametrize(("function", "bits"), [("plan_divide", 31), ("plan_divide_long", 63)])
def test_division_by_multiplication(function: str, bits: int) -> None:
    """What kernels find their place with: every n of so many bits, at the steps of the quotient."""
    divide = getattr(library(), function)
    most, generator = 2**bits - 1, random.Random(0)
    powers = [(1 << k) + d for k in range(1, bits) for d in (-1, 0, 1)]
    divisors = {*range(1, 300), *powers, most - 1, most}
    divisors |= {generator.randint(1, most) for _ in range(300)}
    for divisor in sorted(divisors - {0}):
        near = {k * divisor + d for k in (0, 1, 2, most // divisor) for d in (-1, 0, 1)}
        near |= {generator.randint(0, most) for _ in range(8)} | {most}
        for n in near:
            if 0 <= n <= most:
                assert divide(n, divisor) == n // divisor, (n, divisor)
