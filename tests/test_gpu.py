"""On a GPU: every family of kernels on every shape that it allows, and what only a GPU can hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import cases
import pytest
import reference
import torch
from test_backward import check_autograd, check_gradients
from test_determinism import assert_same_bits, everything
from test_forward import check_forward
from torch import Tensor

import bnext
from bnext._extension import _C

pytestmark = pytest.mark.gpu

FAMILIES = _C.cuda_families()
REFUSED = "cannot run"
# Where cuda_plans knows all that a call will: other layouts may make a plan illegal by their dy.
PLAIN = ("nchw", "channels_last")
LAYOUTS = (*PLAIN, "cropped", "cropped_channels_last", "misaligned", "sliced_w", "transposed_nc")
# (channels, side of the image): ResNet-50's, 7x7 and 14x14 planes among them.
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)
FEW_CHANNELS = ((20, 6, 256, 256), (6, 3, 400, 300), (64, 16, 128, 128), (8, 1, 512, 512))


@pytest.fixture
def gpu() -> str:
    """The device of these tests."""
    return "cuda"


@pytest.fixture(autouse=True)
def oracle_on_gpu(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    """A CPU would be busy with it for many minutes."""
    monkeypatch.setattr(reference, "DEVICE", gpu)


@pytest.fixture(params=["auto", *FAMILIES])
def family(request: pytest.FixtureRequest, environment: Callable[[str, str], None]) -> str:
    """Every pass that reads its tensors twice takes this family of kernels, or raises an error."""
    environment("BNEXT_CUDA_FAMILY", request.param)
    return request.param


def plans_of(case: cases.Case, family: str) -> dict[str, dict[str, Any]]:
    """Both passes on this device."""
    return {p["pass"]: p for p in _C.cuda_plans(case.input, "cuda", family, case.training)}


def allowed(case: cases.Case, family: str) -> dict[str, bool]:
    """Which of the passes can run on this device when this family is asked for."""
    return {name: not plan["error"] for name, plan in plans_of(case, family).items()}


def saved_statistics(case: cases.Case) -> dict[str, Tensor]:
    """mean and invstd as kernels save them, computed without them."""
    own = reference.forward(case.input, **case.arguments)
    dtype = reference.statistics_dtype(case.input.dtype)
    invstd = (own.var.value + 1e-5).rsqrt()
    device = case.input.device
    return {"save_mean": own.mean.value.to(device, dtype), "save_invstd": invstd.to(device, dtype)}


def check_passes(case: cases.Case, family: str, label: str) -> int:
    """Both passes against the oracle; how many of them this family has run.

    Where a plan says that it cannot, the call must say so as well.
    """
    plans = plans_of(case, family)
    can = {name: not plan["error"] for name, plan in plans.items()}
    checks = {
        "forward": lambda: check_forward(case, label),
        "backward": lambda: check_gradients(case, label, **saved_statistics(case)),
    }
    for name, check in checks.items():
        with contextlib.nullcontext() if can[name] else pytest.raises(RuntimeError, match=REFUSED):
            check()
    return sum(can[name] and family in ("auto", plan["family"]) for name, plan in plans.items())


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_every_family(family: str, dtypes: str, layout: str, mode: str, gpu: str) -> None:
    if mode == "eval" and family not in ("auto", "streaming"):
        pytest.skip("eval is streamed, whichever family is asked for")
    ran = 0
    for number, shape in enumerate((*cases.SHAPES, *cases.LARGE_SHAPES)):
        options = {"mode": mode, "layout": layout, "grad_layout": layout, "device": gpu}
        case = cases.make_case(shape, dtypes, seed=10 * number, **options)
        ran += check_passes(case, family, f"{family} {shape}")
    if not ran:
        pytest.skip(f"{family} allows none of these shapes here")


@pytest.mark.parametrize("layout", LAYOUTS[len(PLAIN) :])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32", "float16"])
def test_every_family_in_other_layouts(family: str, dtypes: str, layout: str, gpu: str) -> None:
    """Right, or refused; never something else."""
    for shape in (*cases.SHAPES[3:6], *cases.SHAPES[9:], *cases.LARGE_SHAPES):
        for grad_layout in (layout, "nchw"):
            case = cases.make_case(
                shape, dtypes, layout=layout, grad_layout=grad_layout, device=gpu
            )
            label = f"{family} {shape} {layout} {grad_layout}"
            try:
                check_forward(case, label)
                check_gradients(case, label, **saved_statistics(case))
            except RuntimeError as error:
                assert REFUSED in str(error), label
                assert family not in ("auto", "streaming"), label


@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_family_computes_what_is_asked_for(
    family: str, mode: str, asked: tuple[int, ...], gpu: str
) -> None:
    """Some of dx, dweight and dbias: right, or refused."""
    names = ("input", "weight", "bias")
    for shape in ((16, 65, 28, 28), (8, 32, 7, 7), (2, 3, 160, 161)):
        case = cases.make_case(shape, mode=mode, device=gpu)
        leaves = {
            name: getattr(case, name).detach().requires_grad_(bool(wanted))
            for name, wanted in zip(names, asked, strict=True)
        }
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        arguments = case.arguments | {"weight": leaves["weight"], "bias": leaves["bias"]}
        want = reference.backward(case.grad_output, case.input, **case.backward_arguments)
        try:
            y = bnext.batchnorm2d(leaves["input"], **arguments)
            found = torch.autograd.grad(y, list(wanted.values()), case.grad_output)
        except RuntimeError as error:
            assert REFUSED in str(error)
            assert family not in ("auto", "streaming")
            continue
        for name, got in zip(wanted, found, strict=True):
            getattr(want, name).check(got, f"{family} {shape} {asked} {name}")


def large_case(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, gpu: str, training: bool = True
) -> cases.Case:
    """Made on the device, float32 parameters."""
    generator = torch.Generator(gpu).manual_seed(0)
    wide = reference.statistics_dtype(dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=gpu)

    x = cases.LAYOUTS[layout](normal(*shape).mul_(1.5).add_(1).to(dtype))
    dy = cases.LAYOUTS[layout](normal(*shape).add_(0.5).to(dtype))
    c = shape[1]
    mean, var = normal(c).to(wide), normal(c).square().add_(0.5).to(wide)
    return cases.Case(x, mean, var, normal(c).to(wide), normal(c).to(wide), training, dy)


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("persistent", ["1", "always"])
def test_resnet50(
    family: str,
    persistent: str,
    dtype: torch.dtype,
    layout: str,
    gpu: str,
    environment: Callable[[str, str], None],
) -> None:
    """Also with persistent blocks and clusters, and packs in registers, where the plan would not
    have them."""
    if persistent == "always" and family not in ("resident", "cluster"):
        pytest.skip("BNEXT_CUDA_PERSISTENT is for blocks and clusters")
    for name in ("BNEXT_CUDA_PERSISTENT", "BNEXT_CUDA_REGISTERS"):
        environment(name, persistent)
    ran = 0
    for channels, side in RESNET50:
        case = large_case((32, channels, side, side), dtype, layout, gpu)
        ran += check_passes(case, family, f"{family} {tuple(case.input.shape)}")
    if not ran:
        pytest.skip(f"{family} allows none of these shapes here")


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_few_channels(family: str, dtype: torch.dtype, layout: str, gpu: str) -> None:
    ran = 0
    for shape in FEW_CHANNELS:
        for training in (True, False):
            case = large_case(shape, dtype, layout, gpu, training)
            ran += check_passes(case, family, f"{family} {shape} {training}")
    if not ran:
        pytest.skip(f"{family} allows none of these shapes here")


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32"])
def test_the_same_bits(family: str, dtypes: str, layout: str, gpu: str) -> None:
    """However the blocks are scheduled: alone, and while another stream keeps the GPU busy."""
    options = {"layout": layout, "grad_layout": layout, "device": gpu}
    noise = torch.randn(1024, 1024, device=gpu)
    side = torch.cuda.Stream()
    for shape in ((32, 64, 56, 56), (16, 65, 28, 28), (64, 512, 7, 7), (2, 3, 160, 161)):
        case = cases.make_case(shape, dtypes, **options)
        if not all(allowed(case, family).values()):
            continue
        first = everything(case)
        for _ in range(5):
            with torch.cuda.stream(side):
                for _ in range(4):
                    noise @ noise
            assert_same_bits(everything(case), first, f"{family} {shape}")
        torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autograd_takes_the_family(family: str, mode: str, gpu: str) -> None:
    """The backward pass runs in a thread of autograd's, which has to see the same choice."""
    case = cases.make_case((16, 64, 28, 28), mode=mode, device=gpu)
    can = allowed(case, family)
    if all(can.values()):
        check_autograd(case, family)
    elif can["forward"]:
        with pytest.raises(RuntimeError, match=REFUSED):
            check_autograd(case, family)


