"""The tape: hooks, anomaly mode, versions, freed graphs, modes, and what a layer keeps in memory.

Each behaviour is F.batch_norm's own, run beside it, but for what a test's docstring says.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import bnext

SHAPE = (3, 5, 4, 6)
BOTH = (bnext.batchnorm2d, F.batch_norm)
Call = Callable[..., Any]


def leaves_of(case: cases.Case) -> list[Tensor]:
    tensors = (case.input, case.weight, case.bias)
    return [t.detach().clone().requires_grad_() for t in tensors]


def call_on(call: Call, case: cases.Case, leaves: list[Tensor]) -> Tensor:
    x, weight, bias = leaves
    return call(x, **(case.arguments | {"weight": weight, "bias": bias}))


def compare(scenario: Call, mode: str, device: str, dtypes: str = "float64") -> None:
    """The same results, or an error of the same type that begins with the same words."""
    outcomes = []
    for call in BOTH:
        case = cases.make_case(SHAPE, dtypes, mode=mode, device=device)
        try:
            outcomes.append(scenario(call, case))
        except Exception as error:  # whatever the reference raises
            outcomes.append(error)
    ours, theirs = outcomes
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{ours!r} and not {theirs!r}"
        assert str(ours).split()[:5] == str(theirs).split()[:5]
        return
    if isinstance(ours, Exception):
        raise ours
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


SCENARIOS: dict[str, Call] = {}


def scenario(function: Call) -> Call:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def backward_twice(call: Call, case: cases.Case) -> Any:
    y = call_on(call, case, leaves_of(case)).sum()
    y.backward()
    y.backward()


@scenario
def retain_graph(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    y = call_on(call, case, leaves)
    for _ in range(3):
        y.backward(case.grad_output, retain_graph=True)
    return [t.grad for t in leaves]


@scenario
def hooks_on_tensors(call: Call, case: cases.Case) -> Any:
    """Seen and replaced: on the output, on the leaves before and after accumulation."""
    leaves, seen = leaves_of(case), []
    y = call_on(call, case, leaves)
    y.register_hook(lambda g: (seen.append(g.clone()), 2 * g)[1])
    y.retain_grad()
    for t in leaves:
        t.register_hook(lambda g: g + 1)
        t.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    y.backward(case.grad_output)
    return [y.grad, *seen]


@scenario
def hooks_on_the_node(call: Call, case: cases.Case) -> Any:
    leaves, seen = leaves_of(case), []
    y = call_on(call, case, leaves)
    y.grad_fn.register_prehook(lambda grads: tuple(3 * g for g in grads))
    y.grad_fn.register_hook(lambda after, before: seen.append([g for g in after if g is not None]))
    y.backward(case.grad_output)
    return seen


@scenario
def anomaly_mode(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        (dx,) = torch.autograd.grad(
            call_on(call, case, leaves), leaves[0], case.grad_output, create_graph=True
        )
        return torch.autograd.grad(dx.square().sum(), leaves[1])


@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_mode_finds_nan(device: str) -> None:
    """It names the node, and its 0th output."""
    for call in BOTH:
        case = cases.make_case(SHAPE, device=device)
        y = call_on(call, case, leaves_of(case))
        with (
            pytest.warns(UserWarning, match="Anomaly Detection"),
            torch.autograd.detect_anomaly(),
            pytest.raises(RuntimeError, match=r"'\w+' returned nan values in its 0th output"),
        ):
            y.backward(case.grad_output * torch.nan)


@scenario
def saved_tensors_through_hooks(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    with saved_tensors_hooks(lambda t: t.cpu().clone(), lambda t: t.to(case.input.device)):
        y = call_on(call, case, leaves)
    return torch.autograd.grad(y, leaves, case.grad_output)


@scenario
def saved_on_cpu(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    with save_on_cpu():
        y = call_on(call, case, leaves)
    return torch.autograd.grad(y, leaves, case.grad_output)


@scenario
def input_changed_before_backward(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    x = leaves[0] * 1
    y = call_on(call, case, [x, *leaves[1:]])
    x.add_(1)
    y.sum().backward()


@scenario
def weight_changed_before_backward(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    y = call_on(call, case, leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    y.sum().backward()


@scenario
def bias_and_output_changed_before_backward(call: Call, case: cases.Case) -> Any:
    """Neither is saved: a ReLU in place after batch norm is the usual network."""
    leaves = leaves_of(case)
    y = call_on(call, case, leaves).relu_()
    with torch.no_grad():
        leaves[2].zero_()
    return torch.autograd.grad(y, leaves, case.grad_output)


@scenario
def partial_gradients(call: Call, case: cases.Case) -> Any:
    """Of every subset of the leaves, asked of grad() and of backward(inputs=)."""
    results = []
    for size in (1, 2, 3):
        for which in itertools.combinations(range(3), size):
            leaves = leaves_of(case)
            wanted = [leaves[i] for i in which]
            y = call_on(call, case, leaves)
            results += torch.autograd.grad(y, wanted, case.grad_output, retain_graph=True)
            y.backward(case.grad_output, inputs=wanted)
            results.append([t.grad for t in leaves if t.grad is not None])
    return results


@scenario
def constants_among_the_leaves(call: Call, case: cases.Case) -> Any:
    results = []
    for needs in itertools.product([False, True], repeat=3):
        leaves = [t.requires_grad_(n) for t, n in zip(leaves_of(case), needs, strict=True)]
        y = call_on(call, case, leaves)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.backward(case.grad_output)
        results.append([y.detach(), *(t.grad for t in leaves if t.grad is not None)])
    return results


@scenario
def shared_input(call: Call, case: cases.Case) -> Any:
    """Gradients of two uses add up."""
    leaves = leaves_of(case)
    y = call_on(call, case, leaves) * call_on(call, case, leaves)
    return torch.autograd.grad(y, leaves, case.grad_output)


@scenario
def expanded_gradient(call: Call, case: cases.Case) -> Any:
    """What sum() sends back: one number, in every place."""
    leaves = leaves_of(case)
    return torch.autograd.grad(call_on(call, case, leaves).sum(), leaves)


@scenario
def inference_mode(call: Call, case: cases.Case) -> Any:
    with torch.inference_mode():
        y = call_on(call, case, leaves_of(case))
    assert y.is_inference()
    assert not y.requires_grad
    return y.clone()


@scenario
def inference_mode_with_gradients_on(call: Call, case: cases.Case) -> Any:
    """There are none all the same. The layer has updated its statistics, as ever."""
    with torch.inference_mode(), torch.enable_grad():
        y = call_on(call, case, leaves_of(case))
    assert y.is_inference()
    assert not y.requires_grad
    return y.clone()


@scenario
def inference_tensor_with_gradients(call: Call, case: cases.Case) -> Any:
    """It cannot be saved for a backward pass."""
    leaves = leaves_of(case)
    with torch.inference_mode():
        x = case.input.clone()
    return call_on(call, case, [x, *leaves[1:]])


@scenario
def no_grad(call: Call, case: cases.Case) -> Any:
    with torch.no_grad():
        y = call_on(call, case, leaves_of(case))
        assert not y.requires_grad
        with torch.enable_grad():
            assert call_on(call, case, leaves_of(case)).requires_grad
    return y


@scenario
def gradient_that_never_comes(call: Call, case: cases.Case) -> Any:
    leaves = leaves_of(case)
    (y,) = cases.Dropped.apply(call_on(call, case, leaves))
    return torch.autograd.grad(y, leaves, case.grad_output, allow_unused=True)


@scenario
def gradient_of_another_shape(call: Call, case: cases.Case) -> Any:
    call_on(call, case, leaves_of(case)).backward(case.grad_output[:1])


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_as_pytorch(name: str, mode: str, device: str) -> None:
    compare(SCENARIOS[name], mode, device)


def test_nothing_lives_on(device: str) -> None:
    """No cycle: input and output go with their last reference, without the garbage collector."""
    gc.disable()
    try:
        case = cases.make_case(SHAPE, device=device)
        leaves = leaves_of(case)
        x = leaves[0] * 1
        y = call_on(bnext.batchnorm2d, case, [x, *leaves[1:]])
        y.backward(case.grad_output)
        alive = [weakref.ref(x), weakref.ref(y), weakref.ref(y.grad_fn)]
        del x, y
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


# ---- what a layer keeps --------------------------------------------------------------------------


def kept_bytes(call: Call, case: cases.Case, leaves: list[Tensor]) -> tuple[int, int]:
    """Bytes saved for backward: all that is of the input's size, and what is new besides."""
    saved: list[Tensor] = []
    arguments = case.arguments | {"weight": leaves[1], "bias": leaves[2]}
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = call(leaves[0], **arguments)
    known = [t for t in (*leaves, y, *arguments.values()) if isinstance(t, Tensor)]
    known_storages = {t.untyped_storage().data_ptr() for t in known}
    activations = sum(t.nbytes for t in saved if t.numel() == leaves[0].numel())
    new = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in saved
        if t.untyped_storage().data_ptr() not in known_storages
    }
    return activations, sum(new.values())


