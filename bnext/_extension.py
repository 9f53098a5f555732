"""Loads the compiled module, and says what to do when it does not load."""

import torch  # the extension links against torch's libraries: they have to be there first

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."

try:
    from bnext import _C
except ModuleNotFoundError as error:
    raise ImportError(
        "bnext._C is not built. In the source folder run: " + _REBUILD.replace(" --force-reinstall", "")
    ) from error
except ImportError as error:
    raise ImportError(
        f"bnext._C does not load beside torch {torch.__version__} ({error}). It was probably built for "
        f"another torch; in the source folder run: {_REBUILD}"
    ) from error

__all__ = ["_C"]
