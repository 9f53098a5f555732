"""On a GPU: streams, graphs, threads, devices, memory, and that nothing waits for the device."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import pytest
import torch
from test_determinism import assert_same_bits, everything
from test_forward import check_forward
from torch import Tensor, nn

import bnext
from bnext._extension import _C

pytestmark = pytest.mark.gpu

FAMILIES = _C.cuda_families()
# One that several blocks share a channel of, one with a channel in a block, rows, and C = 3.
CASES = (
    ((8, 16, 112, 112), "nchw", "float32"),
    ((16, 65, 28, 28), "channels_last", "bfloat16-float32"),
    ((32, 128, 7, 7), "nchw", "float16-float32"),
    ((4, 3, 160, 161), "channels_last", "float32"),
)
LONG = 1_000_000_000  # clock cycles that the device is kept busy: about half a second


@pytest.fixture
def gpu() -> str:
    """The device of these tests."""
    return "cuda"


@pytest.fixture(params=["auto", *FAMILIES])
def family(request: pytest.FixtureRequest, environment: Callable[[str, str], None]) -> str:
    environment("BNEXT_CUDA_FAMILY", request.param)
    return request.param


def made(gpu: str, family: str, training: bool = True) -> list[cases.Case]:
    """The cases that this family can run, forward and backward."""
    found = []
    for number, (shape, layout, dtypes) in enumerate(CASES):
        options = {"layout": layout, "grad_layout": layout, "device": gpu, "seed": 10 * number}
        case = cases.make_case(shape, dtypes, mode="train" if training else "eval", **options)
        try:
            everything(case)
        except RuntimeError as error:
            assert "cannot run" in str(error)
            continue
        found.append(case)
    if not found:
        pytest.skip(f"{family} allows none of these shapes here")
    return found


class Step:
    """A training step whose tensors stay in place, for graphs; with a cumulative average."""

    def __init__(self, case: cases.Case) -> None:
        c, device = case.input.shape[1], case.input.device
        self.x, self.dy = case.input.detach().clone().requires_grad_(), case.grad_output.clone()
        self.layer = bnext.BatchNorm2d(c, momentum=None, device=device, dtype=case.weight.dtype)
        names = ("running_mean", "running_var", "weight", "bias")
        set_to([getattr(self.layer, n) for n in names], [getattr(case, n) for n in names])
        self.layer.train(case.training)

    def run(self) -> list[Tensor]:
        y = self.layer(self.x)
        wanted = (self.x, self.layer.weight, self.layer.bias)
        return [y, *torch.autograd.grad(y, wanted, self.dy)]

    def state(self) -> list[Tensor]:
        return list(self.layer.buffers())


def set_to(targets: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_graph_replay(family: str, training: bool, gpu: str) -> None:
    """A captured step, replayed on new data, gives the bits of an eager one, state included."""
    for case in made(gpu, family, training):
        eager, captured = Step(case), Step(case)
        start = [t.clone() for t in captured.state()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first call sets up is not for a graph
            captured.run()
        torch.cuda.current_stream().wait_stream(side)
        set_to(captured.state(), start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = captured.run()
        assert_same_bits(captured.state(), start, "capturing runs nothing")
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            new = [torch.randn_like(eager.x), torch.randn_like(eager.dy)]
            set_to([eager.x, eager.dy], new)
            set_to([captured.x, captured.dy], new)
            want = eager.run()
            graph.replay()
            assert_same_bits(results, want, f"{family} {tuple(case.input.shape)} replay {seed}")
            assert_same_bits(captured.state(), eager.state(), f"{family} state {seed}")
        assert int(captured.layer.num_batches_tracked) == (3 if training else 0)


COLD_CAPTURE = """
import torch, bnext

torch.manual_seed(0)
channels = 16
dy, x = torch.randn(2, 8, channels, 24, 24, device="cuda").unbind()
weight = torch.rand(channels, device="cuda")
start = torch.rand(2, channels, device="cuda")
statistics = start.clone()


def step():
    y = bnext.batchnorm2d(x, *statistics, weight, training=True)
    return [y, *bnext.batchnorm2d_backward(dy, x, weight, training=True)[:3]]


graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="global"):
    captured = step()
