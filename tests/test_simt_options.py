"""On the SIMT shim: statistics as outputs and gradients into them, bad batches, dx over dy."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
from simt import library as simt
from test_simt import LAYOUTS, MACHINES
from test_simt_on_chip import CLUSTER, GRID, RESIDENT, SHARED_OUT
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels")

ON_CHIP = {"resident": RESIDENT, "cluster": CLUSTER._replace(team=2)}
ON_CHIP |= {"grid": GRID._replace(team=2), "shared out": SHARED_OUT._replace(team=2)}
EVERY = MACHINES | ON_CHIP

C = 5
SHAPE = (3, C, 6, 8)


def vectors_of(case: cases.Case) -> dict[str, Tensor | None]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {name: cases.copied(getattr(case, name)) for name in names}


def statistics(case: cases.Case) -> list[Tensor]:
    dtype = reference.statistics_dtype(case.input.dtype)
    return [simt.guarded((C,), dtype, (1,)) for _ in range(4)]


def run_forward(case: cases.Case, limit: float = 0.0, **options: object) -> dict[str, Tensor]:
    x = case.input
    out = simt.guarded(x.shape, x.dtype, torch.empty_like(x).stride())
    names = ("mean", "invstd", "stats_mean", "stats_var")
    vectors = vectors_of(case) | dict(zip(names, statistics(case), strict=True))
    simt.run(x, None, out, vectors, training=case.training, running_limit=limit, **options)
    return vectors | {"output": out}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "bfloat16-float32"])
def test_statistics_come_out(dtypes: str, layout: str, mode: str) -> None:
    case = cases.make_case(SHAPE, dtypes, mode=mode, layout=layout)
    want = reference.forward(case.input, **case.arguments)
    for machine in EVERY.values():
        got = run_forward(case, machine=machine)
        want.mean.check(got["stats_mean"], "mean")
        want.var.check(got["stats_var"], "var")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_channels_keep_their_running_statistics(layout: str, bad: float) -> None:
    case = cases.make_case(SHAPE, layout=layout)
    case.input[1, 2, 3, 4] = bad
    others = [0, 1, 3, 4]
    for machine in EVERY.values():
        got = run_forward(case, torch.finfo(torch.float32).max, machine=machine)
        plain = run_forward(case, machine=machine)
        for name in ("running_mean", "running_var"):
            assert got[name][2] == getattr(case, name)[2]
            assert not plain[name][2].isfinite()
            assert torch.equal(got[name][others], plain[name][others])


def run_backward(
    case: cases.Case, out: Tensor | None, grads: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    x = case.input
    mean, var, _ = reference.batch_statistics(x.double())
    dtype = reference.statistics_dtype(x.dtype)
    vectors: dict[str, Tensor | None] = {
        "mean": mean.flatten().to(dtype),
        "invstd": (var.flatten() + 1e-5).rsqrt().to(dtype),
        "weight": case.weight,
    }
    parameters = [simt.guarded((C,), case.weight.dtype, (1,)) for _ in range(2)]
    names = ("dweight", "dbias", "dmean", "dvar")
    vectors |= dict(zip(names, (*parameters, *statistics(case)[:2]), strict=True))
    if out is None:
        out = simt.guarded(x.shape, x.dtype, torch.empty_like(x).stride())
    simt.run(x, case.grad_output, out, vectors | grads, training=case.training, **options)
    return {name: vectors[name] for name in names} | {"dx": out}


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "cropped"])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16-float32"])
def test_gradients_into_the_statistics(dtypes: str, layout: str) -> None:
    """dx gains dL/dmean / m + dL/dvar * 2 * (x - mean) / m, dmean and dvar what arrives."""
    case = cases.make_case(SHAPE, dtypes, layout=layout, grad_layout=layout)
    dtype = reference.statistics_dtype(case.input.dtype)
    grad_mean, grad_var = (cases.vector(C, dtype, seed) for seed in (60, 61))
    want = reference.backward(case.grad_output, case.input, **case.backward_arguments)
    m = case.input.numel() // C
    _, _, centred = reference.batch_statistics(case.input.double())
    mean_part, var_part = (reference.per_channel(g.double()) / m for g in (grad_mean, grad_var))
    more = mean_part + 2 * var_part * centred
    # The new terms carry the roundings of an element, as the others do, and the mean's error.
    unit = reference.step(case.input.dtype)
    terms = mean_part.abs() + 2 * var_part.abs() * (centred.abs() + case.input.double().abs())
    dx = want.input.value + more
    bar = want.input.bar + reference.rounding(more, case.input.dtype)
    bar = bar + reference.ELEMENT_STEPS * unit * terms
    for machine in (MACHINES if layout == "cropped" else EVERY).values():
        grads = {"grad_mean": grad_mean, "grad_var": grad_var}
        got = run_backward(case, None, grads, machine=machine)
        reference.Expected(dx, bar).check(got["dx"], "dx")
        for name, new in (("mean", grad_mean), ("var", grad_var)):
            plain = getattr(want, name)
            value = plain.value + new.double()
            slack = plain.bar + reference.rounding(value, dtype)
            reference.Expected(value, slack).check(got[f"d{name}"], name)


IN_PLACE = [layout for layout in LAYOUTS if not layout.startswith(("expanded", "overlapping"))]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", IN_PLACE)
def test_dx_over_dy(layout: str, mode: str) -> None:
    """In place, bit for bit what a new tensor would have got."""
    odd, even = (3, C, 7, 6), (4, C, 8, 6)
    for dtypes, shape in (("float32", odd), ("float16", odd), ("float16", even)):
        case = cases.make_case(shape, dtypes, mode=mode, layout=layout, grad_layout=layout)
        strides, dtype = case.grad_output.stride(), case.input.dtype
        # Memory of its own: the same plan for both, also where the layout is a view of more.
        dy, dx, both = (torch.empty_strided(shape, strides, dtype=dtype) for _ in range(3))
        dy.copy_(case.grad_output)
        for number, (name, machine) in enumerate(EVERY.items()):
            options = {"machine": machine, "schedule": simt.Schedule(number)}
            try:
                want = run_backward(case._replace(grad_output=dy), dx, {}, **options)
            except simt.NoPlanError:
                plain = shape == even and layout in ("nchw", "channels_last")
                assert name not in MACHINES and mode == "train" and not plain
                continue
            both.copy_(dy)
            got = run_backward(case._replace(grad_output=both), both, {}, **options)
            for key, value in want.items():
                assert torch.equal(got[key], value), (name, key)
