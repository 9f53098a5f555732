"""Hypothesis: shapes, strides, dtypes and options that nobody thought of, against the oracle."""

from __future__ import annotations

import math
from typing import Any

import cases
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backward import check_autograd, check_gradients
from test_forward import check_forward
from torch import Tensor

import bnext

# The profile in conftest.py draws the same examples each time: no test passes or fails by luck.
SIZES = st.integers(1, 9)
SHAPES = st.tuples(SIZES, st.one_of(SIZES, st.integers(10, 70)), SIZES, SIZES)


@st.composite
def strided(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The values of x in a view with any order of dimensions, gaps, offset and zero strides."""
    order = draw(st.permutations(range(4)))
    steps = [draw(st.integers(1, 3)) for _ in range(4)]
    margins = [draw(st.integers(0, 2)) for _ in range(4)]
    sizes = [steps[d] * x.shape[d] + margins[d] for d in order]
    offset = draw(st.integers(0, 5))
    buffer = torch.full((math.prod(sizes) + offset,), torch.nan, dtype=x.dtype)
    view = buffer[offset:].view(sizes).permute([list(order).index(d) for d in range(4)])
    for d in range(4):
        view = view.narrow(d, margins[d], steps[d] * x.shape[d])
    view = view[tuple(slice(None, None, step) for step in steps)]
    view.copy_(x)
    if draw(st.integers(0, 4)) == 0:
        dim = draw(st.sampled_from((0, 2, 3)))
        view = view.narrow(dim, 0, 1).expand(x.shape)
    return view


@st.composite
def any_case(draw: st.DrawFn) -> tuple[cases.Case, float]:
    """One call with everything drawn; and its eps."""
    shape = draw(SHAPES)
    dtypes, affine = (
        draw(st.sampled_from(sorted(cases.DTYPES))),
        draw(st.sampled_from(sorted(cases.AFFINE))),
    )
    mode = draw(st.sampled_from(cases.MODES))
    if shape[0] * shape[2] * shape[3] == 1:
        mode = "eval"
    spread = draw(st.sampled_from((0.0, 1.0, 30.0)))
    case = cases.make_case(
        shape, dtypes, affine, mode, seed=draw(st.integers(0, 99)), spread=spread
    )
    x, dy = draw(strided(case.input)), draw(strided(case.grad_output))
    return case._replace(input=x, grad_output=dy), draw(st.sampled_from((1e-5, 1e-3, 1.0)))


@settings(max_examples=250)
@given(any_case())
def test_forward_and_backward(drawn: tuple[cases.Case, float]) -> None:
    case, eps = drawn
    label = f"{tuple(case.input.shape)} {case.input.stride()} {case.grad_output.stride()}"
    check_forward(case, label, eps=eps)
    check_gradients(case, label, eps=eps)


@settings(max_examples=80)
@given(any_case())
def test_autograd(drawn: tuple[cases.Case, float]) -> None:
    case, _ = drawn
    check_autograd(case, f"{tuple(case.input.shape)} {case.input.stride()}")


@settings(max_examples=80)
@given(any_case(), st.floats(-2, 2), st.integers(1, 3))
def test_momentum(drawn: tuple[cases.Case, float], momentum: float, steps: int) -> None:
    case, _ = drawn
    for _ in range(steps):
        check_forward(case, f"momentum {momentum}", momentum=momentum)


@settings(max_examples=80)
@given(any_case())
def test_layout_does_not_matter(drawn: tuple[cases.Case, float]) -> None:
    """Any strides and dense ones: both are within the bar, so they are within two of each other."""
    case, eps = drawn
    want = reference.forward(case.input, **case.arguments, eps=eps).output
    got = [
        bnext.batchnorm2d(x, **case.arguments, eps=eps).double()
        for x in (case.input, case.input.contiguous())
    ]
    assert ((got[0] - got[1]).abs() <= 2 * want.bar).all()


@settings(max_examples=60)
@given(any_case())
def test_invariance(drawn: tuple[cases.Case, float]) -> None:
    """Training output does not change when a batch is shifted and scaled by powers of two."""
    case, _ = drawn
    if not case.training or case.input.dtype in (torch.float16, torch.bfloat16):
        return
    eps = 1e-5
    y = bnext.batchnorm2d(case.input, training=True, eps=eps)
    scaled = bnext.batchnorm2d(case.input * 8, training=True, eps=eps * 64)
    want = reference.forward(case.input, training=True, eps=eps).output
    assert ((scaled - y).abs().double() <= 2 * want.bar).all()


@settings(max_examples=60)
@given(any_case())
def test_projections(drawn: tuple[cases.Case, float]) -> None:
    """In training dx is orthogonal to constants, in every channel."""
    case, eps = drawn
    if not case.training:
        return
    arguments: dict[str, Any] = {**case.backward_arguments, "eps": eps}
    got = bnext.batchnorm2d_backward(case.grad_output, case.input, **arguments)
    bar = reference.backward(case.grad_output, case.input, **arguments).input.bar
    total = got.input.double().sum(reference.DIMS).abs()
    assert (total <= bar.sum(reference.DIMS) * (1 + 1e-6)).all()
