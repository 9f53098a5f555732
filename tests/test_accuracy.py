"""Rounding where it is hard: far means, tiny and huge variances, long sums, and signed bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from test_backward import check_gradients
from test_forward import check_forward
from torch import Tensor

import bnext

SHAPE = (8, 12, 15, 17)
VARIANCES = (1e-16, 1e-8, 1.0, 1e6, 1e12)
# |mean| / standard deviation
DISTANCES = (0.0, 1.0, 1e2, 1e4)
# bfloat16 holds 8 bits: beyond 100 deviations little more than a constant is left of the data.
HALF_DISTANCES = (0.0, 1.0, 1e2)
# The worst error that PyTorch makes on the same data, times this, is the most that bnext may make.
TIMES_PYTORCH = 1.5


def hard_case(
    dtypes: str, variance: float, distance: float, mode: str = "train", layout: str = "nchw"
) -> cases.Case:
    """Channels of both signs at `distance` standard deviations from zero."""
    case = cases.make_case(SHAPE, dtypes, mode=mode, spread=0.0)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(SHAPE[1] // 2).view(1, -1, 1, 1)
    x = (noise + distance * sign) * math.sqrt(variance)
    to_layout = cases.LAYOUTS[layout]
    changes = {"input": to_layout(x.to(case.input.dtype))}
    if mode == "eval":
        changes["running_mean"] = x.mean((0, 2, 3)).to(case.running_mean.dtype)
        changes["running_var"] = x.var((0, 2, 3)).to(case.running_var.dtype)
    return case._replace(**changes, grad_output=to_layout(case.grad_output))


def hard_options(dtypes: str) -> Iterator[tuple[float, float, float, str]]:
    """(variance, distance, eps, label). A second eps where the first one hides the variance."""
    half = dtypes.startswith("bfloat16")
    for variance in VARIANCES:
        for distance in HALF_DISTANCES if half else DISTANCES:
            for eps in (1e-5, 1e-20) if variance < 1 else (1e-5,):
                label = f"variance {variance:g}, distance {distance:g}, eps {eps:g}"
                yield variance, distance, eps, label


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "bfloat16-float32"])
def test_bars(dtypes: str, mode: str, layout: str) -> None:
    for variance, distance, eps, label in hard_options(dtypes):
        case = hard_case(dtypes, variance, distance, mode, layout)
        check_forward(case, label, eps=eps)
        check_gradients(case, label, eps=eps)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed_nc"])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "bfloat16-float32", "float16-float32"])
def test_variance(dtypes: str, layout: str) -> None:
    """Relative error at most 1e-5, as seen through running_var with momentum 1."""
    for variance, distance, _, label in hard_options(dtypes):
        if dtypes.startswith("float16") and (variance not in (1.0, 1e6) or distance > 10):
            continue  # outside the range of float16
        x = hard_case(dtypes, variance, distance, layout=layout).input
        mean, var = torch.zeros(2, SHAPE[1], dtype=cases.DTYPES[dtypes][1]).unbind()
        bnext.batchnorm2d(x, mean, var, training=True, momentum=1.0)
        m = x.numel() // SHAPE[1]
        data = x.double()
        exact = reference.batch_statistics(data)
        want = exact.var.flatten() * (m / (m - 1))
        worst = ((var.double() - want).abs() / want).max().item()
        assert worst <= 1e-5, f"{label}: {worst:.3g}"
        want_mean = exact.mean.flatten()
        allowed = reference.mean_bar_of(want_mean, exact.var.flatten(), x.dtype)
        assert ((mean.double() - want_mean).abs() <= allowed).all()


class Errors:
    """The worst error of a tensor against float64, relative to each channel's largest value.

    `terms`: what the tensor is a sum of. The error of a sum whose terms cancel is relative to what
    they come to as a rule, the root of the sum of their squares: of the sum itself it would be
    any multiple, and chance would say whose is larger.
    """

    def __init__(self, want: Tensor, dtype: torch.dtype, terms: Tensor | None = None) -> None:
        self.want = want
        wide = want if want.dim() == 4 else want.view(1, -1, 1, 1)
        self.scale = wide.abs().amax((0, 2, 3), keepdim=True).clamp_min(1e-300)
        if terms is not None:
            usual = terms.square().sum((0, 2, 3), keepdim=True).sqrt()
            self.scale = self.scale.maximum(usual)
        # Rounding the exact result: less than this is not in anybody's power.
        rounding = reference.rounding(wide, dtype)
        self.floor = (rounding / self.scale).max().item()

    def of(self, got: Tensor) -> float:
        error = (got.detach().double() - self.want).abs()
        error = error if error.dim() == 4 else error.view(1, -1, 1, 1)
        return (error / self.scale).max().item()


def results(call: object, case: cases.Case, eps: float) -> dict[str, Tensor]:
    """Output, gradients and running statistics by bnext or by PyTorch."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (case.input, *case[3:5]))
    arguments = {**case.arguments, "weight": weight, "bias": bias}
    y = call(x, **arguments, momentum=1.0, eps=eps)
    gradients = torch.autograd.grad(y, (x, weight, bias), case.grad_output)
    found = dict(zip(("dx", "dweight", "dbias"), gradients, strict=True), output=y)
    if case.training:
        found.update({n: arguments[n] for n in ("running_mean", "running_var")})
    return found


