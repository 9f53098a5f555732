"""torch.func and forward mode: the values, dtypes and errors of F.batch_norm under each transform.

Where PyTorch's own batch norm cannot follow (nested and higher derivatives), plain operations can.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import bnext

B, C = 3, 4
EPS = 1e-2
# Which of x, weight and bias have a batch.
BATCHED = [tuple(0 if b else None for b in c) for c in itertools.product((1, 0), repeat=3)][:-1]
Call = Callable[..., Any]


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(device: str, hw: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """A batch of (x, weight, bias), and a direction for each."""
    values = [rand(B, 2, C, hw, hw, seed=1), rand(B, C, seed=2), rand(B, C, seed=3)]
    moves = [rand(*t.shape, seed=10 + i) for i, t in enumerate(values)]
    return [t.to(device) for t in values], [t.to(device) for t in moves]


def bind(function: Call, training: bool, device: str) -> Call:
    """`function` of (x, weight, bias)."""
    stats = None, None
    if not training:
        stats = tuple(t.to(device) for t in (rand(C, seed=4), rand(C, seed=5).abs() + 0.5))
    return lambda x, w=None, b=None: function(x, *stats, w, b, training, eps=EPS)


def ours_and_theirs(training: bool, device: str, theirs: Call = F.batch_norm) -> list[Call]:
    return [bind(bnext.batchnorm2d, training, device), bind(theirs, training, device)]


def same(got: Any, want: Any) -> None:
    """Equal dtypes and shapes, and values up to float64 rounding on the scale of a Hessian."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def cubed(call: Call) -> Call:
    return lambda *a: (call(*a) ** 3).sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_vmap(batched: tuple[int | None, ...], training: bool, device: str) -> None:
    """Of the function, of its gradient (per-sample gradients), of vjp and of jvp."""
    values, moves = inputs(device)
    args = [t if dim == 0 else t[0] for t, dim in zip(values, batched, strict=True)]
    dy, move = torch.cos(moves[0][0]), tuple(t[0] for t in moves)
    results = []
    for call in ours_and_theirs(training, device):
        loss = cubed(call)
        results.append(
            [
                vmap(call, batched)(*args),
                vmap(grad(loss, (0, 1, 2)), batched)(*args),
                vmap(lambda *a, c=call: vjp(c, *a)[1](dy), batched)(*args),
                vmap(lambda *a, c=call: jvp(c, a, move), batched)(*args),
            ]
        )
    same(*results)


