"""Loads the compiled module, and says what to do when it does not load."""

import torch  # the extension links against torch's libraries: they have to be there first

try:
    from bnext import _C
except ModuleNotFoundError as error:
    raise ImportError(
        "bnext._C is not built. In the source folder run: pip install --no-build-isolation ."
    ) from error
except ImportError as error:
    raise ImportError(
        f"bnext._C does not load beside torch {torch.__version__} ({error}). It was probably built "
        "for another torch. In the source folder run: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

__all__ = ["_C"]
