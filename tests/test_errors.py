"""Every refusal: its type, its exact words, and that the refused call changed nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnext

FORWARD, BACKWARD = "batchnorm2d", "batchnorm2d_backward"
STATISTICS = ("running_mean", "running_var")
PARAMETERS = ("weight", "bias")
SAVED = ("save_mean", "save_invstd")


class Row(NamedTuple):
    """`changes` to a good call of `function`, and what it must raise."""

    function: str
    changes: dict[str, Any]
    error: type[Exception]
    message: str


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def rows_for_input(function: str) -> list[Row]:
    rows = []

    def add(changes: dict[str, Any], error: type[Exception], message: str) -> None:
        rows.append(Row(function, changes, error, message))

    for shape in ((4,), (2, 4), (2, 4, 3), (2, 4, 3, 3, 3), ()):
        x = zeros(*shape)
        message = f"expected 4D input (got {len(shape)}D input)"
        add({"input": x, "grad_output": x}, ValueError, message)
    for dtype in (torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64):
        x = zeros(2, 4, 3, 3, dtype=dtype)
        message = (
            "input should have dtype torch.float64, torch.float32, torch.bfloat16 or "
            f"torch.float16, not {dtype}"
        )
        add({"input": x, "grad_output": x}, NotImplementedError, message)
    one = zeros(1, 4, 1, 1)
    add(
        {"input": one, "grad_output": one, "training": True},
        ValueError,
        "Expected more than 1 value per channel when training, got input size "
        "torch.Size([1, 4, 1, 1])",
    )
    for value, name in (([1.0], "list"), (None, "NoneType"), (1.0, "float")):
        message = f"{function}(): argument 'input' must be Tensor, not {name}"
        add({"input": value}, TypeError, message)
    return rows


def rows_for_channel_tensors(function: str, names: tuple[str, ...]) -> list[Row]:
    rows = []
    for name in names:

        def add(value: Any, error: type[Exception], message: str, name: str = name) -> None:
            rows.append(Row(function, {name: value}, error, message))

        for size in (3, 5, 1, 0):
            add(zeros(size), RuntimeError, f"{name} should contain 4 elements not {size}")
        for shape in ((2, 2), (1, 4), (1, 4, 1, 1)):
            add(
                zeros(*shape),
                RuntimeError,
                f"{name} should contain 4 elements in one dimension, not a tensor of shape "
                f"{list(shape)}",
            )
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64):
            add(
                zeros(4, dtype=dtype),
                RuntimeError,
                f"{name} should have dtype torch.float32, the dtype of input, not {dtype}",
            )
        for half in (torch.bfloat16, torch.float16):
            x = zeros(2, 4, 3, 3, dtype=half)
            other = torch.float16 if half == torch.bfloat16 else torch.bfloat16
            for dtype in (torch.float64, other, torch.int32):
                changes = {"input": x, "grad_output": x, name: zeros(4, dtype=dtype)}
                message = (
                    f"{name} should have dtype {half}, the dtype of input, or torch.float32, "
                    f"not {dtype}"
                )
                rows.append(Row(function, changes, RuntimeError, message))
        add(meta(4), RuntimeError, f"{name} should be on the device of input, cpu, not on meta")
        for value, kind in (([1.0] * 4, "list"), (1.0, "float"), ("x", "str")):
            message = f"{function}(): argument '{name}' must be Tensor or None, not {kind}"
            add(value, TypeError, message)
    return rows


def rows_for_options(function: str) -> list[Row]:
    rows = []

    def add(changes: dict[str, Any], error: type[Exception], message: str) -> None:
        rows.append(Row(function, changes, error, message))

    for eps in (0.0, -0.0, -1.0, -1e-5, float("nan"), float("-inf")):
        message = f"batch_norm eps must be positive during training, but got {eps}"
        add({"training": True, "eps": eps}, ValueError, message)
    for eps in (-1.0, -1e-5, float("nan"), float("-inf")):
        message = f"batch_norm eps must be non-negative, but got {eps}"
        add({"training": False, "eps": eps}, ValueError, message)
    for name in STATISTICS:
        for training in (True, False):
            if training and function == BACKWARD:
                continue  # not read there
            add(
                {name: None, "training": training},
                ValueError,
                "running_mean and running_var must either both be None or neither be None",
            )
    add(
        {"running_mean": None, "running_var": None, "training": False},
        RuntimeError,
        "running_mean must be defined in evaluation mode",
    )
    for value, kind in (("yes", "str"), (None, "NoneType"), (1, "int")):
        message = f"{function}(): argument 'training' must be bool, not {kind}"
        add({"training": value}, TypeError, message)
    for name in ("eps", "momentum") if function == FORWARD else ("eps",):
        for value, kind in (
            ("0.1", "str"),
            (None, "NoneType"),
            ([0.1], "list"),
            (torch.ones(2), "Tensor"),
        ):
            message = f"{function}(): argument '{name}' must be float, not {kind}"
            add({name: value}, TypeError, message)
        add({name: 10**400}, OverflowError, "int too large to convert to float")
        wanted = torch.tensor(0.1, requires_grad=True)
        message = f"{function}(): argument '{name}' must be float, not Tensor that requires grad"
        add({name: wanted}, TypeError, message)
    return rows


def rows_for_grad_output() -> list[Row]:
    rows = []

    def add(value: Any, error: type[Exception], message: str) -> None:
        rows.append(Row(BACKWARD, {"grad_output": value}, error, message))

    for shape in ((2, 4, 3, 2), (1, 4, 3, 3), (2, 4, 9), (2, 4, 3, 3, 1), (72,), ()):
        message = f"grad_output should have the shape of input, [2, 4, 3, 3], not {list(shape)}"
        add(zeros(*shape), RuntimeError, message)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        message = f"grad_output should have dtype torch.float32, the dtype of input, not {dtype}"
        add(zeros(2, 4, 3, 3, dtype=dtype), RuntimeError, message)
    message = "grad_output should be on the device of input, cpu, not on meta"
    add(meta(2, 4, 3, 3), RuntimeError, message)
    for value, kind in (([1.0], "list"), (None, "NoneType")):
        message = f"batchnorm2d_backward(): argument 'grad_output' must be Tensor, not {kind}"
        add(value, TypeError, message)
    for given in SAVED:
        (missing,) = set(SAVED) - {given}
        rows.append(
            Row(
                BACKWARD,
                {given: zeros(4), missing: None},
                ValueError,
                "save_mean and save_invstd must either both be None or neither be None",
            )
        )
    return rows


FORWARD_ROWS = [
    *rows_for_input(FORWARD),
    *rows_for_channel_tensors(FORWARD, STATISTICS + PARAMETERS),
    *rows_for_options(FORWARD),
]
BACKWARD_ROWS = [
    *rows_for_input(BACKWARD),
    *rows_for_channel_tensors(BACKWARD, (*STATISTICS, "weight")),
    *rows_for_options(BACKWARD),
    *rows_for_grad_output(),
]


def good_arguments(function: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "input": torch.linspace(-1, 2, 72).reshape(2, 4, 3, 3),
        "running_mean": torch.full((4,), 0.5),
        "running_var": torch.full((4,), 2.0),
        "weight": torch.full((4,), 3.0),
        "training": False,
        "eps": 1e-5,
    }
    if function == FORWARD:
        return {**arguments, "bias": torch.full((4,), -1.0), "momentum": 0.1}
    return {"grad_output": torch.linspace(2, 1, 72).reshape(2, 4, 3, 3), **arguments}


def check_raises(function: Any, arguments: dict[str, Any], row: Row) -> None:
    """The exact error; and every tensor keeps its values and its version."""
    tensors = {
        k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.device.type == "cpu"
    }
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    with pytest.raises(row.error) as caught:
        function(**arguments)
    assert str(caught.value) == row.message
    assert type(caught.value) is row.error
    for name, (values, version) in before.items():
        assert torch.equal(tensors[name], values), f"{name} was changed"
        assert tensors[name]._version == version, f"{name} was written to"
        assert tensors[name].grad is None


def row_id(row: Row) -> str:
    changed = [
        f"{name}={list(v.shape)}{v.dtype}{v.device}" if isinstance(v, Tensor) else f"{name}={v}"
        for name, v in row.changes.items()
        if name != "grad_output" or len(row.changes) == 1
    ]
    return "-".join(changed).replace("torch.", "")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("row", FORWARD_ROWS, ids=row_id)
def test_forward(row: Row, training: bool) -> None:
    changes = {k: v for k, v in row.changes.items() if k != "grad_output"}
    arguments = {**good_arguments(FORWARD), "training": training, **changes}
    check_raises(bnext.batchnorm2d, arguments, row)
    with torch.no_grad():
        check_raises(bnext.batchnorm2d, arguments, row)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("row", BACKWARD_ROWS, ids=row_id)
def test_backward(row: Row, training: bool) -> None:
    arguments = {**good_arguments(BACKWARD), "training": training, **row.changes}
    check_raises(bnext.batchnorm2d_backward, arguments, row)


@pytest.mark.parametrize("name", SAVED)
def test_saved_statistics(name: str) -> None:
    for row in rows_for_channel_tensors(BACKWARD, (name,)):
        value = row.changes[name]
        if isinstance(value, Tensor) and (value.dtype != torch.float32 or len(row.changes) > 1):
            continue  # their dtype has its own test
        arguments = {**good_arguments(BACKWARD), "training": True}
        arguments.update(save_mean=zeros(4), save_invstd=zeros(4) + 1)
        arguments.update(row.changes)
        if row.error is TypeError:
            row = row._replace(message=row.message.replace("Tensor or None", "Tensor"))
        check_raises(bnext.batchnorm2d_backward, arguments, row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", SAVED)
def test_saved_statistics_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    arguments = {**good_arguments(BACKWARD), "training": True}
    arguments.update(save_mean=zeros(4), save_invstd=zeros(4) + 1)
    arguments[name] = zeros(4, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"{name} should have dtype .*torch.float32.*{dtype}$"):
        bnext.batchnorm2d_backward(**arguments)


def test_one_value_per_channel_in_eval_is_fine() -> None:
    x = zeros(1, 4, 1, 1)
    assert bnext.batchnorm2d(x, zeros(4), zeros(4) + 1).shape == x.shape
    got = bnext.batchnorm2d_backward(x, x, None, zeros(4), zeros(4) + 1, training=False)
    assert got.input.shape == x.shape


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_require_grad(training: bool, name: str) -> None:
    arguments = {**good_arguments(FORWARD), "training": training}
    arguments[name] = arguments[name].clone().requires_grad_()
    message = (
        f"batchnorm2d is not differentiable with respect to argument '{name}'. "
        "This input cannot have requires_grad True."
    )
    check_raises(bnext.batchnorm2d, arguments, Row(FORWARD, {}, RuntimeError, message))
    with torch.no_grad():
        assert not bnext.batchnorm2d(**arguments).requires_grad


def shared_statistics() -> list[tuple[dict[str, Tensor], str, str]]:
    """Changes to a good call, what they make share memory, and with what."""
    x, vector = torch.linspace(1, 2, 72).reshape(2, 4, 3, 3), torch.linspace(1, 2, 8)
    table = vector.view(4, 2)
    rows = [({"input": x, name: x.flatten()[at : at + 4]}, name, "input")
            for name in STATISTICS for at in (0, 30, 68)]  # fmt: skip
    pairs = [(vector[:4], vector[:4]), (vector[:4], vector[3:7]), (table[:, 0], table[:, 0]),
             (vector[::2], vector[2:6]), (vector[:1].expand(1), vector[:1])]  # fmt: skip
    for mean, var in pairs:
        changes = {"running_mean": mean, "running_var": var}
        if len(mean) == 1:
            changes |= {"input": x[:, :1], "weight": torch.ones(1), "bias": torch.ones(1)}
        rows.append((changes, "running_var", "running_mean"))
    return rows


@pytest.mark.parametrize("changes, name, other", shared_statistics())
def test_statistics_that_share_memory(changes: dict[str, Tensor], name: str, other: str) -> None:
    arguments = good_arguments(FORWARD) | changes
    message = f"{name} is updated in training and should not share memory with {other}"
    row = Row(FORWARD, {}, RuntimeError, message)
    check_raises(bnext.batchnorm2d, arguments | {"training": True}, row)
    with torch.no_grad():
        check_raises(bnext.batchnorm2d, arguments | {"training": True}, row)
    assert bnext.batchnorm2d(**arguments).isfinite().all()  # evaluation only reads them


def test_a_count_that_shares_memory() -> None:
    layer = filled_layer(0.1)
    layer.running_var = layer.running_var.double()
    layer.running_mean = layer.running_mean.double()
    layer.num_batches_tracked = layer.running_var.view(torch.int64)[2]
    message = "num_batches_tracked is updated in training and should not share memory with running"
    with pytest.raises(RuntimeError, match=message):
        layer.double()(torch.linspace(-1, 2, 72, dtype=torch.float64).reshape(2, 4, 3, 3))


def test_neighbours_in_one_memory_are_fine() -> None:
    """Running statistics as columns, rows and neighbours of one tensor, and lazy clones of it."""
    x = good_arguments(FORWARD)["input"]
    want = [torch.zeros(4), torch.ones(4)]
    bnext.batchnorm2d(x, *want, training=True)
    start = torch.stack([torch.zeros(4), torch.ones(4)])
    table, rows, lazy = start.t().contiguous(), start.clone(), torch.full((4,), 1.0)
    wide = torch.cat([x.flatten(), start.flatten()])
    for input, mean, var in (
        (x, table[:, 0], table[:, 1]),
        (x, rows[0], rows[1]),
        (wide[:72].view_as(x), wide[72:76], wide[76:]),
        (x, torch.zeros(4), torch._lazy_clone(lazy)),
    ):
        bnext.batchnorm2d(input, mean, var, training=True)
        assert torch.equal(mean, want[0]) and torch.equal(var, want[1])
    assert torch.equal(lazy, torch.ones(4))


@contextlib.contextmanager
def leaves_state(layer: nn.Module) -> Iterator[None]:
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    yield
    for key, t in layer.state_dict().items():
        assert torch.equal(t, before[key]), key


@pytest.mark.parametrize("name", [*STATISTICS, "num_batches_tracked"])
def test_statistics_made_in_inference_mode(name: str) -> None:
    """To be updated in inference mode only; torch's words."""
    layer = filled_layer(0.1)
    with torch.inference_mode():
        setattr(layer, name, getattr(layer, name).clone())
    x = good_arguments(FORWARD)["input"]
    message = f"^{name}: Inplace update to inference tensor outside"
    with leaves_state(layer), pytest.raises(RuntimeError, match=message):
        layer(x)
    layer.eval()(x)
    layer.train()
    with torch.inference_mode():
        layer(x)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("name", ["input", "weight"])