assert torch.equal(statistics, start), "capturing runs nothing"
graph.replay()
captured.append(statistics.clone())
statistics.copy_(start)
eager = [*step(), statistics]
assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
print("same bits")
"""


def test_a_first_call_may_be_captured(family: str, gpu: str) -> None:
    """What a first call asks CUDA does not end the capture. In a process that has made no other."""
    done = subprocess.run([sys.executable, "-c", COLD_CAPTURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same bits\n"


def test_graphed_module(gpu: str) -> None:
    """make_graphed_callables on a small network after convert."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    model = bnext.convert(nn.Sequential(*layers)).to(gpu)
    want_model = copy.deepcopy(model)
    x = torch.randn(4, 3, 16, 16, device=gpu)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    want_model.load_state_dict(model.state_dict())
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, 16, 16, device=gpu)
        for network in (graphed, want_model):
            network.zero_grad()
            network(x).square().sum().backward()
        for got, want in zip(model.parameters(), want_model.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad)
        torch.testing.assert_close(model.state_dict(), want_model.state_dict())


# ---- streams, threads, devices -------------------------------------------------------------------


def test_the_current_stream(family: str, gpu: str) -> None:
    """What a side stream writes late is what bnext reads there; it waits for no other stream."""
    for case in made(gpu, family):
        want = everything(case)
        late = case._replace(
            input=torch.zeros_like(case.input), grad_output=torch.zeros_like(case.grad_output)
        )
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            everything(case)  # so that the allocator has memory for this stream
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG)
            late.input.copy_(case.input)
            late.grad_output.copy_(case.grad_output)
            got = everything(late)
            done = side.record_event()
        assert not done.query(), "the call waited for the device"
        torch.cuda.default_stream().synchronize()
        assert not done.query(), "the call used the default stream"
        done.synchronize()
        assert_same_bits(got, want, f"{family} {tuple(case.input.shape)}")


