"""Derivatives to any order: numeric checks, closed forms, composed autograd, mixed requests."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import cases
import pytest
import reference
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bnext

EPS = 1e-2  # well away from zero, or finite differences would need tiny steps
ROUNDINGS = 2**10  # what the few hundred operations behind a higher derivative may collect
STORED_ROUNDINGS = 8  # outputs, dx, what comes back for it, and the results, each more than once


def leaves_and_call(
    affine: str, mode: str, layout: str, shape: tuple[int, ...] = (3, 2, 2, 3), device: str = "cpu"
) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Float64 leaves, bnext on them, and the composed oracle on them."""
    case = cases.make_case(shape, "float64", affine, mode, layout=layout, device=device)
    tensors = [case.input, case.weight, case.bias]
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]

    def arguments(given: tuple[Tensor, ...]) -> dict[str, object]:
        rest = iter(given)
        result = case.arguments
        result["weight"] = None if case.weight is None else next(rest)
        result["bias"] = None if case.bias is None else next(rest)
        return result

    def ours(x: Tensor, *given: Tensor) -> Tensor:
        return bnext.batchnorm2d(x, **arguments(given), eps=EPS)

    def composed(x: Tensor, *given: Tensor) -> Tensor:
        return reference.composed(x, **arguments(given), eps=EPS)

    return leaves, ours, composed


def assert_near(
    got: Tensor | None, want: Tensor | None, label: str, dtype: torch.dtype = torch.float64
) -> None:
    """Equal up to rounding on the scale of the whole result. None stands for zero."""
    if got is None or want is None:
        there = want if got is None else got
        assert there is None or not there.any(), f"{label}: one side has no gradient"
        return
    assert got.shape == want.shape, label
    if not got.numel():
        return
    wide = want.double()
    error = (got.double() - wide).abs().max().item()
    scale = max(1.0, wide.abs().max().item())
    # What is stored between the orders is rounded to the dtype, beside the arithmetic's roundings.
    stored = STORED_ROUNDINGS * reference.ROUNDOFF[dtype] if dtype != torch.float64 else 0.0
    allowed = (ROUNDINGS * reference.step(dtype) + stored) * scale
    assert error <= allowed, f"{label}: off by {error:.3g} of {scale:.3g}, allowed {allowed:.3g}"


