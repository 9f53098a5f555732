"""What the operators need from Python: fake kernels, autograd, and the eager/compiled switch."""

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from bnext._extension import _C
from bnext.autograd import BatchNorm2dFunction


def kernels() -> Any:
    """The functions of ``bnext._C``, or the same ones as operators for a compiler's graph."""
    return torch.ops.bnext if torch.compiler.is_compiling() else _C


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
    """Decide how batch norm is called.

    A compiler or tracer gets one operator in its graph. Eager calls go straight to the autograd
    Function, or past it where nobody will ask for a gradient. Tensor-like objects (proxies of
    torch.fx, subclasses of Tensor) are asked first.
    """
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
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(batchnorm2d, tensors, *arguments)
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return torch.ops.bnext.batchnorm2d(*arguments)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return BatchNorm2dFunction.apply(*arguments)
    return _C.batchnorm2d_forward(*arguments)[0]


# bnext::batchnorm2d is the Function; traced, it breaks down into batchnorm2d_forward and _backward.
_library = torch.library.Library("bnext", "IMPL")
_library.impl("batchnorm2d", BatchNorm2dFunction.apply, "CompositeImplicitAutograd")


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _per_channel(input: Tensor, wide: bool) -> Tensor:
    dtype = torch.float64 if wide or input.dtype == torch.float64 else torch.float32
    return input.new_empty((input.shape[1],), dtype=dtype)


def _saved(input: Tensor) -> Tensor:
    return _per_channel(input, wide=input.device.type == "cpu")


@torch.library.register_fake("bnext::batchnorm2d_forward")
def _(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _C.check_forward(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, eps
    )
    return _like(input), _saved(input), _saved(input)


@torch.library.register_fake("bnext::batchnorm2d_statistics")
def _(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _C.check_forward(input, running_mean, running_var, None, None, None, training, eps)
    return _saved(input), _saved(input)


@torch.library.register_fake("bnext::batchnorm2d_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    _C.check_backward(grad_output, input, weight, save_mean, save_invstd)

    def statistic() -> Tensor:
        return _per_channel(input, wide=False)

    def parameter() -> Tensor:
        return statistic() if weight is None else weight.new_empty(weight.shape)

    make = (lambda: _like(input), parameter, parameter, statistic, statistic)
    return tuple(f() if wanted else None for f, wanted in zip(make, output_mask, strict=True))
