"""The rules of vmap: a batch of batch norms is one with that many times the channels.

Where an argument has no batch it is repeated. ``apply`` is the autograd Function's own, so that the
transforms around this one find what they need.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnext._checks import check_constants
from bnext._extension import _C


def _fold(t: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """(N, C, H, W) for each of the batch -> (N, batch * C, H, W), or (C,) -> (batch * C,)."""
    if t is None:
        return None
    t = t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    channel = 1 if t.dim() == 5 else 0
    return t.movedim(0, channel).flatten(channel, channel + 1)


def _unfold(t: Tensor | None, batch: int) -> tuple[Tensor | None, int | None]:
    """The way back: the tensor, and where its batch is."""
    if t is None:
        return None, None
    channel = 1 if t.dim() == 4 else 0
    return t.unflatten(channel, (batch, t.shape[channel] // max(batch, 1))), channel


def _first(t: Any, dim: int | None) -> Any:
    """What the first of the batch gets."""
    return t if dim is None or not isinstance(t, Tensor) else t.select(dim, 0)


def _check_updates(
    statistics: dict[str, tuple[Any, int | None]], count: tuple[Any, int | None], x_dim: int | None
) -> None:
    """What training updates in place must be there once for each of the batch."""
    batched = {name for name, (_, dim) in statistics.items() if dim is not None}
    given = {name for name, (t, _) in statistics.items() if t is not None}
    if given - batched and (batched or x_dim is not None):
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean or running_var, which "
            "will be updated in place, were not batched. Give every one of the batch its own "
            "(torch.func.stack_module_state), or track none (track_running_stats=False)."
        )
    for name, (t, dim) in {**statistics, "num_batches_tracked": count}.items():
        if dim is not None:
            _C.check_updated(name, t)


def forward(
    apply: Callable[..., Any], batch: int, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """The rule of BatchNorm2dTransformableFunction."""
    x, running_mean, running_var, tracked, weight, bias, options = arguments
    training, momentum, eps, _, _ = options
    if batch > 0:
        check: Any = _C.check_forward
        first = [_first(t, dim) for t, dim in zip(arguments[:6], in_dims[:6], strict=True)]
        check(*first, training, momentum, eps)
    elif training:
        raise ValueError("vmap over no samples, in training: there must be at least one")
    check_constants(running_mean, running_var)
    x_dim, mean_dim, var_dim, tracked_dim = in_dims[:4]
    if training:
        statistics = {
            "running_mean": (running_mean, mean_dim),
            "running_var": (running_var, var_dim),
        }
        _check_updates(statistics, (tracked, tracked_dim), x_dim)
    counts = None
    if training and tracked_dim is not None:
        if momentum is None:
            raise RuntimeError(
                "momentum=None takes its factor from num_batches_tracked, which is batched here: "
                "the cumulative average does not work under vmap"
            )
        counts, tracked = tracked, None
    outputs = _forward(
        apply, batch, in_dims, x, running_mean, running_var, tracked, weight, bias, options
    )
    if counts is not None and x.numel() != 0:  # when nothing can fail any more
        counts.add_(1)
    return outputs


def _forward(
    apply: Callable[..., Any], batch: int, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """The same with all checks passed; a batched count is not its business."""
    x, running_mean, running_var, tracked, weight, bias, options = arguments
    training, _, eps, _, _ = options
    x_dim, mean_dim, var_dim, _, weight_dim, bias_dim = in_dims[:6]
    if x_dim is None and mean_dim is None and var_dim is None:
        # One standardization for all of the batch; only the affine step differs.
        y, *stats = apply(x, running_mean, running_var, tracked, None, None, options)
        if x.dtype in (torch.bfloat16, torch.float16):
            # Again, unrounded: the affine step rounds. The call above has updated what it should.
            used = (None, None) if training else (running_mean.float(), running_var.float())
            y = apply(x.float(), *used, None, None, None, (training, 0.0, eps, False, False))[0]
        y = _affine(y, _fold(weight, weight_dim, batch), _fold(bias, bias_dim, batch), batch)
        return (y.to(x.dtype), *stats), (0, None, None, None, None)
    if not training and mean_dim is var_dim is weight_dim is bias_dim is None:
        # The same constants for everybody: one batch norm with that many times the images.
        images = x.movedim(x_dim, 0)
        y, *stats = apply(
            images.flatten(0, 1), running_mean, running_var, None, weight, bias, options
        )
        return (y.unflatten(0, images.shape[:2]), *stats), (0, None, None, None, None)

    folded: list[Any] = [_fold(t, d, batch) for t, d in zip(arguments[:3], in_dims, strict=False)]
    affine = (_fold(weight, weight_dim, batch), _fold(bias, bias_dim, batch))
    outputs = apply(*folded, tracked, *affine, options)
    if training and running_mean is not None:
        # Where folding had to copy, what was updated is the copy.
        for t, dim, new in zip(arguments[1:3], in_dims[1:3], folded[1:], strict=True):
            t.movedim(dim, 0).copy_(new.unflatten(0, (batch, -1)))
    unfolded = [_unfold(t, batch) for t in outputs]
    return tuple(t for t, _ in unfolded), tuple(dim for _, dim in unfolded)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int) -> Tensor:
    """The affine step for (batch * C,) vectors, in the wider of the dtypes."""
    shape = (batch, 1, -1, 1, 1)
    y = y.expand(batch, *y.shape)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def folded(
    apply: Callable[..., Any], batch: int, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[Any, Any]:
    """The rule of what writes to none of its arguments: the backward pass and the statistics."""
    wide = [
        _fold(t, dim, batch) if isinstance(t, Tensor) else t
        for t, dim in zip(arguments, in_dims, strict=True)
    ]
    unfolded = [_unfold(t, batch) for t in apply(*wide)]
    return tuple(t for t, _ in unfolded), tuple(dim for _, dim in unfolded)
