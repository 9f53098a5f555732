"""The answer that this package grew from, term by term, beside what bnext returns for each term."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
from torch import Tensor, nn

import bnext

TERMS = ("input", "weight", "bias", "mean", "var")  # dL_dxi, dL_dgamma, dL_dbeta, dL_davg, dL_dvar


def filled(case: cases.Case) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(case.input.shape[1], dtype=case.input.dtype)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(case, name))
    return layer


@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtypes", ["float64", "float32"])
def test_every_term(dtypes: str, layout: str) -> None:
    """In float64 the formula's own rounding is that of the oracle."""
    for shape in cases.SHAPES:
        case = cases.make_case(shape, dtypes, layout=layout)
        layer = filled(case)
        exact = [t.double() for t in (case.input, case.grad_output)]
        terms = reference.seed_gradients(filled(case).double(), *exact)
        want = reference.backward(case.grad_output, case.input, case.weight)
        by_layer = bnext.layer_gradients(layer, case.input, case.grad_output)
        by_hand = bnext.batchnorm2d_backward(case.grad_output, case.input, case.weight)
        for name in TERMS:
            expected = reference.Expected(getattr(terms, name), getattr(want, name).bar)
            expected.check(getattr(by_layer, name), f"{shape} layer_gradients {name}")
            expected.check(getattr(by_hand, name), f"{shape} batchnorm2d_backward {name}")


def test_autograd_agrees_with_the_seed() -> None:
    case = cases.make_case((3, 5, 6, 7), "float64")
    layer = bnext.convert(filled(case))
    terms = reference.seed_gradients(layer, case.input, case.grad_output)
    x = case.input.requires_grad_()
    got = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), case.grad_output)
    for a, b in zip(got, terms[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def askers_dx(layer: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> Tensor:
    """The question's dx: running statistics for the batch's, and B = N for N * H * W."""
    gamma, mean, var = (
        t.detach().view(1, -1, 1, 1) for t in (layer.weight, layer.running_mean, layer.running_var)
    )
    std = torch.sqrt(var + layer.eps)
    dxhat, count = dy * gamma, x.shape[0]
    dvar = (-0.5 * dxhat * (x - mean) / std**3).sum((0, 2, 3), keepdim=True)
    dmean = (-dxhat / std).sum((0, 2, 3), keepdim=True)
    dmean = dmean + dvar * (-2.0 * (x - mean)).sum((0, 2, 3), keepdim=True) / count
    return dxhat / std + 2.0 * dvar * (x - mean) / count + dmean / count


def test_the_mistake_of_the_question() -> None:
    """These tests can tell the question's dx from the right one."""
    case = cases.make_case((3, 5, 6, 7), "float64")
    layer = filled(case)
    right = bnext.layer_gradients(layer, case.input, case.grad_output).input
    wrong = askers_dx(layer, case.input, case.grad_output)
    assert (right - wrong).abs().max() > 0.1
