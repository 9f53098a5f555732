"""Layers that are not plain: lazy, parametrized, hooked, frozen, on meta, in shared memory."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from multiprocessing.reduction import ForkingPickler

import cases
import pytest
import torch
from test_modules import SHAPE, near, pair, same_state
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bnext


def data(seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return cases.random_tensor(SHAPE, dtype, seed, 1.0).to(device)


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one call."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def same_step(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for a, b in zip(step(ours, x), step(theirs, x), strict=True):
        near(a, b)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
def test_lazy(options: dict, device: str) -> None:
    """Converted before its first input, a lazy layer becomes ours with it; reverted, torch's."""

    def make() -> nn.Sequential:
        return nn.Sequential(nn.LazyBatchNorm2d(**options, dtype=torch.float64).to(device))

    ours, theirs, back = bnext.convert(make()), make(), bnext.revert(bnext.convert(make()))
    assert type(ours[0]) is bnext.LazyBatchNorm2d
    assert type(back[0]) is nn.LazyBatchNorm2d
    for number in range(3):
        same_step(ours, theirs, data(number, device))
        back(data(number, device))
    assert type(ours[0]) is bnext.BatchNorm2d
    assert type(back[0]) is nn.BatchNorm2d
    same_state(ours, theirs)
    same_state(back, theirs)
    # A lazy layer takes the state of one that is not, and the other way round.
    fresh = bnext.LazyBatchNorm2d(**options, dtype=torch.float64, device=device)
    fresh.load_state_dict(theirs[0].state_dict())
    same_state(fresh, theirs[0])
    with pytest.raises(ValueError, match="expected 4D input"):
        bnext.LazyBatchNorm2d()(torch.zeros(2, 3))


class Softplus(nn.Module):
    """Keeps a weight positive."""

    def forward(self, raw: Tensor) -> Tensor:
        return nn.functional.softplus(raw)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.expm1().log()


def test_parametrized(device: str) -> None:
    """Parametrized before or after conversion; a copy stays what it was; and back."""
    _, plain = pair()
    plain.to(device)
    before, after = bnext.convert(copy.deepcopy(plain)), copy.deepcopy(plain)
    for layer in (before, after, plain):
        parametrize.register_parametrization(layer, "weight", Softplus())
        parametrizations.spectral_norm(layer, "bias", n_power_iterations=1)
    twin = copy.deepcopy(after)
    bnext.convert(after)
    assert isinstance(after, bnext.BatchNorm2d)
    assert not isinstance(twin, bnext.BatchNorm2d)
    assert parametrize.type_before_parametrizations(after) is bnext.BatchNorm2d
    for number in range(2):
        outcome = step(plain, data(number, device))
        for layer in (before, after, twin):
            for a, b in zip(step(layer, data(number, device)), outcome, strict=True):
                near(a, b)
    bnext.revert(after)
    assert parametrize.type_before_parametrizations(after) is nn.BatchNorm2d
    same_step(after, plain, data(5, device))
    bnext.convert(after)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(after, name)
        parametrize.remove_parametrizations(plain, name)
    assert type(after) is bnext.BatchNorm2d
    same_step(after, plain, data(6, device))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_hooks_that_compute_the_weight(kind: str, device: str) -> None:
    """The older kind of weight_norm and spectral_norm, and pruning, are forward pre-hooks."""

    def make() -> nn.Module:
        layer = pair()[1].to(device)
        if kind == "weight_norm":
            return nn.utils.weight_norm(layer, "weight")
        if kind == "spectral_norm":
            return nn.utils.spectral_norm(layer, "weight")
        return prune.l1_unstructured(layer, "weight", 0.5)

    ours = bnext.convert(make())
    assert type(ours) is bnext.BatchNorm2d
    same_step(ours, make(), data(0, device))


@pytest.mark.parametrize("training", [True, False])
def test_frozen(training: bool, device: str) -> None:
    """Any of x, weight and bias may ask for no gradient: the others get the same one."""
    for wanted in itertools.product([True, False], repeat=3):
        ours, theirs = (layer.to(device).train(training) for layer in pair())
        outcomes = []
        for layer in (ours, theirs):
            x = data(0, device).requires_grad_(wanted[0])
            layer.weight.requires_grad_(wanted[1])
            layer.bias.requires_grad_(wanted[2])
            y = layer(x)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.square().sum().backward()
            outcomes.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad])
        for name, wants, a, b in zip("ydwb", (True, *wanted), *outcomes, strict=True):
            assert (a is not None) == wants, (name, wanted)
            assert (b is None) == (a is None)
            if a is not None:
                near(a, b)
        same_state(ours, theirs)


