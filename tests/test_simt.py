"""The CUDA kernels without a GPU: the very same sources on the SIMT shim, against the oracle."""

from __future__ import annotations

import math

import cases
import pytest
import reference
import torch
from simt import library as simt
from simt.checks import FAR, bits, both, check_backward, check_forward, far_apart

pytestmark = pytest.mark.usefixtures("kernels")

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
            few = call.num_splits <= 64 and call.num_splits * call.slab_channels <= 512
            assert call.fused == (machine != "finish" and few)
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
    # As many packs as a thread may have on chip: two a batch, so twice the additions.
    shape, threads = (8, 2, 64, 64), 64 if layout == "nchw" else 128
    slabs = 2 if layout == "nchw" else 1  # both channels are one pack of two rows
    assert math.prod(shape) // 4 == slabs * threads * 128
    case = cases.make_case(shape, layout=layout, grad_layout=layout, spread=30.0)
    case.grad_output.fill_(0.1)
    resident = MACHINES["serial"]._replace(family="resident", threads=threads)
    both(case, "long sums on chip", machine=resident)


@pytest.mark.parametrize("dtypes", ["float32", "float16"])
@pytest.mark.parametrize("far", FAR)
def test_offsets_beyond_32_bits(far: str, dtypes: str) -> None:
    shapes = {"planes": (2, 3, 4, 8), "rows": (2, 8, 3, 2)}
    for walk, shape in shapes.items():
        case = cases.make_case(shape, dtypes)
        apart = far_apart(case.input, walk == "rows", far)
        call = check_forward(case._replace(input=apart), walk).call
        assert (call.vec > 1) == (far != "single elements")
        dense = torch.channels_last if walk == "rows" else torch.contiguous_format
        dy = case.grad_output.contiguous(memory_format=dense)
        check_backward(case._replace(input=apart, grad_output=dy), walk)
        check_backward(case._replace(grad_output=apart), walk)


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
