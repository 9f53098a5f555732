"""The layer beside torch.nn's: state, options, copies, and the way of a model there and back."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import cases
import pytest
import reference
import torch
from torch import Tensor, nn

import bnext

SHAPE = (4, 5, 6, 7)
# (momentum, affine, track_running_stats)
OPTIONS = list(itertools.product([0.1, None, 0.0, 1.0, 0, 1, -1.2], [True, False], [True, False]))


@pytest.mark.parametrize("ours", [bnext.BatchNorm2d, bnext.LazyBatchNorm2d])
def test_constructors_are_those_of_torch(ours: type) -> None:
    """Names, order and defaults of what may be given by position, and no other keywords."""
    theirs = nn.BatchNorm2d if ours is bnext.BatchNorm2d else nn.LazyBatchNorm2d
    parameters, expected = (inspect.signature(cls).parameters for cls in (ours, theirs))
    found = {name: p.default for name, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    want = {name: p.default for name, p in expected.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    assert list(found.items()) == list(want.items())
    with pytest.raises(TypeError, match="unexpected keyword argument 'mometum'"):
        ours(*([3] if ours is bnext.BatchNorm2d else []), mometum=0.1)


def test_a_class_between_ours_and_that_of_torch() -> None:
    """As docs/compatibility.md has it for timm: it gets what was given, by name."""

    class Activated(nn.BatchNorm2d):
        def __init__(
            self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True,
            track_running_stats: bool = True, apply_act: bool = True, **options: Any,
        ) -> None:  # fmt: skip
            super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
            self.apply_act = apply_act

    class Both(bnext.BatchNorm2d, Activated):
        pass

    assert Both(3).apply_act and not Both(3, apply_act=False).apply_act
    assert Both(3, dtype=torch.float64).weight.dtype == torch.float64


def test_checks_of_a_subclass_are_made() -> None:
    class Even(bnext.BatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:
            super()._check_input_dim(input)
            if input.shape[-1] % 2:
                raise ValueError("odd width")

    layer = Even(3)
    layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="odd width"):
        layer(torch.randn(2, 3, 4, 5))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
def test_a_count_that_was_cast_with_the_layer(
    dtype: torch.dtype, momentum: float | None, device: str
) -> None:
    """As `Module.type` does, and `load_state_dict(assign=True)` may: it counts as torch's does."""
    layers = [
        cls(3, momentum=momentum, device=device) for cls in (nn.BatchNorm2d, bnext.BatchNorm2d)
    ]
    for layer in layers:
        layer.num_batches_tracked = layer.num_batches_tracked.to(dtype)
    ours = layers[1]
    version = ours.num_batches_tracked._version
    for _ in range(2):
        x = torch.randn(2, 3, 4, 4, device=device)
        for layer in layers:
            layer(x)
    for theirs, found in zip(layers[0].buffers(), ours.buffers(), strict=True):
        assert found.dtype == theirs.dtype
        torch.testing.assert_close(found, theirs)
    assert ours.num_batches_tracked == 2
    assert ours.num_batches_tracked._version > version
    with pytest.raises(ValueError, match="4D input"):
        ours(x[0])
    assert ours.num_batches_tracked == 2


def test_training_is_what_is_true() -> None:
    layer = bnext.BatchNorm2d(3)
    for training in (1, 0):
        layer.training = training
        layer(torch.randn(2, 3, 4, 4))
        assert layer.num_batches_tracked == 1