# mean and invstd. PyTorch keeps 8 bytes of them for a batch (4 for bfloat16 on a CPU) and none in
# eval mode. On a CPU they are float64 here, which is what makes gradients exact. In eval mode they
# are a copy of the running statistics: a later batch may change those before backward, where
# PyTorch's gradients go wrong.
STATISTICS_BYTES = {"cpu": 16, "cuda": 8}


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32", "float16-float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "cropped"])
def test_kept_memory(layout: str, dtypes: str, mode: str, device: str) -> None:
    """The input once, as PyTorch does, and two numbers per channel."""
    case = cases.make_case(SHAPE, dtypes, mode=mode, layout=layout, device=device)
    case.input.requires_grad_()
    leaves = [case.input, case.weight.requires_grad_(), case.bias.requires_grad_()]
    ours, theirs = (kept_bytes(call, case, leaves) for call in BOTH)
    assert ours[0] == theirs[0] == case.input.nbytes
    assert ours[1] == STATISTICS_BYTES[device] * SHAPE[1]
    if device == "cuda" and mode != "eval":
        assert ours[1] <= theirs[1]


def test_a_frozen_layer_keeps_no_activation(device: str) -> None:
    """dx = weight * invstd * dy asks for nothing else. PyTorch keeps the input here."""
    case = cases.make_case(SHAPE, mode="eval", device=device)
    leaves = [case.input.requires_grad_(), case.weight, case.bias]
    ours, theirs = (kept_bytes(call, case, leaves) for call in BOTH)
    assert ours[0] == 0
    assert theirs[0] == case.input.nbytes
    x = case.input * 1
    y = call_on(bnext.batchnorm2d, case, [x, case.weight, case.bias])
    x.zero_()  # so the input may change, where PyTorch raises
    (got,) = torch.autograd.grad(y, case.input, case.grad_output)
    (want,) = torch.autograd.grad(call_on(F.batch_norm, case, leaves), case.input, case.grad_output)
    torch.testing.assert_close(got, want)


def test_later_batches_do_not_reach_into_eval(device: str) -> None:
    """The derivative of an eval pass is that of the statistics it used."""
    case = cases.make_case(SHAPE, "float64", mode="eval", device=device)
    leaves = leaves_of(case)
    arguments = case.arguments
    y = bnext.batchnorm2d(leaves[0], **arguments)
    (want,) = torch.autograd.grad(y, leaves[0], case.grad_output, retain_graph=True)
    bnext.batchnorm2d(case.input * 3, **(arguments | {"training": True}))
    (got,) = torch.autograd.grad(y, leaves[0], case.grad_output)
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtypes", ["float32", "float16-float32"])
def test_allocated_memory(dtypes: str, mode: str) -> None:
    """What the allocator says: no more than PyTorch, but for a block for the statistics of eval."""
    kept = []
    for call in BOTH:
        case = cases.make_case((8, 64, 32, 32), dtypes, mode=mode, device="cuda")
        leaves, arguments = leaves_of(case), case.arguments
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = call(leaves[0], **(arguments | {"weight": leaves[1], "bias": leaves[2]}))
        kept.append(torch.cuda.memory_allocated() - before)
        del y
    assert kept[0] <= kept[1] + (2 * 512 if mode == "eval" else 0)