def test_saved_tensors_made_in_inference_mode(name: str) -> None:
    """autograd refuses them, before any statistics are updated."""
    layer, x = filled_layer(0.1), good_arguments(FORWARD)["input"].clone()
    with torch.inference_mode():
        if name == "input":
            x = x.clone()
        else:
            layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    message = f"^Inference tensors cannot be saved .* {name} is one"
    with leaves_state(layer), pytest.raises(RuntimeError, match=message):
        layer(x)
    with torch.no_grad():
        layer(x)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_that_negate_their_memory(name: str) -> None:
    layer = filled_layer(0.1)
    setattr(layer, name, torch._neg_view(-getattr(layer, name)))
    x = good_arguments(FORWARD)["input"]
    message = f"argument '{name}' is written to, and must not be a"
    with leaves_state(layer), pytest.raises(RuntimeError, match=message):
        layer(x)
    layer.eval()(x)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_input_on_another_device(name: str) -> None:
    """The other way round: the input is the odd one out."""
    arguments = {"input": meta(2, 4, 3, 3), "training": True, name: zeros(4)}
    if name in STATISTICS:
        arguments.update(running_mean=zeros(4), running_var=zeros(4))
    first = "running_mean" if name in STATISTICS else name
    message = f"{first} should be on the device of input, meta, not on cpu"
    check_raises(bnext.batchnorm2d, arguments, Row(FORWARD, {}, RuntimeError, message))