def derivatives(
    call: Callable[..., Tensor], leaves: list[Tensor], order: int
) -> list[list[Tensor]]:
    """Gradients up to `order`: of sum(y^3 + y), then of a weighted sum of the last ones."""
    result = []
    y = call(*leaves)
    scalar = (y**3 + y).sum()
    for n in range(1, order + 1):
        gradients = torch.autograd.grad(
            scalar, leaves, create_graph=n < order, allow_unused=True, materialize_grads=True
        )
        result.append([g.detach() for g in gradients])
        scalar = sum(
            (g * torch.cos(torch.arange(g.numel(), device=g.device) + n).view_as(g)).sum()
            for g in gradients
        )
    return result


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_gradcheck(affine: str, mode: str, layout: str, device: str) -> None:
    leaves, ours, _ = leaves_and_call(affine, mode, layout, device=device)
    assert gradcheck(ours, leaves)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_gradgradcheck(affine: str, mode: str, layout: str, device: str) -> None:
    leaves, ours, _ = leaves_and_call(affine, mode, layout, (2, 2, 2, 2), device)
    assert gradgradcheck(ours, leaves)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_third_order_gradgradcheck(affine: str, mode: str, device: str) -> None:
    """PyTorch refuses this order."""
    leaves, ours, _ = leaves_and_call(affine, mode, "nchw", (2, 1, 2, 2), device)

    def first_derivative(*given: Tensor) -> tuple[Tensor, ...]:
        value = ours(*given)
        return torch.autograd.grad((value**2).sum(), given, create_graph=True)

    # Fast mode: one random direction, and no Jacobian of a Jacobian.
    assert gradgradcheck(first_derivative, leaves, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed_nc", "sliced_w"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_up_to_fourth_order(affine: str, mode: str, layout: str, device: str) -> None:
    """Against autograd through plain operations. weight=None with a bias is among them."""
    leaves, ours, composed = leaves_and_call(affine, mode, layout, (3, 4, 5, 4), device)
    got, want = (derivatives(call, leaves, 4) for call in (ours, composed))
    for order, (mine, theirs) in enumerate(zip(got, want, strict=True), start=1):
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_near(a, b, f"order {order}, argument {number}")


@pytest.mark.parametrize("affine", cases.AFFINE)
def test_double_backward_closed_form(affine: str, device: str) -> None:
    """The formulas of the second derivative, written out, for every subset of what arrives."""
    case = cases.make_case((3, 5, 4, 3), "float64", affine, "no_stats", device=device)
    c = case.input.shape[1]
    x, dy = case.input.requires_grad_(), case.grad_output.requires_grad_()
    weight = None if case.weight is None else case.weight.requires_grad_()
    bias = None if case.bias is None else case.bias.requires_grad_()
    y = bnext.batchnorm2d(x, None, None, weight, bias, True)
    first = [t for t in (x, weight, bias) if t is not None]
    gradients = dict(
        zip(
            [n for n, t in (("x", x), ("weight", weight), ("bias", bias)) if t is not None],
            torch.autograd.grad(y, first, dy, create_graph=True),
            strict=True,
        )
    )
    v = cases.random_tensor((3, 5, 4, 3), torch.float64, 70, 0.3).to(device)
    vectors = {"weight": cases.vector(c, torch.float64, 71), "bias": cases.vector(c, x.dtype, 72)}
    names = list(gradients)
    for size in range(1, len(names) + 1):
        for asked in itertools.combinations(names, size):
            arriving = {"x": v, **{n: t.to(device) for n, t in vectors.items()}}
            zero = {n: torch.zeros_like(t) for n, t in arriving.items()}
            used = {n: arriving[n] if n in asked else zero[n] for n in arriving}
            want = reference.double_backward(
                *(double.cpu() for double in (used["x"], used["weight"], used["bias"])),
                *(double.detach().cpu() for double in (dy, x)),
                weight,
                1e-5,
            )
            wanted = [t for t in (dy, x, weight) if t is not None]
            got = torch.autograd.grad(
                [gradients[n] for n in asked],
                wanted,
                [arriving[n] for n in asked],
                retain_graph=True,
                allow_unused=True,
            )
            for name, mine, theirs in zip(("dy", "x", "weight"), got, want, strict=False):
                assert_near(None if mine is None else mine.cpu(), theirs, f"{asked}: {name}")


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:])
def test_second_order_of_a_subset(needs: tuple[bool, ...], mode: str, device: str) -> None:
    """Any of x, weight, bias and dy may be a constant."""
    case = cases.make_case((3, 2, 4, 3), "float64", mode=mode, device=device)
    names = ("input", "weight", "bias", "grad_output")

    def second(call: Callable[..., Tensor]) -> list[Tensor | None]:
        tensors = {
            name: getattr(case, name).detach().clone().requires_grad_(need)
            for name, need in zip(names, needs, strict=True)
        }
        dy = tensors.pop("grad_output")
        arguments = {**case.arguments, **tensors}
        y = call(arguments.pop("input"), **arguments, eps=EPS)
        first = [t for t in tensors.values() if t.requires_grad]
        if not first:
            return []
        gradients = torch.autograd.grad(y, first, dy, create_graph=True)
        scalar = sum((g**2).sum() for g in gradients)
        inner = [t for t in (*first, dy) if t.requires_grad]
        if not scalar.requires_grad:
            return [*gradients, *[None] * len(inner)]
        return [*gradients, *torch.autograd.grad(scalar, inner, allow_unused=True)]

    for number, (a, b) in enumerate(
        zip(second(bnext.batchnorm2d), second(reference.composed), strict=True)
    ):
        assert_near(a, b, f"result {number}")


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("affine", cases.AFFINE)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16-float32"])
def test_second_order_in_other_dtypes(dtypes: str, affine: str, mode: str, device: str) -> None:
    """Rounded once on the way between the derivatives, as every tensor of that dtype is."""
    case = cases.make_case((4, 5, 6, 7), dtypes, affine, mode, device=device)
    v = cases.random_tensor((4, 5, 6, 7), case.input.dtype, 70, 0.3).to(device)

    def second(call: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()

        x, dy, weight, bias = map(leaf, (case.input, case.grad_output, case.weight, case.bias))
        stats = [None if s is None else s.to(dtype or s.dtype) for s in case[1:3]]
        y = call(x, *stats, weight, bias, case.training, eps=EPS)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        inner = [t for t in (x, dy, weight) if t is not None]
        return torch.autograd.grad(dx, inner, v.to(dx.dtype), allow_unused=True)

    got = second(bnext.batchnorm2d, None)
    want = second(reference.composed, torch.float64)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_near(a, b, f"result {number}", case.input.dtype)


def test_gradient_penalty(device: str) -> None:
    """The usual reason for a second derivative, through a small network, against float64 nn."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 6, 3)
    theirs = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(6), torch.nn.Tanh()).double().to(device)
    ours = bnext.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(device)
    results = []
    for model in (ours, theirs):
        data = x.clone().requires_grad_()
        score = model(data).square().mean()
        (gradient,) = torch.autograd.grad(score, data, create_graph=True)
        (score + gradient.norm()).backward()
        results.append([p.grad for p in model.parameters()])
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert_near(a, b, f"parameter {number}")


@pytest.mark.parametrize("mode", cases.MODES)
def test_create_graph_changes_nothing(mode: str, device: str) -> None:
    case = cases.make_case((3, 5, 4, 6), mode=mode, device=device)
    x = case.input.requires_grad_()
    plain, graphed = (
        torch.autograd.grad(
            bnext.batchnorm2d(x, **case.arguments), x, case.grad_output, create_graph=create
        )[0]
        for create in (False, True)
    )
    assert torch.equal(plain, graphed)
    assert graphed.requires_grad == case.training  # frozen: dx is dy times a constant


def test_empty_second_order(device: str) -> None:
    x = torch.empty(0, 4, 3, 3, device=device, requires_grad=True)
    weight = torch.ones(4, device=device, requires_grad=True)
    y = bnext.batchnorm2d(x, weight=weight, training=True)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    got = torch.autograd.grad(dx.sum() + dweight.sum(), (x, weight), allow_unused=True)
    assert got[0] is None or got[0].shape == x.shape
    assert got[1] is None or not got[1].any()
