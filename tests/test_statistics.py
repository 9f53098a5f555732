"""return_stats: the statistics as outputs, and gradients into them. skip_nonfinite: bad batches."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import cases
import pytest
import reference
import torch
from test_derivatives import assert_near, derivatives
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import bnext

EPS = 1e-2  # well away from zero, or finite differences would need tiny steps
USES = [use for use in itertools.product([False, True], repeat=3) if any(use[1:])]


def with_stats(case: cases.Case, call: Callable[..., object]) -> Callable[..., tuple[Tensor, ...]]:
    """(output, mean, var) of `call` as a function of input, weight and bias where there are any."""

    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        arguments = case.arguments
        arguments["weight"] = None if case.weight is None else next(rest)
        arguments["bias"] = None if case.bias is None else next(rest)
        return call(x, **arguments, eps=EPS)

    return run


def ours(x: Tensor, **arguments: object) -> tuple[Tensor, ...]:
    return bnext.batchnorm2d(x, **arguments, return_stats=True)


def composed(x: Tensor, **arguments: object) -> tuple[Tensor, ...]:
    """The same in plain differentiable operations."""
    y = reference.composed(x, **arguments)
    if not arguments["training"]:
        return y, arguments["running_mean"], arguments["running_var"]
    return y, x.mean(reference.DIMS), x.var(reference.DIMS, unbiased=False)


def leaves_of(case: cases.Case) -> list[Tensor]:
    return [t.requires_grad_() for t in (case.input, case.weight, case.bias) if t is not None]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
def test_values(layout: str, dtypes: str, mode: str, device: str) -> None:
    """The output is that of a call without them; the statistics are the oracle's."""
    case = cases.make_case((3, 5, 6, 7), dtypes, mode=mode, layout=layout, device=device)
    y, mean, var = bnext.batchnorm2d(case.input, **case.arguments, return_stats=True)
    assert torch.equal(y, bnext.batchnorm2d(case.input, **case.arguments))
    assert mean.dtype == var.dtype == reference.statistics_dtype(case.input.dtype)
    if case.training:
        want = reference.forward(case.input, **case.arguments)
        want.mean.check(mean, "mean")
        want.var.check(var, "var")
    else:
        assert torch.equal(mean, case.running_mean.to(mean.dtype))
        assert torch.equal(var, case.running_var.to(var.dtype))
        mean.zero_()  # copies, that nobody else holds
        assert case.running_mean.all()


@pytest.mark.parametrize("mode", cases.MODES)
def test_eval_statistics_are_constants(mode: str, device: str) -> None:
    case = cases.make_case((3, 5, 4, 3), mode=mode, device=device)
    leaves_of(case)
    y, mean, var = bnext.batchnorm2d(case.input, **case.arguments, return_stats=True)
    assert y.requires_grad
    assert mean.requires_grad == var.requires_grad == case.training


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_gradcheck(affine: str, layout: str, device: str) -> None:
    case = cases.make_case((3, 2, 2, 3), "float64", affine, layout=layout, device=device)
    call = with_stats(case, ours)
    assert gradcheck(call, leaves_of(case), fast_mode=True)
    assert gradgradcheck(call, leaves_of(case), fast_mode=True)


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_up_to_third_order(affine: str, use: tuple[bool, ...], device: str) -> None:
    """Gradients that arrive for any of output, mean and var, against plain operations."""
    case = cases.make_case((3, 4, 5, 4), "float64", affine, device=device)
    leaves = leaves_of(case)

    def mixed(call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        def run(*given: Tensor) -> Tensor:
            outputs = with_stats(case, call)(*given)
            return torch.cat([t.flatten() for t, used in zip(outputs, use, strict=True) if used])

        return run

    got, want = (derivatives(mixed(call), leaves, 3) for call in (ours, composed))
    for order, (mine, theirs) in enumerate(zip(got, want, strict=True), start=1):
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_near(a, b, f"order {order}, argument {number}")


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16-float32"])
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
def test_gradients_in_other_dtypes(layout: str, dtypes: str, device: str) -> None:
    case = cases.make_case((4, 5, 6, 7), dtypes, layout=layout, device=device)
    arriving = [cases.vector(5, torch.float64, seed).to(device) for seed in (60, 61)]

    def gradients(call: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype | None) -> Tensor:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype or t.dtype)

        x = cast(case.input).requires_grad_()
        arguments = case.arguments | {"weight": cast(case.weight), "bias": cast(case.bias)}
        outputs = call(x, **arguments)
        grads = [t.to(o.dtype) for t, o in zip((case.grad_output, *arriving), outputs, strict=True)]
        return torch.autograd.grad(outputs, x, grads)[0]

    assert_near(
        gradients(ours, None), gradients(composed, torch.float64), "dx", dtype=case.input.dtype
    )


