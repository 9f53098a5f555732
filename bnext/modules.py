"""The layer, and the way of a model to it and back."""

from typing import TypeVar

from torch import Tensor, nn

from bnext import _ops

Module = TypeVar("Module", bound=nn.Module)


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on bnext's kernels.

    Same constructor, parameters, buffers and ``state_dict``. Input (N, C, H, W), output the same;
    dtypes and errors as :func:`bnext.batchnorm2d`. A call that fails leaves the running statistics
    and ``num_batches_tracked`` as they were.
    """

    def forward(self, input: Tensor) -> Tensor:
        training = self.training
        running_mean, running_var, num_batches_tracked = self.running_mean, self.running_var, None
        momentum = self.momentum
        if training:
            if self.track_running_stats:
                num_batches_tracked = self.num_batches_tracked
            else:
                running_mean = running_var = None
            if momentum is None and num_batches_tracked is None:
                momentum = 0.0  # as in torch: without a count there is no cumulative average
        elif momentum is None:
            momentum = 0.0
        return _ops.batchnorm2d(
            input,
            running_mean,
            running_var,
            num_batches_tracked,
            self.weight,
            self.bias,
            training or (running_mean is None and running_var is None),
            momentum,
            self.eps,
        )


def _change_class(module: Module, old: type[nn.Module], new: type[nn.Module]) -> Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    for layer in module.modules():
        if type(layer) is old:
            layer.__class__ = new
    return module


def convert(module: Module) -> Module:
    """Make every :class:`torch.nn.BatchNorm2d` in a module a :class:`bnext.BatchNorm2d`.

    In place: each layer stays the same object and only changes its class, so parameters, buffers,
    hooks, flags, names and sharing are what they were, and optimizers keep working. Subclasses of
    ``nn.BatchNorm2d`` are left alone: their forward may do more. So is a ``LazyBatchNorm2d``, which
    becomes an ``nn.BatchNorm2d`` with its first input: convert after that.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a :class:`torch.nn.Module`.
    """
    return _change_class(module, nn.BatchNorm2d, BatchNorm2d)


def revert(module: Module) -> Module:
    """Undo :func:`convert`: every :class:`bnext.BatchNorm2d` becomes :class:`torch.nn.BatchNorm2d`.

    Returns:
        ``module``.
    """
    return _change_class(module, BatchNorm2d, nn.BatchNorm2d)
