"""What was built, what it runs on, and which kernels a tensor gets."""

import platform

import torch
from torch import Tensor

from bnext._extension import _C


def explain(input: Tensor) -> str:
    """Which kernels :func:`bnext.batchnorm2d` runs on ``input``, and why, in a few lines.

    Args:
        input: (N, C, H, W), on a device that bnext has kernels for.

    Raises:
        As :func:`bnext.batchnorm2d` for ``input``.
    """
    kernels = _C.explain(input)
    shape = ", ".join(map(str, input.shape))
    dtype = str(input.dtype).removeprefix("torch.")
    tensor = f"({shape}) {dtype} on {input.device}, strides {tuple(input.stride())}"
    return f"{tensor}: {kernels}"


def build_report() -> str:
    """Versions, what the extension was built for, and what this machine offers it."""
    from bnext import __version__

    archs = _C.build["cuda_archs"]
    cuda = f"kernels for {archs}" if archs else "not in this build"
    rows = {
        "bnext": __version__,
        "built for torch": _C.build["torch"],
        "running torch": torch.__version__,
        "Python": platform.python_version(),
        "CPU kernels": f"{_C.cpu_isa()}, {torch.get_num_threads()} threads",
        "CUDA": cuda,
    }
    return "\n".join(f"{name:<16} {value}" for name, value in rows.items())
