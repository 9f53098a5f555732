"""What the operators need from Python: fake kernels, autograd, and the eager/compiled switch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._prims_common import (
    is_channels_last_contiguous_or_false_2d,
    is_contiguous_or_false,
    suggest_memory_format,
)
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext import _vmap
from bnext._extension import _C, kernels
from bnext.autograd import differentiable, transforms_active

_is_tracing = torch._C._is_tracing  # by torch.jit.trace


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
    skip_nonfinite: bool = False,
    return_stats: bool = False,
) -> Any:
    """Decide how batch norm is called.

    A compiler or tracer gets one operator in its graph. Eager calls go straight to the autograd
    Function, or past it where nobody will ask for a gradient. Tensor-like objects (proxies of
    torch.fx, subclasses of Tensor) are asked first. Returns output, or (output, mean, var).
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
        skip_nonfinite,
        return_stats,
    )
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        tensors = (input, running_mean, running_var, weight, bias)
        return handle_torch_function(batchnorm2d, tensors, *arguments)
    if is_compiling() or _is_tracing():
        operators = torch.ops.bnext
        call = operators.batchnorm2d_with_stats if return_stats else operators.batchnorm2d
        return call(*arguments[:7], _number(momentum), _number(eps), skip_nonfinite)
    if is_grad_enabled() or transforms_active():
        return differentiable(*arguments)
    output, _, _, mean, var = _C.batchnorm2d_forward(*arguments)
    return (output, mean, var) if return_stats else output


def _number(value: Any) -> Any:
    """For a compiler, to which a number that is not Python's, such as NumPy's, is a tensor."""
    return value if value is None or isinstance(value, (float, int, str)) else float(value)


def batchnorm2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    """All five derivatives, dL/dx in ``out`` where there is one."""
    saved = (grad_output, input, weight, save_mean, save_invstd, training)
    everything = (True,) * 5
    if out is None:
        return kernels().batchnorm2d_backward(*saved, everything, grad_mean, grad_var)
    if not is_compiling():
        return _C.batchnorm2d_backward(*saved, everything, grad_mean, grad_var, out)
    rest = torch.ops.bnext.batchnorm2d_backward_out(*saved, grad_mean, grad_var, out)
    return (out, *rest)


# These two run the autograd Function. Under a compiler it breaks down into the operators _forward
# or _eval, and _backward. The second key catches a graph's call before a transform of torch.func
# takes it apart, so that the Function's own rules apply.
_library = torch.library.Library("bnext", "IMPL")
for _key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
    _library.impl("batchnorm2d", differentiable, _key)
    _library.impl("batchnorm2d_with_stats", partial(differentiable, return_stats=True), _key)


def _register_vmap(name: str) -> None:
    operator = getattr(torch.ops.bnext, name)

    @torch.library.register_vmap(f"bnext::{name}")
    def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _vmap.folded(operator, info.batch_size, in_dims, *arguments)


_register_vmap("batchnorm2d_backward")
_register_vmap("batchnorm2d_statistics")


def _format_of(t: Tensor) -> torch.memory_format:
    """csrc/api.cpp's ``format_of``, for sizes and strides that a compiler need not know."""
    if not is_contiguous_or_false(t) and is_channels_last_contiguous_or_false_2d(t):
        return torch.channels_last
    return suggest_memory_format(t)


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=_format_of(input))


def _per_channel(input: Tensor, wide: bool) -> Tensor:
    dtype = torch.float64 if wide or input.dtype == torch.float64 else torch.float32
    return input.new_empty((input.shape[1],), dtype=dtype)


def _saved(input: Tensor) -> Tensor:
    return _per_channel(input, wide=input.device.type == "cpu")


@torch.library.register_fake("bnext::batchnorm2d_forward")
def _forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _C.check_forward(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps
    )
    return _like(input), _saved(input), _saved(input)


@torch.library.register_fake("bnext::batchnorm2d_forward_with_stats")
def _(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    mean, var = (_per_channel(input, wide=False) for _ in range(2))
    return *_forward(input, *arguments), mean, var


@torch.library.register_fake("bnext::batchnorm2d_eval")
def _(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    return _forward(input, running_mean, running_var, None, weight, bias, False, 0.0, eps)


@torch.library.register_fake("bnext::batchnorm2d_statistics")
def _(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _C.check_statistics_arguments(input, running_mean, running_var, training, eps)
    return _saved(input), _saved(input)


def _gradients(
    input: Tensor, weight: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    def statistic() -> Tensor:
        return _per_channel(input, wide=False)

    def parameter() -> Tensor:
        return statistic() if weight is None else weight.new_empty(weight.shape)

    make = (lambda: _like(input), parameter, parameter, statistic, statistic)
    return tuple(f() if wanted else None for f, wanted in zip(make, output_mask, strict=True))


@torch.library.register_fake("bnext::batchnorm2d_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    output_mask: list[bool],
    grad_mean: Tensor | None = None,
    grad_var: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    _C.check_backward(grad_output, input, weight, save_mean, save_invstd, grad_mean, grad_var)
    return _gradients(input, weight, output_mask)


@torch.library.register_fake("bnext::batchnorm2d_backward_out")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    out: Tensor,
) -> tuple[Tensor | None, ...]:
    _C.check_backward(grad_output, input, weight, save_mean, save_invstd, grad_mean, grad_var)
    _C.check_out(out, input)
    return _gradients(input, weight, (False, True, True, True, True))[1:]
