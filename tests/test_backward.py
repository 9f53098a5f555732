"""The first derivative against the oracle: by autograd, and by batchnorm2d_backward."""

from __future__ import annotations

import itertools

import cases
import pytest
import reference
import torch

import bnext

FIELDS = ("input", "weight", "bias", "mean", "var")


def check_gradients(case: cases.Case, label: str, **options: object) -> None:
    """One call of `batchnorm2d_backward`: all five results, and nothing written to."""
    arguments = case.backward_arguments
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    data = case.input.clone(), case.grad_output.clone()
    strict = bool(options.pop("strict", False))
    want = reference.backward(
        case.grad_output, case.input, **case.backward_arguments, **options, strict=strict
    )
    got = bnext.batchnorm2d_backward(case.grad_output, case.input, **arguments, **options)

    assert isinstance(got, bnext.BatchNorm2dGradients)
    assert got._fields == FIELDS
    statistics = reference.statistics_dtype(case.input.dtype)
    parameters = statistics if case.weight is None else case.weight.dtype
    dtypes = (case.input.dtype, parameters, parameters, statistics, statistics)
    for name, dtype in zip(FIELDS, dtypes, strict=True):
        tensor = getattr(got, name)
        assert tensor.dtype == dtype, f"{label}: {name} has {tensor.dtype}"
        assert tensor.device == case.input.device, f"{label}: {name}"
        assert not tensor.requires_grad, f"{label}: {name}"
        getattr(want, name).check(tensor, f"{label}: {name}")
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), f"{label}: {name} was written to"
    assert torch.equal(case.input, data[0]), f"{label}: input was written to"
    assert torch.equal(case.grad_output, data[1]), f"{label}: grad_output was written to"


def check_autograd(case: cases.Case, label: str) -> None:
    """The same derivative through `batchnorm2d` and autograd."""
    names = [name for name in ("input", "weight", "bias") if getattr(case, name) is not None]
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in names}
    arguments = {**case.arguments, **{n: t for n, t in leaves.items() if n != "input"}}
    y = bnext.batchnorm2d(leaves["input"], **arguments)
    got = torch.autograd.grad(y, list(leaves.values()), case.grad_output)
    # dbias is computed in the weight's dtype, or the statistics', before it gets the bias's own.
    want = reference.backward(case.grad_output, case.input, **case.backward_arguments)
    for (name, leaf), gradient in zip(leaves.items(), got, strict=True):
        assert gradient.dtype == leaf.dtype, f"{label}: {name}"
        expected = getattr(want, name)
        if name == "bias":
            extra = reference.rounding(expected.value, leaf.dtype)
            expected = reference.Expected(expected.value, expected.bar + extra)
        expected.check(gradient, f"{label}: autograd {name}")


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_values(dtypes: str, layout: str, mode: str, device: str) -> None:
    options = {"dtypes": dtypes, "layout": layout, "grad_layout": layout}
    for label, case in cases.small_cases(**options, mode=mode, device=device):
        check_gradients(case, label)
        check_autograd(case, label)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.LARGE_SHAPES, ids=str)
def test_large(shape: tuple[int, ...], dtypes: str, layout: str, mode: str, device: str) -> None:
    options = {"mode": mode, "layout": layout, "grad_layout": layout, "device": device}
    case = cases.make_case(shape, dtypes, **options)
    check_gradients(case, str(shape))
    check_autograd(case, str(shape))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_strict_bar_on_centred_data(dtypes: str, layout: str, device: str) -> None:
    """With channel means near zero nothing but the stated bars: no allowance for the mean."""
    shapes = [shape for shape in cases.SHAPES if shape[0] * shape[2] * shape[3] >= 50]
    small = itertools.product(shapes, cases.AFFINE)
    for shape, affine in (*small, *((shape, "affine") for shape in cases.LARGE_SHAPES)):
        options = {"layout": layout, "grad_layout": layout, "device": device, "spread": 0.0}
        case = cases.make_case(shape, dtypes, affine, **options)
        check_gradients(case, f"{shape} {affine}", strict=True)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_saved_statistics(dtypes: str, device: str) -> None:
    """`save_mean` and `save_invstd` take the place of the input's own statistics."""
    for shape, affine in itertools.product(cases.SHAPES, cases.AFFINE):
        case = cases.make_case(shape, dtypes, affine, "no_stats", device=device)
        own = reference.forward(case.input, training=True)
        invstd = (own.var.value + 1e-5).rsqrt()
        exact = {"save_mean": own.mean.value, "save_invstd": invstd}
        for dtype in {torch.float64, reference.statistics_dtype(case.input.dtype)}:
            saved = {name: value.to(device=device, dtype=dtype) for name, value in exact.items()}
            check_gradients(case, f"{shape} {affine} {dtype}", **saved)


