"""The derivative of batch norm as autograd Functions: first by kernels, then by torch's ops.

Names are the equation's: dy, x, weight (gamma), mean, invstd, and xhat = (x - mean) * invstd.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bnext._extension import _C

_REDUCED = (0, 2, 3)  # N, H and W


class BatchNorm2dFunction(Function):
    """``output = (x - mean) * invstd * weight + bias``. Saves x, weight and the statistics used."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad
        if needs_grad[1] or needs_grad[2]:
            name = "running_mean" if needs_grad[1] else "running_var"
            raise RuntimeError(
                f"batchnorm2d is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
        output, mean, invstd = _C.batchnorm2d_forward(
            input,
            running_mean,
            running_var,
            num_batches_tracked,
            weight,
            bias,
            training,
            momentum,
            eps,
        )
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.training = training
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad
        mask = (needs_grad[0], needs_grad[4], needs_grad[5], False, False)
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate this
            dx, dweight, dbias = BatchNorm2dBackwardFunction.apply(
                dy, x, weight, mean, invstd, ctx.training, ctx.eps, mask
            )
        else:
            dx, dweight, dbias, _, _ = _C.batchnorm2d_backward(
                dy, x, weight, mean, invstd, ctx.training, mask
            )
        return dx, None, None, None, dweight, dbias, None, None, None


class BatchNorm2dBackwardFunction(Function):
    """The backward pass as a function of dy, x and weight, itself differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool,
        eps: float,
        mask: tuple[bool, bool, bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(dy, x, weight, mean, invstd)
        ctx.training = training
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return _C.batchnorm2d_backward(dy, x, weight, mean, invstd, training, mask)[:3]

    @staticmethod
    def backward(
        ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, invstd = ctx.saved_tensors
        gradients = _double_backward(
            ddx, ddweight, ddbias, dy, x, weight, mean, invstd, ctx.training, ctx.eps
        )
        return *gradients, None, None, None, None, None


def _double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of <dx, ddx> + <dweight, ddweight> + <dbias, ddbias> for dy, x and weight.

    In training, with m = N*H*W, means over a channel written as mean(.), and the projection
    P(a) = a - mean(a) - xhat * mean(a * xhat), the backward pass is dx = weight * invstd * P(dy).
    Written in differentiable operations, with the statistics computed from x again, the result can
    be differentiated as often as anybody likes.
    """
    dtype = mean.dtype  # what the first derivative was computed in
    m = max(x.numel() // max(x.shape[1], 1), 1)

    def total(a: Tensor) -> Tensor:
        return a.sum(_REDUCED, keepdim=True)

    def average(a: Tensor) -> Tensor:
        return total(a) / m

    def per_channel(a: Tensor) -> Tensor:
        return a.to(dtype).view(1, -1, 1, 1)

    wide_x, wide_dy = x.to(dtype), dy.to(dtype)
    if training:
        xmu = wide_x - average(wide_x)
        xmu = xmu - average(xmu)  # what rounding left of a mean far from zero
        r = (average(xmu.square()) + eps).rsqrt()
    else:
        xmu = wide_x - per_channel(mean)
        r = per_channel(invstd)
    xhat = xmu * r
    scale = r if weight is None else r * per_channel(weight)

    def project(a: Tensor) -> Tensor:
        return a - average(a) - xhat * average(a * xhat)

    grad_dy: list[Tensor] = []
    grad_xhat: list[Tensor] = []  # through xhat, with invstd held
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    if ddx is not None:
        v = ddx.to(dtype)
        if training:
            grad_dy.append(scale * project(v))
            # <v, P(dy)> = q, and it depends on x through xhat and through invstd.
            mean_v_xhat, mean_dy_xhat = average(v * xhat), average(wide_dy * xhat)
            q = total(v * wide_dy) - total(v) * average(wide_dy) - total(v * xhat) * mean_dy_xhat
            grad_xhat.append(-scale * (v * mean_dy_xhat + mean_v_xhat * wide_dy))
            grad_x = -scale * r * xhat * q / m
        else:
            grad_dy.append(scale * v)
            q = total(v * wide_dy)
        grad_weight = r * q
    if ddweight is not None:
        grad_dy.append(per_channel(ddweight) * xhat)
        grad_xhat.append(per_channel(ddweight) * wide_dy)
    if ddbias is not None:
        grad_dy.append(per_channel(ddbias).expand_as(x))
    if grad_xhat:
        g = sum(grad_xhat[1:], start=grad_xhat[0])
        through_xhat = r * (project(g) if training else g)
        grad_x = through_xhat if grad_x is None else grad_x + through_xhat

    return (
        sum(grad_dy[1:], start=grad_dy[0]).to(dy.dtype) if grad_dy else None,
        None if grad_x is None else grad_x.to(x.dtype),
        None if weight is None or grad_weight is None else grad_weight.view(-1).to(weight.dtype),
    )
