"""The layer, and the way of a model to it and back."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bnext import _ops

Module = TypeVar("Module", bound=nn.Module)


class _LayerOfTorch(str):
    """A class's ``__module__``: its own name on the class, torch.nn's on instances.

    torch.fx and the quantisation passes on top of it ask ``layer.__module__`` whether a layer is
    one of torch.nn's, and then keep it whole: a ``call_module`` node, hooks and all, as they do
    for nn.BatchNorm2d. Pickle asks the class, and wants a plain str.
    """

    def __get__(self, layer: nn.Module | None, owner: type) -> str:
        return self if layer is None else nn.BatchNorm2d.__module__

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)


def _options(*options: Any) -> dict[str, Any]:
    """By keyword; device and dtype only where given.

    Other classes, which have other parameters there, may stand between these layers and torch's.
    """
    names = ("eps", "momentum", "affine", "track_running_stats", "device", "dtype")
    named = dict(zip(names, options, strict=True))
    return {k: v for k, v in named.items() if v is not None or k not in names[4:]}


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on bnext's kernels.

    Same constructor, parameters, buffers and ``state_dict``. Input (N, C, H, W), output the same;
    dtypes and errors as :func:`bnext.batchnorm2d`. A call that fails leaves the running statistics
    and ``num_batches_tracked`` as they were.

    ``skip_nonfinite``, a keyword of the constructor and an attribute to set at any time: a channel
    keeps its running statistics where a batch would make them NaN or infinite, as in
    :func:`bnext.batchnorm2d`. The batch still counts in ``num_batches_tracked``: for that channel
    as one whose statistics were the running ones. A converted layer starts with False, or with what
    it had before :func:`revert`.
    """

    __module__ = _LayerOfTorch(__module__)
    # As torch declares it.
    __constants__ = [*nn.BatchNorm2d.__constants__, "skip_nonfinite"]  # noqa: RUF012
    skip_nonfinite: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        skip_nonfinite: bool = False,
        **newer: Any,  # what this torch's layer takes besides, such as bias
    ) -> None:
        options = _options(eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, **options, **newer)
        self.skip_nonfinite = skip_nonfinite

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, skip_nonfinite=True" if self.skip_nonfinite else text

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor):  # anything else is for _ops.batchnorm2d to refuse, or to ask
            self._check_input_dim(input)
        training = self.training
        running_mean: Tensor | None = self.running_mean
        running_var: Tensor | None = self.running_var
        num_batches_tracked: Tensor | None = None
        if training and self.track_running_stats:
            num_batches_tracked = self.num_batches_tracked
        elif training:
            running_mean, running_var = None, None
        momentum: float | None = self.momentum
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # as in torch: without a count there is no cumulative average
        arguments = (
            input,
            running_mean,
            running_var,
            num_batches_tracked,
            self.weight,
            self.bias,
            True if training else running_mean is None and running_var is None,
            momentum,
            self.eps,
            self.skip_nonfinite,
        )
        if torch.jit.is_scripting():  # TorchScript compiles this branch, and nothing of the other
            return torch.ops.bnext.batchnorm2d(*arguments)
        else:
            return _ops.batchnorm2d(*arguments)


class LazyBatchNorm2d(nn.LazyBatchNorm2d, BatchNorm2d):
    """:class:`torch.nn.LazyBatchNorm2d` that becomes a :class:`BatchNorm2d` with its first input.

    Until then ``num_features`` and the tensors of that size are unknown.
    """

    __module__ = _LayerOfTorch(__module__)
    cls_to_become = BatchNorm2d

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        skip_nonfinite: bool = False,
        **newer: Any,  # what this torch's layer takes besides, such as bias
    ) -> None:
        options = _options(eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(**options, **newer)
        self.skip_nonfinite = skip_nonfinite


_OURS: dict[type, type] = {nn.BatchNorm2d: BatchNorm2d, nn.LazyBatchNorm2d: LazyBatchNorm2d}
_THEIRS: dict[type, type] = {ours: theirs for theirs, ours in _OURS.items()}


def _change_class(module: Module, new_class: dict[type, type]) -> Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"argument 'module' must be torch.nn.Module, not {type(module).__name__}")
    for layer in module.modules():
        cls = type(layer)
        if cls in new_class:
            layer.__class__ = new_class[cls]
        elif is_parametrized(layer) and cls.__base__ in new_class:
            # torch.nn.utils.parametrize made this class, for its properties; copies of the layer
            # share it, so it is made anew on the other base, not changed.
            layer.__class__ = type(cls.__name__, (new_class[cls.__base__],), dict(vars(cls)))
    return module


def convert(module: Module) -> Module:
    """Make every :class:`torch.nn.BatchNorm2d` in a module a :class:`bnext.BatchNorm2d`.

    In place: each layer stays the same object and only changes its class, so parameters, buffers,
    hooks, flags, names, parametrizations and sharing are what they were, and optimizers keep
    working. A ``LazyBatchNorm2d`` is converted too. Subclasses of ``nn.BatchNorm2d`` are left
    alone: their forward may do more.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a :class:`torch.nn.Module`.
    """
    return _change_class(module, _OURS)


def revert(module: Module) -> Module:
    """Undo :func:`convert`: every :class:`bnext.BatchNorm2d` becomes :class:`torch.nn.BatchNorm2d`.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a :class:`torch.nn.Module`.
    """
    return _change_class(module, _THEIRS)
