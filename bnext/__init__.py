"""BatchNorm2d for PyTorch with its own kernels, and its derivative as a function."""

from bnext._diagnostics import explain
from bnext.functional import (
    BatchNorm2dGradients,
    batchnorm2d,
    batchnorm2d_backward,
    layer_gradients,
)
from bnext.memory import empty_cache
from bnext.modules import BatchNorm2d, LazyBatchNorm2d, convert, revert

__version__ = "0.1.0"

__all__ = [
    "BatchNorm2d",
    "BatchNorm2dGradients",
    "LazyBatchNorm2d",
    "batchnorm2d",
    "batchnorm2d_backward",
    "convert",
    "empty_cache",
    "explain",
    "layer_gradients",
    "revert",
]