# ---- more than 2**31 elements --------------------------------------------------------------------

# A small case many times over along N. Statistics, y and dx are those of the small one, dweight and
# dbias its multiples, so the small oracle will do. (tile, times)
HUGE = {
    "planes": ((4, 64, 260, 260), 128),
    "few channels": ((1, 3, 1024, 1024), 700),
    "7x7": ((64, 2048, 7, 7), 350),
}


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("name", HUGE)
def test_more_than_2_31_elements(name: str, layout: str, gpu: str) -> None:
    shape, times = HUGE[name]
    tile = large_case(shape, torch.float16, layout, gpu)
    n, c, h, w = shape
    assert times * tile.input.numel() > 2**31
    needed = 4 * times * tile.input.nbytes + 16 * 8 * tile.input.numel()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")

    def repeated(t: Tensor) -> Tensor:
        memory_format = torch.channels_last if layout == "channels_last" else None
        large = torch.empty(
            (times * n, c, h, w),
            dtype=t.dtype,
            device=gpu,
            memory_format=memory_format or torch.contiguous_format,
        )
        for i in range(times):
            large[i * n : (i + 1) * n] = t
        return large

    def check_tiles(large: Tensor, want: reference.Expected, label: str) -> None:
        for i in range(times):
            want.check(large[i * n : (i + 1) * n], f"{label}, tile {i}")

    want = reference.forward(tile.input, **tile.arguments)
    gradients = reference.backward(tile.grad_output, tile.input, **tile.backward_arguments)
    x = repeated(tile.input)
    mean, var = torch.zeros(c, device=gpu), torch.ones(c, device=gpu)
    y = bnext.batchnorm2d(x, mean, var, tile.weight, tile.bias, training=True, momentum=1.0)
    want.mean.check(mean, "mean")
    m = times * n * h * w
    reference.Expected(want.var.value * (m / (m - 1)), want.var.bar).check(var, "var")
    check_tiles(y, want.output, "y")
    del y
    found = bnext.batchnorm2d_backward(repeated(tile.grad_output), x, tile.weight)
    check_tiles(found.input, gradients.input, "dx")
    for name in ("weight", "bias"):
        one = getattr(gradients, name)
        many = reference.Expected(times * one.value, times * one.bar)
        many.check(getattr(found, name), f"d{name}")


