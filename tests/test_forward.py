"""The forward pass against the oracle: values, running statistics, dtypes, momentum, NaN, empty."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
import torch.nn.functional as F

import bnext


def check_forward(case: cases.Case, label: str, **options: float) -> None:
    """One call of `batchnorm2d`: its output, the running statistics, and nothing else changed."""
    arguments = case.arguments
    constants = {"input": case.input, "weight": case.weight, "bias": case.bias}
    before = {name: cases.copied(tensor) for name, tensor in constants.items()}
    want = reference.forward(case.input, **case.arguments, **options)
    got = bnext.batchnorm2d(case.input, **arguments, **options)

    assert got.dtype == case.input.dtype, label
    assert got.device == case.input.device, label
    assert not got.requires_grad, label
    want.output.check(got, f"{label}: output")
    for name in ("running_mean", "running_var"):
        expected = getattr(want, name)
        if expected is not None:
            expected.check(arguments[name], f"{label}: {name}")
    for name, tensor in constants.items():
        if tensor is not None:
            assert torch.equal(tensor, before[name]), f"{label}: {name} was written to"


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_values(dtypes: str, layout: str, mode: str, device: str) -> None:
    options = {"dtypes": dtypes, "layout": layout, "mode": mode, "device": device}
    for label, case in cases.small_cases(**options):
        check_forward(case, label)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.LARGE_SHAPES, ids=str)
def test_large(shape: tuple[int, ...], dtypes: str, layout: str, mode: str, device: str) -> None:
    case = cases.make_case(shape, dtypes, mode=mode, layout=layout, device=device)
    check_forward(case, str(shape))


@pytest.mark.parametrize("momentum", [0.1, 0, 1, 0.0, 1.0, -1.2, 2.5, 1e-3])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_momentum(dtypes: str, momentum: float, device: str) -> None:
    for mode in ("train", "eval"):
        case = cases.make_case((4, 5, 6, 7), dtypes, mode=mode, device=device)
        check_forward(case, mode, momentum=momentum)
        if case.input.dtype not in (torch.float32, torch.float64):
            continue
        # PyTorch's own update rule, which the oracle's formula must be.
        ours, theirs = case.arguments, case.arguments
        bnext.batchnorm2d(case.input, **ours, momentum=momentum)
        F.batch_norm(case.input, **theirs, momentum=momentum)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.5, 10, 1e6])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_eps(dtypes: str, eps: float, device: str) -> None:
    for mode in cases.MODES:
        case = cases.make_case((4, 5, 6, 7), dtypes, mode=mode, device=device)
        check_forward(case, mode, eps=eps)


def test_eps_zero_in_eval(device: str) -> None:
    case = cases.make_case((4, 5, 6, 7), mode="eval", device=device)
    check_forward(case, "eval", eps=0.0)
    check_forward(case, "eval", eps=0)


def test_defaults_are_those_of_pytorch(device: str) -> None:
    """Called by position and with everything left out, as F.batch_norm would be."""
    case = cases.make_case((4, 5, 6, 7), device=device)
    x = case.input
    calls = [
        (case.running_mean, case.running_var),
        (case.running_mean, case.running_var, case.weight),
        (case.running_mean, case.running_var, case.weight, case.bias),
        (case.running_mean, case.running_var, case.weight, case.bias, True),
        (case.running_mean, case.running_var, case.weight, case.bias, True, 0.3),
        (case.running_mean, case.running_var, case.weight, case.bias, True, 0.3, 0.01),
        (None, None, None, None, True),
    ]
    for arguments in calls:
        ours = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        theirs = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.testing.assert_close(bnext.batchnorm2d(x, *ours), F.batch_norm(x, *theirs))
        torch.testing.assert_close(ours, theirs)


def test_running_statistics_are_updated_in_place(device: str) -> None:
    """In their own storage, at any stride, and visible to autograd's version counter."""
    case = cases.make_case((4, 5, 6, 7), device=device)
    want = reference.forward(case.input, case.running_mean, case.running_var, training=True)
    storage = torch.full((4, 10), -7.0, device=device)
    mean, var = storage[1, ::2], storage[2, 1::2]
    mean.copy_(case.running_mean)
    var.copy_(case.running_var)
    versions = mean._version, var._version
    bnext.batchnorm2d(case.input, mean, var, training=True)
    want.running_mean.check(mean, "running_mean")
    want.running_var.check(var, "running_var")
    assert mean._version > versions[0]
    assert var._version > versions[1]
    untouched = torch.cat([storage[0], storage[3], storage[1, 1::2], storage[2, ::2]])
    assert (untouched == -7.0).all()


