"""The derivative of batch norm as autograd Functions: by kernels, and the next by torch's ops.

Names are the equation's: dy, x, weight (gamma), mean, invstd, and xhat = (x - mean) * invstd.
Functions written for torch.func cost twice as much to call, so eager calls have one of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from bnext import _vmap
from bnext._checks import check_constants, check_saved, refuse_derivative
from bnext._extension import _C, kernels
from bnext._second_order import average, double_backward, per_channel, standardize

_functorch_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def transforms_active() -> bool:
    """Whether a torch.func transform or a level of forward-mode AD is around this call."""
    return _functorch_active() or forward_ad._current_level >= 0


def differentiable(
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
    """Batch norm as one node of the graph: output, or (output, mean, var)."""
    options = (training, momentum, eps, skip_nonfinite, return_stats)
    if transforms_active():
        check_constants(running_mean, running_var)
        if training:
            check_saved(input, weight, bias)
        output, _, _, mean, var = BatchNorm2dTransformableFunction.apply(
            input, running_mean, running_var, num_batches_tracked, weight, bias, options
        )
        return (output, mean, var) if return_stats else output
    if torch.is_inference_mode_enabled():  # with gradients on again: there are none, as in torch
        output, _, _, mean, var = _C.batchnorm2d_forward(
            input, running_mean, running_var, num_batches_tracked, weight, bias, *options
        )
        return (output, mean, var) if return_stats else output
    # What a transform has leaked to its outside. Function.apply would look at every argument.
    if isinstance(input, Tensor):
        input = _unwrap_if_dead(input)
        if training and input.is_inference():
            check_saved(input, weight, bias)
    if isinstance(weight, Tensor):
        weight = _unwrap_if_dead(weight)
        if training and weight.is_inference():
            check_saved(input, weight, bias)
    if isinstance(bias, Tensor):
        bias = _unwrap_if_dead(bias)
    return _apply_eagerly(
        input, running_mean, running_var, num_batches_tracked, weight, bias, options
    )


def _input_gradients(
    ctx: Any, dy: Any, grad_mean: Tensor | None = None, grad_var: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument of the forward pass."""
    if dy is None and grad_mean is None and grad_var is None:
        return (None,) * 7
    x, weight, mean, invstd = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad
    if dy is None:  # only mean and var were used
        dy = torch.zeros_like(x)
    if x is None:  # not read, but for its shape and strides
        batched = not is_compiling() and _is_batched(dy)  # by is_grads_batched: no memory formats
        if not batched:
            dy = dy.contiguous(memory_format=ctx.memory_format)
        x = dy
    training, _, eps, _, _ = ctx.options
    mask = (needs_grad[0], needs_grad[4], needs_grad[5])
    dx, dweight, dbias = derivative(
        dy, x, weight, mean, invstd, grad_mean, grad_var, training, eps, mask
    )
    return dx, None, None, None, dweight, dbias, None


