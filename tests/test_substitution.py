"""F.batch_norm replaced by ours for 4-D input, under torch's own layers, samples and checks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_modules import near, same_state
from test_networks import NETWORKS, build, same, train
from test_opinfo import DTYPES, OPERATOR, fresh, module_inputs, operator_samples
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bnext

compliance = pytest.importorskip("torch.testing._internal.composite_compliance")
THEIRS = F.batch_norm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Replaces F.batch_norm, which torch's layers call; the shapes that went to ours."""
    shapes = []

    def batch_norm(input: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if input.dim() != 4:
            return THEIRS(input, *arguments, **keywords)
        shapes.append(input.shape)
        return bnext.batchnorm2d(input, *arguments, **keywords)

    monkeypatch.setattr(F, "batch_norm", batch_norm)
    return shapes


@pytest.mark.parametrize("training", [True, False])
def test_module_samples(training: bool, calls: list, device: str) -> None:
    """Each of ModuleInfo's layers through what torch's generic tests of modules do with it."""
    for sample in module_inputs(torch.float64, device, training):
        made, (x,) = sample.constructor_input, sample.forward_input.args
        layer = nn.BatchNorm2d(*made.args, **made.kwargs, device=device, dtype=torch.float64)
        layer.train(training)
        if not x.numel():
            continue
        before = copy.deepcopy(layer)
        for copied in (pickle.loads(pickle.dumps(layer)), through_a_file(layer)):
            near(copied(x), copy.deepcopy(before)(x))
        # input and its gradient with gaps between their elements
        gaps = x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()
        dense = x.detach().clone().requires_grad_()
        outputs = [copy.deepcopy(layer)(t) for t in (gaps, dense)]
        dy = torch.linspace(-1, 1, 2 * x.numel(), device=device, dtype=x.dtype)[::2].view(x.shape)
        gradients = [
            torch.autograd.grad(outputs[0], gaps, dy)[0],
            torch.autograd.grad(outputs[1], dense, dy.contiguous())[0],
        ]
        near(*outputs)
        near(*gradients)

        def call(x: Tensor, *parameters: Tensor) -> Tensor:
            names = [name for name, _ in layer.named_parameters()]  # noqa: B023
            given = dict(zip(names, parameters, strict=True))
            own = {name: b.clone() for name, b in layer.named_buffers()}  # noqa: B023
            return torch.func.functional_call(layer, {**given, **own}, (x,))  # noqa: B023

        leaves = (dense, *layer.parameters())
        assert gradcheck(call, leaves, fast_mode=True)
        assert gradgradcheck(call, leaves, fast_mode=True)
    assert calls


def through_a_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_dtypes(device: str) -> None:
    """What OpInfo says is supported is accepted, and nothing else."""
    claimed = OPERATOR.supported_dtypes(device)
    assert set(DTYPES) <= set(claimed)
    for dtype in {torch.complex64, torch.int64, torch.uint8, torch.bool} - set(claimed):
        x = torch.ones(2, 3, 2, 2, device=device).to(dtype)
        for call in (bnext.batchnorm2d, F.batch_norm):
            with pytest.raises(RuntimeError):
                call(x, None, None, training=True)


def test_composite_compliance(device: str) -> None:
    """Any mix of plain tensors and subclasses that wrap them, forward and backward."""
    for x, arguments, keywords in operator_samples(torch.float64, device):
        given = (bnext.batchnorm2d, [x, *arguments], keywords)
        compliance.check_with_mode(*given, torch.testing.assert_close)
        compliance.check_all_permutations(*given, torch.testing.assert_close)
        leaves = [x.detach().requires_grad_(), *fresh(arguments, torch.float64)]
        compliance.check_backward_formula(
            bnext.batchnorm2d, leaves, keywords, assert_equal_fn=torch.testing.assert_close
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_plain_torch(name: str, device: str, request: pytest.FixtureRequest) -> None:
    """A network that was never converted, with and without the replacement."""
    theirs = build(name).to(device)
    ours = copy.deepcopy(theirs)
    layout = torch.contiguous_format
    want = train(theirs, theirs, layout, device)
    calls = request.getfixturevalue("calls")
    same(train(ours, ours, layout, device), want)
    same_state(ours, theirs)
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert len(calls) >= 4 * layers


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_other_dimensions_stay(make: Callable[[int], nn.Module], calls: list) -> None:
    shape = (4, 3) if make is nn.BatchNorm1d else (4, 3, 2, 2, 2)
    make(3)(torch.randn(shape))
    assert not calls
