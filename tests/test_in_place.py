"""dx in a tensor of the caller's, dy among them: the same bits, or an error and nothing written."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from test_errors import BACKWARD, Row, check_raises, good_arguments, meta, zeros
from torch import Tensor

import bnext

# Every element has a place of its own, and is stored as it is.
APART = [n for n in cases.LAYOUTS if not n.startswith(("expanded", "overlapping", "negative"))]
# Elements of these overlap, or look as if they might.
TOGETHER = ("expanded_n", "expanded_c", "expanded_h", "expanded_hw", "expanded_all", "overlapping")
SHAPE = (3, 5, 4, 6)


def arguments_of(case: cases.Case) -> tuple[Any, ...]:
    return case.input, case.weight, case.running_mean, case.running_var, case.training


def check_same_bits(got: Any, want: Any) -> None:
    for name, value in want._asdict().items():
        assert torch.equal(getattr(got, name), value), name


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "bfloat16-float32", "float16"])
@pytest.mark.parametrize("layout", APART)
def test_over_grad_output(layout: str, dtypes: str, mode: str, device: str) -> None:
    """Whatever the layout of dy, and whether x has the same one or not."""
    for x_layout in ("nchw", "channels_last", layout):
        case = cases.make_case(
            SHAPE, dtypes, mode=mode, layout=x_layout, grad_layout=layout, device=device
        )
        dy = case.grad_output
        elsewhere = cases.LAYOUTS[layout](torch.zeros(SHAPE, dtype=dy.dtype, device=device))
        want = bnext.batchnorm2d_backward(dy, *arguments_of(case), out=elsewhere)
        version = dy._version
        got = bnext.batchnorm2d_backward(dy, *arguments_of(case), out=dy)
        assert got.input is dy
        assert dy._version > version
        check_same_bits(got, want)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", APART)
def test_into_a_tensor(layout: str, mode: str, device: str) -> None:
    """Of any layout; what lies between its elements stays as it was."""
    case = cases.make_case(SHAPE, mode=mode, device=device)
    out = cases.LAYOUTS[layout](torch.zeros(SHAPE, device=device))
    want = bnext.batchnorm2d_backward(case.grad_output, *arguments_of(case))
    got = bnext.batchnorm2d_backward(case.grad_output, *arguments_of(case), out=out)
    assert got.input is out
    # Layouts that do not match go one element at a time, in float64; vectors are float32.
    roundings = {"rtol": 2.0**-23, "atol": 2 * 2.0**-23 * want.input.abs().max().item()}
    torch.testing.assert_close(out, want.input, **roundings)
    whole = torch.empty(0, device=device).set_(out.untyped_storage())
    assert whole.numel() - whole.isnan().sum() == out.numel()


def test_large(device: str) -> None:
    """Stores that go around the caches, and every thread."""
    case = cases.make_case((4, 33, 192, 192), device=device)
    dy = case.grad_output.clone()
    want = bnext.batchnorm2d_backward(dy, *arguments_of(case))
    check_same_bits(bnext.batchnorm2d_backward(dy, *arguments_of(case), out=dy), want)


def test_empty(device: str) -> None:
    x = torch.empty(0, 4, 3, 3, device=device)
    assert bnext.batchnorm2d_backward(x, x, out=x).input is x


def test_compiled() -> None:
    for over_grad_output in (True, False):
        case = cases.make_case(SHAPE)
        want = bnext.batchnorm2d_backward(case.grad_output, *arguments_of(case))
        out = case.grad_output if over_grad_output else torch.empty(SHAPE)
        torch._dynamo.reset()
        compiled = torch.compile(bnext.batchnorm2d_backward, backend="aot_eager", fullgraph=True)
        got = compiled(case.grad_output, *arguments_of(case), out=out)
        check_same_bits(got, want)
        assert torch.equal(out, want.input)


def shared(*offsets: int) -> list[Tensor]:
    """Tensors of (2, 4, 3, 3) at these offsets of one memory."""
    memory = torch.linspace(1, 2, 200)
    return [memory.as_strided((2, 4, 3, 3), (36, 9, 3, 1), offset) for offset in offsets]


def overlapping_arguments() -> list[tuple[dict[str, Tensor], str]]:
    dy, shifted = shared(0, 1)
    rows = [({"grad_output": dy, "out": shifted}, "grad_output, but not element for element")]
    turned = dy.transpose(2, 3)
    rows.append(({"grad_output": dy, "out": turned}, "grad_output, but not element for element"))
    (x,) = shared(3)
    rows.append(({"input": x, "out": x}, "input"))
    x, after = shared(0, 71)
    rows.append(({"input": x, "out": after}, "input"))
    (out,) = shared(5)
    for name in ("weight", "save_mean", "save_invstd", "grad_mean", "grad_var"):
        rows.append(({name: out.flatten()[8:12], "out": out}, name))
    return rows


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes, what", overlapping_arguments())
def test_shared_memory(changes: dict[str, Tensor], what: str, training: bool) -> None:
    arguments = good_arguments(BACKWARD) | {"training": training}
    arguments |= {"save_mean": zeros(4), "save_invstd": zeros(4) + 1} | changes
    start = "out shares memory with" if "element" in what else "out should not share memory with"
    row = Row(BACKWARD, {}, RuntimeError, f"{start} {what}")
    check_raises(bnext.batchnorm2d_backward, arguments, row)


def test_neighbours_are_not_shared_memory() -> None:
    x, out = shared(0, 72)
    dy = torch.ones_like(x)
    want = bnext.batchnorm2d_backward(dy, x)
    assert torch.equal(bnext.batchnorm2d_backward(dy, x, out=out).input, want.input)


@pytest.mark.parametrize("layout", TOGETHER)
def test_out_with_shared_elements(layout: str) -> None:
    arguments = good_arguments(BACKWARD) | {"training": True}
    arguments["out"] = cases.LAYOUTS[layout](torch.zeros(2, 4, 3, 3))
    message = (
        "out is written to, but several of its elements share one place in memory "
        "(an expanded tensor?)"
    )
    row = Row(BACKWARD, {}, RuntimeError, message)
    check_raises(bnext.batchnorm2d_backward, arguments, row)


REFUSED = [
    (
        {"out": zeros(2, 4, 3, 2)},
        "out should have the shape of input, [2, 4, 3, 3], not [2, 4, 3, 2]",
    ),
    (
        {"out": zeros(2, 4, 3, 3, dtype=torch.float64)},
        "out should have dtype torch.float32, the dtype of input, not torch.float64",
    ),
    ({"out": meta(2, 4, 3, 3)}, "out should be on the device of input, cpu, not on meta"),
    *(
        ({name: value}, message)
        for name in ("grad_mean", "grad_var")
        for value, message in (
            (zeros(3), f"{name} should contain 4 elements not 3"),
            (meta(4), f"{name} should be on the device of input, cpu, not on meta"),
            (
                zeros(4, dtype=torch.int64),
                f"{name} should have dtype torch.float64 or torch.float32, not torch.int64",
            ),
        )
    ),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused(changes: dict[str, Tensor], message: str) -> None:
    for training in (True, False):
        arguments = good_arguments(BACKWARD) | {"training": training} | changes
        row = Row(BACKWARD, {}, RuntimeError, message)
        check_raises(bnext.batchnorm2d_backward, arguments, row)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_out_that_is_a_leaf(view: bool, training: bool) -> None:
    arguments = good_arguments(BACKWARD) | {"training": training}
    leaf = torch.zeros(3, 4, 3, 3, requires_grad=True) if view else zeros(2, 4, 3, 3)
    out = leaf[1:] if view else leaf.requires_grad_()
    kind = "view of a leaf" if view else "leaf"
    message = f"out: a {kind} Variable that requires grad is being used in an in-place operation."
    row = Row(BACKWARD, {}, RuntimeError, message)
    check_raises(bnext.batchnorm2d_backward, arguments | {"out": out}, row)
    with torch.no_grad():
        got = bnext.batchnorm2d_backward(**arguments, out=out)
    assert torch.equal(out, bnext.batchnorm2d_backward(**arguments).input)
    assert got.input is out


def test_out_made_in_inference_mode() -> None:
    arguments = good_arguments(BACKWARD)
    with torch.inference_mode():
        out = zeros(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"^out: Inplace update to inference tensor outside"):
        bnext.batchnorm2d_backward(**arguments, out=out)
    assert not out.any()
    with torch.inference_mode():
        bnext.batchnorm2d_backward(**arguments, out=out)
    assert torch.equal(out, bnext.batchnorm2d_backward(**arguments).input)


def test_out_that_stores_negatives() -> None:
    dy = good_arguments(BACKWARD)["grad_output"]
    arguments = good_arguments(BACKWARD) | {"training": True, "out": torch._neg_view(dy)}
    message = (
        "batchnorm2d_backward(): argument 'out' is written to, and must not be a view that negates "
        "its memory"
    )
    check_raises(bnext.batchnorm2d_backward, arguments, Row(BACKWARD, {}, RuntimeError, message))


@pytest.mark.parametrize("name", ["out", "grad_mean", "grad_var"])
def test_not_a_tensor(name: str) -> None:
    arguments = good_arguments(BACKWARD) | {"training": True, name: [1.0]}
    kind = "Tensor" if name == "out" else "Tensor or None"
    message = f"batchnorm2d_backward(): argument '{name}' must be {kind}, not list"
    check_raises(bnext.batchnorm2d_backward, arguments, Row(BACKWARD, {}, TypeError, message))


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bytes_that_begin_anywhere(layout: str, offset: int) -> None:
    """Of a buffer of the caller's, and large enough for stores that go around the caches."""
    shape = (8, 64, 128, 128)
    x, dy = (cases.LAYOUTS[layout](torch.randn(shape)) for _ in range(2))
    want = bnext.batchnorm2d_backward(dy, x, training=True)
    buffer = bytearray(4 * x.numel() + 4)
    out = torch.frombuffer(buffer, dtype=torch.float32, count=x.numel(), offset=offset)
    out = out.as_strided(shape, x.stride())
    check_same_bits(bnext.batchnorm2d_backward(dy, x, training=True, out=out), want)
