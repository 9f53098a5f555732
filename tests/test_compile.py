"""torch.compile in one graph; the operators by torch's own checks; fake tensors and tracers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bnext

SHAPE = (3, 5, 4, 6)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test sees what an earlier one compiled, and none may fall back to eager silently."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=False):
        yield
    torch._dynamo.reset()


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    model.append(nn.BatchNorm2d(5, affine=False, track_running_stats=False))
    model.append(nn.BatchNorm2d(5, momentum=None))  # nn.BatchNorm2d breaks the graph here
    return bnext.convert(model).to(dtype)


def train(model: Any, layers: nn.Module, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, gradients and buffers of a few steps, then of eval."""
    results = []
    for step in range(steps):
        x = cases.random_tensor(SHAPE, dtype, step, 1.0).requires_grad_()
        layers.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results += [y.detach(), x.grad, *(p.grad.clone() for p in layers.parameters())]
        results += [b.clone() for b in layers.buffers()]
    layers.eval()
    x = cases.random_tensor(SHAPE, dtype, 99, 1.0).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [*results, y.detach(), x.grad]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_model(backend: str) -> None:
    """One graph for training and one for eval, compiled once each, with the results of eager."""
    eager = model_of()
    layers = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layers, backend=counter, fullgraph=True)
    got, want = train(compiled, layers, 4, torch.float64), train(eager, eager, 4, torch.float64)
    assert counter.frame_count == 2, "a step was compiled again"
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=number: f"{n}: {m}"
        )


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_function(affine: str, mode: str) -> None:
    """The same kernels run: bit for bit the eager result, the gradients and the statistics too."""
    case = cases.make_case(SHAPE, "float32", affine, mode, layout="channels_last")

    def run(call: Any) -> list[Tensor | None]:
        leaves = {
            name: t.detach().clone().requires_grad_()
            for name, t in (("input", case.input), ("weight", case.weight), ("bias", case.bias))
            if t is not None
        }
        arguments = {**case.arguments, **leaves}
        y = call(**arguments)
        gradients = torch.autograd.grad(y, list(leaves.values()), case.grad_output)
        return [y.detach(), *gradients, arguments["running_mean"], arguments["running_var"]]

    compiled = torch.compile(bnext.batchnorm2d, backend="aot_eager", fullgraph=True)
    for number, (a, b) in enumerate(zip(run(compiled), run(bnext.batchnorm2d), strict=True)):
        assert (a is None and b is None) or torch.equal(a, b), f"result {number}"
        assert a is None or a.stride() == b.stride(), f"result {number}"


class Regularized(nn.Module):
    """Draws the statistics of its features to 0 and 1, and survives bad batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 3, padding=1)
        self.weight = nn.Parameter(torch.ones(5))
        self.register_buffer("running_mean", torch.zeros(5))
        self.register_buffer("running_var", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y, mean, var = bnext.batchnorm2d(
            self.conv(x),
            self.running_mean,
            self.running_var,
            self.weight,
            training=self.training,
            skip_nonfinite=True,
            return_stats=True,
        )
        return y.square().mean() + mean.square().sum() + (var - 1).square().sum()


@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_writes_nothing(affine: bool) -> None:
    """Not even to the running statistics what they were: they may be saved for another backward
    pass, inference tensors, or expanded."""
    layer = bnext.BatchNorm2d(5, affine=affine).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = cases.random_tensor(SHAPE, torch.float32, 0, 1.0)
    with torch.inference_mode():
        layer.running_mean, layer.running_var = torch.zeros(5), torch.ones(5)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(compiled(x), layer(x))
    layer.running_mean, layer.running_var = torch.zeros(1).expand(5), torch.ones(5)
    versions = layer.running_mean._version, layer.running_var._version
    x.requires_grad_()
    compiled(x).sum().backward()
    assert (layer.running_mean._version, layer.running_var._version) == versions


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_statistics_and_bad_batches(backend: str) -> None:
    """Trained compiled and eager: the same weights and statistics, one graph, one compilation."""
    torch.manual_seed(0)
    eager = Regularized().double()
    layers = copy.deepcopy(eager)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    for model, module in ((compiled, layers), (eager, eager)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for step in range(5):
            x = cases.random_tensor(SHAPE, torch.float64, step, 1.0)
            if step == 2:
                x[0, 0, 0, 0] = torch.inf
            loss = model(x)
            assert loss.isfinite() == (step != 2)
            optimizer.zero_grad()
            if step != 2:  # as GradScaler skips it
                loss.backward()
                optimizer.step()
    for name, value in eager.state_dict().items():
        assert value.isfinite().all()
        torch.testing.assert_close(layers.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_export_with_statistics(training: bool) -> None:
    layer = Regularized().train(training)
    x = cases.random_tensor(SHAPE, torch.float32, 0, 1.0)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    exported = program.module()
    for size in (3, 7):
        x = cases.random_tensor((size, *SHAPE[1:]), torch.float32, size, 1.0)
        assert torch.equal(exported(x), layer(x))
    for name, value in layer.named_buffers():
        assert torch.equal(dict(exported.named_buffers())[name], value)


@pytest.mark.parametrize("dtypes", ["bfloat16", "float16-float32"])
def test_inductor_in_half(dtypes: str) -> None:
    case = cases.make_case(SHAPE, dtypes)

    def run(call: Any) -> list[Tensor]:
        x, weight = (t.detach().clone().requires_grad_() for t in (case.input, case.weight))
        y = call(x, None, None, weight, case.bias, True)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), case.grad_output)]

    compiled = torch.compile(bnext.batchnorm2d, backend="inductor", fullgraph=True)
    for a, b in zip(run(compiled), run(bnext.batchnorm2d), strict=True):
        assert torch.equal(a, b)


def test_derivative_by_hand_compiles() -> None:
    case = cases.make_case(SHAPE)
    compiled = torch.compile(bnext.batchnorm2d_backward, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        arguments = (case.weight, case.running_mean, case.running_var, training)
        got = compiled(case.grad_output, case.input, *arguments)
        want = bnext.batchnorm2d_backward(case.grad_output, case.input, *arguments)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_dynamic_shapes() -> None:
    """One graph for every batch size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bnext.batchnorm2d, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for n, h in ((3, 4), (5, 6), (2, 9)):
        x = cases.random_tensor((n, 5, h, 7), torch.float32, n, 1.0)
        got, want = compiled(x, training=True), bnext.batchnorm2d(x, training=True)
        assert torch.equal(got, want)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "a new shape was compiled again"