def test_eval_leaves_running_statistics_alone(device: str) -> None:
    case = cases.make_case((4, 5, 6, 7), mode="eval", device=device)
    arguments = case.arguments
    versions = [arguments[name]._version for name in ("running_mean", "running_var")]
    bnext.batchnorm2d(case.input, **arguments, momentum=1.0)
    assert torch.equal(arguments["running_mean"], case.running_mean)
    assert torch.equal(arguments["running_var"], case.running_var)
    assert versions == [arguments[name]._version for name in ("running_mean", "running_var")]


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_strided_parameters(mode: str, stride: int, device: str) -> None:
    """Parameters and statistics that are slices or expanded scalars."""
    case = cases.make_case((4, 5, 6, 7), mode=mode, device=device)
    spread = torch.full((4, 5 * stride), torch.nan, device=device)
    views = [row[::stride] for row in spread]
    names = ("running_mean", "running_var", "weight", "bias")
    for view, name in zip(views, names, strict=True):
        view.copy_(getattr(case, name))
    check_forward(case._replace(**dict(zip(names, views, strict=True))), "sliced")
    one = torch.tensor(1.5, device=device).expand(5)
    check_forward(case._replace(weight=one, bias=one), "expanded")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_nan_stays_in_its_channel(mode: str, layout: str, poison: float, device: str) -> None:
    """The other channels are the same bit for bit; the poisoned one shows what it was given."""
    clean = cases.make_case((3, 19, 5, 7), mode=mode, device=device)
    data = clean.input.clone()
    data[1, 4, 2, 3] = poison
    dirty = clean._replace(input=cases.LAYOUTS[layout](data))
    clean = clean._replace(input=cases.LAYOUTS[layout](clean.input))
    others = [c for c in range(19) if c != 4]

    ours, expected = dirty.arguments, clean.arguments
    got = bnext.batchnorm2d(dirty.input, **ours)
    want = bnext.batchnorm2d(clean.input, **expected)
    assert torch.equal(got[:, others], want[:, others])
    if mode == "train":
        for name in ("running_mean", "running_var"):
            assert torch.equal(ours[name][others], expected[name][others])
        theirs = dirty.arguments
        F.batch_norm(dirty.input, **theirs)
        for name in ("running_mean", "running_var"):
            assert not ours[name][4].isfinite()
            torch.testing.assert_close(ours[name][4], theirs[name][4], equal_nan=True)
    if mode == "eval":
        place = torch.zeros_like(got, dtype=torch.bool)
        place[1, 4, 2, 3] = True
        assert torch.equal(got[~place], want[~place])
        assert not got[place].isfinite().any()
    else:
        assert got[:, 4].isnan().all()


@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_infinity_in_evaluation(dtypes: str, layout: str, infinity: float, device: str) -> None:
    """Output and dx are infinite where PyTorch's are, with the same sign, whatever the scale."""
    case = cases.make_case((2, 200, 3, 5), dtypes, mode="eval", device=device)
    # Weights down to the least float32, whose rounding errors are smaller still.
    case.weight[:80] *= torch.logspace(0, -126 if dtypes == "float32" else -14, 80, 2)
    arguments = case.arguments
    sign = case.weight.sign().to(case.input.dtype).view(1, -1, 1, 1)
    infinite = cases.LAYOUTS[layout](torch.full_like(case.input, infinity))
    got, want = (f(infinite, **arguments) for f in (bnext.batchnorm2d, F.batch_norm))
    assert torch.equal(got, infinite * sign) and torch.equal(got, want)
    x = cases.LAYOUTS[layout](case.input).requires_grad_()
    (dx,) = torch.autograd.grad(bnext.batchnorm2d(x, **arguments), x, infinite)
    assert torch.equal(dx, infinite * sign)


EMPTY_SHAPES = (
    (0, 4, 3, 3),
    (2, 4, 0, 3),
    (2, 4, 3, 0),
    (2, 0, 3, 3),
    (0, 4, 1, 1),
    (3, 0, 1, 1),
    (0, 0, 0, 0),
)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("mode", cases.MODES)
def test_empty(mode: str, shape: tuple[int, ...], device: str) -> None:
    c = shape[1]
    x = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(c, device=device, requires_grad=True)
    bias = torch.ones(c, device=device, requires_grad=True)
    mean, var = torch.full((2, c), 0.5, device=device).unbind()
    has_stats = mode != "no_stats"
    stats = (mean, var) if has_stats else (None, None)
    y = bnext.batchnorm2d(x, *stats, weight, bias, mode != "eval")
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert (mean == 0.5).all()
    assert (var == 0.5).all()
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in (weight, bias):
        assert torch.equal(parameter.grad, torch.zeros(c, device=device))


def test_constant_channel_is_beta(device: str) -> None:
    """Variance zero: x-hat is zero, up to the rounding of the mean; no NaN, no Inf."""
    case = cases.make_case((3, 6, 5, 5), device=device)
    values = torch.tensor([0.0, 1.0, -3.0, 1e-30, 0.1, 7e4], device=device).reshape(1, 6, 1, 1)
    constant = values.expand(3, 6, 5, 5).contiguous()
    check_forward(case._replace(input=constant), "constant")


def test_two_values_per_channel(device: str) -> None:
    """The smallest batch that training takes: x-hat is plus or minus one."""
    x = torch.tensor([[-1.0], [3.0]], device=device).reshape(2, 1, 1, 1)
    y = bnext.batchnorm2d(x, training=True, eps=1e-12)
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor([-1.0, 1.0]))
    mean, var = torch.zeros(1, device=device), torch.zeros(1, device=device)
    bnext.batchnorm2d(x, mean, var, training=True, momentum=1.0)
    assert (mean.item(), var.item()) == (1.0, 8.0)