@pytest.mark.parametrize("training", [True, False])
def test_vmap_dimensions(training: bool, device: str) -> None:
    """The batch may be anywhere in the input and in the output; vmaps nest."""
    (x, w, b), _ = inputs(device)
    results = []
    for call in ours_and_theirs(training, device):
        results.append(
            [
                vmap(lambda x, c=call: c(x, w[0], b[0]), 3, 2)(x.movedim(0, 3)),
                vmap(call, (4, 1, 0), 1)(x.movedim(0, 4), w.movedim(0, 1), b),
                vmap(vmap(call, (None, 0, 0)), (0, None, None))(x, w, b),
                vmap(call)(x),
            ]
        )
    same(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians(transform: Call, training: bool, device: str) -> None:
    args = [t[0] for t in inputs(device)[0]]
    same(*(transform(call, (0, 1, 2))(*args) for call in ours_and_theirs(training, device)))


@pytest.mark.parametrize("training", [True, False])
def test_jvp_of_each_argument(training: bool, device: str) -> None:
    values, moves = inputs(device)
    args, directions = [t[0] for t in values], [t[0] for t in moves]
    for moved in itertools.product([False, True], repeat=3):
        if not any(moved):
            continue
        which = [i for i in range(3) if moved[i]]

        def along(call: Call, which: list[int] = which) -> tuple[Tensor, ...]:
            def run(*given: Tensor) -> Tensor:
                full = list(args)
                for i, t in zip(which, given, strict=True):
                    full[i] = t
                return call(*full)

            return jvp(run, tuple(args[i] for i in which), tuple(directions[i] for i in which))

        same(*map(along, ours_and_theirs(training, device)))


NESTED: dict[str, Call] = {
    "hessian": lambda f, a, v: hessian(f, (0, 1, 2))(*a),
    "jacrev jacrev": lambda f, a, v: jacrev(jacrev(f, (0, 1, 2)), (0, 1, 2))(*a),
    "jacfwd jacfwd": lambda f, a, v: jacfwd(jacfwd(f, (0, 1, 2)), (0, 1, 2))(*a),
    "jacrev jacfwd": lambda f, a, v: jacrev(jacfwd(f, (0, 1, 2)), (0, 1, 2))(*a),
    "third order": lambda f, a, v: grad(
        lambda *b: (grad(lambda *c: (grad(f)(*c) ** 2).sum())(*b) ** 2).sum(), (0, 1, 2)
    )(*a),
    "jvp of jvp": lambda f, a, v: jvp(lambda *b: jvp(f, b, v)[1], a, v),
    "jacfwd jacfwd of x": lambda f, a, v: jacfwd(jacfwd(lambda x: f(x, *a[1:])))(a[0]),
    "jvp of jvp of grad": lambda f, a, v: jvp(lambda *b: jvp(grad(f), b, v)[1], a, v),
    "vmap of jvp of grad": lambda f, a, v: vmap(lambda x: jvp(grad(f, (0, 1)), (x, *a[1:]), v)[1])(
        torch.stack([a[0], v[0]])
    ),
    "grad of vmap": lambda f, a, v: grad(lambda x, w: vmap(f, (0, 0, None))(x, w, a[2]).sum(), 1)(
        torch.stack([a[0], v[0]]), torch.stack([a[1], v[1]])
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", NESTED)
def test_nested(nested: str, training: bool, device: str) -> None:
    values, moves = inputs(device, hw=2)
    args, directions = (tuple(t[0] for t in side) for side in (values, moves))
    calls = ours_and_theirs(training, device, reference.composed)
    same(*(NESTED[nested](cubed(call), args, directions) for call in calls))


@pytest.mark.parametrize("training", [True, False])
def test_statistics_under_transforms(training: bool, device: str) -> None:
    """return_stats: mean and var move with x, and gradients reach x through them."""
    (x, w, _), moves = inputs(device, hw=2)
    stats = (
        (None, None) if training else (rand(C, seed=4).to(device), rand(C, seed=5).abs().to(device))
    )

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return bnext.batchnorm2d(x, *stats, w, None, training, eps=EPS, return_stats=True)

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = reference.composed(x, *stats, w, None, training, EPS)
        if not training:
            return y, *stats
        return y, x.mean(reference.DIMS), x.var(reference.DIMS, unbiased=False)

    results = []
    for call in (ours, plain):
        loss = lambda x, w, call=call: sum((t**3).sum() for t in call(x, w))  # noqa: E731
        results.append(
            [
                vmap(call)(x, w),
                vmap(call, (None, 0))(x[0], w),
                jvp(call, (x[0], w[0]), (moves[0][0], moves[1][0])),
                vmap(grad(loss, (0, 1)))(x, w),
                hessian(loss, (0, 1))(x[0], w[0]),
                jacfwd(jacfwd(loss))(x[0], w[0]),
            ]
        )
    same(*results)


# ---- running statistics under vmap ---------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("x_dim", [0, None])
def test_batched_running_statistics_are_updated(x_dim: int | None, dim: int, device: str) -> None:
    """Each its own, as calls one after the other would; wherever their batch lies in memory."""
    x = inputs(device)[0][0]
    mean, var = (torch.stack([rand(C, seed=s + i).abs() for i in range(B)], dim).to(device)
                 for s in (20, 30))  # fmt: skip
    one_by_one = mean.movedim(dim, 0).clone(), var.movedim(dim, 0).clone()
    got = vmap(lambda x, m, v: bnext.batchnorm2d(x, m, v, training=True), (x_dim, dim, dim))(
        x if x_dim == 0 else x[0], mean, var
    )
    for i in range(B):
        example = x[i] if x_dim == 0 else x[0]
        same(got[i], bnext.batchnorm2d(example, one_by_one[0][i], one_by_one[1][i], training=True))
    same((mean.movedim(dim, 0), var.movedim(dim, 0)), one_by_one)


def test_shared_running_statistics(device: str) -> None:
    """Updated once where only the weight has a batch; an error, and no update, where x has one."""
    (x, w, _), _ = inputs(device)
    got, want = [], []
    for call, stats in ((bnext.batchnorm2d, got), (F.batch_norm, want)):
        stats += [torch.zeros(C, dtype=x.dtype).to(device), torch.ones(C, dtype=x.dtype).to(device)]
        vmap(lambda w, c=call, s=stats: c(x[0], *s, w, training=True))(w)
        with pytest.raises(RuntimeError, match="got a batched tensor as input while the running_"):
            vmap(lambda x, c=call, s=stats: c(x, *s, training=True))(x)
    same(got, want)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_ensemble(momentum: float | None, device: str) -> None:
    """stack_module_state: every model with its own parameters, statistics and count."""
    torch.manual_seed(0)
    models = [nn.BatchNorm2d(C, momentum=momentum).double().to(device) for _ in range(B)]
    for model in models:
        nn.init.normal_(model.weight)
    models = [bnext.convert(model) for model in models]
    x = inputs(device)[0][0]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(p: Any, b: Any, x: Tensor) -> Tensor:
        return functional_call(base, (p, b), (x,))

    if momentum is None:
        with pytest.raises(RuntimeError, match="num_batches_tracked, which is batched"):
            vmap(call)(parameters, buffers, x)
        return
    got = vmap(call)(parameters, buffers, x)
    same(got, torch.stack([model(example) for model, example in zip(models, x, strict=True)]))
    same(buffers, {k: torch.stack([m.state_dict()[k] for m in models]) for k in buffers})


def test_functional_call_under_grad(device: str) -> None:
    """Gradients for parameters given from outside; the buffers given are updated."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(C).double().to(device)
    mine = bnext.convert(copy.deepcopy(theirs))
    x = inputs(device)[0][0][0]
    results = []
    for model in (mine, theirs):
        parameters = dict(model.named_parameters())
        buffers = {k: v.clone() for k, v in model.named_buffers()}

        def loss(p: Any, b: Any, model: nn.Module = model) -> Tensor:
            return (functional_call(model, (p, b), (x,)) ** 3).sum()

        results.append((grad(loss)(parameters, buffers), buffers))
    same(*results)


# ---- forward mode, and what eager autograd does with transforms ----------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_dual_numbers(training: bool, device: str) -> None:
    """torch.autograd.forward_ad, alone and over a backward pass."""
    values, moves = inputs(device)

    def run(call: Call) -> list[Any]:
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t[0].clone().requires_grad_(), v[0])
                for t, v in zip(values, moves, strict=True)
            ]
            y = call(*duals)
            first = torch.autograd.grad((y**3).sum(), duals)
            return [tuple(forward_ad.unpack_dual(t)) for t in (y, *first)]

    same(*map(run, ours_and_theirs(training, device, reference.composed)))


@pytest.mark.parametrize("training", [True, False])
def test_forward_gradcheck(training: bool, device: str) -> None:
    args = [t[0].requires_grad_() for t in inputs(device, hw=2)[0]]
    call = bind(bnext.batchnorm2d, training, device)
    assert torch.autograd.gradcheck(
        call, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(call, args, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_autograd_around_vmap(training: bool, device: str) -> None:
    """The tape of eager autograd goes through vmap, and batches of gradients through the tape."""
    (x, w, b), (dy, *_) = inputs(device)
    results = []
    for call in ours_and_theirs(training, device):
        leaf = x.clone().requires_grad_()
        through = torch.autograd.grad((vmap(call)(leaf, w, b) ** 3).sum(), leaf)
        y = call(leaf[0], w[0], b[0])
        results.append([through, torch.autograd.grad(y, leaf, dy, is_grads_batched=True)])
    same(*results)


def test_what_a_transform_leaks(device: str) -> None:
    """A tensor of a finished transform is an ordinary one outside, with its gradient."""
    leaves = [t[0].requires_grad_() for t in inputs(device)[0]]
    leaked: list[Tensor] = []
    for t in leaves:
        grad(lambda one, t=t: (leaked.append(t * one), one)[1])(torch.tensor(2.0, device=device))
    results = []
    for call in ours_and_theirs(True, device):
        loss = cubed(call)(*leaked)
        results.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    same(*results)


@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_derivative_by_hand(batched: tuple[int | None, ...], device: str) -> None:
    """vmap of batchnorm2d_backward, which is no part of the tape, in one call of the kernels."""
    (x, w, b), (dy, *_) = inputs(device)
    running = w, b.abs()
    args = [t if dim == 0 else t[0] for t, dim in zip((dy, x, w), batched, strict=True)]
    for training, stats in ((True, (None, None)), (False, tuple(t[0] for t in running))):

        def call(dy: Tensor, x: Tensor, w: Tensor, options: Any = (*stats, training)) -> Any:
            return tuple(bnext.batchnorm2d_backward(dy, x, w, *options))

        want = [call(*(t if d is None else t[i] for t, d in zip(args, batched, strict=True)))
                for i in range(B)]  # fmt: skip
        same(vmap(call, batched)(*args), tuple(map(torch.stack, zip(*want, strict=True))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [(None, 0, 0), (None, 0, None), (None, None, 0)], ids=str)
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16", "bfloat16-float32", "float16-float32"])
def test_half_is_rounded_once(
    dtypes: str, batched: tuple[int | None, ...], training: bool, device: str
) -> None:
    """One x and many weights: half an ulp of the result and of nothing in between."""
    case = cases.make_case((2, C, 5, 5), dtypes, device=device)
    arguments: list[Any] = [case.input]
    for t, dim in zip((case.weight, case.bias), batched[1:], strict=True):
        arguments.append(t if dim is None else torch.stack([t, t + 1, t * 3]))
    stats = [t.clone() for t in (case.running_mean, case.running_var)]

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return bnext.batchnorm2d(x, *stats, w, b, training, eps=EPS)

    got = vmap(call, batched)(*arguments)
    want = vmap(
        lambda *a: F.batch_norm(
            a[0], case.running_mean.double(), case.running_var.double(), *a[1:], training, eps=EPS
        ),
        batched,
    )(*(t.double() for t in arguments))
    # A product and a sum in float32 come before the rounding, with three more roundings to 2^-24.
    ulps = torch.finfo(got.dtype).eps / 2 * want.abs() * (1 + 2**-10)
    scale = want.abs() + 2 * arguments[2].double().abs().amax()
    assert ((got.double() - want).abs() <= ulps + 2**-22 * scale).all()
    once = [t.clone() for t in (case.running_mean, case.running_var)]
    bnext.batchnorm2d(case.input, *once, training=training, eps=EPS)
    assert all(map(torch.equal, stats, once))


@pytest.mark.parametrize("no_grad", [False, True])
def test_dtypes(no_grad: bool, device: str) -> None:
    """What PyTorch refuses under vmap, half input beside float32 parameters, works as outside."""
    for dtypes in cases.DTYPES:
        case = cases.make_case((2, C, 3, 3), dtypes, device=device)
        x = torch.stack([case.input, case.input * 2])

        def call(x: Tensor, w: Tensor | None = case.weight) -> Tensor:
            return bnext.batchnorm2d(x, None, None, w, None, True)

        with torch.no_grad() if no_grad else torch.enable_grad():
            assert torch.equal(vmap(call)(x), torch.stack([call(t) for t in x]))
            weights = torch.stack([case.weight, case.weight + 1])
            got = vmap(call, (None, 0))(x[0], weights)
            assert got.dtype == x.dtype
            _, tangent = jvp(call, (x[0],), (x[1],))
            assert tangent.dtype == x.dtype


ERRORS: dict[str, Call] = {
    "shape": lambda f, x, w: vmap(lambda x: f(x, None, None, w[0, :3], training=True))(x),
    "one value": lambda f, x, w: vmap(lambda x: f(x[:1, :, :1, :1], None, None, training=True))(x),
    "no statistics": lambda f, x, w: vmap(lambda x: f(x, None, None))(x),
    "running": lambda f, x, w: grad(lambda m: f(x[0], m, w[1].abs()).sum())(w[0]),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str, device: str) -> None:
    """Of one example's shapes, not of the batch's."""
    (x, w, _), _ = inputs(device)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        ERRORS[error](F.batch_norm, x, w)
    with pytest.raises(theirs.type) as ours:
        ERRORS[error](bnext.batchnorm2d, x, w)
    if error != "running":  # names the function
        assert str(ours.value) == str(theirs.value)


def test_dimensions_of_one_example() -> None:
    with pytest.raises(ValueError, match=r"expected 4D input .got 3D input"):
        vmap(lambda x: bnext.batchnorm2d(x, training=True))(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("weight", [1.0, 2.0], r"argument 'weight' must be Tensor or None, not list"),
        ("eps", "small", r"argument 'eps' must be float, not str"),
        ("momentum", [0.1], r"argument 'momentum' must be float, not list"),
    ],
)
def test_wrong_types_are_named(name: str, value: object, error: str) -> None:
    x = torch.randn(5, 2, 3, 4, 4)
    with pytest.raises(TypeError, match=error):
        vmap(lambda x: bnext.batchnorm2d(x, training=True, **{name: value}))(x)


def test_no_samples() -> None:
    xs, statistics = torch.empty(0, 2, C, 4, 4), (torch.zeros(C), torch.ones(C))
    with pytest.raises(ValueError, match="vmap over no samples"):
        vmap(lambda x: bnext.batchnorm2d(x, training=True))(xs)
    assert vmap(lambda x: bnext.batchnorm2d(x, *statistics))(xs).shape == xs.shape


@pytest.mark.parametrize("inside", [False, True])
def test_inference_tensors_may_be_differentiated(inside: bool) -> None:
    """By torch.func, whose levels save what they have wrapped: as of F.batch_norm."""
    with torch.inference_mode():
        x, weight = torch.randn(2, C, 4, 4), torch.rand(C)
    normal = x.clone(), weight.clone()

    def gradients(call: Any) -> list[Tensor]:
        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return call(x, None, None, weight, training=True).pow(3).sum()

        mixed = ((x, weight), (normal[0], weight), (x, normal[1]))
        with torch.inference_mode(inside):
            return [g for pair in mixed for which in (0, 1) for g in [grad(loss, which)(*pair)]]

    for got, want in zip(gradients(bnext.batchnorm2d), gradients(F.batch_norm), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


WHAT_FAILS = {
    "expanded": r"^running_var is updated .* share one place in memory",
    "inference": r"^running_var: Inplace update to inference tensor outside",
    "aliased": r"^running_var is updated in training and should not share memory",
    "differentiated": r"not differentiable with respect to argument 'running_var'",
    "expanded count": r"^num_batches_tracked is updated .* share one place in memory",
    "inference count": r"^num_batches_tracked: Inplace update to inference tensor outside",
    "inference input": r"^Inference tensors cannot be saved for backward, and input is one",
}


@pytest.mark.parametrize(
    "fault, batched, training",
    [(fault, True, True) for fault in WHAT_FAILS]
    + [("differentiated", *which) for which in ((True, False), (False, True), (False, False))],
)
def test_a_call_that_fails_updates_nothing(fault: str, batched: bool, training: bool) -> None:
    """Neither the statistics before the one that is at fault, nor the count of batches."""
    mean, var = torch.zeros(4, C), torch.ones(4, C)
    count, xs = torch.zeros(4, dtype=torch.long), torch.randn(4, 2, C, 3, 3)
    layer = bnext.BatchNorm2d(C).train(training)
    with torch.inference_mode():
        var_, count_, xs_ = (t.clone() for t in (var, count, xs))
    variances = {"expanded": var[:1].expand(4, C), "aliased": mean, "inference": var_}
    counts = {"expanded count": count[:1].expand(4), "inference count": count_}
    var, count = variances.get(fault, var), counts.get(fault, count)
    xs = xs_ if fault == "inference input" else xs

    def one(mean: Tensor, var: Tensor, count: Tensor, x: Tensor) -> Tensor:
        buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
        return torch.func.functional_call(layer, buffers, (x,)).sum()

    def loss(var: Tensor) -> Tensor:
        if batched:
            return vmap(one)(mean, var, count, xs).sum()
        return one(mean[0], var[0], count[0], xs[0])

    before = [t.clone() for t in (mean, var)]
    with pytest.raises(RuntimeError, match=WHAT_FAILS[fault]):
        (grad(loss) if fault == "differentiated" else loss)(var)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1]) and not count.any()


def test_counts_of_an_ensemble_that_shares_its_statistics() -> None:
    """x and running statistics once for all, and a count for each: all of them count."""
    x, mean, var = torch.randn(2, C, 3, 3), torch.zeros(C), torch.ones(C)
    counts = torch.zeros(4, dtype=torch.long)
    layer = bnext.BatchNorm2d(C)

    def call(weight: Tensor, count: Tensor) -> Tensor:
        tensors = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
        return torch.func.functional_call(layer, tensors | {"weight": weight}, (x,))

    vmap(call)(torch.rand(4, C), counts)
    assert counts.tolist() == [1] * 4 and mean.any()


def test_evaluation_is_not_differentiable_by_running_statistics() -> None:
    """PyTorch's forward mode says zero here, which is wrong; in training nothing depends on it."""
    x, m = torch.randn(2, C, 3, 3), torch.randn(C)
    with pytest.raises(RuntimeError, match=r"not differentiable .* argument 'running_mean'"):
        jvp(lambda m: bnext.batchnorm2d(x, m, torch.ones(C)), (m,), (m,))
    _, tangent = jvp(
        lambda m: bnext.batchnorm2d(x, m, torch.ones(C), training=True), (m.clone(),), (m,)
    )
    assert not tangent.any()


# ---- traced and compiled -------------------------------------------------------------------------

COMPILED: dict[str, Call] = {
    "grad": lambda f, x, v: grad(cubed(f))(x[0]),
    "vmap": lambda f, x, v: vmap(f)(x),
    "per-sample": lambda f, x, v: vmap(grad(cubed(f)))(x),
    "jvp": lambda f, x, v: jvp(f, (x[0],), (v[0],)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", COMPILED)
def test_compiled(transform: str, training: bool) -> None:
    """A transform inside of torch.compile, in one graph."""
    (x, *_), (v, *_) = inputs("cpu")
    call = bind(bnext.batchnorm2d, training, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[transform], backend="aot_eager", fullgraph=True)
    same(compiled(call, x, v), COMPILED[transform](call, x, v))


def test_make_fx() -> None:
    """A traced per-sample gradient calls the kernels once, for all of the batch."""
    x = inputs("cpu")[0][0]
    call = vmap(grad(cubed(bind(bnext.batchnorm2d, True, "cpu"))))
    traced = torch.fx.experimental.proxy_tensor.make_fx(call)(x)
    called = [str(n.target) for n in traced.graph.nodes if "bnext" in str(n.target)]
    operators = ("batchnorm2d_forward_with_stats", "batchnorm2d_backward")
    assert called == [f"bnext.{name}.default" for name in operators]
    same(traced(x), call(x))


def test_constants_may_require_a_gradient_that_nobody_asks_for(device: str) -> None:
    x = torch.randn(4, 2, C, 3, 3, device=device)
    mean, var = torch.zeros(C, device=device, requires_grad=True), torch.ones(C, device=device)
    want = torch.stack([bnext.batchnorm2d(image, mean.detach(), var) for image in x])

    def ours(x: Tensor) -> Tensor:
        return bnext.batchnorm2d(x, mean, var)

    with pytest.raises(RuntimeError, match="with respect to argument 'running_mean'"):
        torch.vmap(ours)(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(ours)(x), want)
        with forward_ad.dual_level():
            torch.testing.assert_close(ours(x[0]), want[0])


def test_an_empty_batch_counts_for_nothing_under_vmap(device: str) -> None:
    stats = torch.zeros(B, C, device=device), torch.ones(B, C, device=device)
    count = torch.zeros(B, dtype=torch.int64, device=device)
    for images, want in ((0, 0), (2, 1)):
        x = torch.randn(B, images, C, 3, 3, device=device)
        torch.vmap(
            lambda x, mean, var, count: torch.ops.bnext.batchnorm2d(
                x, mean, var, count, None, None, True, 0.1, EPS, False
            )
        )(x, *stats, count)
        assert count.tolist() == [want] * B