def compare_with_pytorch(case: cases.Case, eps: float, label: str) -> None:
    backward = reference.backward(case.grad_output, case.input, **case.backward_arguments, eps=eps)
    forward = reference.forward(case.input, **case.arguments, momentum=1.0, eps=eps)
    want = {
        "output": forward.output.value,
        "dx": backward.input.value,
        "dweight": backward.weight.value,
        "dbias": backward.bias.value,
    }
    if case.training:
        want.update(running_mean=forward.running_mean.value, running_var=forward.running_var.value)
    running = (case.arguments["running_mean"], case.arguments["running_var"])
    _, var, centred = reference.statistics(case.input.double(), *running, case.training)
    dy = case.grad_output.double()
    terms = {"dweight": dy * centred * (var + eps).rsqrt(), "dbias": dy}
    ours, theirs = (results(call, case, eps) for call in (bnext.batchnorm2d, F.batch_norm))
    for name, value in want.items():
        errors = Errors(value, ours[name].dtype, terms.get(name))
        mine, yours = errors.of(ours[name]), errors.of(theirs[name])
        allowed = max(TIMES_PYTORCH * yours, errors.floor)
        assert mine <= allowed, f"{label}: {name} is off by {mine:.3g}, PyTorch by {yours:.3g}"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16-float32"])
def test_never_worse_than_pytorch(dtypes: str, mode: str, layout: str) -> None:
    for variance, distance, eps, label in hard_options(dtypes):
        case = hard_case(dtypes, variance, distance, mode, layout)
        compare_with_pytorch(case, eps, label)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "float16-float32"])
def test_never_worse_than_pytorch_on_ordinary_data(dtypes: str, layout: str) -> None:
    for shape in ((2, 3, 33, 35), (8, 65, 14, 15), (5, 64, 1, 1), (3, 17, 7, 7)):
        for mode in ("train", "eval"):
            options = {"mode": mode, "layout": layout, "grad_layout": layout}
            case = cases.make_case(shape, dtypes, **options)
            compare_with_pytorch(case, 1e-5, f"{shape} {mode}")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("distance", [1.0, 10.0, 100.0, 1000.0])
