"""What Python refuses before a kernel has written anything; the rest is csrc/checks.cpp."""

from typing import Any

import torch
from torch import Tensor


def refuse_derivative(name: str) -> None:
    raise RuntimeError(
        f"batchnorm2d is not differentiable with respect to argument '{name}'. "
        "This input cannot have requires_grad True."
    )


def check_constants(running_mean: Any, running_var: Any) -> None:
    """Nobody may ask for a derivative by the running statistics."""
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if isinstance(t, Tensor) and t.requires_grad:
            refuse_derivative(name)


def check_saved(input: Any, weight: Any, bias: Any) -> None:
    """Autograd would refuse to save inference tensors, too, but not before they have been used."""
    tensors = [t for t in (input, weight, bias) if isinstance(t, Tensor)]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return
    for name, t in (("input", input), ("weight", weight)):
        if isinstance(t, Tensor) and t.is_inference():
            raise RuntimeError(
                f"Inference tensors cannot be saved for backward, and {name} is one. To work "
                "around you can make a clone to get a normal tensor and use it in autograd."
            )


def check_each_written(name: str, t: Tensor, dim: int) -> None:
    """What vmap has a place of its own for along ``dim``, and training updates."""
    if t.shape[dim] > 1 and t.stride(dim) == 0:
        raise RuntimeError(
            f"{name} is updated in training, but several of its elements share one place in memory "
            "(an expanded tensor?)"
        )
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: Inplace update to inference tensor outside InferenceMode is not allowed."
        )
