"""Who takes part: bnext, what a user would take instead, and the floors.

Like is compared with like, by the case's level:

`call`  What a user writes, with autograd recording and Python included. bnext.batchnorm2d against
        F.batch_norm (on CUDA `torch.native_batch_norm` and `torch.cudnn_batch_norm`, the two
        differentiable operators between which F.batch_norm chooses), and torch.compile of it.
        backward is torch.autograd.grad through the graph of that very call.
`op`    The raw operators below autograd, called through torch.ops: bnext::batchnorm2d_forward and
        _backward against aten::native_batch_norm[_backward] and aten::cudnn_batch_norm[_backward].
        On CUDA they are replayed from a graph, where the host's work is gone; a provider without
        raw operators is captured through its public call, which leaves the same: its kernels. On a
        CPU such a provider has no place at this level.

Direction `derivative` is the backward pass as a function of (dy, x, weight) that keeps nothing from
a forward pass and computes the statistics itself: bnext.batchnorm2d_backward against the formula
written in PyTorch operations, the compiled formula, and native's operators one after the other.

All get the same tensors in the same layout. What is compiled or planned is so before the clock
starts. The floors are plain PyTorch operations on the same tensors that move as many bytes as batch
norm must.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bnext
from benchmarks.checks import EPS, MOMENTUM, Tensors
from benchmarks.shapes import FLOORS, Case, meta_input
from bnext._extension import _C

Results = dict[str, Tensor]
Call = Callable[[], Any]
aten = torch.ops.aten

RESULTS = {
    "forward": ("output",),
    "inference": ("output",),
    "backward": ("dx", "dweight", "dbias"),
    "step": ("dx", "dweight", "dbias"),
    "derivative": ("dx", "dweight", "dbias", "dmean", "dvar"),
}


def no_derivative_alone(provider: str) -> str:
    return f"{provider} has no derivative without a forward pass"


class Provider:
    """One contestant. A subclass says how it is called; `prepare` makes a case's call of that."""

    name = ""
    has_ops = False  # raw operators below autograd

    def rounds_often(self, case: Case) -> bool:
        """Whether it computes op by op in the tensors' own dtype."""
        return False

    def why_not(self, case: Case) -> str | None:
        """The reason why this provider cannot run the case, if there is one."""
        if case.level == "op" and not self.has_ops and case.device == "cpu":
            return "no operator below autograd"
        return None

    def plan(self, case: Case) -> str | None:
        """What it will do, in words, if it says so."""
        return None

    def reset(self) -> None:
        """The next case has another shape: drop what was made for this one."""

    def apply(self, t: Tensors, training: bool) -> Tensor:
        """The public call."""
        raise NotImplementedError

    def op_forward(self, t: Tensors, training: bool) -> tuple[Tensor, ...]:
        """The raw operator: the output, and what `op_backward` wants to be `saved`."""
        raise NotImplementedError

    def op_backward(self, t: Tensors, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def derivative(self, t: Tensors) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def prepare(self, case: Case, t: Tensors) -> Call:
        """All that precedes a measurement. The result is called for one."""
        make = self._op if case.level == "op" and self.has_ops else self._call
        return make(case.direction, t)

    def _call(self, direction: str, t: Tensors) -> Call:
        wanted = (t.x, t.weight, t.bias)
        if direction == "forward":
            return lambda: self.apply(t, True)
        if direction == "backward":
            edge = torch.autograd.graph.get_gradient_edge(self.apply(t, True))
            return lambda: torch.autograd.grad((edge,), wanted, t.dy, retain_graph=True)
        if direction == "step":
            return lambda: torch.autograd.grad(self.apply(t, True), wanted, t.dy)
        detached = Tensors(*(a.detach() for a in t))

        def without_grad() -> Any:
            with torch.no_grad():
                if direction == "derivative":
                    return self.derivative(detached)
                return self.apply(detached, False)

        return without_grad

    def _op(self, direction: str, t: Tensors) -> Call:
        t = Tensors(*(a.detach() for a in t))
        if direction in ("forward", "inference"):
            return lambda: self.op_forward(t, direction == "forward")
        if direction == "backward":
            saved = self.op_forward(t, True)[1:]
            return lambda: self.op_backward(t, saved)
        if direction == "step":
            return lambda: self.op_backward(t, self.op_forward(t, True)[1:])
        return lambda: self.derivative(t)

    def run_once(self, case: Case, t: Tensors) -> Results:
        """The results of one call by their names, running statistics included."""
        found = self.prepare(case, t)()
        found = (found,) if isinstance(found, Tensor) else tuple(found)
        results = dict(zip(RESULTS[case.direction], found, strict=False))
        if case.direction in ("forward", "step"):
            results.update(running_mean=t.running_mean, running_var=t.running_var)
        return results


class Bnext(Provider):
    name = "bnext"
    has_ops = True

    def apply(self, t: Tensors, training: bool) -> Tensor:
        return bnext.batchnorm2d(
            t.x, t.running_mean, t.running_var, t.weight, t.bias, training, MOMENTUM, EPS
        )

    def plan(self, case: Case) -> str | None:
        return plan_text(case) if case.device == "cuda" else None

    def op_forward(self, t: Tensors, training: bool) -> tuple[Tensor, ...]:
        if not training:
            return torch.ops.bnext.batchnorm2d_eval(
                t.x, t.running_mean, t.running_var, t.weight, t.bias, EPS
            )
        return torch.ops.bnext.batchnorm2d_forward(
            t.x, t.running_mean, t.running_var, None, t.weight, t.bias, training, MOMENTUM, EPS
        )

    def op_backward(self, t: Tensors, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = (True, True, True, False, False)  # what autograd asks for
        return torch.ops.bnext.batchnorm2d_backward(t.dy, t.x, t.weight, *saved, True, mask)

    def derivative(self, t: Tensors) -> tuple[Tensor, ...]:
        return bnext.batchnorm2d_backward(t.dy, t.x, t.weight, training=True, eps=EPS)


Settings = dict[str, str]


@contextlib.contextmanager
def forced(settings: Settings) -> Iterator[None]:
    """With these environment variables, BNEXT_CUDA_ before their names, which CUDA plans heed."""
    before = {f"BNEXT_CUDA_{name}": os.environ.get(f"BNEXT_CUDA_{name}", "") for name in settings}
    os.environ.update({f"BNEXT_CUDA_{name}": value for name, value in settings.items()})
    _C.read_environment()
    try:
        yield
    finally:
        os.environ.update(before)
        _C.read_environment()


def plans_of(case: Case, device: str = "cuda", **options: Any) -> list[dict[str, Any]]:
    """What bnext's CUDA kernels would do for a case: a plan for each of its passes."""
    x = meta_input(case.shape[:4], case.dtype, case.layout)
    plans = _C.cuda_plans(x, device, "", case.direction != "inference", **options)
    one_pass = case.direction in ("forward", "backward")
    return [p for p in plans if not one_pass or p["pass"] == case.direction]


def plan_text(case: Case, device: str = "cuda") -> str:
    """The same in words."""
    return "; ".join(plan["text"] for plan in plans_of(case, device))


class Variant(Bnext):
    """bnext with something forced that its CUDA plans heed, to see whether something else would be
    faster than what they choose."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = f"bnext-{name}"
        self.settings = settings

    def why_not(self, case: Case) -> str | None:
        if case.device != "cuda":
            return "plans are of CUDA kernels"
        return "it plans the same" if self.plan(case) == plan_text(case) else None

    def plan(self, case: Case) -> str | None:
        with forced(self.settings):
            return super().plan(case)

    def prepare(self, case: Case, t: Tensors) -> Call:
        # The forward pass of a backward case comes from wherever: it is not what is measured.
        call = super().prepare(case, t)

        def varied() -> Any:
            with forced(self.settings):
                return call()

        return varied


class Native(Provider):
    """PyTorch's own kernels."""

    name = "native"
    has_ops = True

    def rounds_often(self, case: Case) -> bool:
        """Its CUDA kernels for planes round every product and every partial sum of the derivative
        to the tensors' dtype (aten/src/ATen/native/cuda/Normalization.cuh, Float2)."""
        planes_of_halves = case.layout == "nchw" and case.dtype in ("bfloat16", "float16")
        derives = case.direction not in ("forward", "inference")
        return case.device == "cuda" and planes_of_halves and derives

    def apply(self, t: Tensors, training: bool) -> Tensor:
        if t.x.is_cuda:  # where F.batch_norm would take cuDNN
            return torch.native_batch_norm(
                t.x, t.weight, t.bias, t.running_mean, t.running_var, training, MOMENTUM, EPS
            )[0]
        return F.batch_norm(
            t.x, t.running_mean, t.running_var, t.weight, t.bias, training, MOMENTUM, EPS
        )

    def op_forward(self, t: Tensors, training: bool) -> tuple[Tensor, ...]:
        return aten.native_batch_norm(
            t.x, t.weight, t.bias, t.running_mean, t.running_var, training, MOMENTUM, EPS
        )

    def op_backward(self, t: Tensors, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return aten.native_batch_norm_backward(
            t.dy, t.x, t.weight, None, None, *saved, True, EPS, (True, True, True)
        )

    def derivative(self, t: Tensors) -> tuple[Tensor, ...]:
        # Given running statistics, because without them it refuses 16-bit inputs on a CPU.
        mean, var = aten.batch_norm_update_stats(t.x, t.running_mean, t.running_var, MOMENTUM)
        return self.op_backward(t, (mean, (var + EPS).rsqrt()))


class Cudnn(Provider):
    """cuDNN through PyTorch."""

    name = "cudnn"
    has_ops = True

    def why_not(self, case: Case) -> str | None:
        if case.device != "cuda":
            return "cuDNN runs on CUDA only"
        if case.shape.numel > 2**31 - 1:
            return "more than 2**31 - 1 elements"
        if case.dtype == "bfloat16":
            return "PyTorch calls it with parameters of bfloat16, never with those of float32"
        return no_derivative_alone("cuDNN") if case.direction == "derivative" else None

    def apply(self, t: Tensors, training: bool) -> Tensor:
        return torch.cudnn_batch_norm(
            t.x, t.weight, t.bias, t.running_mean, t.running_var, training, MOMENTUM, EPS
        )[0]

    def op_forward(self, t: Tensors, training: bool) -> tuple[Tensor, ...]:
        return aten.cudnn_batch_norm(
            t.x, t.weight, t.bias, t.running_mean, t.running_var, training, MOMENTUM, EPS
        )

    def op_backward(self, t: Tensors, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mean, invstd, reserve = saved
        return aten.cudnn_batch_norm_backward(
            t.x, t.dy, t.weight, None, None, mean, invstd, EPS, reserve
        )


def formula(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The derivative as the formula in the README says it, one PyTorch operation at a time."""
    dims = (0, 2, 3)
    m = x.shape[0] * x.shape[2] * x.shape[3]
    gamma = weight.view(1, -1, 1, 1)
    mean = x.mean(dims, keepdim=True)
    var = x.var(dims, unbiased=False, keepdim=True)
    std = torch.sqrt(var + EPS)
    xhat = (x - mean) / std
    dxhat = dy * gamma
    dvar = (-0.5 * dxhat * (x - mean)).sum(dims, keepdim=True) * (var + EPS) ** -1.5
    dmean = (-1.0 / std * dxhat).sum(dims, keepdim=True)
    dmean = dmean + dvar * (-2.0 * (x - mean)).sum(dims, keepdim=True) / m
    dx = dxhat / std + 2.0 * dvar * (x - mean) / m + dmean / m
    return dx, (dy * xhat).sum(dims), dy.sum(dims), dmean.flatten(), dvar.flatten()


class Formula(Provider):
    name = "formula"

    def rounds_often(self, case: Case) -> bool:
        return True

    def why_not(self, case: Case) -> str | None:
        if case.direction != "derivative":
            return "only a derivative: see direction derivative"
        return None

    def derivative(self, t: Tensors) -> tuple[Tensor, ...]:
        return formula(t.dy, t.x, t.weight)


class Inductor(Provider):
    """torch.compile of F.batch_norm, and of the formula; one compilation for each shape."""

    name = "inductor"

    def rounds_often(self, case: Case) -> bool:
        """A compiled formula keeps the roundings of what it fuses, or not: both are right."""
        return True

    def __init__(self) -> None:
        self.reset()

    def why_not(self, case: Case) -> str | None:
        return None if case.direction == "derivative" else super().why_not(case)

    def reset(self) -> None:
        # Else every call would look through the guards of all shapes before.
        torch._dynamo.reset()
        # The measured backward runs often on one graph, which the reuse of its buffers forbids. Of
        # batch norm only (C,) tensors are concerned.
        torch._functorch.config.donated_buffer = False
        self.batch_norm = torch.compile(F.batch_norm, dynamic=False)
        self.formula = torch.compile(formula, dynamic=False)

    def apply(self, t: Tensors, training: bool) -> Tensor:
        return self.batch_norm(
            t.x, t.running_mean, t.running_var, t.weight, t.bias, training, MOMENTUM, EPS
        )

    def derivative(self, t: Tensors) -> tuple[Tensor, ...]:
        return self.formula(t.dy, t.x, t.weight)


class CudnnFrontend(Provider):
    """cuDNN's graph API through its own Python package; see cudnn_frontend.py."""

    name = "cudnn-frontend"
    has_ops = True

    def __init__(self) -> None:
        self.graphs: Any = None

    def why_not(self, case: Case) -> str | None:
        if case.device != "cuda":
            return "cuDNN runs on CUDA only"
        if find_spec("cudnn") is None:
            return "not installed: pip install nvidia-cudnn-frontend"
        if case.level == "call":
            return "no autograd: see level op"
        return no_derivative_alone("cuDNN") if case.direction == "derivative" else None

    def reset(self) -> None:
        self.graphs = None

    def _graphs(self, t: Tensors) -> Any:
        from benchmarks.cudnn_frontend import Graphs

        if self.graphs is None or not self.graphs.fits(t):
            self.graphs = Graphs(t, MOMENTUM, EPS)
        return self.graphs

    def op_forward(self, t: Tensors, training: bool) -> tuple[Tensor, ...]:
        graphs = self._graphs(t)
        return graphs.forward(t) if training else graphs.inference(t)

    def op_backward(self, t: Tensors, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._graphs(t).backward(t, saved)


def floor_call(case: Case, t: Tensors) -> Call:
    """A PyTorch operation that moves the bytes that batch norm must move."""
    x, dy = t.x.detach(), t.dy
    if case.direction in ("forward", "inference"):
        return lambda: x.clone()
    if case.direction == "step":
        return lambda: (x.clone(), torch.add(x, dy))
    return lambda: torch.add(x, dy)


def floor_name(case: Case) -> str:
    return FLOORS[case.direction]


PROVIDERS: dict[str, type[Provider]] = {
    kind.name: kind for kind in (Bnext, Cudnn, Native, Inductor, CudnnFrontend, Formula)
}

# Besides the contestants: bnext with each family of its CUDA kernels, with no persistent blocks,
# with no packs in registers, with all blocks beginning together, with L2 asked for nothing early,
# and with a pass's kernels apart.
VARIANTS = (
    *(functools.partial(Variant, name, {"FAMILY": name}) for name in _C.cuda_families()),
    functools.partial(Variant, "one-slab", {"PERSISTENT": "0"}),
    functools.partial(Variant, "slots", {"REGISTERS": "0"}),
    functools.partial(Variant, "together", {"LATE": "0"}),
    functools.partial(Variant, "unasked", {"EARLY": "0"}),
    functools.partial(Variant, "apart", {"OVERLAP": "0"}),
)