def test_unusual_tensors_are_refused_or_right() -> None:
    """Never a crash, never garbage: other layouts raise; lazy zeros are zeros."""
    x = torch.linspace(-1, 2, 72).reshape(2, 4, 3, 3)
    for odd in (x.to_sparse(), x.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            bnext.batchnorm2d(odd, training=True)
    lazy = torch._efficientzerotensor((2, 4, 3, 3))
    assert torch.equal(bnext.batchnorm2d(lazy, training=True), torch.zeros(2, 4, 3, 3))
    assert torch.equal(bnext.batchnorm2d_backward(lazy, x).input, torch.zeros(2, 4, 3, 3))
    with pytest.raises(RuntimeError):
        bnext.batchnorm2d(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), training=True)


LAYER_ROWS = [
    (zeros(2, 4, 3), ValueError, "expected 4D input (got 3D input)"),
    (zeros(2, 3, 3, 3), RuntimeError, "running_mean should contain 3 elements not 4"),
    (
        zeros(2, 4, 3, 3, dtype=torch.float64),
        RuntimeError,
        "running_mean should have dtype torch.float64, the dtype of input, not torch.float32",
    ),
    (
        zeros(2, 4, 3, 3, dtype=torch.int32),
        NotImplementedError,
        "input should have dtype torch.float64, torch.float32, torch.bfloat16 or torch.float16, "
        "not torch.int32",
    ),
    (
        meta(2, 4, 3, 3),
        RuntimeError,
        "running_mean should be on the device of input, meta, not on cpu",
    ),
    ([1.0], TypeError, "batchnorm2d(): argument 'input' must be Tensor, not list"),
]
ONE_VALUE_ROW = (
    zeros(1, 4, 1, 1),
    ValueError,
    "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])",
)