def test_streams_side_by_side(family: str, gpu: str) -> None:
    """Calls on several streams at a time do not disturb each other."""
    all_cases = made(gpu, family)
    alone = [everything(case) for case in all_cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for number in range(20):
        results = []
        for i, case in enumerate(all_cases):
            with torch.cuda.stream(streams[(i + number) % 4]):
                results.append(everything(case))
        torch.cuda.synchronize()
        for got, want in zip(results, alone, strict=True):
            assert_same_bits(got, want, f"{family} round {number}")


def test_beside_a_long_kernel(family: str, gpu: str) -> None:
    """Whether a launch finds room beside it or waits: the results are the same."""
    all_cases = made(gpu, family)
    alone = [everything(case) for case in all_cases]
    side = torch.cuda.Stream()
    for case, want in zip(all_cases, alone, strict=True):
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG // 20)
        assert_same_bits(everything(case), want, f"{family} {tuple(case.input.shape)}")


def test_host_threads(family: str, gpu: str) -> None:
    """Calls from several threads, each on a stream of its own, or all on the default one."""
    all_cases = made(gpu, family)
    alone = [everything(case) for case in all_cases]
    torch.cuda.synchronize()

    def call(number: int, own_stream: bool) -> list[Tensor]:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            results = everything(all_cases[number % len(all_cases)])
            stream.synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        for own_stream in (True, False):
            for number, got in enumerate(pool.map(call, range(64), [own_stream] * 64)):
                assert_same_bits(got, alone[number % len(all_cases)], f"{family} call {number}")


def test_the_device_of_the_tensors(gpu: str) -> None:
    """Not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    case = cases.make_case((8, 16, 28, 28), device=f"{gpu}:1")
    with torch.cuda.device(0):
        check_forward(case, "device 1")
        results = everything(case)
        assert torch.cuda.current_device() == 0
    assert {t.device.index for t in results} == {1}
    assert_same_bits(results, everything(case), "device 1 as the current one")


# ---- the host ------------------------------------------------------------------------------------


def calls(gpu: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that a training or an inference loop calls."""
    for shape, layout, dtypes in CASES:
        for training in (True, False):
            options = {"layout": layout, "grad_layout": layout, "device": gpu}
            case = cases.make_case(shape, dtypes, mode="train" if training else "eval", **options)
            arguments = case.arguments
            label = f"{shape} {'train' if training else 'eval'}"
            yield f"{label} step", Step(case).run
            yield (
                f"{label} by hand",
                (
                    lambda c=case: bnext.batchnorm2d_backward(
                        c.grad_output, c.input, **c.backward_arguments
                    )
                ),
            )
            yield f"{label} forward", lambda c=case, a=arguments: bnext.batchnorm2d(c.input, **a)
    layer = bnext.BatchNorm2d(16, momentum=None, device=gpu)
    x = torch.randn(8, 16, 12, 12, device=gpu)
    yield "cumulative average", lambda: layer(x)


def test_nothing_waits_for_the_device(gpu: str) -> None:
    """torch refuses every synchronisation that it knows of; the queue shows all others."""
    for label, call in calls(gpu):
        call()  # the first call may load modules and allocate
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG // 5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = call()
            event = torch.cuda.current_stream().record_event()
            assert not event.query(), f"{label}: the host waited"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        del kept


def test_no_memory_growth(gpu: str) -> None:
    """10 000 training steps leave as much memory in use as a few."""
    step = Step(cases.make_case((2, 17, 7, 7), device=gpu))

    def memory(number: int) -> tuple[int, int]:
        for _ in range(number):
            step.run()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = memory(10)
    assert memory(10_000) == before


def test_results_keep_their_memory(gpu: str) -> None:
    """The workspace goes back to the allocator while kernels may still be at work on it."""
    case = cases.make_case(*CASES[0][::2], device=gpu)
    want = everything(case)
    for _ in range(20):
        torch.cuda._sleep(LONG // 100)
        got = everything(case)
        # Overwrites whatever the allocator holds to be free, in the order of the stream.
        junk = [torch.full((size,), 255, dtype=torch.uint8, device=gpu) for size in (512, 1 << 16)]
        del junk
        assert_same_bits(got, want, "workspace")


LAUNCH_ERROR = """
import torch, bnext

x = torch.randn(4, 8, 6, 6, device="cuda")
stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
with torch.cuda.stream(stream):
    bnext.batchnorm2d(x, training=True)
    stream.synchronize()
    graph.capture_begin()
    try:
        stream.synchronize()  # forbidden: from here on the stream refuses everything
    except RuntimeError:
        try:
            torch.empty(1, device="cuda")
        except RuntimeError:
            raise SystemExit("torch hands out no memory")
        bnext.batchnorm2d(x, training=True)
"""


def test_a_launch_error_is_raised(gpu: str) -> None:
    """With the plan beside it. In a process of its own, which is of no use afterwards."""
    done = subprocess.run([sys.executable, "-c", LAUNCH_ERROR], capture_output=True, text=True)
    assert done.returncode != 0
    if "torch hands out no memory" in done.stderr:
        pytest.skip("this torch refuses a broken capture its memory, before anything is launched")
    assert re.search(r"could not launch .*the plan was: \w+ forward", done.stderr), done.stderr


# ---- autocast and compilers ----------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [None, torch.float32], ids=["half input", "float32 input"])
def test_autocast(half: torch.dtype, x_dtype: torch.dtype | None, gpu: str) -> None:
    """Outputs and gradients have the dtypes that nn.BatchNorm2d's have."""
    theirs = nn.BatchNorm2d(8, device=gpu)
    ours = bnext.BatchNorm2d(8, device=gpu)
    x = torch.randn(4, 8, 9, 9, device=gpu, dtype=x_dtype or half)
    found = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=half):
            y = layer(leaf)
        y.float().square().sum().backward()
        found.append([y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean])
    assert [t.dtype for t in found[1]] == [t.dtype for t in found[0]]
    # Each is within a rounding of the exact result.
    tolerance = 2 * torch.finfo(found[0][0].dtype).eps
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, gpu: str) -> None:
    """One graph, the bits of an eager call."""
    case = cases.make_case((4, 16, 14, 14), device=gpu)
    want = everything(case)[:6]

    def step(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bnext.batchnorm2d(x, mean, var, weight, bias, training=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    leaves = [t.detach().clone().requires_grad_() for t in (case.input, case.weight, case.bias)]
    mean, var = case.running_mean.clone(), case.running_var.clone()
    y = compiled(leaves[0], mean, var, *leaves[1:])
    gradients = torch.autograd.grad(y, leaves, case.grad_output)
    assert_same_bits([y.detach(), *gradients, mean, var], want, backend)
