"""Batch norm and its derivative as functions."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from bnext import _ops
from bnext._extension import kernels


@overload
def batchnorm2d(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    skip_nonfinite: bool = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def batchnorm2d(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    skip_nonfinite: bool = False,
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
def batchnorm2d(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    skip_nonfinite: bool = False,
    return_stats: bool = False,
) -> Any:
    r"""Batch normalization over a 4-D input; the meaning of :func:`torch.nn.functional.batch_norm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}}\,\gamma + \beta

    per channel, with the biased variance (Ioffe and Szegedy, 2015, Algorithm 1). In training the
    statistics are those of the batch, and ``running = (1 - momentum) * running + momentum * batch``
    with the unbiased variance; otherwise they are the running statistics.

    Args:
        input: (N, C, H, W); float64, float32, bfloat16 or float16; any strides.
        running_mean, running_var: (C,), both or neither. Updated in place in training, and then not
            to share memory with any other argument.
        weight, bias: gamma and beta, (C,). None stands for 1 and 0.
        training: take statistics from the batch.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance, in the units of ``input``, squared.
        skip_nonfinite: in training, a channel keeps its running statistics where this batch would
            make one of them NaN or infinite, in their dtype: one bad batch does not poison them for
            good. Other channels learn from the batch. The device decides; nobody waits for it.
        return_stats: return (output, mean, var): the mean and biased variance used, which are those
            of the batch in training and copies of the running statistics otherwise. (C,), float64
            for float64 input, float32 otherwise. In training, gradients flow into ``input`` through
            them as well, in the same pass.

    All (C,) tensors have the dtype of ``input``, or float32 beside bfloat16 and float16. Sums are
    accumulated in float64 on a CPU; of 16-bit dtypes, eight terms at a time in float32 first. An
    empty input gives an empty output and leaves the running statistics as they are.

    Returns:
        A tensor of the shape and dtype of ``input``, contiguous or channels_last as it is.
        Differentiable to any order for ``input``, ``weight`` and ``bias``, in reverse and forward
        mode, and under the transforms of :mod:`torch.func`.

    Raises:
        ValueError: ``input`` is not 4-D; one value per channel in training; only one running
            statistic; ``eps`` not positive in training or negative otherwise.
        RuntimeError: shape, dtype or device of a (C,) tensor does not fit ``input``; no running
            statistics in evaluation mode. In training: running statistics that share memory with
            ``input`` or each other, or are inference tensors outside of inference mode.
        NotImplementedError: ``input`` has an unsupported dtype.
        TypeError: an argument of another type. The message names the argument; nothing was written.
    """
    return _ops.batchnorm2d(
        input,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training,
        momentum,
        eps,
        skip_nonfinite,
        return_stats,
    )


class BatchNorm2dGradients(NamedTuple):
    """The derivative of a loss by everything that batch norm computes with."""

    input: Tensor  #: dL/dx, (N, C, H, W), dtype of the input
    weight: Tensor  #: dL/dgamma, (C,), dtype of weight, or of the statistics without one
    bias: Tensor  #: dL/dbeta, (C,), likewise
    mean: Tensor  #: dL/dmean, (C,), float64 for float64 input, float32 otherwise
    var: Tensor  #: dL/dvar, (C,), likewise


def batchnorm2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    *,
    save_mean: Tensor | None = None,
    save_invstd: Tensor | None = None,
    grad_mean: Tensor | None = None,
    grad_var: Tensor | None = None,
    out: Tensor | None = None,
) -> BatchNorm2dGradients:
    r"""The derivative of :func:`batchnorm2d`, for a backward pass written by hand.

    With :math:`m = NHW`, :math:`r = 1/\sqrt{\mathrm{var}+\epsilon}`,
    :math:`\hat x = (x - \mathrm{mean})\,r`, and sums over N, H and W
    (Ioffe and Szegedy, 2015, section 3):

    .. math::
        \frac{dL}{d\gamma} &= \sum dy\,\hat x, \qquad \frac{dL}{d\beta} = \sum dy \\
        \frac{dL}{d\mathrm{var}} &= -\tfrac12 \gamma r^3 \sum dy\,(x - \mathrm{mean}) \\
        \frac{dL}{d\mathrm{mean}} &= -\gamma r \sum dy
            - 2 \frac{dL}{d\mathrm{var}} \frac{\sum (x - \mathrm{mean})}{m} \\
        \frac{dL}{dx} &= \gamma r\,dy + \frac{dL}{d\mathrm{var}} \frac{2 (x - \mathrm{mean})}{m}
            + \frac{1}{m} \frac{dL}{d\mathrm{mean}}

    In evaluation mode mean and var are constants: :math:`dL/dx = \gamma r\,dy`, and
    :math:`dL/d\mathrm{mean} = -\gamma r \sum dy`. Where the loss also uses mean and var themselves
    (``return_stats`` of :func:`batchnorm2d`), what it says about them is added to dL/dmean and
    dL/dvar.

    Args:
        grad_output: dL/dy, the shape, dtype and device of ``input``; any strides.
        input: x, (N, C, H, W).
        weight: gamma, (C,); None stands for 1.
        running_mean, running_var: (C,), read in evaluation mode.
        training: whether mean and var were those of the batch.
        eps: as in the forward pass.
        save_mean, save_invstd: (C,), float64 or float32, both or neither: the mean and
            1/sqrt(var + eps) of the forward pass, where the caller has kept them. They spare one
            reading of ``input``; the running statistics and ``eps`` are then not looked at.
        grad_mean, grad_var: (C,), float64 or float32: the loss's own derivative by mean and var,
            where it uses them other than through the output.
        out: where dL/dx goes instead of a new tensor: the shape, dtype and device of ``input``. It
            may be ``grad_output`` itself, which is then overwritten; otherwise it shares memory
            with no argument.

    Returns:
        :class:`BatchNorm2dGradients`, all five. They are not part of the autograd graph.

    Raises:
        The errors of :func:`batchnorm2d`; RuntimeError if ``grad_output`` does not fit ``input``;
        RuntimeError if ``out`` does not, shares memory as it should not, is a leaf that requires
        grad while gradients are recorded, or an inference tensor outside of inference mode;
        ValueError if only one of ``save_mean`` and ``save_invstd`` is given.
    """
    if (save_mean is None) != (save_invstd is None):
        raise ValueError("save_mean and save_invstd must either both be None or neither be None")
    if isinstance(out, Tensor) and out.requires_grad and torch.is_grad_enabled():
        _refuse_leaf(out)
    with torch.no_grad():
        if save_mean is None or save_invstd is None:
            save_mean, save_invstd = kernels().batchnorm2d_statistics(
                input, running_mean, running_var, training, eps
            )
        gradients = _ops.batchnorm2d_backward(
            grad_output, input, weight, save_mean, save_invstd, training, grad_mean, grad_var, out
        )
    return BatchNorm2dGradients(*gradients)


def _refuse_leaf(out: Tensor) -> None:
    """Autograd accumulates into a leaf; other tensors that it knows only get a new version."""
    for tensor, kind in ((out, ""), (out._base, "view of a ")):
        if tensor is not None and tensor.is_leaf:
            raise RuntimeError(
                f"out: a {kind}leaf Variable that requires grad is being used in an in-place "
                "operation."
            )


def layer_gradients(
    layer: nn.BatchNorm2d, input: Tensor, grad_output: Tensor
) -> BatchNorm2dGradients:
    """The derivative of ``layer(input)``, in the mode that the layer is in.

    Args:
        layer: a batch-norm layer. Nothing in it is changed, its running statistics included.
        input: what went into it, (N, C, H, W).
        grad_output: dL/d(output), the shape of ``input``.

    Returns:
        :class:`BatchNorm2dGradients`; formulas and errors as :func:`batchnorm2d_backward`.

    Raises:
        TypeError: ``layer`` is not a :class:`torch.nn.BatchNorm2d`.
    """
    if not isinstance(layer, nn.BatchNorm2d):
        raise TypeError(
            "layer_gradients(): argument 'layer' must be torch.nn.BatchNorm2d, "
            f"not {type(layer).__name__}"
        )
    training = layer.training or (layer.running_mean is None and layer.running_var is None)
    running = (None, None) if training else (layer.running_mean, layer.running_var)
    return batchnorm2d_backward(
        grad_output, input, layer.weight, *running, training=training, eps=layer.eps
    )