def filled_layer(momentum: float | None) -> nn.BatchNorm2d:
    """A layer that has seen a batch and holds gradients."""
    layer = bnext.BatchNorm2d(4, momentum=momentum)
    layer(torch.linspace(-1, 2, 72).reshape(2, 4, 3, 3)).square().sum().backward()
    return layer


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("x, error, message", [*LAYER_ROWS, ONE_VALUE_ROW])
def test_layer(x: Any, error: type[Exception], message: str, momentum: float | None) -> None:
    """Parameters, gradients, running statistics and the count of batches stay as they were."""
    for training in (True, False):
        if not training and message == ONE_VALUE_ROW[2]:
            continue
        layer = filled_layer(momentum).train(training)
        tensors = {**layer.state_dict(), "weight.grad": layer.weight.grad, "b": layer.bias.grad}
        before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
        with pytest.raises(error) as caught:
            layer(x)
        assert str(caught.value) == message
        assert type(caught.value) is error
        for name, (values, version) in before.items():
            assert torch.equal(tensors[name], values), name
            assert tensors[name]._version == version, name
        assert layer.num_batches_tracked.item() == 1


def test_layer_with_bad_eps() -> None:
    layer = filled_layer(0.1)
    layer.eps = 0.0
    message = "batch_norm eps must be positive during training"
    with leaves_state(layer), pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 4, 3, 3))


