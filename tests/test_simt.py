"""The CUDA kernels without a GPU: the very same sources on the SIMT shim, against the oracle."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import cases
import pytest
import reference
import torch
from simt import library as simt
from torch import Tensor

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no C++ compiler here")

# One layout for each way through the kernels: packs, scalars, folds, packs that begin anywhere.
LAYOUTS = (
    *("nchw", "channels_last", "transposed_hw", "transposed_nc", "chwn", "sliced_n", "sliced_c"),
    *("sliced_h", "sliced_w", "cropped", "cropped_channels_last", "sliced_w_channels_last"),
    *("misaligned", "misaligned_channels_last", "expanded_n", "expanded_hw", "overlapping"),
)
SHAPES = (
    *cases.SHAPES[1:],
    (3, 2, 16, 16),
    (2, 8, 16, 16),
    (4, 3, 8, 8),
    (2, 24, 5, 4),
    (1, 1, 2, 700),
)
MACHINES = {
    "fused": simt.Machine(),
    "finish": simt.Machine(fused_splits=0),
    "crowded": simt.Machine(num_sms=40, threads=128),
    "serial": simt.Machine(num_sms=1, threads_per_sm=64, batches=32, threads=256),
}


def invstd_of(x: Tensor, var: Tensor, eps: float = 1e-5) -> Tensor:
    return (var + eps).rsqrt().to(reference.statistics_dtype(x.dtype))


def check_forward(case: cases.Case, label: str, **options: object) -> simt.Forward:
    got = simt.forward(case.input, **case.arguments, **options)
    want = reference.forward(case.input, **case.arguments)
    plan = f"{label}: {got.call.plan.decode()}"
    want.output.check(got.output, f"{plan}: output")
    want.mean.check(got.mean, f"{plan}: mean")
    var = got.invstd.double() ** -2 - 1e-5
    bar = want.var.bar + 8 * reference.step(case.input.dtype) * (want.var.value + 1e-5)
    reference.Expected(want.var.value, bar).check(var, f"{plan}: invstd")
    for name in ("running_mean", "running_var"):
        if getattr(want, name) is not None:
            getattr(want, name).check(getattr(got, name), f"{plan}: {name}")
    assert got.num_batches_tracked == 2 + case.training
    return got


def check_backward(case: cases.Case, label: str, **options: object) -> simt.Backward:
    x = case.input
    if case.training:
        mean, var, _ = reference.batch_statistics(x.double())
        mean, var = mean.flatten(), var.flatten()
    else:
        mean, var = case.running_mean.double(), case.running_var.double()
    mean = mean.to(reference.statistics_dtype(x.dtype))
    invstd = invstd_of(x, var)
    got = simt.backward(case.grad_output, x, mean, invstd, case.weight, case.training, **options)
    arguments = case.backward_arguments | {"training": case.training}
    want = reference.backward(case.grad_output, x, **arguments)
    for name in ("input", "weight", "bias", "mean", "var"):
        if getattr(got, name) is not None:
            label_of = f"{label}: {got.call.plan.decode()}: {name}"
            getattr(want, name).check(getattr(got, name), label_of)
    return got


def both(case: cases.Case, label: str, **options: object) -> None:
    check_forward(case, label, **options)
    check_backward(case, label, **options)


def moderate(case: cases.Case) -> bool:
    """Training needs more than one value per channel."""
    return not case.training or case.input.numel() > case.input.shape[1]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_shapes(layout: str, dtypes: str, mode: str) -> None:
    affine = list(cases.AFFINE)
    for number, shape in enumerate(SHAPES):
        options = {"layout": layout, "grad_layout": layout, "seed": number}
        case = cases.make_case(shape, dtypes, affine[number % 4], mode, **options)
        both(case, f"{shape}", schedule=simt.Schedule(number))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["float32", "float16", "float64"])
def test_layouts(dtypes: str, layout: str, mode: str) -> None:
    """In their own strides, and dy in other strides than x where one walk serves both."""
    for shape in ((3, 5, 7, 6), (2, 8, 5, 9)):
        for grad_layout in (layout, "nchw" if "channels_last" not in layout else "channels_last"):
            options = {"layout": layout, "grad_layout": grad_layout}
            case = cases.make_case(shape, dtypes, mode=mode, **options)
            both(case, f"{shape} dy {grad_layout}", schedule=simt.Schedule(1))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("machine", MACHINES)
def test_plans(machine: str, layout: str) -> None:
    """Finish in a kernel of its own or in the apply kernel, one block per channel or many."""
    splits = set()
    for dtypes in ("float32", "bfloat16"):
        for shape in ((2, 3, 33, 35), (4, 6, 16, 32), (2, 40, 9, 8)):
            options = {"layout": layout, "grad_layout": layout}
            case = cases.make_case(shape, dtypes, **options)
            call = check_forward(case, machine, machine=MACHINES[machine]).call
            splits.add(call.num_splits)
            assert call.fused == (
                machine != "finish" and layout == "nchw" and call.num_splits <= 64
            )
            check_backward(case, machine, machine=MACHINES[machine])
    assert max(splits) > 1 or machine == "serial"


WANTS = {
    "all": (True,) * 5,
    "dx": (True, False, False, False, False),
    "parameters": (False, True, True, False, False),
    "dbias": (False, False, True, False, False),
    "dx_dbias": (True, False, True, False, False),
    "dmean": (False, False, False, True, False),
    "dvar": (False, False, False, False, True),
    "nothing": (False,) * 5,
}
# Activations moved: what training and eval cannot do without.
MOVES = {
    "train": {"all": 5, "dx": 5, "parameters": 2, "dbias": 1, "dx_dbias": 5, "dmean": 1, "dvar": 2},
    "eval": {"all": 3, "dx": 2, "parameters": 2, "dbias": 1, "dx_dbias": 2, "dmean": 1, "dvar": 2},
}


@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_only_what_is_asked_for(mode: str, want: str) -> None:
    """And the bytes that kernels move are those that the plan says."""
    for layout in ("nchw", "channels_last"):
        for dtypes in ("float32", "float16"):
            options = {"layout": layout, "grad_layout": layout}
            case = cases.make_case((3, 8, 8, 8), dtypes, mode=mode, **options)
            call = check_backward(case, f"{mode} {want}", want=WANTS[want]).call
            moved = call.bytes_loaded + call.bytes_stored
            assert moved == call.planned_bytes
            tensor_bytes = case.input.numel() * case.input.element_size()
            assert moved == MOVES[mode].get(want, 0) * tensor_bytes


def test_forward_bytes() -> None:
    for layout in ("nchw", "channels_last"):
        for mode, output, moves in (
            *(("train", True, 3), ("train", False, 1)),
            *(("eval", True, 2), ("eval", False, 0)),
        ):
            case = cases.make_case((3, 8, 8, 8), layout=layout, mode=mode)
            got = simt.forward(case.input, **case.arguments, want_output=output)
            want = reference.forward(case.input, **case.arguments)
            want.mean.check(got.mean, f"{mode} mean")
            call = got.call
            moved = call.bytes_loaded + call.bytes_stored
            assert moved == call.planned_bytes == moves * case.input.numel() * 4


def bits(*tensors: Tensor | None) -> tuple[bytes, ...]:
    given = (t.contiguous() for t in tensors if t is not None)
    return tuple(t.view(torch.uint8).numpy().tobytes() for t in given)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "cropped"])
def test_every_schedule_gives_the_same_bits(layout: str) -> None:
    for machine in MACHINES.values():
        options = {"layout": layout, "grad_layout": layout}
        case = cases.make_case((3, 3, 20, 21), "bfloat16-float32", **options)
        seen = set()
        for seed in range(6):
            run = {"machine": machine, "schedule": simt.Schedule(seed)}
            there = check_forward(case, "forward", **run)
            back = check_backward(case, "backward", **run)
            seen.add(bits(*there[:-2], *back[:-1]))
        assert len(seen) == 1


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_cumulative_momentum(layout: str) -> None:
    """The third batch counts one third, whichever block reads the count."""
    for machine in MACHINES.values():
        case = cases.make_case((3, 5, 9, 9), layout=layout)
        got = simt.forward(case.input, **case.arguments, momentum=None, machine=machine)
        want = reference.forward(case.input, **case.arguments, momentum=1 / 3)
        want.running_mean.check(got.running_mean, "running_mean")
        want.running_var.check(got.running_var, "running_var")
        assert got.num_batches_tracked == 3


@pytest.mark.parametrize("dtypes", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_far_from_zero(layout: str, dtypes: str) -> None:
    """A mean of 1e4 deviations, and a border unlike the rest."""
    for spread in (1e2, 1e4):
        options = {"layout": layout, "grad_layout": layout, "spread": spread}
        case = cases.make_case((4, 6, 24, 24), dtypes, **options)
        both(case, f"spread {spread}", machine=MACHINES["serial"])
        dark = case.input.clone(memory_format=torch.preserve_format)
        dark[:, :, :2] = 0
        if dtypes == "float32":  # the oracle's own pivot: in float64 its error would show
            dark[0, :, 0, 0] = -5 * spread
        both(case._replace(input=dark), f"border, spread {spread}", machine=MACHINES["serial"])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_long_sums(layout: str) -> None:
    """Many batches for each thread. Equal terms are the worst case: they all round one way."""
    for shape in ((8, 2, 64, 64), (16, 12, 32, 32)):
        case = cases.make_case(shape, layout=layout, grad_layout=layout, spread=30.0)
        case.grad_output.fill_(0.1)
        both(case, "long sums", machine=MACHINES["serial"])


@pytest.mark.parametrize("dtypes", ["float32", "float16"])
def test_offsets_beyond_32_bits(dtypes: str) -> None:
    """Planes and rows 2^32 elements apart, in memory that is never touched between them."""
    distance = 2**32 + 8
    shapes = {"planes": (2, 3, 4, 8), "rows": (2, 8, 3, 2)}
    for walk, shape in shapes.items():
        channels_last = walk == "rows"
        case = cases.make_case(shape, dtypes)
        size = (distance + case.input.numel()) * case.input.element_size()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            memory = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            pytest.skip(f"no address space: {error}")
        flat = torch.frombuffer(memory, dtype=case.input.dtype)
        _, c, h, w = shape
        stride = (distance, 1, w * c, c) if channels_last else (distance, h * w, w, 1)
        far = flat.as_strided(shape, stride).copy_(case.input)
        dense = torch.channels_last if channels_last else torch.contiguous_format
        call = check_forward(case._replace(input=far), walk).call
        assert call.vec > 1
        dy = case.grad_output.contiguous(memory_format=dense)
        check_backward(case._replace(input=far, grad_output=dy), walk)
        check_backward(case._replace(grad_output=flat.as_strided(shape, stride)), walk)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "misaligned"])
def test_nan_stays_in_its_channel(layout: str, poison: float) -> None:
    clean = cases.make_case((3, 19, 5, 7))
    data = clean.input.clone()
    data[1, 4, 2, 3] = poison
    got = simt.forward(cases.LAYOUTS[layout](data), **clean.arguments)
    want = simt.forward(cases.LAYOUTS[layout](clean.input), **clean.arguments)
    others = [c for c in range(19) if c != 4]
    assert torch.equal(got.output[:, others], want.output[:, others])
    assert torch.equal(got.running_var[others], want.running_var[others])
    assert got.output[:, 4].isnan().all()
    assert not got.running_mean[4].isfinite()


def test_vectors_of_any_stride_and_dtype() -> None:
    case = cases.make_case((3, 5, 4, 4), "bfloat16")
    wide = {
        name: torch.full((5, 3), torch.nan, dtype=torch.bfloat16)[:, 1].copy_(getattr(case, name))
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    mixed = wide | {"bias": case.bias.float(), "running_var": case.running_var.float()}
    for vectors in (wide, mixed):
        both(case._replace(**vectors), "strided vectors")


FAULTS = (
    *("not all threads reach the barrier", "threads are at different barriers"),
    *("not all lanes reach the shuffle", "a shuffle without all lanes"),
    *("a load of 16 bytes is misaligned", "a load outside the tensors"),
    *("a store outside the outputs", "an element is stored twice"),
    *("wrote beyond its shared memory", ""),
)


@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_the_shim_notices(which: int) -> None:
    for seed in range(6):
        error = simt.fault(which, seed)
        assert FAULTS[which] in error
        assert bool(error) == bool(FAULTS[which])


def broken_runs(schedule: simt.Schedule) -> Iterator[str]:
    """What goes wrong in a few passes that reach every barrier."""
    wide = simt.Machine(threads=128, num_sms=40)
    for layout, shape, machine in (
        ("channels_last", (4, 6, 16, 32), wide),
        ("nchw", (4, 6, 16, 32), wide),
        (
            "sliced_w",
            (9, 2, 32, 32),
            wide._replace(threads=64),
        ),  # more splits than a warp has lanes
    ):
        case = cases.make_case(shape, layout=layout, grad_layout=layout)
        for check in (check_forward, check_backward):
            try:
                check(case, layout, machine=machine, schedule=schedule)
            except (AssertionError, simt.ShimError) as error:
                yield str(error)


def test_each_barrier_is_needed() -> None:
    """A barrier taken away shows in a result: the tests above would notice."""
    for seed in range(3):
        assert list(broken_runs(simt.Schedule(seed))) == []
    found = [barrier for barrier in simt.barriers() if ".cuh:" in barrier]
    written = [
        f"{path.name}:{number}"
        for path in sorted((simt.ROOT / "csrc/cuda").glob("**/*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads();" in line
    ]
    assert sorted(found) == sorted(written)  # the runs above reach all there are
    for barrier in found:
        schedules = (simt.Schedule(seed, barrier) for seed in range(30))
        caught = next((s for s in schedules if any(True for _ in broken_runs(s))), None)
        assert caught is not None, f"nothing shows that the barrier at {barrier} is missing"
