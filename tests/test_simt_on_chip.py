"""The families that keep a channel on chip, on the SIMT shim: results, bytes, schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import cases
import pytest
import reference
import torch
from simt import library as simt
from simt.checks import bits, both, check_backward, check_forward, far_apart
from test_simt import LAYOUTS, SHAPES

pytestmark = pytest.mark.usefixtures("kernels")

RESIDENT = simt.Machine(family="resident", batches=32)
CLUSTER = RESIDENT._replace(family="cluster")
GRID = RESIDENT._replace(family="grid")
# Blocks that go on to further slabs.
PERSISTENT = RESIDENT._replace(persistent_limit=simt.ALWAYS, num_sms=1)
PERSISTENT_CLUSTER = CLUSTER._replace(persistent_limit=simt.ALWAYS, num_sms=2, team=2)
# Registers keep what has no room in shared memory.
KEEPING = {"registers_limit": simt.ALWAYS, "shared_bytes": 10000}
SHARED_OUT = GRID._replace(share_out=1)  # each warp finishes some of a slab's channels
# Layout, shape, shared memory for all of a backward pass, and for half of forward (float32).
TIGHT = {
    "planes": ("nchw", (2, 3, 32, 32), 17000, 4300),
    "rows": ("channels_last", (3, 32, 9, 9), 65000, 10500),
    "folded": ("channels_last", (4, 6, 16, 16), 54000, 17000),
    "runs": ("nchw", (30, 16, 7, 7), 67000, 21500),
    "skewed": ("nchw", (2, 3, 33, 35), 21000, 7000),
}
# A way through the kernels each: layout, shape, machine.
WAYS = {
    "planes": ("nchw", (4, 3, 16, 16), RESIDENT),
    "planes, cluster": ("nchw", (4, 3, 16, 16), CLUSTER._replace(team=4)),
    "rows": ("channels_last", (3, 40, 9, 9), RESIDENT),
    "rows, cluster": ("channels_last", (3, 40, 9, 9), CLUSTER._replace(team=2)),
    "folded": ("channels_last", (4, 6, 8, 8), CLUSTER._replace(team=2)),
    "runs": ("nchw", (12, 16, 7, 7), RESIDENT),
    "runs, cluster": ("nchw", (12, 16, 7, 7), CLUSTER._replace(team=4)),
    "runs, slices": ("nchw", (40, 16, 7, 7), RESIDENT._replace(threads=512)),
    "runs, slices, cluster": ("nchw", (40, 8, 7, 7), CLUSTER._replace(team=2, threads=512)),
    "planes, persistent": ("nchw", (4, 5, 16, 16), PERSISTENT),
    "planes, cluster, persistent": ("nchw", (4, 5, 16, 32), PERSISTENT_CLUSTER),
    "rows, persistent": ("channels_last", (3, 200, 5, 9), PERSISTENT),
    "rows, cluster, persistent": ("channels_last", (3, 160, 7, 7), PERSISTENT_CLUSTER),
    "runs, persistent": ("nchw", (12, 56, 7, 7), PERSISTENT),
    "runs, cluster, persistent": ("nchw", (16, 48, 7, 7), PERSISTENT_CLUSTER),
    # some teams, and one, that have one slab after the other
    "planes, grid": ("nchw", (4, 5, 8, 16), GRID._replace(team=2)),
    "planes, one team": ("nchw", (4, 3, 16, 16), GRID._replace(team=4)),
    "rows, grid": ("channels_last", (3, 80, 9, 9), GRID._replace(team=3)),
    "rows, shared out": ("channels_last", (3, 80, 9, 9), SHARED_OUT._replace(team=3)),
    "rows, teams of one": ("channels_last", (3, 80, 9, 9), GRID._replace(team=1)),
    "folded, grid": ("channels_last", (4, 6, 8, 8), GRID._replace(team=2)),
    "folded, shared out": ("channels_last", (4, 6, 8, 8), SHARED_OUT._replace(team=4)),
    "runs, grid": ("nchw", (12, 40, 7, 7), GRID._replace(team=2)),
}
# Ways on which some packs are read twice: two planes share them, or they have no slots.
AGAIN = {
    "skewed": ("nchw", (4, 5, 17, 15), CLUSTER._replace(team=2)),
    "again": ("nchw", (4, 3, 32, 32), CLUSTER._replace(team=2, shared_bytes=10000)),
    "rows, again": ("channels_last", (4, 16, 16, 16), RESIDENT._replace(shared_bytes=14000)),
    "skewed, persistent": ("nchw", (4, 5, 17, 15), PERSISTENT),
    "again, persistent": ("nchw", (4, 5, 32, 32), PERSISTENT_CLUSTER._replace(shared_bytes=10000)),
    "rows, again, persistent": (
        "channels_last",
        (4, 144, 16, 16),
        PERSISTENT._replace(shared_bytes=14000),
    ),
    "registers": ("nchw", (4, 5, 32, 32), PERSISTENT._replace(**KEEPING)),
    "registers, cluster": ("nchw", (4, 5, 32, 64), PERSISTENT_CLUSTER._replace(**KEEPING)),
    "registers, grid": ("nchw", (4, 5, 32, 64), GRID._replace(team=2, **KEEPING)),
    "rows, registers": (
        "channels_last",
        (4, 144, 16, 16),
        PERSISTENT._replace(registers_limit=simt.ALWAYS, shared_bytes=14000),
    ),
    "rows, registers, cluster": (
        "channels_last",
        (4, 144, 16, 16),
        PERSISTENT_CLUSTER._replace(registers_limit=simt.ALWAYS, shared_bytes=14000),
    ),
    "again, grid": ("nchw", (4, 5, 32, 32), GRID._replace(team=2, shared_bytes=10000)),
    "rows, again, grid": (
        "channels_last",
        (4, 48, 16, 16),
        SHARED_OUT._replace(team=2, shared_bytes=22000),
    ),
    "rows, registers, grid": (
        "channels_last",
        (4, 48, 16, 16),
        SHARED_OUT._replace(team=2, registers_limit=simt.ALWAYS, shared_bytes=22000),
    ),
}
EVERY_WAY = WAYS | AGAIN


def copies_are_asynchronous() -> bool:
    return simt.arch() >= 80


def needs_clusters() -> None:
    if simt.arch() < 90:
        pytest.skip("no clusters before sm_90")


@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("family", ["resident", "cluster", "grid"])
def test_shapes(family: str, layout: str, dtypes: str) -> None:
    affine, ran = list(cases.AFFINE), 0
    for number, shape in enumerate(SHAPES):
        mode = "no_stats" if number % 5 == 0 else "train"
        options = {"layout": layout, "grad_layout": layout, "seed": number}
        case = cases.make_case(shape, dtypes, affine[number % 4], mode, **options)
        team = 0 if family == "resident" else 2 if shape[1] > 16 else 2 << number % 3
        machine = RESIDENT._replace(family=family, team=team, share_out=number % 2)
        try:
            both(case, f"{shape}", machine=machine, schedule=simt.Schedule(number))
        except simt.NoPlanError as error:
            reasons = ("do not fill packs", "has less to read", "too wide")
            assert any(reason in str(error) for reason in reasons)
        else:
            ran += 1
    assert ran >= len(SHAPES) // 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["float32", "float16"])
def test_layouts(dtypes: str, layout: str) -> None:
    """In their own strides, and dy in other strides than x where one walk serves both."""
    for shape in ((3, 8, 7, 6), (2, 8, 5, 9)):
        for machine in (RESIDENT, CLUSTER._replace(team=2), GRID._replace(team=2)):
            for grad_layout in (
                layout,
                "nchw" if "channels_last" not in layout else "channels_last",
            ):
                case = cases.make_case(shape, dtypes, layout=layout, grad_layout=grad_layout)
                label = f"{shape} dy {grad_layout}"
                for check in (check_forward, check_backward):
                    try:
                        check(case, label, machine=machine, schedule=simt.Schedule(1))
                    except simt.NoPlanError as error:
                        reasons = ("do not fill packs", "has less to read")
                        assert any(reason in str(error) for reason in reasons)


@pytest.mark.parametrize("way", WAYS)
def test_every_byte_moves_once(way: str) -> None:
    """2 tensors forward, 3 backward, whole packs: the plan says so, and the kernels do it."""
    layout, shape, machine = WAYS[way]
    # Sums of a grid, which stands in for a cluster before sm_90, go through the workspace anyway.
    in_slices = "slices" in way and ("cluster" not in way or simt.arch() >= 90)
    overlapped = 0
    for dtypes in ("float32", "float16", "float64"):
        case = cases.make_case(shape, dtypes, layout=layout, grad_layout=layout)
        tensor_bytes = case.input.numel() * case.input.element_size()
        for tensors, check in ((2, check_forward), (3, check_backward)):
            call = check(case, way, machine=machine).call
            assert call.held == 1
            assert call.planned_bytes == tensors * tensor_bytes
            assert call.bytes_stored == tensor_bytes
            assert call.bytes_loaded == (tensors - 1) * tensor_bytes
            assert (call.run_length > 1) == ("runs" in way)
            assert (call.slices > 1) == in_slices or dtypes != "float32"
            assert call.persistent or "persistent" not in way
            # While a slab is mapped, the next one's first batches are on their way: all but the
            # last, each behind the stores of the batch whose place it gets.
            early = call.persistent and call.batches_ahead > 2 and copies_are_asynchronous()
            assert (call.bytes_stored_meanwhile > 0) == early
            overlapped += early
            # L2 is asked for what comes first of it, less where a block has less than others, and
            # for nothing that persistent blocks do not load. (Others begin in any order.)
            assert call.planned_asked > 0 or not call.persistent
            assert call.planned_asked / 2 <= call.num_asked <= call.planned_asked
            assert call.num_asked_late == 0
            assert call.num_asked_in_vain == 0 or not call.persistent
            assert call.num_asked == call.planned_asked or way != "planes, persistent"
    assert overlapped or "persistent" not in way or not copies_are_asynchronous()


@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16"])
def test_runs_of_channels(dtypes: str) -> None:
    """Channels that are shorter than a pack, that two of them share, and that end with one."""
    vec = 16 // cases.DTYPES[dtypes][0].itemsize
    for shape in ((3, 1), (5, 1), (3, 2), (7, 1), (9, 1), (5, 2), (4, 3), (7, 5), (7, 7), (10, 10)):
        positions = math.prod(shape)
        case = cases.make_case((24, 16, *shape), dtypes)
        for machine in (RESIDENT, GRID._replace(team=2)):
            for check in (check_forward, check_backward):
                call = check(case, f"{shape}", machine=machine).call
                assert call.run_length == (positions if positions % vec else 1)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_largest_cluster(layout: str) -> None:
    """16 blocks; in NCHW, the last two have nothing to read."""
    needs_clusters()
    for dtypes in ("float32", "float16"):
        case = cases.make_case((17, 8, 4, 4), dtypes, layout=layout, grad_layout=layout)
        both(case, "16 blocks", machine=CLUSTER._replace(team=16))


@pytest.mark.parametrize("walk", TIGHT)
def test_what_does_not_fit_is_read_again(walk: str) -> None:
    layout, shape, shared_bytes, _ = TIGHT[walk]
    shares = set()
    for dtypes in ("float32", "float16"):
        for kind in (RESIDENT, PERSISTENT, GRID._replace(team=2), CLUSTER._replace(team=2)):
            case = cases.make_case(shape, dtypes, layout=layout, grad_layout=layout)
            tensor_bytes = case.input.numel() * case.input.element_size()
            for tensors, check in ((2, check_forward), (3, check_backward)):
                least = 1.0
                # From all on chip to nothing: every plan on the way there is right.
                for share in (1, 0.8, 0.6, 0.4, 0.3):
                    machine = kind._replace(shared_bytes=int(share * shared_bytes))
                    try:
                        call = check(case, walk, machine=machine).call
                    except simt.NoPlanError as error:
                        assert "next to nothing of it" in str(error)
                        break
                    assert 0 < call.held <= least
                    least = call.held
                    shares.add(call.held)
                    assert call.num_asked_in_vain == 0 or not call.persistent
                    if walk != "skewed":
                        assert call.bytes_loaded + call.bytes_stored == call.planned_bytes
                        # L2 should keep what is read again, and nothing else.
                        twice = call.planned_bytes - tensors * tensor_bytes
                        assert call.bytes_kept == (twice if copies_are_asynchronous() else 0)
    assert min(shares) < 0.8, shares


@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16"])
@pytest.mark.parametrize("walk", ["planes", "rows", "runs"])
def test_registers_keep_what_has_no_room(walk: str, dtypes: str) -> None:
    """The first packs of a thread, 12 at most: so many fewer are read again, or none."""
    itemsize = cases.DTYPES[dtypes][0].itemsize
    layout, shape = {
        "planes": ("nchw", (4, 5, 32, 128 // itemsize)),
        "rows": ("channels_last", (4, 512 // itemsize, 16, 16)),
        "runs": ("nchw", (256, 96 // itemsize, 3, 5)),
    }[walk]
    case = cases.make_case(shape, dtypes, layout=layout, grad_layout=layout)
    tensor_bytes = case.input.numel() * itemsize
    saved_all, most = 0, {2: 0, 3: 0}
    for kind, (tensors, check), shared_bytes in itertools.product(
        (PERSISTENT, PERSISTENT_CLUSTER, GRID._replace(team=2), GRID._replace(team=1)),
        ((2, check_forward), (3, check_backward)),
        range(3000, 30000, 3000),
    ):
        machine = kind._replace(shared_bytes=shared_bytes)
        try:
            without = check(case, "without", machine=machine).call
        except simt.NoPlanError:
            continue
        assert without.kept_batches == 0 and (without.run_length > 1) == (walk == "runs")
        machine = machine._replace(registers_limit=simt.ALWAYS)
        call = check(case, "with", machine=machine, schedule=simt.Schedule(1)).call
        assert call.bytes_loaded + call.bytes_stored == call.planned_bytes
        again = without.planned_bytes - tensors * tensor_bytes
        still = call.planned_bytes - tensors * tensor_bytes
        assert call.bytes_kept == (still if copies_are_asynchronous() else 0)
        if walk != "planes" and (itemsize == 2 or simt.arch() < 90):
            assert call.kept_batches == 0
            continue
        assert (call.kept_batches > 0) == (again > 0)
        if again > 0:
            assert 0 <= still < again
            saved_all += still == 0
        if walk == "planes":
            # A thread has two packs of each tensor in a batch.
            num_threads = 64 * call.num_splits * shape[1]
            in_registers = call.kept_batches * 2 * 16 * (tensors - 1) * num_threads
            assert still == max(0, again - in_registers)
        most[tensors] = max(most[tensors], call.kept_batches)
    if walk != "planes" and itemsize == 8 and simt.arch() >= 90:
        assert most == {2: 3, 3: 1}
    elif walk == "planes" or (itemsize > 2 and simt.arch() >= 90):
        assert saved_all > 0 and most == {2: 6, 3: 3}


@pytest.mark.parametrize(
    ("layout", "size", "machine"),
    [
        ("nchw", 4, RESIDENT),
        ("channels_last", 4, RESIDENT),
        ("nchw", 4, CLUSTER._replace(team=2)),
        ("nchw", 16, GRID._replace(team=2, threads=256)),
        ("nchw", 4, RESIDENT._replace(persistent_limit=simt.ALWAYS)),
        ("nchw", 4, CLUSTER._replace(persistent_limit=simt.ALWAYS, team=2)),
    ],
)
def test_half_of_the_blocks_begin_late(layout: str, size: int, machine: simt.Machine) -> None:
    """Where SMs have more than one block to do, and threads enough; and nobody else."""
    if machine.family == "cluster":
        needs_clusters()
    for channels in (2, 256):
        case = cases.make_case((8, channels, size, size), layout=layout, grad_layout=layout)
        for check in (check_forward, check_backward):
            call = check(case, layout, machine=machine._replace(threads_per_sm=512)).call
            assert call.late_threads == call.planned_late_threads
            assert (call.late_threads > 0) == (channels > 2)
            if call.late_threads > 0:
                assert call.first_late_block == call.planned_late_from > 0
                assert call.least_late_clocks == call.most_late_clocks
                # 1700 clocks are about a microsecond. They end while a thread sleeps.
                assert 0 <= call.most_late_clocks - int(1700 * call.late_us) < 20


def test_only_training_has_a_second_pass() -> None:
    """What streaming does in one pass is streamed, whichever family is asked for."""
    for machine in (RESIDENT, CLUSTER, GRID):
        case = cases.make_case((2, 8, 8, 8), mode="eval")
        checks = (check_forward, check_backward)
        checked = [check(case, "eval", machine=machine) for check in checks]
        case = cases.make_case((2, 8, 8, 8))
        sums = (False, True, True, True, True)
        checked.append(check_backward(case, "sums", want=sums, machine=machine))
        for found in checked:
            assert found.call.plan.startswith(b"streaming ")


@pytest.mark.parametrize("way", EVERY_WAY)
def test_dx_alone(way: str) -> None:
    layout, shape, machine = EVERY_WAY[way]
    case = cases.make_case(shape, layout=layout, grad_layout=layout)
    for want in ((True, False, False, False, False), (True, False, True, False, True)):
        check_backward(case, way, want=want, machine=machine)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_every_schedule_gives_the_same_bits(way: str) -> None:
    layout, shape, machine = EVERY_WAY[way]
    case = cases.make_case(shape, "bfloat16-float32", layout=layout, grad_layout=layout)
    seen = set()
    for seed in range(4):
        run = {"machine": machine, "schedule": simt.Schedule(seed)}
        there, back = check_forward(case, way, **run), check_backward(case, way, **run)
        seen.add(bits(*there[:-2], *back[:-1]))
    assert len(seen) == 1


@pytest.mark.parametrize("way", EVERY_WAY)
def test_cumulative_momentum(way: str) -> None:
    """The third batch counts one third, whichever block reads the count."""
    layout, shape, machine = EVERY_WAY[way]
    case = cases.make_case(shape, layout=layout)
    got = simt.forward(case.input, **case.arguments, momentum=None, machine=machine)
    want = reference.forward(case.input, **case.arguments, momentum=1 / 3)
    want.running_mean.check(got.running_mean, "running_mean")
    want.running_var.check(got.running_var, "running_var")
    assert got.num_batches_tracked == 3


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_refused_launch_counts_nothing(way: str, momentum: float | None) -> None:
    layout, shape, machine = EVERY_WAY[way]
    x, tracked = cases.make_case(shape, layout=layout).input, torch.tensor(2)
    out = simt.guarded(x.shape, x.dtype, torch.empty_like(x).stride())
    vectors = {
        name: simt.guarded((x.shape[1],), torch.float32, (1,)) for name in ("mean", "invstd")
    }
    with pytest.raises(simt.ShimError, match="refused"):
        simt.run(
            *(x, None, out, vectors),
            training=True,
            momentum=momentum,
            num_batches_tracked=tracked,
            machine=machine,
            schedule=simt.Schedule(refused_launch=1),
        )
    assert tracked == 2


def test_many_blocks_to_a_channel() -> None:
    """More than a group of lanes reads at once, and the last of them has nothing to do."""
    for layout, shape, grid in (
        ("nchw", (3, 1, 9, 20), GRID),
        ("channels_last", (3, 16, 5, 13), GRID),
        ("channels_last", (3, 16, 5, 13), SHARED_OUT),
    ):
        case = cases.make_case(shape, "float64", layout=layout, grad_layout=layout)
        for check in (check_forward, check_backward):
            machine = grid._replace(num_sms=40, team=40)
            assert check(case, layout, machine=machine).call.num_splits == 40


def far_cases(layout: str, shape: tuple[int, int, int, int]) -> Iterator[tuple[str, cases.Case]]:
    for spread in (1e2, 1e4):
        options = {"layout": layout, "grad_layout": layout, "spread": spread}
        case = cases.make_case(shape, **options)
        yield f"spread {spread}", case
        dark = case.input.clone(memory_format=torch.preserve_format)
        dark[:, :, :2] = 0
        dark[0, :, 0, 0] = -5 * spread
        yield f"border, spread {spread}", case._replace(input=dark)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_far_from_zero(way: str) -> None:
    """A mean of 1e4 deviations, and a border unlike the rest."""
    layout, shape, machine = EVERY_WAY[way]
    for label, case in far_cases(layout, shape):
        both(case, label, machine=machine)


@pytest.mark.parametrize("walk", TIGHT)
def test_far_from_zero_half_on_chip(walk: str) -> None:
    """Where what is read first, a border and the rest far off, does not stay on chip."""
    layout, shape, _, shared_bytes = TIGHT[walk]
    machine = RESIDENT._replace(shared_bytes=shared_bytes)
    for label, case in far_cases(layout, shape):
        held = check_forward(case, label, machine=machine).call.held
        assert 0 < held < 1


@pytest.mark.parametrize("dtypes", ["float32", "float16"])
@pytest.mark.parametrize("walk", ["planes", "rows", "runs"])
@pytest.mark.parametrize("far", ["elements", "packs"])
def test_offsets_beyond_32_bits(far: str, walk: str, dtypes: str) -> None:
    shape = (2, 8, 7, 7) if walk == "runs" else (2, 8, 4, 8)
    case = cases.make_case(shape, dtypes)
    apart = far_apart(case.input, walk == "rows", far)
    dense = torch.channels_last if walk == "rows" else torch.contiguous_format
    dy = case.grad_output.contiguous(memory_format=dense)
    for machine in (RESIDENT, CLUSTER._replace(team=2), GRID._replace(team=2)):
        both(case._replace(input=apart, grad_output=dy), walk, machine=machine)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_nan_stays_in_its_channel(way: str, poison: float) -> None:
    """Also where neighbouring channels share packs."""
    layout, shape, machine = EVERY_WAY[way]
    clean = cases.make_case(shape, layout=layout)
    data = clean.input.clone(memory_format=torch.preserve_format)
    data[1, 2, 2, 3] = poison
    got = simt.forward(data, **clean.arguments, machine=machine)
    want = simt.forward(clean.input, **clean.arguments, machine=machine)
    others = [c for c in range(shape[1]) if c != 2]
    assert torch.equal(got.output[:, others], want.output[:, others])
    assert torch.equal(got.running_var[others], want.running_var[others])
    assert got.output[:, 2].isnan().all()
    assert not got.running_mean[2].isfinite()


@pytest.mark.parametrize("way", EVERY_WAY)
def test_an_infinite_gradient_has_an_infinite_sum(way: str) -> None:
    """Not NaN."""
    layout, shape, machine = EVERY_WAY[way]
    case = cases.make_case(shape, layout=layout, grad_layout=layout)
    dy = case.grad_output.clone(memory_format=torch.preserve_format)
    dy[1, 2, 2, 3] = torch.inf
    ones = torch.ones(shape[1])
    got = simt.backward(dy, case.input, 0 * ones, ones, case.weight, machine=machine)
    assert got.bias[2] == torch.inf
    assert got.bias.isfinite().sum() == shape[1] - 1