# ---- what a user sees of a choice ----------------------------------------------------------------


def test_an_unknown_family_is_an_error(gpu: str, environment: Callable[[str, str], None]) -> None:
    case = cases.make_case((4, 8, 6, 6), device=gpu)
    environment("BNEXT_CUDA_FAMILY", "fastest")
    arguments = case.arguments
    with pytest.raises(RuntimeError, match="BNEXT_CUDA_FAMILY should be auto"):
        bnext.batchnorm2d(case.input, **arguments)
    assert torch.equal(arguments["running_mean"], case.running_mean)
    environment("BNEXT_CUDA_FAMILY", "")
    check_forward(case, "auto")


def test_a_refusal_names_the_plan(family: str, gpu: str) -> None:
    """In float64 or at odd strides some family cannot run; then nothing is written."""
    for layout, dtypes in (("sliced_w", "float32"), ("nchw", "float64"), ("misaligned", "float16")):
        case = cases.make_case((2, 17, 7, 7), dtypes, layout=layout, device=gpu)
        arguments = case.arguments
        try:
            bnext.batchnorm2d(case.input, **arguments)
        except RuntimeError as error:
            assert family in str(error) and REFUSED in str(error)
            for name in ("running_mean", "running_var"):
                assert torch.equal(arguments[name], getattr(case, name))
            assert not allowed(case, family)["forward"]
        else:
            assert allowed(case, family)["forward"]


def test_explain_on_the_device(family: str, gpu: str) -> None:
    x = torch.randn(32, 64, 56, 56, device=gpu)
    text = bnext.explain(x)
    assert torch.cuda.get_device_name() in text
    assert family == "auto" or f"  {family} forward" in text
    # The tensor's own device is the current one.
    assert bnext.explain(x, "current").splitlines()[1:] == text.splitlines()[1:]