class Calls(TorchDispatchMode):
    """Records each operator, and how large its largest tensor was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(result if isinstance(result, tuple) else (result,)))]
        sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
        self.seen.append((func._schema.name, max(sizes, default=0)))
        return result


@pytest.mark.parametrize("weight_needs_grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_gradient_at_all(training: bool, weight_needs_grad: bool, device: str) -> None:
    """What a node behind the outputs does not send back is None here: no zeros are made of it."""
    case = cases.make_case((3, 5, 4, 3), mode="train" if training else "eval", device=device)
    x, weight, bias = leaves_of(case)
    arguments = {**case.arguments, "weight": weight.requires_grad_(weight_needs_grad), "bias": bias}
    y, mean, var = bnext.batchnorm2d(x, **arguments, return_stats=True)
    outputs = cases.Dropped.apply(*((y, mean, var) if training else (y,)))
    sum(t.sum() for t in outputs).backward()
    assert x.grad is weight.grad is bias.grad is None


def test_one_pass(device: str) -> None:
    """Gradients into the statistics are two more numbers per channel, not another pass."""
    case = cases.make_case((3, 5, 4, 3), device=device)
    leaves = leaves_of(case)
    y, mean, var = bnext.batchnorm2d(case.input, **case.arguments, return_stats=True)
    with Calls() as calls:
        torch.autograd.grad((y, mean, var), leaves, (case.grad_output, mean.detach(), var.detach()))
    large = [name for name, size in calls.seen if size >= case.input.numel()]
    assert large == ["bnext::batchnorm2d_backward"]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtypes", ["float64", "float16-float32"])
def test_by_hand(dtypes: str, mode: str, device: str) -> None:
    """What arrives for mean and var is a part of dL/dmean and dL/dvar, and so of dx."""
    case = cases.make_case((3, 5, 4, 6), dtypes, mode=mode, device=device)
    statistics = reference.statistics_dtype(case.input.dtype)
    grad_mean, grad_var = (cases.vector(5, statistics, s).to(device) for s in (60, 61))
    arguments = (case.grad_output, case.input, case.weight, case.running_mean, case.running_var)
    plain = bnext.batchnorm2d_backward(*arguments, case.training)
    got = bnext.batchnorm2d_backward(
        *arguments, case.training, grad_mean=grad_mean, grad_var=grad_var
    )
    assert torch.equal(got.weight, plain.weight)
    assert torch.equal(got.bias, plain.bias)
    assert_near(got.mean, plain.mean + grad_mean, "mean", got.mean.dtype)
    assert_near(got.var, plain.var + grad_var, "var", got.var.dtype)
    if not case.training:
        assert torch.equal(got.input, plain.input)  # constants do not lead to x
        return
    x = case.input.requires_grad_()
    outputs = bnext.batchnorm2d(x, weight=case.weight, training=True, return_stats=True)
    want = torch.autograd.grad(outputs, x, (case.grad_output, grad_mean, grad_var))[0]
    assert torch.equal(got.input, want)


def test_no_values(device: str) -> None:
    """Nothing has no mean; in eval mode the running statistics are used as ever."""
    x = torch.empty(0, 3, 4, 4, device=device)
    running = torch.ones(3, device=device), torch.full((3,), 2.0, device=device)
    _, mean, var = bnext.batchnorm2d(x, *running, training=True, return_stats=True)
    assert mean.isnan().all()
    assert var.isnan().all()
    _, mean, var = bnext.batchnorm2d(x, *running, return_stats=True)
    assert torch.equal(mean, running[0])
    assert torch.equal(var, running[1])


# ---- skip_nonfinite ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_bad_channel_keeps_its_running_statistics(
    layout: str, dtypes: str, bad: float, device: str
) -> None:
    """It alone: the others learn from the batch, and the outputs are what they would have been."""
    case = cases.make_case((3, 5, 4, 6), dtypes, layout=layout, device=device)
    case.input[1, 2, 3, 4] = bad
    got, plain = case.arguments, case.arguments
    y = bnext.batchnorm2d(case.input, **got, skip_nonfinite=True)
    torch.testing.assert_close(
        y, bnext.batchnorm2d(case.input, **plain), rtol=0, atol=0, equal_nan=True
    )
    for name in ("running_mean", "running_var"):
        before, want = getattr(case, name), plain[name].clone()
        assert not want[2].isfinite()
        want[2] = before[2]
        assert torch.equal(got[name], want)
        assert (got[name] != before).sum() == 4


def test_what_the_buffer_cannot_hold_is_not_finite(device: str) -> None:
    """A variance of 9e4 is a float32, but infinite as float16: it would stay there for good."""
    x = torch.zeros(2, 2, 2, 2, dtype=torch.float16, device=device)
    x[0, 0] = 600.0
    for dtype in (torch.float16, torch.float32):
        running = [t.to(device, dtype) for t in (torch.zeros(2), torch.ones(2))]
        bnext.batchnorm2d(x, *running, training=True, momentum=1.0, skip_nonfinite=True)
        want = [0.0, 1.0] if dtype == torch.float16 else [300.0, 600.0**2 * 2 / 7]
        got = [running[0][0].item(), running[1][0].item()]
        assert got == pytest.approx(want, rel=1e-6)
        assert running[1][1] == 0


def test_good_batches_are_not_skipped(device: str) -> None:
    case = cases.make_case((3, 5, 4, 6), device=device)
    got, want = case.arguments, case.arguments
    bnext.batchnorm2d(case.input, **got, skip_nonfinite=True)
    bnext.batchnorm2d(case.input, **want)
    assert torch.equal(got["running_mean"], want["running_mean"])
    assert torch.equal(got["running_var"], want["running_var"])


def test_pytorch_poisons_them(device: str) -> None:
    """What this option is for: github.com/pytorch/pytorch/issues/88474."""
    x = torch.randn(4, 3, 2, 2, device=device)
    running = torch.zeros(3, device=device), torch.ones(3, device=device)
    nn.functional.batch_norm(x * torch.nan, *running, training=True)
    nn.functional.batch_norm(x, *running, training=True)
    assert running[0].isnan().all()


def bad_batch(device: str) -> Tensor:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(device)
    x[1, 2, 0, 0] = torch.nan
    return x


def test_layers(device: str) -> None:
    """By keyword or by attribute, made here or converted; copies and pickles keep it."""
    made = bnext.BatchNorm2d(3, skip_nonfinite=True)
    converted = bnext.convert(nn.BatchNorm2d(3))
    assert not converted.skip_nonfinite
    assert repr(converted) == repr(nn.BatchNorm2d(3))
    converted.skip_nonfinite = True
    lazy = bnext.LazyBatchNorm2d(skip_nonfinite=True)
    layers = [made, converted, lazy, copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    layers.append(bnext.convert(bnext.revert(copy.deepcopy(made))))
    for layer in layers:
        layer.to(device)
        layer(bad_batch(device))
        assert repr(layer).endswith("skip_nonfinite=True)")
        assert layer.running_mean[2] == 0
        assert layer.running_var[2] == 1
        assert layer.running_mean[:2].all()
        assert layer.num_batches_tracked == 1
        assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_a_skipped_batch_counts_as_one_like_the_average(device: str) -> None:
    """Cumulative average: (3 + 3) / 2 stays 3 at the second batch, then (2 * 3 + 6) / 3 = 4."""
    layer = bnext.BatchNorm2d(1, momentum=None, skip_nonfinite=True).to(device)
    for value, want in ((3.0, 3.0), (torch.inf, 3.0), (6.0, 4.0)):
        layer(torch.full((2, 1, 2, 2), value, device=device))
        assert layer.running_mean.item() == pytest.approx(want, rel=1e-6)
    assert layer.num_batches_tracked == 3


def test_scripted_layer() -> None:
    layer = bnext.BatchNorm2d(3, skip_nonfinite=True)
    scripted = torch.jit.script(layer)
    scripted(bad_batch("cpu"))
    assert scripted.running_mean[2] == 0


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_constant_are_constants(training: bool, device: str) -> None:
    """weight and bias have no part in them."""
    case = cases.make_case((2, 3, 4, 4), device=device)
    weight = case.weight.requires_grad_()
    stats = (case.running_mean, case.running_var)
    y, mean, var = bnext.batchnorm2d(
        case.input, *stats, weight, training=training, return_stats=True
    )
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad
    y.sum().backward()
    assert weight.grad is not None
