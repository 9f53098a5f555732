"""The CUDA build on simulated devices, without a GPU: what runs GPU tests on the SIMT shim.

python tests/simt/device.py -m pytest -m gpu tests/test_transforms.py

runs Python with these arguments and two CUDA devices, as they are described in runtime.cpp. It
takes a CUDA build of bnext, with a PyTorch and a toolkit for CUDA 13. BNEXT_SHIM_SEED says what
runs when; PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own, so that an access
outside it is seen; BNEXT_SHIM_STREAM_SMS=2 lets streams use two SMs of a device, as in a green
context, of which the device itself says nothing; BNEXT_SHIM_UNLOADABLE=apply_kernel stands for
kernels that cannot be loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import kernel_code  # noqa: E402
import torch  # noqa: E402
from simt import library  # noqa: E402


def why_not() -> str | None:
    """Why there are no simulated devices here, or None."""
    if library.compiler() is None:
        return "no C++ compiler here"
    if (torch.version.cuda or "").split(".")[0] != "13":
        return "the simulated devices stand in for CUDA 13, which this PyTorch was not built with"
    return None


def environment() -> dict[str, str]:
    """The environment in which Python processes have the simulated devices."""
    include = kernel_code.toolkit() / "include"
    # Under the driver's name, so that who asks for the driver gets it.
    flags = (f"-I{include}", "-Wl,-soname,libcuda.so.1", "-ldl")
    runtime = library.build_library("runtime", ("tests/simt/runtime.cpp",), flags)
    paths = [str(TESTS / "simt/site"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "LD_PRELOAD": str(runtime),
        "BNEXT_SHIM_LIBRARY": str(library.build_library("simt", library.SIMT_SOURCES)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(f"bnext: {reason}")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
