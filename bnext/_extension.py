"""Loads the compiled module, or says what to do; and its operators, under a compiler."""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # the extension links against torch's libraries: they have to be there first
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from bnext import _C

try:
    _C = importlib.import_module("bnext._C")
except ModuleNotFoundError as error:
    raise ImportError(
        f"bnext._C is not built in {__file__.rpartition('/')[0]}. If that is the source folder, an "
        "installed bnext is hidden behind it: change to another folder, or build in place with "
        "pip install --no-build-isolation --editable ."
    ) from error
except ImportError as error:
    raise ImportError(
        f"bnext._C does not load beside torch {torch.__version__} ({error}). It was probably built "
        "for another torch. In the source folder run: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

__all__ = ["_C", "kernels"]


def kernels() -> Any:
    """The functions of ``bnext._C``, or the same ones as operators for a compiler's graph."""
    return torch.ops.bnext if is_compiling() else _C
