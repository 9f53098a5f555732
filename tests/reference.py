"""The oracle: batch norm and its derivatives in float64, each result with the error it may carry.

Owns the formulas and the tolerances. Calls neither bnext nor PyTorch's batch norm. A tolerance is
always derived from what a careful implementation must round; the derivations stand beside them.

The arithmetic of the kernels is float32 for float32, bfloat16 and float16 and float64 for float64.
`step` is its unit roundoff. For float64 it counts twice, because the oracle works there as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Half the distance from 1 to the next number: what rounding a result to the dtype may cost.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Roundings that one element of an output may have collected on its way: the statistics' own few,
# the products and the additions.
ELEMENT_STEPS = 8
# A sum over N, H and W may be off by 2e-6 of the sum of its terms' magnitudes in float32. That is
# 33.6 roundings, and float64 gets as many of its own.
SUM_STEPS = 2e-6 / 2.0**-24
# What dx inherits of that. A thread that adds up n of m terms of random signs in float32 makes
# roundings of 0.4 u of its running sum, as standard errors; all threads together are off by 0.35 u
# sqrt(n / m) of the terms' magnitudes. For n = m / 8, as in rows of 8 threads, 0.5 is four standard
# errors. It shows where dy and both sums are nearly zero.
SUM_NOISE = 0.5
# The variance may be off by 1e-5 of itself in float32 for |mean| up to 1e4 standard deviations.
VARIANCE_STEPS = 1e-5 / 2.0**-24
DIMS = (0, 2, 3)
# Where the oracle computes. tests/test_gpu.py sets it to "cuda": float64 is float64.
DEVICE = "cpu"


def step(dtype: torch.dtype) -> float:
    """Unit roundoff of the arithmetic behind an input of this dtype."""
    return 2 * 2.0**-53 if dtype == torch.float64 else 2.0**-24


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of mean and invstd for an input of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding `value` to `dtype` may change it, subnormal results included."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return ROUNDOFF[dtype] * value.abs() + smallest / 2


class Expected(NamedTuple):
    """A float64 value and the largest error that each of its elements may have."""

    value: Tensor
    bar: Tensor

    def check(self, actual: Tensor, label: str) -> None:
        """Fail with the worst element when `actual` leaves the bar. NaN must meet NaN."""
        assert isinstance(actual, Tensor), f"{label}: got {type(actual).__name__}"
        assert actual.shape == self.value.shape, f"{label}: shape {tuple(actual.shape)}"
        got = actual.detach().to(self.value.device).double()
        same = (got == self.value) | (got.isnan() & self.value.isnan())
        excess = ((got - self.value).abs() - self.bar).masked_fill(same, -1.0)
        bad = ~(excess <= 0)
        if bad.any():
            worst = int(torch.where(bad, excess.nan_to_num(torch.inf), -1.0).argmax())
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
            raise AssertionError(
                f"{label}: {int(bad.sum())} of {got.numel()} elements beyond the bar; worst at "
                f"{place}: got {got[place].item():.9g}, want {self.value[place].item():.9g} "
                f"within {self.bar[place].item():.3g}"
            )


class Statistics(NamedTuple):
    """Per-channel statistics, shaped (1, C, 1, 1), and the centred input."""

    mean: Tensor
    var: Tensor
    centred: Tensor


class ForwardExpected(NamedTuple):
    output: Expected
    running_mean: Expected | None
    running_var: Expected | None
    mean: Expected
    var: Expected


class BackwardExpected(NamedTuple):
    input: Expected
    weight: Expected
    bias: Expected
    mean: Expected
    var: Expected


def double(tensor: Tensor | None) -> Tensor | None:
    """The same values in float64, where the oracle computes."""
    return None if tensor is None else tensor.detach().to(DEVICE).double()


def per_channel(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1, 1, 1)


def batch_statistics(x: Tensor) -> Statistics:
    """Mean and biased variance of each channel of a float64 `x`, accurate at any mean.

    The data is shifted by one of its own values first and centred twice, so what is left of the
    mean's rounding is far below one rounding of the data.
    """
    pivot = x[:1, :, :1, :1]
    centred = x - pivot
    shift = centred.mean(DIMS, keepdim=True)
    centred = centred - shift
    rest = centred.mean(DIMS, keepdim=True)
    centred = centred - rest
    return Statistics(pivot + (shift + rest), centred.square().mean(DIMS, keepdim=True), centred)


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> Statistics:
    """Those that a pass takes: of the batch `x`, in float64, or the running ones."""
    if training:
        return batch_statistics(x)
    assert running_mean is not None
    assert running_var is not None
    mean, var = per_channel(double(running_mean)), per_channel(double(running_var))
    return Statistics(mean, var, x - mean)


def scale_of(weight: Tensor | None, like: Tensor) -> Tensor:
    """Gamma, shaped (1, C, 1, 1); 1 where there is no weight."""
    return torch.ones_like(like) if weight is None else per_channel(double(weight))


def mean_bar_of(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean is rounded to the statistics' dtype, and its sum was of values about that large."""
    return ELEMENT_STEPS * step(dtype) * (mean.abs() + var.sqrt())


