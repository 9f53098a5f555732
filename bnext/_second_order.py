"""The derivative of the backward pass, in torch operations that can be differentiated again.

Names as in autograd.py.
"""

import torch
from torch import Tensor

_REDUCED = (0, 2, 3)  # N, H and W


def _total(a: Tensor) -> Tensor:
    return a.sum(_REDUCED, keepdim=True)


def _num_positions(a: Tensor) -> int:
    return max(a.numel() // max(a.shape[1], 1), 1)


def average(a: Tensor) -> Tensor:
    return _total(a) / _num_positions(a)


def per_channel(a: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype).view(1, -1, 1, 1)


def standardize(
    x: Tensor, mean: Tensor, invstd: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(x - mean, invstd) in the dtype of mean, differentiable by x: in training, computed again."""
    if not training:
        return x.to(mean.dtype) - per_channel(mean, mean.dtype), per_channel(invstd, mean.dtype)
    wide = x.to(mean.dtype)
    xmu = wide - average(wide)
    xmu = xmu - average(xmu)  # what rounding left of a mean far from zero
    return xmu, (average(xmu.square()) + eps).rsqrt()


def double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of <dx, ddx> + <dweight, ddweight> + <dbias, ddbias> for dy, x and weight.

    In training, with m = N*H*W, means over a channel written as mean(.), and the projection
    P(a) = a - mean(a) - xhat * mean(a * xhat), the backward pass is
    dx = weight * invstd * P(dy) + grad_mean / m + grad_var * 2 * (x - mean(x)) / m.
    Written in differentiable operations, with the statistics computed from x again, the result can
    be differentiated as often as anybody likes.
    """
    dtype = mean.dtype  # what the first derivative was computed in
    m = _num_positions(x)
    wide_dy = dy.to(dtype)
    xmu, r = standardize(x, mean, invstd, training, eps)
    xhat = xmu * r
    scale = r if weight is None else r * per_channel(weight, dtype)

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
            q = _total(v * wide_dy) - _total(v) * average(wide_dy) - _total(v * xhat) * mean_dy_xhat
            grad_xhat.append(-scale * (v * mean_dy_xhat + mean_v_xhat * wide_dy))
            grad_x = -scale * r * xhat * q / m
            if grad_var is not None:
                grad_x = grad_x + (2 / m) * per_channel(grad_var, dtype) * (v - average(v))
        else:
            grad_dy.append(scale * v)
            q = _total(v * wide_dy)
        grad_weight = r * q
    if ddweight is not None:
        grad_dy.append(per_channel(ddweight, dtype) * xhat)
        grad_xhat.append(per_channel(ddweight, dtype) * wide_dy)
    if ddbias is not None:
        grad_dy.append(per_channel(ddbias, dtype).expand_as(x))
    if grad_xhat:
        g = sum(grad_xhat[1:], start=grad_xhat[0])
        through_xhat = r * (project(g) if training else g)
        grad_x = through_xhat if grad_x is None else grad_x + through_xhat

    return (
        sum(grad_dy[1:], start=grad_dy[0]).to(dy.dtype) if grad_dy else None,
        None if grad_x is None else grad_x.to(x.dtype),
        None if weight is None or grad_weight is None else grad_weight.view(-1).to(weight.dtype),
    )