def test_gradients_far_from_zero(distance: float, layout: str) -> None:
    """dL/dx takes the mean of dy off in its last step: weight * invstd and dL/dmean / m are rounded
    to float32, and so is their sum with the term of x. Half a unit each of what is taken off."""
    case = cases.make_case((8, 4, 16, 16), layout=layout, grad_layout=layout)
    case = case._replace(grad_output=case.grad_output + distance)
    check_gradients(case, f"distance {distance:g}")
    want = reference.backward(case.grad_output, case.input, **case.backward_arguments).input.value
    ours, theirs = (results(call, case, 1e-5) for call in (bnext.batchnorm2d, F.batch_norm))
    errors = [(found["dx"].double() - want).abs().amax((0, 2, 3)) for found in (ours, theirs)]
    scale = case.weight.double() / (case.input.double().var((0, 2, 3), correction=0) + 1e-5).sqrt()
    taken_off = (scale * case.grad_output.double().mean((0, 2, 3))).abs()
    allowed = TIMES_PYTORCH * errors[1] + 1.5 * torch.finfo(torch.float32).eps * taken_off
    assert (errors[0] <= allowed).all(), (errors[0] / allowed).max()


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed_hw"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32", "float16-float32"])
def test_long_sums(dtypes: str, layout: str) -> None:
    """A million values per channel, gradients of one sign: errors must not grow with the count."""
    case = cases.make_case((2, 2, 1024, 512), dtypes)
    to_layout = cases.LAYOUTS[layout]
    case = case._replace(
        input=to_layout(case.input), grad_output=to_layout(case.grad_output.abs() + 0.5)
    )
    check_forward(case, "long")
    check_gradients(case, "long")