def forward(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ForwardExpected:
    """What `batchnorm2d` must give: the output, and the running statistics after the call."""
    unit = step(x.dtype)
    data = double(x)
    mean, var, centred = statistics(data, running_mean, running_var, training)
    invstd = (var + eps).rsqrt()
    gamma = scale_of(weight, mean)
    beta = torch.zeros_like(mean) if bias is None else per_channel(double(bias))
    xhat = centred * invstd
    output = gamma * xhat + beta
    # y = gamma * (x - mean) * invstd + beta, or y = A * x + K with K = beta - A * mean: a few
    # roundings of each term. What the batch's mean is off by shifts every x-hat of its channel
    # (`drift`) and adds its square to the variance.
    terms = gamma.abs() * (xhat.abs() + mean.abs() * invstd) + beta.abs()
    bar = rounding(output, x.dtype) + ELEMENT_STEPS * unit * terms
    mean_bar = mean_bar_of(mean, var, x.dtype)
    if training:
        drift = mean_bar * invstd
        bar = bar + gamma.abs() * (drift + 0.5 * drift.square() * xhat.abs())

    m = data.numel() // max(data.shape[1], 1)
    unbiased = var * (m / (m - 1)) if m > 1 else var
    # Rounding the mean by d adds d^2 to a two-pass variance, all there is for constant data.
    var_bar = VARIANCE_STEPS * unit * var + (2 * unit * mean).square()

    def updated(old: Tensor | None, new: Tensor, bar: Tensor) -> Expected | None:
        if old is None or not training:
            return None if old is None else Expected(double(old), torch.zeros_like(double(old)))
        kept, added = (1 - momentum) * double(old), momentum * new.flatten()
        value = kept + added
        return Expected(
            value,
            rounding(value, old.dtype)
            + 4 * unit * (kept.abs() + added.abs())
            + abs(momentum) * bar.flatten(),
        )

    return ForwardExpected(
        Expected(output, bar),
        updated(running_mean, mean, mean_bar),
        updated(running_var, unbiased, var_bar),
        Expected(mean.flatten(), mean_bar.flatten()),
        Expected(var.flatten(), var_bar.flatten()),
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    *,
    save_mean: Tensor | None = None,
    save_invstd: Tensor | None = None,
    strict: bool = False,
) -> BackwardExpected:
    """What `batchnorm2d_backward` must give.

    The mean's error shifts every x-hat of its channel by `drift`, which matters for data far from
    zero. `strict` makes no allowance for it.
    """
    unit = step(x.dtype)
    data, grad = double(x), double(dy)
    m = max(data.numel() // max(data.shape[1], 1), 1)
    if training and save_mean is not None:
        mean, invstd = per_channel(double(save_mean)), per_channel(double(save_invstd))
        centred, drift = data - mean, torch.zeros_like(mean)
    else:
        mean, var, centred = statistics(data, running_mean, running_var, training)
        invstd = (var + eps).rsqrt()
        drift = mean_bar_of(mean, var, x.dtype) * invstd
    if strict or not training:
        drift = torch.zeros_like(drift)
    gamma = scale_of(weight, mean)
    xhat = centred * invstd
    scale = gamma * invstd

    s1 = grad.sum(DIMS, keepdim=True)
    s2 = (grad * xhat).sum(DIMS, keepdim=True)
    s1_bar = SUM_STEPS * unit * grad.abs().sum(DIMS, keepdim=True)
    # Sum of dy * (xhat + drift) = s2 + drift * s1; the drift's square is in invstd as well.
    s2_bar = SUM_STEPS * unit * (grad * xhat).abs().sum(DIMS, keepdim=True)
    s2_bar = s2_bar + drift * s1.abs() + 0.5 * drift.square() * s2.abs()

    if training:
        dx = scale * (grad - s1 / m - xhat * s2 / m)
        terms = grad.abs() + s1.abs() / m + (xhat * s2).abs() / m
        # (xhat + d) * (s2 + d * s1) - xhat * s2 = d * s2 + d * xhat * s1 + d^2 * s1
        drifted = drift * (s2.abs() + (xhat * s1).abs() + drift * s1.abs()) / m
        drifted = drifted + 1.5 * drift.square() * terms
        if x.dtype == torch.float64:
            # Nothing is wider than float64, so there dx inherits all that its sums may lack.
            drifted = drifted + (s1_bar + xhat.abs() * s2_bar) / m
        else:
            s1_noise, s2_noise = (t.abs().sum(DIMS, keepdim=True) for t in (grad, grad * xhat))
            drifted = drifted + SUM_NOISE * unit * (s1_noise + xhat.abs() * s2_noise) / m
    else:
        dx = scale * grad
        terms = grad.abs()
        drifted = torch.zeros_like(terms)
    dx_bar = rounding(dx, x.dtype) + scale.abs() * (ELEMENT_STEPS * unit * terms + drifted)

    dvar = -0.5 * scale * invstd * s2
    dmean = -scale * s1
    # The factors gamma * invstd and gamma * invstd^3 come with the roundings of an element.
    factor = ELEMENT_STEPS * unit + 1.5 * drift.square()
    dvar_bar = 0.5 * scale.abs() * invstd * s2_bar + 3 * factor * dvar.abs()
    dmean_bar = scale.abs() * s1_bar + factor * dmean.abs()
    # dL/dmean has a term 2 * dvar * sum(x - mean) / m: zero, up to the rounding of the mean.
    dmean_bar = dmean_bar + 2 * dvar.abs() * ELEMENT_STEPS * unit * (mean.abs() + 1 / invstd)

    of_statistics = statistics_dtype(x.dtype)
    parameters = of_statistics if weight is None else weight.dtype

    def channels(value: Tensor, bar: Tensor, dtype: torch.dtype) -> Expected:
        value = value.flatten()
        return Expected(value, bar.flatten() + rounding(value, dtype))

    return BackwardExpected(
        Expected(dx, dx_bar),
        channels(s2, s2_bar, parameters),
        channels(s1, s1_bar, parameters),
        channels(dmean, dmean_bar, of_statistics),
        channels(dvar, dvar_bar, of_statistics),
    )


def double_backward(
    v: Tensor,
    grad_dweight: Tensor,
    grad_dbias: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training mode, all float64: the gradients for dy, x and weight of the backward pass.

    `v`, `grad_dweight` and `grad_dbias` are what arrives for dx, dweight and dbias.
    """
    _, var, centred = batch_statistics(x)
    r = (var + eps).rsqrt()
    xhat = centred * r
    m = x.numel() // x.shape[1]
    gamma = scale_of(weight, r)
    ggamma, gbeta = per_channel(grad_dweight), per_channel(grad_dbias)

    def total(t: Tensor) -> Tensor:
        return t.sum(DIMS, keepdim=True)

    s1, s2 = total(dy), total(dy * xhat)
    sv, sx, sy = total(v), total(v * xhat), total(v * dy)
    for_dy = gamma * r * (v - sv / m - xhat * sx / m) + ggamma * xhat + gbeta
    q = sy - sv * s1 / m - sx * s2 / m
    for_weight = (r * q).flatten()
    g = -gamma * r * (v * s2 + sx * dy) / m + ggamma * dy
    for_x = r * (g - total(g) / m - xhat * total(g * xhat) / m) - gamma * r**2 * xhat * q / m
    return for_dy, for_x, for_weight


def composed(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm in plain differentiable operations: right to any order, by autograd."""
    if training:
        mean = x.mean(DIMS, keepdim=True)
        var = (x - mean).square().mean(DIMS, keepdim=True)
    else:
        mean, var = per_channel(running_mean), per_channel(running_var)
    y = (x - mean) * (var + eps).rsqrt()
    y = y if weight is None else y * per_channel(weight)
    return y if bias is None else y + per_channel(bias)
