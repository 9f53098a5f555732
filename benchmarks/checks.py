"""Is a result right? Each one is held against float64 before it may be timed.

The bars are for telling a wrong kernel from a right one, whatever its order of summation: small
differences in accuracy are for the tests. With u the roundoff of the arithmetic (float32's for
kernels; the tensor's own for a formula that rounds after each operation), an element may collect
ELEMENT_STEPS of u times its terms, and a sum of m terms 4·√m of float32's: roundings are
independent, one after the other they grow with √m, and 4 is four standard deviations. The data is
chosen so that every term of the derivative is a large part of dx: dy has a mean of 0.5 and a
correlation of 0.3 with x-hat, x has a mean of half a standard deviation. A term left out is off by
thousands of bars.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import DTYPES, LAYOUTS, Case

EPS = 1e-5
MOMENTUM = 0.1
ELEMENT_STEPS = 16
# Elements compared at most: float64 costs many times what is measured. Beyond it, the first, the
# last and evenly spaced channels are compared, at least 3; that all elements are finite, always.
LIMIT = {"cpu": 2**22, "cuda": 2**25}
DIMS = (0, 2, 3)


class Tensors(NamedTuple):
    """The inputs of one call. Parameters and statistics are float32 beside 16-bit types."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def make_tensors(case: Case, seed: int = 0, requires_grad: bool = True) -> Tensors:
    """Inputs from a seed, in the case's dtype, layout and device."""
    dtype = DTYPES[case.dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Random numbers in the tensor's own type: a huge one has no room for a wider copy.
        kind = dtype if len(shape) == 4 else wide
        return torch.randn(*shape, generator=generator, device=case.device, dtype=kind)

    shape = case.shape[:4]
    x = normal(*shape)
    dy = normal(*shape).mul_(0.95).add_(x, alpha=0.3).add_(0.5)
    x = x.mul_(2).add_(1).to(memory_format=LAYOUTS[case.layout])
    dy = dy.to(memory_format=LAYOUTS[case.layout])
    C = case.shape.C
    weight, bias, running_mean = normal(C).mul_(0.2).add_(1), normal(C), normal(C)
    for tensor in (x, weight, bias):
        tensor.requires_grad_(requires_grad)
    return Tensors(x, dy, weight, bias, running_mean, normal(C).square_().add_(0.5))


class Expected(NamedTuple):
    value: Tensor
    bar: Tensor  # with roundings of the arithmetic in float32 or wider
    coarse: Tensor  # what each further u of the arithmetic adds


class Verdict(NamedTuple):
    """`max_error` is relative to the root mean square of the result; `problem` None if right."""

    max_error: float
    problem: str | None


class Reference:
    """float64 results for some tensors; running statistics as they were before the call."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        shape = case.shape
        per_channel = shape.numel // shape.C
        number = min(shape.C, max(3, LIMIT[case.device] // per_channel))
        places = torch.linspace(0, shape.C - 1, number, dtype=torch.float64).round().long()
        self.channels = places.unique().to(case.device)
        self.dtype = DTYPES[case.dtype]
        self.everything = len(self.channels) == shape.C
        self.training = self._training(tensors)
        self.evaluation = self._evaluation(tensors)

    def pick(self, tensor: Tensor) -> Tensor:
        """The compared channels in float64; (C,) tensors as (1, C, 1, 1)."""
        tensor = tensor.detach()
        tensor = tensor if tensor.dim() == 4 else tensor.reshape(1, -1, 1, 1)
        return (tensor if self.everything else tensor.index_select(1, self.channels)).double()

    def _rounding(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.finfo(dtype).eps / 2 * value.abs() + torch.finfo(dtype).smallest_normal

    def _training(self, t: Tensors) -> dict[str, Expected]:
        x, dy, weight, bias = (self.pick(a) for a in t[:4])
        wide = t.weight.dtype
        m = x.numel() / x.shape[1]
        unit = torch.finfo(torch.float32 if wide == torch.float32 else torch.float64).eps / 2
        # The reference's own roundings are float64's too, hence twice.
        unit = 2 * unit if wide == torch.float64 else unit
        growth = 4 * math.sqrt(m) * unit
        mean = x.mean(DIMS, keepdim=True)
        xmu = x - mean
        var = xmu.square().mean(DIMS, keepdim=True)
        invstd = (var + EPS).rsqrt()
        xhat = xmu.mul_(invstd)
        distance = 1 + mean.abs() * invstd  # rounding x costs more far from zero
        drift = growth * distance  # how far the mean, and the variance, may be off
        scale = weight * invstd
        s1, s2 = dy.mean(DIMS, keepdim=True), (dy * xhat).mean(DIMS, keepdim=True)
        a1, a2 = dy.abs().mean(DIMS, keepdim=True), (dy * xhat).abs().mean(DIMS, keepdim=True)

        def expected(value: Tensor, dtype: torch.dtype, terms: Tensor, sums: Tensor) -> Expected:
            coarse = ELEMENT_STEPS * terms
            return Expected(value, self._rounding(value, dtype) + unit * coarse + sums, coarse)

        output = weight * xhat + bias
        dx = scale * (dy - s1 - xhat * s2)
        dx_terms = scale.abs() * (dy.abs() + s1.abs() + (xhat * s2).abs()) * distance
        dx_sums = scale.abs() * (growth * (a1 + xhat.abs() * a2) + drift * (s2.abs() + xhat.abs()))
        new_mean, new_var = self.pick(t.running_mean), self.pick(t.running_var)
        new_mean = (1 - MOMENTUM) * new_mean + MOMENTUM * mean
        new_var = (1 - MOMENTUM) * new_var + MOMENTUM * var * m / (m - 1)
        mean_terms, var_terms = mean.abs() + var.sqrt(), var * distance.square()
        sums = growth * a2 + drift * (a1 + s2.abs())
        # dmean and dvar in the sense of bnext.BatchNorm2dGradients.
        dmean, dvar = -scale * m * s1, -0.5 * scale * invstd * m * s2
        var_scale = 0.5 * scale.abs() * invstd * m
        mean_sums = scale.abs() * m * growth * a1 + 2 * dvar.abs() * drift / invstd
        return {
            "output": expected(
                output,
                self.dtype,
                weight.abs() * xhat.abs() * distance + bias.abs(),
                weight.abs() * drift * (1 + xhat.abs()),
            ),
            "dx": expected(dx, self.dtype, dx_terms, dx_sums),
            "dweight": expected(m * s2, wide, m * a2 * distance, m * sums),
            "dbias": expected(m * s1, wide, m * a1, m * growth * a1),
            "dmean": expected(
                dmean, wide, scale.abs() * m * a1 + 2 * dvar.abs() / invstd * distance, mean_sums
            ),
            "dvar": expected(dvar, wide, var_scale * a2 * distance, var_scale * sums),
            "running_mean": expected(
                new_mean, wide, new_mean.abs() + mean_terms, growth * mean_terms
            ),
            "running_var": expected(
                new_var, wide, new_var.abs() + var_terms, 4 * growth * var_terms
            ),
        }

    def _evaluation(self, t: Tensors) -> dict[str, Expected]:
        x, _, weight, bias, mean, var = (self.pick(a) for a in t)
        invstd = (var + EPS).rsqrt()
        output = weight * (x - mean) * invstd + bias
        unit = torch.finfo(t.weight.dtype).eps
        coarse = ELEMENT_STEPS * (weight.abs() * invstd * (x.abs() + mean.abs()) + bias.abs())
        bar = self._rounding(output, self.dtype) + unit * coarse
        return {"output": Expected(output, bar, coarse)}

    def check(self, case: Case, results: dict[str, Tensor], rounds_often: bool = False) -> Verdict:
        """Compare results by name. `rounds_often`: the arithmetic is in the tensors' own dtype."""
        known = self.evaluation if case.direction == "inference" else self.training
        worst = 0.0
        for name, actual in results.items():
            want = known[name]
            if not bool(actual.isfinite().all()):
                return Verdict(math.inf, f"wrong: {name} holds NaN or infinity")
            got = self.pick(actual)
            if got.shape != want.value.shape:
                return Verdict(math.inf, f"wrong: {name} has shape {tuple(actual.shape)}")
            error = (got - want.value).abs_()
            size = want.value.square().mean().sqrt().clamp_min(1e-300)
            worst = max(worst, (error.max() / size).item())
            bar = want.bar
            if rounds_often:
                bar = bar + torch.finfo(self.dtype).eps / 2 * want.coarse
            excess = (error / bar).max().item()
            if not excess <= 1:
                return Verdict(worst, f"wrong: {name} is off by {excess:.3g} times what is allowed")
        return Verdict(worst, None)
