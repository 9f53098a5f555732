"""PyTorch's own samples for batch norm: OpInfo and ModuleInfo, in four layouts and four dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from test_derivatives import assert_near
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bnext

pytest.importorskip("expecttest", reason="torch's lists of samples import it")
common_methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATOR = next(op for op in common_methods.op_db if op.name == "nn.functional.batch_norm")
MODULE = next(m for m in common_modules.module_db if m.module_cls is nn.BatchNorm2d)


def four_dimensional(tensor: Tensor) -> Tensor:
    """The same channels as an image: (N, C) and (N, C, L) get the dimensions that they lack."""
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(-1)
    return tensor


def operator_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[Any, ...]]:
    """(input, positional arguments, keywords) of every sample that has channels."""
    torch.manual_seed(0)
    for sample in OPERATOR.sample_inputs(device, dtype, requires_grad=False):
        if sample.input.dim() < 2:
            continue
        x = four_dimensional(sample.input)
        if sample.kwargs.get("training", False) and x.numel() == x.shape[1]:
            continue
        yield x, sample.args, sample.kwargs


def samples_with_4d(dtype: torch.dtype) -> int:
    samples = OPERATOR.sample_inputs("cpu", dtype, requires_grad=False)
    return sum(sample.input.dim() == 4 for sample in samples)


def fresh(arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """Copies in another dtype; gamma and beta require gradients, the statistics do not."""
    result = [None if t is None else t.detach().clone().to(dtype) for t in arguments]
    for tensor in result[2:4]:
        if tensor is not None:
            tensor.requires_grad_()
    return result


def derivatives(
    call: Callable[..., Tensor], x: Tensor, arguments: list[Any], keywords: dict
) -> list:
    """Output, statistics, first derivatives, and those of dx."""
    y = call(x, *arguments, **keywords)
    leaves = [t for t in (x, *arguments[2:4]) if t is not None]
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=x.device).view(y.shape)
    dy = dy.to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    second = torch.autograd.grad(
        first[0].sum() + (first[0] * first[0]).sum(), [*leaves, dy], allow_unused=True
    )
    return [y.detach(), *arguments[:2], *(g.detach() for g in first), *second]


def test_samples_are_there() -> None:
    assert samples_with_4d(torch.float64) >= 2
    assert len(list(operator_samples(torch.float64, "cpu"))) >= 8


@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator(dtype: torch.dtype, layout: str, device: str) -> None:
    """Values, side effects and two orders of derivatives, against float64 on the same numbers."""
    for number, (x, arguments, keywords) in enumerate(operator_samples(dtype, device)):
        placed = cases.LAYOUTS[layout](x)
        ours = derivatives(
            bnext.batchnorm2d, placed.detach().requires_grad_(), fresh(arguments, dtype), keywords
        )
        exact = fresh(arguments, torch.float64)
        wide = placed.detach().double().contiguous().requires_grad_()

        def composed(
            x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, **options: Any
        ) -> Tensor:
            training, eps = options.get("training", False), options.get("eps", 1e-5)
            return reference.composed(x, mean, var, weight, bias, training, eps)

        theirs = derivatives(composed, wide, exact, keywords)
        options = {**keywords, "training": keywords.get("training", False)}
        after = reference.forward(x, *arguments[:2], **options)
        if after.running_mean is not None:
            after.running_mean.check(ours[1], f"sample {number}: running_mean")
            after.running_var.check(ours[2], f"sample {number}: running_var")
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if place in (1, 2):
                continue
            assert_near(a, b, f"sample {number}, result {place}", dtype)


@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_beside_pytorch(dtype: torch.dtype, layout: str, device: str) -> None:
    """The same call, both ways: values, statistics, dtypes and strides.

    In 16 bits PyTorch rounds on the way, so there only the distance from float64 can be compared.
    """
    for x, arguments, keywords in operator_samples(dtype, device):
        placed = cases.LAYOUTS[layout](x)
        ours, theirs = fresh(arguments, dtype), fresh(arguments, dtype)
        got = bnext.batchnorm2d(placed, *ours, **keywords)
        want = F.batch_norm(placed, *theirs, **keywords)
        assert got.dtype == want.dtype
        assert cases.memory_format(got) == cases.memory_format(want)
        if dtype in (torch.float32, torch.float64):
            for a, b in zip((got, *ours[:2]), (want, *theirs[:2]), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
            continue
        options = {**keywords, "training": keywords.get("training", False)}
        exact = reference.forward(placed, *arguments, **options).output.value
        errors = [(t.detach().cpu().double() - exact).abs().max() for t in (got, want)]
        assert errors[0] <= max(1.5 * errors[1], reference.rounding(exact, dtype).max())


def test_operator_gradgradcheck(device: str) -> None:
    for x, arguments, keywords in operator_samples(torch.float64, device):
        given = fresh(arguments, torch.float64)
        leaves = [x.detach().requires_grad_(), *(t for t in given[2:4] if t is not None)]
        stats = given[:2]

        def call(x: Tensor, *rest: Tensor) -> Tensor:
            own = [None if t is None else t.clone() for t in stats]  # noqa: B023
            parameters = rest if rest else (None, None)
            return bnext.batchnorm2d(x, *own, *parameters, **keywords)  # noqa: B023

        assert gradcheck(call, leaves, fast_mode=True)
        assert gradgradcheck(call, leaves, fast_mode=True)


def module_inputs(dtype: torch.dtype, device: str, training: bool) -> list[Any]:
    torch.manual_seed(0)
    return MODULE.module_inputs_func(
        MODULE, device=device, dtype=dtype, requires_grad=True, training=training
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(dtype: torch.dtype, layout: str, training: bool, device: str) -> None:
    """Each of ModuleInfo's layers: ours, and theirs converted, beside theirs in float64."""
    for sample in module_inputs(dtype, device, training):
        made, options = sample.constructor_input, {"device": device, "dtype": dtype}
        theirs = nn.BatchNorm2d(*made.args, **made.kwargs, **options)
        built = bnext.BatchNorm2d(*made.args, **made.kwargs, **options)
        converted = bnext.convert(copy.deepcopy(theirs))
        exact = copy.deepcopy(theirs).double()
        (data,) = sample.forward_input.args
        outcomes = []
        for layer in (built, converted, exact):
            layer.train(training)
            x = cases.LAYOUTS[layout](data.detach())
            x = (x.double() if layer is exact else x).requires_grad_()
            y = layer(x)
            leaves = [x, *layer.parameters()]
            dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype).to(y.dtype)
            dy.requires_grad_()  # in evaluation without weight, dx depends on nothing else
            first = torch.autograd.grad(y, leaves, dy, create_graph=True)
            second: tuple[Any, ...] = ()
            if y.numel():
                goal = (first[0] * dy.detach()).sum()
                second = torch.autograd.grad(goal, x, allow_unused=True, materialize_grads=True)
            outcomes.append([y.detach(), *(g.detach() for g in first), *second])
        if not data.numel():
            continue
        for ours in outcomes[:2]:
            for place, (a, b) in enumerate(zip(ours, outcomes[2], strict=True)):
                assert_near(a, b, f"{sample.desc}: result {place}", dtype)


@pytest.mark.skipif(
    MODULE.module_error_inputs_func is None, reason="this torch lists no errors of the layer"
)
def test_module_error_inputs(device: str) -> None:
    """What ModuleInfo says must fail, fails likewise."""
    samples = MODULE.module_error_inputs_func(
        MODULE, device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        made = sample.module_error_input.constructor_input
        given = sample.module_error_input.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            bnext.BatchNorm2d(*made.args, **made.kwargs)(*given.args, **given.kwargs)
