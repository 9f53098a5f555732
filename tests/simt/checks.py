"""One pass on the SIMT shim, held against the float64 oracle."""

from __future__ import annotations

import mmap
import sys

import cases
import pytest
import reference
import torch
from simt import library as simt
from torch import Tensor


def invstd_of(x: Tensor, var: Tensor, eps: float = 1e-5) -> Tensor:
    return (var + eps).rsqrt().to(reference.statistics_dtype(x.dtype))


def check_forward(case: cases.Case, label: str, **options: object) -> simt.Forward:
    got = simt.forward(case.input, **case.arguments, **options)
    want = reference.forward(case.input, **case.arguments)
    plan = f"{label}: {got.call.plan.decode()}"
    want.output.check(got.output, f"{plan}: output")
    want.mean.check(got.mean, f"{plan}: mean")
    var = got.invstd.double() ** -2 - 1e-5
    bar = want.var.bar + 8 * reference.step(case.input.dtype) * (want.var.value + 1e-5)
    reference.Expected(want.var.value, bar).check(var, f"{plan}: invstd")
    for name in ("running_mean", "running_var"):
        if getattr(want, name) is not None:
            getattr(want, name).check(getattr(got, name), f"{plan}: {name}")
    assert got.num_batches_tracked == 2 + case.training
    return got


def check_backward(case: cases.Case, label: str, **options: object) -> simt.Backward:
    x = case.input
    if case.training:
        mean, var, _ = reference.batch_statistics(x.double())
        mean, var = mean.flatten(), var.flatten()
    else:
        mean, var = case.running_mean.double(), case.running_var.double()
    mean = mean.to(reference.statistics_dtype(x.dtype))
    invstd = invstd_of(x, var)
    got = simt.backward(case.grad_output, x, mean, invstd, case.weight, case.training, **options)
    arguments = case.backward_arguments | {"training": case.training}
    want = reference.backward(case.grad_output, x, **arguments)
    for name in ("input", "weight", "bias", "mean", "var"):
        if getattr(got, name) is not None:
            label_of = f"{label}: {got.call.plan.decode()}: {name}"
            getattr(want, name).check(getattr(got, name), label_of)
    return got


def check_statistics(case: cases.Case, label: str, **options: object) -> None:
    """Evaluation of which nobody wants the output: the finish kernel alone."""
    arguments = case.arguments | {"training": False}
    got = simt.forward(case.input, **arguments, want_output=False, **options)
    assert torch.equal(got.mean, case.running_mean), label
    torch.testing.assert_close(got.invstd, (case.running_var + 1e-5).rsqrt())


def both(case: cases.Case, label: str, **options: object) -> None:
    check_forward(case, label, **options)
    check_backward(case, label, **options)


def bits(*tensors: Tensor | None) -> tuple[bytes, ...]:
    given = (t.contiguous() for t in tensors if t is not None)
    return tuple(t.view(torch.uint8).numpy().tobytes() for t in given)


# Elements from one image to the next: more than 32 bits can count; nearly as many as they can
# count packs of 16 bytes; and more than that, where kernels take single elements.
FAR = {
    "elements": lambda size: 2**32 + 8,
    "packs": lambda size: (2**32 - 2**12) * 16 // size,
    "single elements": lambda size: (2**32 + 2**12) * 16 // size,
}


def far_apart(t: Tensor, channels_last: bool, far: str) -> Tensor:
    """The values of t in memory of which most is never touched."""
    distance = FAR[far](t.element_size())
    size = (distance + t.numel()) * t.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    _, c, h, w = t.shape
    stride = (distance, 1, w * c, c) if channels_last else (distance, h * w, w, 1)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, stride).copy_(t)