def near(got: Tensor, want: Tensor) -> None:
    """Equal but for the order of a few hundred float64 roundings. NaN equals NaN."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


def same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        near(left[name], right[name])


def pair(**options: object) -> tuple[bnext.BatchNorm2d, nn.BatchNorm2d]:
    """Two layers of float64 with the same random state."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(SHAPE[1], dtype=torch.float64, **options)
    for tensor in itertools.chain(theirs.parameters(), theirs.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    ours = bnext.BatchNorm2d(SHAPE[1], dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


class Residual(nn.Module):
    """Layers in every kind of container, one of them at two places."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        shared = nn.BatchNorm2d(channels)
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), shared, nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.BatchNorm2d(channels, momentum=None), "act": nn.Tanh()})
            for _ in range(2)
        )
        self.again = shared
        self.last = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)
        self.head = nn.BatchNorm1d(channels)
        self.missing = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block["act"](block["norm"](x))
        x = self.last(self.again(x))
        return self.head(x.mean((2, 3)))


def train(model: nn.Module, dtype: torch.dtype = torch.float64, steps: int = 3) -> list[Tensor]:
    """Losses of a few steps of gradient descent, the gradients of the last, and an eval output."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    results = []
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 5, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        loss = (model(x) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        results.append(loss.detach())
    results += [p.grad for p in model.parameters()]
    training = model.training
    model.eval()
    results.append(model(x).detach())
    model.train(training)
    return results


def test_signature_is_that_of_torch() -> None:
    assert issubclass(bnext.BatchNorm2d, nn.BatchNorm2d)
    layer = bnext.BatchNorm2d(7)
    assert repr(layer) == repr(nn.BatchNorm2d(7))
    assert layer.state_dict().keys() == nn.BatchNorm2d(7).state_dict().keys()


def test_constructor_passes_everything_on() -> None:
    layer = bnext.BatchNorm2d(3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    assert (layer.eps, layer.momentum) == (1e-3, 0.2)
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64
    assert bnext.BatchNorm2d(3, device="meta").weight.is_meta
    # Keywords that newer versions of torch add must work when torch has them.
    known = inspect.signature(nn.BatchNorm2d.__init__).parameters
    if "bias" in known:
        layer = bnext.BatchNorm2d(3, bias=False)
        assert layer.weight is not None
        assert layer.bias is None
    with pytest.raises(TypeError, match="nonsense"):
        bnext.BatchNorm2d(3, nonsense=1)


@pytest.mark.parametrize("momentum, affine, track", OPTIONS)
def test_options(momentum: float | None, affine: bool, track: bool, device: str) -> None:
    """Several batches in training, then eval, then training again, beside nn.BatchNorm2d.

    A negative momentum makes running variances negative and eval outputs NaN, in both.
    """
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track}
    ours, theirs = (layer.to(device) for layer in pair(**options))
    for step, training in enumerate((True, True, False, True, False)):
        ours.train(training)
        theirs.train(training)
        x = cases.random_tensor(SHAPE, torch.float64, step, 1.0).to(device)
        mine, yours = (x.clone().requires_grad_() for _ in range(2))
        got, want = ours(mine), theirs(yours)
        near(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        near(mine.grad, yours.grad)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            near(a.grad, b.grad)
        same_state(ours, theirs)


def test_cumulative_average(device: str) -> None:
    """momentum=None: after n batches the plain mean of their statistics."""
    layer = bnext.BatchNorm2d(5, momentum=None, dtype=torch.float64).to(device)
    batches = [cases.random_tensor(SHAPE, torch.float64, n, 1.0).to(device) for n in range(4)]
    for number, x in enumerate(batches, start=1):
        layer(x)
        assert layer.num_batches_tracked.item() == number
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.var((0, 2, 3)) for x in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    torch.testing.assert_close(layer.running_var, variances.mean(0))
    layer.reset_running_stats()
    layer(batches[0])
    torch.testing.assert_close(layer.running_mean, means[0])


def test_bias_off() -> None:
    if "bias" not in inspect.signature(nn.BatchNorm2d.__init__).parameters:
        pytest.skip("this torch has no bias option")
    ours, theirs = pair(bias=False)
    x = cases.random_tensor(SHAPE, torch.float64, 0, 1.0)
    torch.testing.assert_close(ours(x), theirs(x))
    assert type(bnext.convert(theirs)) is bnext.BatchNorm2d


@pytest.mark.parametrize("training", [True, False])
def test_tracking_switched_after_construction(training: bool) -> None:
    """The flag and the buffers decide separately, as in nn.BatchNorm2d."""
    x = cases.random_tensor(SHAPE, torch.float64, 0, 1.0)
    for changes in (
        {"track_running_stats": False},
        {"num_batches_tracked": None},
        {"num_batches_tracked": None, "momentum": None},
        {"running_mean": None, "running_var": None},
        {"running_mean": None, "running_var": None, "track_running_stats": False},
    ):
        ours, theirs = (layer.train(training) for layer in pair())
        for layer, (name, value) in itertools.product((ours, theirs), changes.items()):
            setattr(layer, name, value)
        torch.testing.assert_close(ours(x), theirs(x), msg=str(changes))
        same_state(ours, theirs)


def test_empty_batch_counts_for_nothing() -> None:
    layer = bnext.BatchNorm2d(4, momentum=None)
    assert layer(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert layer.num_batches_tracked.item() == 0
    assert torch.equal(layer.running_var, torch.ones(4))


def test_eval_does_not_count(device: str) -> None:
    layer = bnext.BatchNorm2d(5, dtype=torch.float64, device=device).eval()
    layer(cases.random_tensor(SHAPE, torch.float64, 0, 1.0).to(device))
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_models(half: torch.dtype, device: str) -> None:
    """A model cast whole, one with float32 layers, and autocast."""
    x = cases.random_tensor(SHAPE, half, 0, 1.0).to(device)
    for layer in (bnext.BatchNorm2d(5, dtype=half), bnext.BatchNorm2d(5)):
        layer.to(device)
        stats = [layer.running_mean.clone(), layer.running_var.clone()]
        want = reference.forward(x, *stats, layer.weight, layer.bias, training=True)
        y = layer(x)
        assert y.dtype == half
        want.output.check(y, str(layer.weight.dtype))
        want.running_var.check(layer.running_var, "running_var")
        y.float().sum().backward()
        assert layer.weight.grad.dtype == layer.weight.dtype
    model = nn.Sequential(nn.Conv2d(5, 5, 3), bnext.BatchNorm2d(5)).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = model(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.1, None])
def test_state_dict_both_ways(momentum: float | None) -> None:
    ours, theirs = pair(momentum=momentum)
    ours(cases.random_tensor(SHAPE, torch.float64, 0, 1.0))
    fresh = nn.BatchNorm2d(SHAPE[1], momentum=momentum, dtype=torch.float64)
    fresh.load_state_dict(ours.state_dict())
    same_state(ours, fresh)
    theirs(cases.random_tensor(SHAPE, torch.float64, 1, 1.0))
    ours.load_state_dict(theirs.state_dict())
    same_state(ours, theirs)
    x = cases.random_tensor(SHAPE, torch.float64, 2, 1.0)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    # Through a file, as checkpoints go; and one from before num_batches_tracked.
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    old = theirs.state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    ours.load_state_dict(old)


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies_of_a_layer(way: str) -> None:
    def through(module: nn.Module) -> nn.Module:
        if way == "deepcopy":
            return copy.deepcopy(module)
        if way == "pickle":
            return pickle.loads(pickle.dumps(module))
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = bnext.convert(Residual().double())
    train(model)
    clone = through(model)
    assert type(clone.again) is bnext.BatchNorm2d
    assert clone.again is clone.first[1]
    same_state(model, clone)
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in clone.parameters()
    }
    for a, b in zip(train(model), train(clone), strict=True):
        assert torch.equal(a, b)
    # A pickle for people without bnext, and theirs for us.
    plain = through(bnext.revert(copy.deepcopy(model)))
    assert type(plain.again) is nn.BatchNorm2d
    back = bnext.convert(through(plain))
    assert type(back.again) is bnext.BatchNorm2d
    for a, b in zip(train(plain), train(back), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_convert_and_revert_a_nested_model() -> None:
    model = Residual()
    model.blocks[0].eval()
    model.last.requires_grad_(False)
    before = copy.deepcopy(model)
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for change, kind in ((bnext.convert, bnext.BatchNorm2d), (bnext.revert, nn.BatchNorm2d)):
        assert change(model) is model
        assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
        assert {type(layer) for layer in layers_of(model)} == {kind}
        assert len(layers_of(model)) == len(layers_of(before))
        assert model.again is model.first[1]
        assert type(model.head) is nn.BatchNorm1d
        after = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
        assert after.keys() == tensors.keys()
        assert all(after[name] is tensors[name] for name in after)
        for old, new in zip(before.modules(), model.modules(), strict=True):
            assert old.training == new.training
            for name in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
                assert getattr(old, name, "none") == getattr(new, name, "none")
        same_state(model, before)
        change(model)  # once more changes nothing
        assert {type(layer) for layer in layers_of(model)} == {kind}


def test_convert_the_root() -> None:
    theirs = nn.BatchNorm2d(4)
    weight, mean = theirs.weight, theirs.running_mean
    ours = bnext.convert(theirs)
    assert type(ours) is bnext.BatchNorm2d
    assert ours.weight is weight
    assert ours.running_mean is mean
    back = bnext.revert(ours)
    assert type(back) is nn.BatchNorm2d
    assert back.weight is weight


def test_converted_model_trains_alike() -> None:
    torch.manual_seed(0)
    theirs = Residual().double()
    ours = bnext.convert(copy.deepcopy(theirs))
    for a, b in zip(train(ours), train(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    same_state(ours, theirs)
    bnext.revert(ours)
    for a, b in zip(train(ours), train(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_optimizer_survives_conversion() -> None:
    """Parameters stay the same objects, so an optimizer made before goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[1].weight.detach().clone()
    bnext.convert(model)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_hooks_and_attributes_survive_conversion() -> None:
    layer = nn.BatchNorm2d(4)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    layer.note = "kept"
    model = bnext.convert(nn.Sequential(layer))
    model(torch.randn(2, 4, 3, 3))
    assert seen == [bnext.BatchNorm2d]
    assert model[0].note == "kept"
    bnext.revert(model)(torch.randn(2, 4, 3, 3))
    assert seen == [bnext.BatchNorm2d, nn.BatchNorm2d]


class Doubled(nn.BatchNorm2d):
    """A user's layer whose forward does more than batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_conversion_keeps_what_other_layers_compute() -> None:
    """Subclasses and relatives of nn.BatchNorm2d give the same output before and after."""
    x = torch.randn(3, 4, 5, 5)
    for layer in (Doubled(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)):
        want = copy.deepcopy(layer)(x)
        torch.testing.assert_close(bnext.convert(nn.Sequential(layer))(x), want)
    assert type(bnext.convert(nn.SyncBatchNorm(4))) is nn.SyncBatchNorm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnext.BatchNorm2d])
def test_layer_gradients(
    kind: type[nn.BatchNorm2d], affine: bool, track: bool, training: bool, device: str
) -> None:
    """The derivative of the layer as it stands; the layer is left exactly as it was."""
    case = cases.make_case(SHAPE, "float32", device=device)
    layer = kind(SHAPE[1], eps=1e-3, affine=affine, track_running_stats=track).to(device)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(getattr(case, name))
    layer.train(training)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(layer.state_dict())
    versions = {name: t._version for name, t in layer.state_dict(keep_vars=True).items()}
    got = bnext.layer_gradients(layer, case.input, case.grad_output)
    stats = (layer.running_mean, layer.running_var)
    batch = training or not track
    want = reference.backward(case.grad_output, case.input, layer.weight, *stats, batch, eps=1e-3)
    for name in got._fields:
        getattr(want, name).check(getattr(got, name), name)
        assert not getattr(got, name).requires_grad
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert versions == {n: t._version for n, t in layer.state_dict(keep_vars=True).items()}
    assert not calls
    assert layer.training == training
    assert all(p.grad is None for p in layer.parameters())


def test_functional_call_and_parameter_swaps() -> None:
    """torch.func.functional_call puts other tensors in place of the parameters."""
    layer = bnext.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    weight = torch.full((4,), 2.0)
    swapped = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(
        swapped, nn.functional.batch_norm(x, None, None, weight, training=True)
    )


def test_conv_fusion_in_eval() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3).eval(), bnext.BatchNorm2d(4).eval()
    x = torch.randn(2, 3, 6, 6)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_convert_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"argument 'module' must be torch\.nn\.Module, not list"):
        bnext.convert([nn.BatchNorm2d(3)])  # type: ignore[type-var]


@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(training: bool) -> None:
    """It sees one call of bnext, and computes what the layer computes."""
    model = bnext.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train(training)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    traced = torch.jit.trace(model, x)
    assert "bnext::batchnorm2d" in str(traced.inlined_graph)
    assert torch.equal(traced(x), expected)


def test_tensor_subclass_is_kept() -> None:
    class Tagged(Tensor):
        pass

    y = bnext.batchnorm2d(torch.randn(2, 3, 4, 4).as_subclass(Tagged), training=True)
    assert type(y) is Tagged