class BatchNorm2dFunction(Function):
    """``output = (x - mean) * invstd * weight + bias``, for eager calls.

    Saves x, weight and the statistics used; x only where the derivative asks for it. The options
    are (training, momentum, eps, skip_nonfinite, return_stats): one argument, because autograd
    spends time on every one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple[bool, float | None, float, bool, bool],
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad
        if needs_grad[1] or needs_grad[2]:
            refuse_derivative("running_mean" if needs_grad[1] else "running_var")
        output, save_mean, save_invstd, mean, var = _C.batchnorm2d_forward(
            input, running_mean, running_var, num_batches_tracked, weight, bias, *options
        )
        training, return_stats = options[0], options[4]
        x: Tensor | None = input
        if not training and not needs_grad[4]:  # dx = weight * invstd * dy
            x = None
            ctx.memory_format = suggest_memory_format(output)
        ctx.save_for_backward(x, weight, save_mean, save_invstd)
        ctx.set_materialize_grads(False)
        ctx.options = options
        if not return_stats:
            return output
        if not training or not needs_grad[0]:
            ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    backward = staticmethod(_input_gradients)


# Function.apply, without its preparations for torch.func: 2 of 8 us.
_apply_eagerly = super(Function, BatchNorm2dFunction).apply
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def _below_outer_levels(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let a jvp rule be differentiated itself, by the levels of forward mode around its own.

    torch turns forward mode off for the rule, and the second derivative would silently be zero.
    Turned on again, saved tensors may not bring along their tangents of this level.
    """

    def rule(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            # Level 0: torch has one level of forward mode, and torch.func nests by other means.
            saved = [
                None if t is None else forward_ad.unpack_dual(t, level=0).primal
                for t in ctx.saved_tensors
            ]
            return jvp(ctx, saved, *tangents)

    return rule


class BatchNorm2dTransformableFunction(Function):
    """The same for torch.func and forward-mode AD, which want every saved tensor as an output."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        call: Any = _C.batchnorm2d_forward
        return call(*arguments[:6], *arguments[6][:4], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, _, _, weight, _, options = inputs
        training, return_stats = options[0], options[4]
        ctx.mark_non_differentiable(*output[1 : 3 if training and return_stats else 5])
        ctx.save_for_backward(x, weight, *output[1:3])
        ctx.save_for_forward(x, weight, *output[1:3])
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.differentiable_stats = training and return_stats
        ctx.stats_dtype = output[3].dtype

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        _mean: None,
        _invstd: None,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return _input_gradients(ctx, dy, grad_mean, grad_var)

    @staticmethod
    @_below_outer_levels
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[Tensor | None, ...]:
        """How the outputs move with x, weight and bias.

        The kernels' dx is a linear and symmetric function of dy, so it also takes the tangent of x
        to that of the output.
        """
        x, weight, mean, invstd = saved
        x_t, mean_t, var_t, _, weight_t, bias_t = tangents[:6]
        training, _, eps, _, _ = ctx.options
        if not training and (mean_t is not None or var_t is not None):
            refuse_derivative("running_mean" if mean_t is not None else "running_var")
        dtype = mean.dtype
        xmu, r = standardize(x, mean, invstd, training, eps)
        terms = []
        if x_t is not None:
            mask = (True, False, False)
            dx, _, _ = derivative(x_t, x, weight, mean, invstd, None, None, training, eps, mask)
            terms.append(dx.to(dtype))
        if weight_t is not None:
            terms.append(xmu * r * per_channel(weight_t, dtype))
        if bias_t is not None:
            terms.append(per_channel(bias_t, dtype).expand_as(x))
        y_t = sum(terms[1:], start=terms[0]).to(x.dtype) if terms else torch.zeros_like(x)
        if not ctx.differentiable_stats:
            return y_t, None, None, None, None
        wide_x_t = torch.zeros_like(xmu) if x_t is None else x_t.to(dtype)
        stats_t = average(wide_x_t), 2 * average(wide_x_t * xmu)
        return y_t, None, None, *(t.flatten().to(ctx.stats_dtype) for t in stats_t)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        apply = BatchNorm2dTransformableFunction.apply
        return _vmap.forward(apply, info.batch_size, in_dims, *arguments)


def derivative(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    training: bool,
    eps: float,
    mask: tuple[bool, bool, bool],
) -> Any:
    """(dx, dweight, dbias), None where ``mask`` is false; as a node of the graph where needed."""
    node = BatchNorm2dBackwardFunction
    wanted = torch.is_grad_enabled() or transforms_active()  # somebody may differentiate this
    call: Any = node.apply if wanted else node.forward
    return call(dy, x, weight, mean, invstd, grad_mean, grad_var, training, eps, mask)


class BatchNorm2dBackwardFunction(Function):
    """The backward pass as a function of dy, x and weight, itself differentiable to any order.

    mean and invstd count as functions of x in training. grad_mean and grad_var are what reaches
    mean and var past the output.
    """

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        training: bool,
        eps: float,
        mask: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        arguments = (dy, x, weight, mean, invstd, training, (*mask, False, False))
        return kernels().batchnorm2d_backward(*arguments, grad_mean, grad_var)[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.options = inputs[7:]
        ctx.dtypes = [None if t is None else t.dtype for t in output]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, invstd, grad_mean, grad_var = ctx.saved_tensors
        training, eps, _ = ctx.options
        for_dy, for_x, for_weight = double_backward(
            ddx, ddweight, ddbias, dy, x, weight, mean, invstd, grad_var, training, eps
        )
        for_mean = for_var = None
        if training and ddx is not None:  # dx has grad_mean / m + grad_var * 2 * (x - mean) / m
            v = ddx.to(mean.dtype)
            if grad_mean is not None:
                for_mean = average(v).flatten().to(grad_mean.dtype)
            if grad_var is not None:
                xmu, _ = standardize(x, mean, invstd, training, eps)
                for_var = 2 * average(v * xmu).flatten().to(grad_var.dtype)
        return for_dy, for_x, for_weight, None, None, for_mean, for_var, None, None, None

    @staticmethod
    @_below_outer_levels
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> tuple[Tensor | None, ...]:
        """How dx, dweight and dbias move.

        They are linear in dy, grad_mean and grad_var together. And they are the gradient of
        <output, dy> + <mean, grad_mean> + <var, grad_var> by x, weight and bias: how they move with
        those is its Hessian, which is symmetric, and double_backward multiplies by it.
        """
        dy, x, weight, mean, invstd, _, grad_var = saved
        training, eps, mask = ctx.options
        dy_t, x_t, weight_t, _, _, grad_mean_t, grad_var_t = tangents[:7]
        moves: list[Any] = [None, None, None]
        if dy_t is not None or grad_mean_t is not None or grad_var_t is not None:
            dy_t = torch.zeros_like(dy) if dy_t is None else dy_t
            moves = list(
                derivative(
                    dy_t, x, weight, mean, invstd, grad_mean_t, grad_var_t, training, eps, mask
                )
            )
        if x_t is not None or weight_t is not None:
            _, for_x, for_weight = double_backward(
                x_t, weight_t, None, dy, x, weight, mean, invstd, grad_var, training, eps
            )
            for i, more in enumerate((for_x, for_weight)):
                if mask[i] and more is not None:
                    moves[i] = more if moves[i] is None else moves[i] + more
        for i, shape in enumerate((x.shape, x.shape[1:2], x.shape[1:2])):
            if mask[i] and moves[i] is None:
                moves[i] = x.new_zeros(shape, dtype=ctx.dtypes[i])
        return tuple(moves)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        apply = BatchNorm2dBackwardFunction.apply
        return _vmap.folded(apply, info.batch_size, in_dims, *arguments)
