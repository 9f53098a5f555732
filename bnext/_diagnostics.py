"""What was built, what it runs on, and which kernels a tensor gets."""

import platform
from typing import Any

import torch
from torch import Tensor

from bnext._extension import _C


def explain(
    input: Tensor,
    device: str | torch.device | None = None,
    *,
    family: str | None = None,
    direction: str = "both",
    training: bool = True,
) -> str:
    """Which kernels :func:`bnext.batchnorm2d` runs on ``input``, and what they move.

    For CUDA: the plan of the forward and of the backward pass, with the bytes of activations that
    it moves and those that any implementation must move. Nothing is computed, and ``input`` may be
    on any device: a tensor on ``meta`` takes no memory.

    Args:
        input: (N, C, H, W).
        device: the device to plan for, or its name. None is the one that ``input`` is on;
            ``"current"`` the current CUDA device; ``"cuda:1"`` another one; a name such as
            ``"h200"`` or ``"t4"`` a kind of device that need not be here (``python -m bnext
            --help`` lists them).
        family: plan with this family of kernels, or with each of them (``"all"``), and say why
            where one cannot run; plans that have to wait for other streams' kernels, or let them
            wait, count as 3 % (grids) or 2 % (persistent blocks) slower than predicted. Only
            passes that read their tensors twice have a choice; the others are streamed. None is
            what a call would take: the best one, or what the environment variables
            ``BNEXT_CUDA_FAMILY``, ``BNEXT_CUDA_GRID``, ``BNEXT_CUDA_PERSISTENT``,
            ``BNEXT_CUDA_REGISTERS``, ``BNEXT_CUDA_OVERLAP``, ``BNEXT_CUDA_LATE``,
            ``BNEXT_CUDA_EARLY``, ``BNEXT_CUDA_TEAM``, ``BNEXT_CUDA_THREADS`` and
            ``BNEXT_CUDA_ROW_BYTES`` say.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.
        training: in training or in evaluation mode.

    Raises:
        TypeError: ``input`` is not a tensor.
        ValueError: ``device`` or ``direction`` is not known; ``input`` is not 4-D.
        RuntimeError: no ``family`` of that name; a CUDA device, in a build without CUDA kernels.
    """
    if direction not in ("forward", "backward", "both"):
        raise ValueError(f"direction should be forward, backward or both, not {direction!r}")
    if not isinstance(input, Tensor):
        raise TypeError(f"explain(): argument 'input' must be Tensor, not {type(input).__name__}")
    shape = ", ".join(map(str, input.shape))
    dtype = str(input.dtype).removeprefix("torch.")
    tensor = f"({shape}) {dtype}, strides {tuple(input.stride())}"
    device = str(input.device if device is None else device)
    if device == "current":
        device = "cuda"
    if device.partition(":")[0] == "cpu":
        if family is not None:
            raise ValueError("family is a choice of CUDA kernels: name a CUDA device, too")
        return f"{tensor}, on cpu: {_C.explain_cpu(input)}"
    _C.read_environment()  # what was set since: for this plan, and for calls from now on
    families = _C.cuda_families() if family == "all" else [family or ""]
    plans = [plan for name in families for plan in _C.cuda_plans(input, device, name, training)]
    taken = _C.cuda_plans(input, device, "", training) if family == "all" else []
    chosen = {plan["pass"]: plan for plan in taken if not plan["error"]}
    plans = list({(plan["pass"], plan["text"]): plan for plan in plans}.values())  # each once
    lines = [f"{tensor}, on {device}:"]
    directions = ("forward", "backward") if direction == "both" else (direction,)
    for plan in (plan for name in directions for plan in plans if plan["pass"] == name):
        lines.append(f"  {plan['text']}{_beside(plan, chosen.get(plan['pass']))}")
        if not plan["error"]:
            moved, least = plan["bytes_moved"], plan["bytes_min"]
            lines.append(
                f"    {moved / 1e6:.4g} MB where {least / 1e6:.4g} MB must be moved: "
                f"{moved / max(least, 1):.2f} times as much"
            )
    return "\n".join([*lines, f"  {_what_runs_here()}"])


def _beside(plan: dict[str, Any], chosen: dict[str, Any] | None) -> str:
    """Whether this plan is the chosen one, or why not, where its predicted time does not tell."""
    if chosen is None or plan["error"]:
        return ""
    if plan["text"] == chosen["text"]:
        return " (chosen)"
    counts = plan["microseconds_compared"]
    if plan["microseconds"] < chosen["microseconds"] and counts > chosen["microseconds_compared"]:
        counts_as = f"{counts:.3g}" if counts < 999.5 else f"{counts:.0f}"
        return f" (counts as {counts_as} us: it and other streams wait for each other)"
    return ""


def _what_runs_here() -> str:
    """What this build and this machine can do with a CUDA plan."""
    archs = _C.build["cuda_archs"]
    if not archs:
        return "This build holds CPU kernels only: it can show the plan, not run it."
    if not torch.cuda.is_available():
        return f"This build holds kernels for {archs}, but no CUDA device is here to run them."
    return f"This build holds kernels for {archs}; here is {torch.cuda.get_device_name()}."


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
