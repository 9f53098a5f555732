"""What Python refuses before a kernel has written anything; the rest is csrc/checks.cpp."""

from collections.abc import Iterator
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


def _levels(t: Any) -> Iterator[Tensor]:
    """The tensor, and what transforms of torch.func have wrapped in it."""
    while isinstance(t, Tensor):
        yield t
        t = functorch.get_unwrapped(t) if functorch.is_functorch_wrapped_tensor(t) else None


def check_saved(input: Any, weight: Any, bias: Any) -> None:
    """Autograd would refuse to save inference tensors, too, but not before they have been used."""
    wanted = (t.requires_grad for tensor in (input, weight, bias) for t in _levels(tensor))
    if not torch.is_grad_enabled() or not any(wanted):
        return
    for name, tensor in (("input", input), ("weight", weight)):
        if any(t.is_inference() for t in _levels(tensor)):
            raise RuntimeError(
                f"Inference tensors cannot be saved for backward, and {name} is one. To work "
                "around you can make a clone to get a normal tensor and use it in autograd."
            )
