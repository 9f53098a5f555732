"""The SIMT shim: it notices what kernels do wrong, and kernels need every barrier they have."""

from __future__ import annotations

import re
from collections.abc import Iterator

import cases
import pytest
from simt import library as simt
from simt.checks import check_backward, check_forward, check_statistics

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no C++ compiler here")

FAULTS = (
    *("not all threads reach the barrier", "threads are at different barriers"),
    *("not all lanes reach the shuffle", "a shuffle without all lanes"),
    *("a load of 16 bytes is misaligned", "a load outside the tensors"),
    *("a store outside the outputs", "an element is stored twice"),
    *("wrote beyond its shared memory", "waits at the cluster's barrier without arriving"),
    *("a load from a block that has ended", "threads are at different cluster barriers"),
    *("an asynchronous copy that nobody waits for", "", ""),
    *("a kernel before may not have ended", "", ""),
    *("waits for ever at faults.cpp", "a store outside the outputs", ""),
    "a load from a block that is not in the cluster",
)
# In some orders only.
SOMETIMES = (FAULTS.index("a load from a block that has ended"), len(FAULTS) - 3)


@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_the_shim_notices(which: int) -> None:
    errors = [simt.fault(which, seed) for seed in range(48)]
    if which in SOMETIMES:
        errors = [error for error in errors if error]
        assert errors
    for error in errors:
        assert FAULTS[which] in error
        assert bool(error) == bool(FAULTS[which])


CALLS = r"__syncthreads|cluster_arrive|cluster_wait|wait_async|wait_for_kernels"
CALLS += r"|grid_arrive|grid_wait|read_letters"
BARRIER = re.compile(rf"\s*(?:if \(.*\) )?({CALLS})\(.*\);")
WIDE = simt.Machine(threads=128, num_sms=40)
RESIDENT = simt.Machine(threads=128, family="resident", batches=32)
CLUSTER = RESIDENT._replace(threads=64, family="cluster", team=2)
GRID = CLUSTER._replace(family="grid")
# A few passes that reach every barrier: layout, shape, machine.
RUNS = {
    "streaming": (
        ("channels_last", (4, 6, 16, 32), WIDE),
        ("nchw", (4, 6, 16, 32), WIDE),
        # more splits than a warp has lanes, in a kernel of their own
        ("sliced_w", (9, 2, 32, 32), WIDE._replace(threads=64, fused_splits=8)),
    ),
    "on chip": (
        ("nchw", (4, 2, 16, 32), RESIDENT),
        ("channels_last", (4, 16, 16, 16), RESIDENT),
        ("nchw", (20, 4, 7, 7), RESIDENT),
        ("nchw", (40, 4, 7, 7), RESIDENT._replace(threads=512)),  # in slices
        ("nchw", (4, 2, 32, 32), RESIDENT._replace(shared_bytes=18000)),  # in part
        ("nchw", (4, 2, 16, 16), CLUSTER),
        ("channels_last", (4, 16, 8, 8), CLUSTER),
        ("nchw", (4, 9, 16, 16), RESIDENT._replace(persistent_limit=simt.ALWAYS, num_sms=2)),
        ("nchw", (4, 5, 16, 16), CLUSTER._replace(persistent_limit=simt.ALWAYS, num_sms=2)),
        ("nchw", (4, 7, 8, 8), GRID),
        ("channels_last", (4, 96, 8, 8), GRID),
        ("channels_last", (4, 96, 8, 8), GRID._replace(share_out=1)),
    ),
}


def broken_runs(kind: str, schedule: simt.Schedule) -> Iterator[str]:
    """What goes wrong in them."""
    checks = [check_forward, check_backward]
    if kind == "streaming":
        checks.append(check_statistics)
    for layout, shape, machine in RUNS[kind]:
        case = cases.make_case(shape, layout=layout, grad_layout=layout)
        for check in checks:
            try:
                check(case, layout, machine=machine, schedule=schedule)
            except (AssertionError, simt.ShimError) as error:
                yield str(error)


def needed(kind: str, *barriers: str) -> bool:
    """Without these barriers some schedule shows a wrong result, or the shim reports an error."""
    schedules = (simt.Schedule(seed, barriers) for seed in range(30))
    return any(next(broken_runs(kind, schedule), None) for schedule in schedules)


def test_each_barrier_is_needed() -> None:
    """A barrier taken away shows in a result: the other tests would notice."""
    for kind in RUNS:
        for seed in range(4):
            assert list(broken_runs(kind, simt.Schedule(seed))) == []
    lines = {
        f"{path.name}:{number}": line
        for path in sorted((simt.ROOT / "csrc/cuda").glob("**/*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
    }
    written = {place: match[1] for place in lines if (match := BARRIER.match(lines[place]))}
    found = [place for place in simt.barriers() if ".cuh:" in place]
    assert sorted(found) == sorted(written)  # the runs above reach all there are
    for barrier in found:
        kind = "on chip" if barrier.startswith(("on_chip", "teams")) else "streaming"
        assert needed(kind, barrier), f"nothing shows that the barrier at {barrier} is missing"
    # Half a barrier is an error by itself. Both halves at once, in the order of their writing:
    for both in (("cluster_arrive", "cluster_wait"), ("grid_arrive", "grid_wait")):
        halves = [[b for b in written if written[b] == half] for half in both]
        for pair in zip(*halves, strict=True):
            assert needed("on chip", *pair), f"nothing shows that the barrier at {pair} is missing"