@pytest.mark.parametrize("order", ["rising", "outlier first", "outlier last"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32"])
def test_order_of_the_data(dtypes: str, layout: str, order: str) -> None:
    """Sorted data and a far outlier, for whatever value the sums are shifted by."""
    case = cases.make_case((4, 6, 16, 16), dtypes)
    if order == "rising":
        flat = case.input.transpose(0, 1).reshape(6, -1).sort(dim=1).values
        x = flat.reshape(6, 4, 16, 16).transpose(0, 1)
    else:
        x = case.input.clone()
        place = (0, slice(None), 0, 0) if order == "outlier first" else (3, slice(None), 15, 15)
        x[place] = 1e6
    case = case._replace(input=cases.LAYOUTS[layout](x.contiguous()))
    check_forward(case, order)
    check_gradients(case, order)
    mean, var = torch.zeros(2, 6).unbind()
    bnext.batchnorm2d(case.input, mean, var, training=True, momentum=1.0)
    want = case.input.double().var((0, 2, 3))
    assert ((var.double() - want).abs() <= 1e-5 * want).all()


def is_centred(samples: Tensor, invisible: float = 1e-300) -> bool:
    """Independent samples whose mean is zero, at five standard errors."""
    spread = samples.std() / math.sqrt(samples.numel())
    return bool(samples.mean().abs() <= 5 * spread + invisible)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32", "float16-float32"])
def test_errors_have_no_preferred_sign(dtypes: str, layout: str) -> None:
    """A small systematic error hides below a tolerance, but not in the mean of many errors.

    One sample per channel: the mean error (a shift), and the mean error along the sign of the
    result (a gain), in units of rounding. The channels' own roundings are independent.
    """
    options = {"layout": layout, "grad_layout": layout, "spread": 0.5}
    case = cases.make_case((16, 512, 6, 6), dtypes, **options)
    weight = case.weight.sign() * (case.weight.abs() + 0.1)  # no channel of rounding alone
    case = case._replace(weight=weight)
    forward = reference.forward(case.input, **case.arguments)
    backward = reference.backward(case.grad_output, case.input, **case.backward_arguments)
    y = bnext.batchnorm2d(case.input, **case.arguments)
    gradients = bnext.batchnorm2d_backward(case.grad_output, case.input, **case.backward_arguments)
    pairs = (
        ("output", y, forward.output.value),
        ("dx", gradients.input, backward.input.value),
    )
    for name, got, want in pairs:
        unit = reference.ROUNDOFF[got.dtype] * want.abs().mean(reference.DIMS)
        error = got.double() - want
        assert is_centred(error.mean(reference.DIMS) / unit), f"{name}: shifted"
        gain = (error * want.sign()).mean(reference.DIMS) / unit
        assert is_centred(gain), f"{name}: scaled by {gain.mean():.3g} roundings"
    # float32 sums of eight positive terms are a little low; a quarter of the rounding of the
    # float32 results (2**-24) is what may stay of it.
    quarter = 2.0**-26
    for name in ("weight", "bias", "mean", "var"):
        want = getattr(backward, name).value
        error = (getattr(gradients, name).double() - want) / want.abs().clamp_min(1e-30)
        assert is_centred(error, quarter), name
        assert is_centred(error * want.sign(), quarter), name


@pytest.mark.parametrize("distance", [0.0, 1e2, 1e3])
def test_second_order_never_worse_than_pytorch(distance: float) -> None:
    """Gradients of <dx, v> for dy, x and weight, the mean `distance` deviations from zero."""
    generator = torch.Generator().manual_seed(0)
    noise, dy, v = torch.randn(3, 8, 4, 7, 9, generator=generator)
    weight = torch.rand(4, generator=generator) + 0.5
    leaves = (noise + distance, dy, weight)

    def second_order(batch_norm: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, up, gamma = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        y = batch_norm(x, None, None, gamma, None, True)
        (dx,) = torch.autograd.grad(y, x, up, create_graph=True)
        return [g.double() for g in torch.autograd.grad(dx, (x, up, gamma), v.to(dtype))]

    exact = second_order(F.batch_norm, torch.float64)
    ours = second_order(bnext.batchnorm2d, torch.float32)
    theirs = second_order(F.batch_norm, torch.float32)
    for name, right, mine, yours in zip(("x", "dy", "weight"), exact, ours, theirs, strict=True):
        # An error within a rounding of the largest value is as good as a float32 gets.
        floor = 2.0**-24 * right.abs().max().item()
        error, allowed = (mine - right).abs().max().item(), (yours - right).abs().max().item()
        assert error <= max(TIMES_PYTORCH * allowed, floor), (name, error, allowed)


@pytest.mark.parametrize("power", [-350, 350])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_in_all_of_float64s_range(training: bool, power: int) -> None:
    """To scale x by a power of two, and eps by its square, scales dx by its inverse: no rounding.
    dL/dvar, with the third power of it, is out of range long before dx is."""
    case = cases.make_case(SHAPE, "float64")
    scale, eps = 2.0**power, 1e-5

    def gradient(by: float) -> Tensor:
        x = (case.input * by).requires_grad_()
        stats = (case.running_mean * by, case.running_var * by * by)
        y = bnext.batchnorm2d(x, *stats, case.weight, training=training, eps=eps * by * by)
        return torch.autograd.grad(y, x, case.grad_output)[0]

    assert torch.equal(gradient(scale) * scale, gradient(1.0))


@pytest.mark.parametrize("power", [70, 80, 90, 100])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradient_of_huge_values(layout: str, power: int, device: str) -> None:
    """Where dx's share of x is too small for float32, what is left of it may not be too much."""
    case = cases.make_case(SHAPE, "float32", layout=layout, device=device)
    want = gradient_of(bnext.batchnorm2d, case.input.double(), case.grad_output.double())
    x = case.input * 2.0**power
    ours, theirs = (
        gradient_of(call, x, case.grad_output).double() * 2.0**power - want
        for call in (bnext.batchnorm2d, F.batch_norm)
    )
    assert ours.abs().max() <= TIMES_PYTORCH * theirs.abs().max()


def gradient_of(call: Callable[..., Tensor], x: Tensor, grad_output: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(call(x, None, None, training=True, eps=1e-30), x, grad_output)[0]