def test_layer_gradients() -> None:
    x = torch.linspace(-1, 2, 72).reshape(2, 4, 3, 3)
    layer = filled_layer(0.1)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    for bad, kind in (
        (nn.Linear(2, 2), "Linear"),
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (None, "NoneType"),
    ):
        row = Row("", {}, TypeError, "layer_gradients(): argument 'layer' must be ")
        row = row._replace(message=f"{row.message}torch.nn.BatchNorm2d, not {kind}")
        check_raises(bnext.layer_gradients, {"layer": bad, "input": x, "grad_output": x}, row)
    with pytest.raises(TypeError, match="argument 'input' must be Tensor, not list"):
        bnext.layer_gradients(layer, [1.0], x)
    with pytest.raises(TypeError, match="argument 'grad_output' must be Tensor, not list"):
        bnext.layer_gradients(layer, x, [1.0])
    for training in (True, False):
        layer.train(training)
        arguments = {"layer": layer, "input": x, "grad_output": zeros(2, 4, 3, 2)}
        message = "grad_output should have the shape of input, [2, 4, 3, 3], not [2, 4, 3, 2]"
        row = Row("", {}, RuntimeError, message)
        check_raises(bnext.layer_gradients, arguments, row)
        for bad_input, error, message in LAYER_ROWS[:1]:
            arguments = {"layer": layer, "input": bad_input, "grad_output": bad_input}
            check_raises(bnext.layer_gradients, arguments, Row("", {}, error, message))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.gpu
def test_mixed_devices() -> None:
    x = torch.zeros(2, 4, 3, 3, device="cuda")
    with pytest.raises(RuntimeError) as caught:
        bnext.batchnorm2d(x, weight=zeros(4), training=True)
    assert str(caught.value) == "weight should be on the device of input, cuda:0, not on cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_tensor_without_cuda_kernels() -> None:
    """Never a silent copy to the CPU."""
    if bnext._extension._C.build["cuda_archs"]:
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(RuntimeError, match="rebuild"):
        bnext.batchnorm2d(torch.zeros(2, 4, 3, 3, device="cuda"), training=True)


@pytest.mark.parametrize("argument", ["input", "weight"])
@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested"])
def test_not_dense(argument: str, kind: str) -> None:
    dense = {"input": torch.randn(2, 3, 4, 4), "weight": torch.ones(3)}
    tensor = dense[argument]
    makers = {
        "sparse": tensor.to_sparse,
        "quantized": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor(list(tensor.view(1, -1))),
    }
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    arguments = {**dense, argument: makers[kind]()}
    with pytest.raises(NotImplementedError, match=f"argument '{argument}' must be a dense tensor"):
        bnext.batchnorm2d(
            **arguments, running_mean=running_mean, running_var=running_var, training=True
        )
    assert torch.equal(running_mean, torch.zeros(3)) and torch.equal(running_var, torch.ones(3))
