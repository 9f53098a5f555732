"""What Python refuses before a kernel has written anything; the rest is csrc/checks.cpp."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch


def refuse_derivative(name: str) -> None:
    raise RuntimeError(
        f"batchnorm2d is not differentiable with respect to argument '{name}'. "
        "This input cannot have requires_grad True."
    )


def check_constants(running_mean: Any, running_var: Any) -> None:
    """Where gradients are on, nobody may ask for one by the running statistics."""
    if not torch.is_grad_enabled():
        return
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if isinstance(t, Tensor) and t.requires_grad:
            refuse_derivative(name)


def _innermost(t: Any) -> Any:
    """What transforms of torch.func have wrapped: the levels around it save wrapped tensors."""
    while isinstance(t, Tensor) and functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def check_saved(input: Any, weight: Any, bias: Any) -> None:
    """Autograd would refuse to save inference tensors, too, but not before they have been used."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return
    x, gamma, beta = (_innermost(t) for t in (input, weight, bias))
    if not any(isinstance(t, Tensor) and t.requires_grad for t in (x, gamma, beta)):
        return
    for name, tensor in (("input", x), ("weight", gamma)):
        if isinstance(tensor, Tensor) and tensor.is_inference():
            raise RuntimeError(
                f"Inference tensors cannot be saved for backward, and {name} is one. To work "
                "around you can make a clone to get a normal tensor and use it in autograd."
            )
