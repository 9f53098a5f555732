"""The derivative as one writes it by hand, term by term, beside what bnext returns for each."""

from __future__ import annotations

import cases
import pytest
import reference
import scripts
import torch
from torch import Tensor, nn

import bnext

TERMS = {"x": "input", "gamma": "weight", "beta": "bias", "mean": "mean", "var": "var"}
by_hand = scripts.load("examples/derivative_by_hand.py")


def filled(case: cases.Case) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(case.input.shape[1], dtype=case.input.dtype)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(case, name))
    return layer


def correction(layer: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return by_hand.correction(x, dy, layer)


@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtypes", ["float64", "float32"])
def test_every_term(dtypes: str, layout: str) -> None:
    """In float64 the formula's own rounding is that of the oracle."""
    for shape in cases.SHAPES:
        case = cases.make_case(shape, dtypes, layout=layout)
        layer = filled(case)
        terms = correction(filled(case).double(), case.input.double(), case.grad_output.double())
        want = reference.backward(case.grad_output, case.input, case.weight)
        by_layer = bnext.layer_gradients(layer, case.input, case.grad_output)
        alone = bnext.batchnorm2d_backward(case.grad_output, case.input, case.weight)
        for term, name in TERMS.items():
            expected = reference.Expected(terms[term], getattr(want, name).bar)
            expected.check(getattr(by_layer, name), f"{shape} layer_gradients {name}")
            expected.check(getattr(alone, name), f"{shape} batchnorm2d_backward {name}")


def test_autograd_agrees() -> None:
    case = cases.make_case((3, 5, 6, 7), "float64")
    layer = bnext.convert(filled(case))
    terms = correction(layer, case.input, case.grad_output)
    x = case.input.requires_grad_()
    got = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), case.grad_output)
    for gradient, term in zip(got, ("x", "gamma", "beta"), strict=True):
        torch.testing.assert_close(gradient, terms[term], rtol=1e-12, atol=1e-12)


def test_the_mistakes_of_the_attempt_show() -> None:
    """These tests can tell the attempt from the right derivative."""
    case = cases.make_case((3, 5, 6, 7), "float64")
    layer = filled(case)
    right = bnext.layer_gradients(layer, case.input, case.grad_output)
    with torch.no_grad():
        wrong = by_hand.attempt(case.input, layer(case.input), case.grad_output, filled(case))
    assert (right.input - wrong["x"]).abs().max() > 0.1
    assert (right.weight - wrong["gamma"]).abs().max() > 0.1
    torch.testing.assert_close(right.bias, wrong["beta"])