def test_flags_devices_and_dtypes_stay() -> None:
    """What a layer is besides its class is not touched, there and back."""
    model = nn.Sequential(
        nn.BatchNorm2d(3, dtype=torch.bfloat16).eval(),
        nn.BatchNorm2d(3, dtype=torch.float64).requires_grad_(False),
        nn.BatchNorm2d(3, device="meta"),
    )
    model.append(model[0])
    model[1].weight.requires_grad_(True)
    model[1].register_forward_pre_hook(lambda *_: None)
    model[1].register_full_backward_hook(lambda *_: None)
    model[1].register_state_dict_post_hook(lambda *_: None)
    before = [dict(vars(layer)) for layer in model]
    bnext.convert(model)
    assert [vars(layer) for layer in model] == before
    assert all(type(layer) is bnext.BatchNorm2d for layer in model)
    assert model[3] is model[0]
    bnext.revert(model)
    assert [vars(layer) for layer in model] == before
    assert all(type(layer) is nn.BatchNorm2d for layer in model)


class Scaled(bnext.BatchNorm2d):
    """A user's layer on ours."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclasses_of_ours() -> None:
    """They run on our kernels, and neither convert nor revert touches them."""
    layer = Scaled(4)
    x = torch.randn(2, 4, 3, 3)
    want = 2 * bnext.batchnorm2d(x, training=True)
    for change in (bnext.convert, bnext.revert):
        assert type(change(nn.Sequential(layer))[0]) is Scaled
        assert torch.equal(layer(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one, as timm has it: convert leaves it alone."""

    def __init__(self, channels: int, **options: object) -> None:
        super().__init__(channels, **options)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class OurNormAct(bnext.BatchNorm2d, NormAct):
    """The same with bnext's layer before torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(bnext.BatchNorm2d.forward(self, x))


def test_a_subclass_with_an_activation(device: str) -> None:
    """The way for a user's own layer: a class with both as bases, and layers changed to it."""
    theirs = NormAct(SHAPE[1], dtype=torch.float64, device=device)
    ours = bnext.convert(copy.deepcopy(theirs))
    assert type(ours) is NormAct
    ours.__class__ = OurNormAct
    for number in range(2):
        same_step(ours, theirs, data(number, device))
    same_step(ours.eval(), theirs.eval(), data(2, device))


def test_meta_and_swapped_tensors() -> None:
    """Built without data and materialised later; and tensors swapped instead of copied."""
    _, theirs = pair()
    with torch.device("meta"):
        made = bnext.BatchNorm2d(SHAPE[1], dtype=torch.float64)
    changed = bnext.convert(nn.BatchNorm2d(SHAPE[1], device="meta", dtype=torch.float64))
    for layer in (made, changed):
        layer.to_empty(device="cpu").load_state_dict(theirs.state_dict())
        same_step(layer, copy.deepcopy(theirs), data())
    fresh = bnext.BatchNorm2d(SHAPE[1], device="meta").to_empty(device="cpu")
    fresh.reset_parameters()
    same_state(fresh, nn.BatchNorm2d(SHAPE[1]))
    with torch.device("meta"):
        assigned = bnext.BatchNorm2d(SHAPE[1])
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assigned.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert assigned.running_var.dtype == torch.float64
    x = data()
    torch.testing.assert_close(assigned.eval()(x), theirs.eval()(x), rtol=1e-6, atol=1e-6)


def test_class_survives_every_pickle_protocol() -> None:
    """The name that instances show to torch.fx is not the one that pickle finds the class by."""
    assert bnext.BatchNorm2d(3).__module__.startswith("torch.nn")
    for kind in (bnext.BatchNorm2d, bnext.LazyBatchNorm2d):
        assert kind.__module__ == "bnext.modules"
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(kind, protocol)) is kind
    layer = bnext.BatchNorm2d(3)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(layer, protocol))) is bnext.BatchNorm2d


def test_weights_only() -> None:
    """A whole model loads without arbitrary code once its classes are allowed."""
    file = io.BytesIO()
    torch.save(bnext.BatchNorm2d(3), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"bnext\.modules\.BatchNorm2d"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([bnext.BatchNorm2d]):
        assert type(torch.load(file, weights_only=True)) is bnext.BatchNorm2d


def test_shared_memory() -> None:
    """As workers get a model: the copy in another process would write to the same statistics."""
    layer = bnext.BatchNorm2d(4).share_memory()
    twin = pickle.loads(ForkingPickler.dumps(layer))
    assert type(twin) is bnext.BatchNorm2d
    twin(torch.randn(2, 4, 3, 3) + 5)
    assert layer.running_mean.is_shared()
    assert layer.running_mean.min() > 0.25  # a tenth of about 5
    assert layer.num_batches_tracked.item() == 1


def test_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    ours, theirs = pair()
    ours(data())
    safetensors.save_model(ours, str(tmp_path / "model.safetensors"))
    safetensors.load_model(theirs, str(tmp_path / "model.safetensors"))
    same_state(ours, theirs)


def test_functional_call_takes_buffers(device: str) -> None:
    """The statistics that are written to are the ones that were handed over."""
    layer = bnext.BatchNorm2d(SHAPE[1], momentum=None, dtype=torch.float64, device=device)
    kept = copy.deepcopy(layer.state_dict())
    given = {name: t.detach().clone() for name, t in layer.state_dict(keep_vars=True).items()}
    torch.func.functional_call(layer, given, (data(0, device),))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert given["num_batches_tracked"].item() == 1
    near(given["running_mean"], data(0, device).mean((0, 2, 3)))