def test_saved_invstd_is_used_as_given(device: str) -> None:
    """The eps of the forward pass is in it; the argument `eps` is not looked at."""
    case = cases.make_case((3, 5, 4, 6), mode="no_stats", device=device)
    own = reference.forward(case.input, training=True)
    invstd = (own.var.value + 0.5).rsqrt()
    saved = {"save_mean": own.mean.value, "save_invstd": invstd}
    saved = {name: value.float().to(device) for name, value in saved.items()}
    check_gradients(case, "eps 0.5", **saved)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_parameters_of_different_dtypes(half: torch.dtype, mode: str, device: str) -> None:
    """Beside a half input each of the four may be half or float32 by itself."""
    names = ("running_mean", "running_var", "weight", "bias")
    for dtypes in itertools.product([half, torch.float32], repeat=4):
        case = cases.make_case((3, 5, 4, 6), f"{half}".removeprefix("torch."), mode=mode)
        changes = {n: getattr(case, n).to(d) for n, d in zip(names, dtypes, strict=True)}
        case = case._replace(**changes)
        case = cases.Case(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in case))
        check_gradients(case, str(dtypes))
        check_autograd(case, str(dtypes))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["bfloat16-float32", "float16-float32"])
def test_running_mean_beyond_the_range_of_the_input(dtypes: str, layout: str, device: str) -> None:
    """What the kernels take off x before they multiply need not be a float16."""
    case = cases.make_case((3, 5, 7, 9), dtypes, mode="eval", layout=layout, device=device)
    case = case._replace(running_mean=case.running_mean + 1e6 * case.weight.sign())
    check_gradients(case, "a million")


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_asked_for(asked: tuple[bool, ...], mode: str, device: str) -> None:
    """Any subset of input, weight and bias may need a gradient; the others get none."""
    case = cases.make_case((3, 5, 4, 6), mode=mode, device=device)
    want = reference.backward(case.grad_output, case.input, **case.backward_arguments)
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_(need)
        for name, need in zip(("input", "weight", "bias"), asked, strict=True)
    }
    arguments = case.arguments
    arguments.update(weight=leaves["weight"], bias=leaves["bias"])
    y = bnext.batchnorm2d(leaves["input"], **arguments)
    assert y.requires_grad == any(asked)
    if any(asked):
        y.backward(case.grad_output)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            getattr(want, name).check(leaf.grad, name)
        else:
            assert leaf.grad is None


