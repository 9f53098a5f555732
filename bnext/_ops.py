"""What the compiled operators need from Python: fake kernels, autograd, and the eager/compiled switch."""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from bnext._extension import _C
from bnext.autograd import BatchNorm2dFunction


def batchnorm2d(
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
    """A compiler gets one operator in its graph; eager calls go straight to the autograd Function, or
    past it where nobody will ask for a gradient."""
    arguments = (
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
    if torch.compiler.is_compiling():
        return torch.ops.bnext.batchnorm2d(*arguments)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return BatchNorm2dFunction.apply(*arguments)
    return _C.batchnorm2d_forward(*arguments)[0]


# bnext::batchnorm2d is the Function, and breaks down into bnext::batchnorm2d_forward and _backward when traced.
_library = torch.library.Library("bnext", "IMPL")
_library.impl("batchnorm2d", BatchNorm2dFunction.apply, "CompositeImplicitAutograd")


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _statistic(input: Tensor) -> Tensor:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((input.shape[1],), dtype=dtype)


@torch.library.register_fake("bnext::batchnorm2d_forward")
def _(
    input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps
):
    _C.check_forward(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, eps
    )
    return _like(input), _statistic(input), _statistic(input)


@torch.library.register_fake("bnext::batchnorm2d_statistics")
def _(input, running_mean, running_var, training, eps):
    _C.check_forward(input, running_mean, running_var, None, None, None, training, eps)
    return _statistic(input), _statistic(input)


@torch.library.register_fake("bnext::batchnorm2d_backward")
def _(grad_output, input, weight, save_mean, save_invstd, training, output_mask):
    _C.check_backward(grad_output, input, weight, save_mean, save_invstd)
    like_weight = torch.empty_like(weight) if weight is not None else _statistic(input)
    makers = (
        lambda: _like(input),
        lambda: torch.empty_like(like_weight),
        lambda: torch.empty_like(like_weight),
        lambda: _statistic(input),
        lambda: _statistic(input),
    )
    return tuple(
        make() if wanted else None for make, wanted in zip(makers, output_mask, strict=True)
    )