@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace")  # NumPy's float32
@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor], ids=str)
def test_numbers_that_are_not_of_python(number: Any) -> None:
    x = cases.random_tensor(SHAPE, torch.float32, 0, 1.0)
    layer = bnext.BatchNorm2d(5, eps=number(1e-3), momentum=number(0.25))
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled.running_mean, layer.running_mean)


def test_errors_come_through() -> None:
    compiled = torch.compile(bnext.batchnorm2d, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="weight should contain 5 elements not 3"):
        compiled(torch.zeros(SHAPE), weight=torch.zeros(3), training=True)


def operator_samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, by name: affine or not, training or eval, two layouts."""
    samples: dict[str, list[tuple[Any, ...]]] = {
        "batchnorm2d": [],
        "batchnorm2d_with_stats": [],
        "batchnorm2d_forward": [],
        "batchnorm2d_forward_with_stats": [],
        "batchnorm2d_eval": [],
        "batchnorm2d_backward": [],
        "batchnorm2d_backward_out": [],
        "batchnorm2d_statistics": [],
    }
    for mode, affine, layout, dtypes in (
        ("train", "affine", "nchw", "float32"),
        ("train", "none", "channels_last", "float64"),
        ("eval", "affine", "channels_last", "bfloat16-float32"),
        ("no_stats", "weight", "cropped", "float32"),
        ("eval", "bias", "transposed_hw", "float32"),
    ):
        case = cases.make_case(SHAPE, dtypes, affine, mode, layout=layout)
        stats = (cases.copied(case.running_mean), cases.copied(case.running_var))
        train = case.training
        count = torch.tensor(3) if mode == "train" else None
        leaves = (
            case.input.detach().requires_grad_(),
            None if case.weight is None else case.weight.requires_grad_(),
            None if case.bias is None else case.bias.requires_grad_(),
        )
        tail = (*leaves[1:], train, 0.1, 1e-5)
        samples["batchnorm2d"].append((leaves[0], *stats, count, *tail))
        samples["batchnorm2d_with_stats"].append((leaves[0], *stats, count, *tail, True))
        plain = (case.weight, case.bias, train, 0.1, 1e-5)
        plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in plain)
        for name in ("batchnorm2d_forward", "batchnorm2d_forward_with_stats"):
            samples[name].append((case.input, *stats, count, *plain, "stats" in name))
        if not train:
            samples["batchnorm2d_eval"].append((case.input, *stats, *plain[:2], 1e-5))
        samples["batchnorm2d_statistics"].append((case.input, *stats, train, 1e-5))
        saved = torch.ops.bnext.batchnorm2d_statistics(case.input, *stats, train, 1e-5)
        arguments = (case.grad_output, case.input, plain[0], *saved, train)
        to_stats = (cases.vector(5, torch.float64, 8), cases.vector(5, torch.float32, 9))
        for rest in (
            ([True] * 5, *to_stats),
            ([True, False, True, False, False],),
            ([False, True, False, True, True],),
        ):
            samples["batchnorm2d_backward"].append((*arguments, *rest))
        out = torch.empty_like(case.input)
        samples["batchnorm2d_backward_out"].append((*arguments, *to_stats, out))
    return samples


SAMPLES = operator_samples()


def registered_operators() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.split("::")[1].split(".")[0] for n in names if n.startswith("bnext::")}


def test_every_operator_has_samples() -> None:
    assert registered_operators() == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema (what is mutated), autograd registration, fake kernel, and AOT dispatch."""
    operator = getattr(torch.ops.bnext, name).default
    for arguments in SAMPLES[name]:
        result = torch.library.opcheck(operator, arguments, raise_exception=True)
        assert set(result.values()) == {"SUCCESS"}, result