def test_gradients_accumulate(device: str) -> None:
    case = cases.make_case((3, 5, 4, 6), device=device)
    x, weight, bias = (t.requires_grad_() for t in (case.input, case.weight, case.bias))
    y = bnext.batchnorm2d(x, None, None, weight, bias, True)
    y.backward(case.grad_output, retain_graph=True)
    once = [t.grad.clone() for t in (x, weight, bias)]
    y.backward(case.grad_output)
    for tensor, first in zip((x, weight, bias), once, strict=True):
        assert torch.equal(tensor.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(case.grad_output)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_input_changed_before_backward(changed: str, device: str) -> None:
    """Autograd must notice that what the derivative needs was overwritten."""
    case = cases.make_case((3, 5, 4, 6), device=device)
    x, weight = case.input * 1.0, case.weight * 1.0
    y = bnext.batchnorm2d(x.requires_grad_(), None, None, weight.requires_grad_(), None, True)
    with torch.no_grad():
        {"input": x, "weight": weight}[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_changed_in_place(device: str) -> None:
    """relu_ on the output, as networks do to save memory: nothing of the output was saved."""
    case = cases.make_case((3, 5, 4, 6), device=device)
    results = []
    for activation in (torch.relu, torch.relu_):
        x = case.input.detach().requires_grad_()
        y = activation(bnext.batchnorm2d(x, weight=case.weight, bias=case.bias, training=True))
        results.append([y, *torch.autograd.grad(y, x, case.grad_output)])
    for plain, in_place in zip(*results, strict=True):
        assert torch.equal(plain, in_place)


def test_running_statistics_may_change_before_training_backward(device: str) -> None:
    """Two training steps through one layer before either backward, as in gradient accumulation."""
    case = cases.make_case((3, 5, 4, 6), device=device)
    mean, var = case.running_mean, case.running_var
    x = case.input.requires_grad_()
    first = bnext.batchnorm2d(x, mean, var, training=True)
    second = bnext.batchnorm2d(2 * x, mean, var, training=True)
    mean.zero_()
    (gradient,) = torch.autograd.grad(first, x, case.grad_output)
    want = reference.backward(case.grad_output, case.input)
    want.input.check(gradient, "first")
    second.backward(case.grad_output)


def test_no_grad_and_inference_mode(device: str) -> None:
    case = cases.make_case((3, 5, 4, 6), device=device)
    want = reference.forward(case.input, **case.arguments)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            weight = torch.nn.Parameter(case.weight.clone())
            arguments = {**case.arguments, "weight": weight}
            y = bnext.batchnorm2d(case.input, **arguments)
            assert not y.requires_grad
        want.output.check(y, "output")


def test_checkpoint_and_saved_tensor_hooks(device: str) -> None:
    """What backward needs is saved where activation checkpointing can find it."""
    from torch.utils.checkpoint import checkpoint

    case = cases.make_case((3, 5, 4, 6), mode="no_stats", device=device)
    want = reference.backward(case.grad_output, case.input, case.weight)

    def run(x: torch.Tensor) -> torch.Tensor:
        return bnext.batchnorm2d(x, None, None, case.weight, case.bias, True)

    x = case.input.requires_grad_()
    (gradient,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x, case.grad_output)
    want.input.check(gradient, "checkpoint")

    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = run(x)
    assert any(t.data_ptr() == x.data_ptr() for t in packed)
    (gradient,) = torch.autograd.grad(y, x, case.grad_output)
    want.input.check(gradient, "hooks")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", cases.SOME_LAYOUTS)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("where", ["input", "grad_output"])
def test_nan_stays_in_its_channel(
    where: str, mode: str, layout: str, poison: float, device: str
) -> None:
    clean = cases.make_case((3, 19, 5, 7), mode=mode, device=device)
    data = getattr(clean, where).clone()
    data[1, 4, 2, 3] = poison
    dirty = clean._replace(**{where: data})
    others = [c for c in range(19) if c != 4]
    got, want = (
        bnext.batchnorm2d_backward(
            cases.LAYOUTS[layout](case.grad_output),
            cases.LAYOUTS[layout](case.input),
            **case.backward_arguments,
        )
        for case in (dirty, clean)
    )
    assert torch.equal(got.input[:, others], want.input[:, others])
    for name in FIELDS[1:]:
        assert torch.equal(getattr(got, name)[others], getattr(want, name)[others]), name
    assert not got.weight[4].isfinite()
    if mode != "eval":
        assert not got.input[:, 4].isfinite().any()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_the_operator_with_any_mask(training: bool, layout: str, device: str) -> None:
    """The operator with every choice of results, none included; 64 short planes."""
    case = cases.make_case((2, 64, 7, 7), layout=layout, device=device)
    mean, invstd = torch.randn(64, device=device).double(), torch.rand(64, device=device).double()
    if device != "cpu":
        mean, invstd = mean.float(), invstd.float()
    arguments = case.grad_output, case.input, case.weight, mean, invstd, training
    everything = torch.ops.bnext.batchnorm2d_backward(*arguments, [True] * 5)
    for mask in itertools.product([True, False], repeat=5):
        got = torch.ops.bnext.batchnorm2d_backward(*arguments, mask)
        for name, tensor, want, wanted in zip(FIELDS, got, everything, mask, strict=True):
            assert (tensor is not None) == wanted, f"{mask}: {name}"
            if wanted:
                torch.testing.assert_close(tensor, want, msg=f"{mask}: {name}")


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty(training: bool, shape: tuple[int, ...], device: str) -> None:
    c = shape[1]
    x = torch.empty(shape, device=device)
    mean, var, weight = torch.ones(3, c, device=device).unbind()
    got = bnext.batchnorm2d_backward(x, x, weight, mean, var, training)
    assert got.input.shape == x.shape
    for name in FIELDS[1:]:
        assert torch.equal(getattr(got, name), torch.zeros(c, device=device)), name


def test_result_is_outside_the_graph(device: str) -> None:
    case = cases.make_case((3, 5, 4, 6), device=device)
    x, dy = case.input.requires_grad_(), case.grad_output.requires_grad_()
    got = bnext.batchnorm2d_backward(dy, x, case.weight.requires_grad_())
    assert not any(tensor.requires_grad for tensor in got)
    assert x.grad is None