def test_schemas_declare_mutation() -> None:
    """The running statistics and the count are written to, or `out`; nothing else is."""
    for name in SAMPLES:
        schema = getattr(torch.ops.bnext, name).default._schema
        written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        statistics = {"running_mean", "running_var", "num_batches_tracked"}
        reads_only = name in (
            "batchnorm2d_eval",
            "batchnorm2d_statistics",
            "batchnorm2d_backward",
        )
        expected = {"out"} if name.endswith("_out") else set() if reads_only else statistics
        assert written == expected


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_tensors(device: str, layout: str) -> None:
    """Without data the same shape, dtype, device and strides; and no kernel runs."""
    case = cases.make_case(SHAPE, "bfloat16-float32", layout=layout)
    want = bnext.batchnorm2d(case.input, **case.arguments)
    gradients = bnext.batchnorm2d_backward(case.grad_output, case.input, case.weight)
    if device == "meta":
        mode = torch.no_grad()

        def to_fake(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    else:
        mode = FakeTensorMode()
        to_fake = mode.from_tensor
    inputs = [to_fake(t) for t in (case.input, *case[1:5])]
    dy = to_fake(case.grad_output)
    with mode:
        got = bnext.batchnorm2d(*inputs, training=True)
        fake_gradients = bnext.batchnorm2d_backward(dy, inputs[0], inputs[3])
    for real, fake in zip((want, *gradients), (got, *fake_gradients), strict=True):
        assert fake.device.type == device
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_fake_kernels_refuse_what_the_real_ones_refuse() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match="weight should contain 4 elements not 3"),
    ):
        bnext.batchnorm2d(torch.zeros(2, 4, 3, 3), weight=torch.zeros(3), training=True)


@pytest.mark.parametrize("fake", [True, False])
def test_cumulative_average_without_a_count(fake: bool) -> None:
    """It has no factor; there is nothing to refuse where nothing is averaged."""
    operator = torch.ops.bnext.batchnorm2d_forward
    with FakeTensorMode() if fake else contextlib.nullcontext():
        x, mean, var = torch.zeros(2, 4, 3, 3), torch.zeros(4), torch.ones(4)
        with pytest.raises(ValueError, match="momentum may be None only with num_batches_tracked"):
            operator(x, mean, var, None, None, None, True, None, 1e-5)
        operator(x, mean, var, None, None, None, False, None, 1e-5)
        operator(x, None, None, None, None, None, True, None, 1e-5)


def test_make_fx_and_export() -> None:
    """Tracers see operators of bnext, and what they trace computes the same."""
    x = cases.random_tensor(SHAPE, torch.float32, 0, 1.0)
    layer = bnext.BatchNorm2d(5).eval()
    traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert torch.equal(traced(x), layer(x))
    program = torch.export.export(layer, (x,))
    assert any("bnext" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_batched_gradients_of_a_frozen_layer(layout: str) -> None:
    x = cases.LAYOUTS[layout](cases.random_tensor((2, 3, 4, 5), torch.float64, 0, 1.0))
    layer = bnext.BatchNorm2d(3).double().eval().requires_grad_(False)
    layer.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    dy = cases.random_tensor((2, 3, 4, 5), torch.float64, 1, 1.0).repeat(4, 1, 1, 1, 1)
    y = layer(x.requires_grad_())
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    (alone,) = torch.autograd.grad(y, x, dy[0])
    assert torch.equal(batched, alone.expand_as(batched))


def test_batched_gradients() -> None:
    """Several output gradients at once, as torch.autograd.functional.jacobian(vectorize=True)."""
    x = cases.random_tensor((2, 2, 2, 3), torch.float64, 0, 1.0)
    jacobian = torch.autograd.functional.jacobian

    def call(t: Tensor) -> Tensor:
        return bnext.batchnorm2d(t, training=True)

    torch.testing.assert_close(jacobian(call, x, vectorize=True), jacobian(call, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_backward_pass_compiles_as_one_graph(frozen: bool) -> None:
    """Compiled autograd traces the backward pass of a call that was eager."""
    layer = bnext.BatchNorm2d(5).train(not frozen).requires_grad_(not frozen)
    x = torch.randn(3, 5, 4, 4, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    (want := layer(x).square().sum()).backward()
    wanted = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    loss = layer(x).square().sum()
    with compiled_autograd._enable(lambda g: torch.compile(g, backend="eager", fullgraph=True)):
        loss.backward()
    assert torch.equal(loss, want)
    for t, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(t.grad, grad)
