"""Memory layouts: any strides in, PyTorch's memory format out, nothing read or written outside."""

from __future__ import annotations

import math

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from test_backward import check_autograd, check_gradients
from test_forward import check_forward

import bnext
from bnext._extension import _C

SHAPE = (3, 19, 6, 7)
# Twice the size along every dimension that a layout leaves gaps in, and enough for two threads.
LARGE_SHAPE = (3, 20, 40, 34)


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a view lies in."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage()).clone()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtypes", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_values(layout: str, dtypes: str, mode: str, device: str) -> None:
    options = {"layout": layout, "grad_layout": layout, "mode": mode, "device": device}
    case = cases.make_case(SHAPE, dtypes, **options)
    check_forward(case, layout)
    check_gradients(case, layout)
    check_autograd(case, layout)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_large(layout: str, mode: str, device: str) -> None:
    options = {"layout": layout, "grad_layout": layout, "mode": mode, "device": device}
    case = cases.make_case(LARGE_SHAPE, "float32", **options)
    check_forward(case, layout)
    check_gradients(case, layout)


# What kernels store around the caches: planes of odd sizes, so that no two begin at the same
# alignment; planes of which several lie in a block, and such as are too short; rows of whole
# vectors, other rows, a shifted base. Outputs of 14 MB and more, or up to four times that where
# the last cache holds both tensors.
LARGER_THAN_CACHES = (
    ((2, 3, 593, 601), "float64", "nchw"),
    ((2, 3, 853, 857), "float32", "nchw"),
    ((2, 3, 853, 857), "float32", "channels_last"),
    ((4, 16, 263, 269), "float32", "channels_last"),
    ((4, 16, 263, 269), "float32", "misaligned_channels_last"),
    ((2, 3, 1187, 1231), "bfloat16", "nchw"),
    ((16, 1100, 14, 14), "float32", "nchw"),
    ((32, 1100, 14, 14), "bfloat16", "nchw"),
    ((4, 32, 257, 263), "bfloat16-float32", "channels_last"),
)


@pytest.mark.parametrize("shape, dtypes, layout", LARGER_THAN_CACHES)
def test_larger_than_caches(
    shape: tuple[int, int, int, int], dtypes: str, layout: str, device: str
) -> None:
    options = {"layout": layout, "grad_layout": layout, "device": device}
    tensor_bytes = math.prod(shape) * cases.DTYPES[dtypes][0].itemsize
    times = _C.last_cache_bytes() // (2 * tensor_bytes) + 1 if device == "cpu" else 1
    if times > 4:
        pytest.skip("tensors beyond this cache are too large for a test; make sanitize needs none")
    case = cases.make_case((times * shape[0], *shape[1:]), dtypes, **options)
    check_forward(case, layout)
    check_gradients(case, layout)
    evaluated = case._replace(training=False)
    want = reference.forward(evaluated.input, **evaluated.arguments).output
    want.check(bnext.batchnorm2d(evaluated.input, **evaluated.arguments), "eval")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("grad_layout", cases.LAYOUTS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed_hw", "sliced_w"])
def test_gradient_in_another_layout(layout: str, grad_layout: str, mode: str, device: str) -> None:
    """What arrives from autograd need not be laid out as the input is."""
    options = {"layout": layout, "grad_layout": grad_layout, "mode": mode, "device": device}
    for dtypes in ("float32", "bfloat16"):
        check_gradients(cases.make_case(SHAPE, dtypes, **options), f"{layout} {grad_layout}")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_output_strides_are_those_of_pytorch(layout: str, mode: str, device: str) -> None:
    """Output and dx, where a dimension has more than one place.

    On CUDA of PyTorch's own kernels: cuDNN's read misaligned channels_last tensors 16 bytes at a
    time, which ends the process's CUDA context. And there dx is contiguous in evaluation, whatever
    the input is, as on a CPU where dimensions of size 1 have odd strides; ours is laid out like the
    output.
    """
    shapes = [SHAPE, (2, 1, 3, 3), (2, 5, 1, 1), (1, 5, 3, 4), (2, 4, 1, 6), (2, 4, 6, 1)]
    for shape in shapes:
        if layout == "overlapping" and shape[3] == 1:
            continue
        case = cases.make_case(shape, mode=mode, layout=layout, device=device)
        x = case.input.requires_grad_()
        got = bnext.batchnorm2d(x, **case.arguments)
        with torch.backends.cudnn.flags(enabled=False):
            want = F.batch_norm(x, **case.arguments)
            dy = torch.ones_like(want)
            (expected,) = torch.autograd.grad(want, x, dy)
        assert cases.memory_format(got) == cases.memory_format(want), f"{shape}: output"
        (dx,) = torch.autograd.grad(got, x, dy)
        if (device != "cpu" and mode == "eval") or layout == "channels_last_unsqueezed":
            expected = want
        assert cases.memory_format(dx) == cases.memory_format(expected), f"{shape}: dx"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", [name for name in cases.LAYOUTS if name != "negative_bit"])
def test_surroundings_are_untouched(layout: str, mode: str, device: str) -> None:
    """NaN lies around every view: none is read (the values tests) and none is overwritten."""
    options = {"layout": layout, "grad_layout": layout, "mode": mode, "device": device}
    case = cases.make_case(SHAPE, **options)
    before = whole_storage(case.input), whole_storage(case.grad_output)
    y = bnext.batchnorm2d(case.input, **case.arguments)
    got = bnext.batchnorm2d_backward(case.grad_output, case.input, **case.backward_arguments)
    assert torch.equal(whole_storage(case.input), before[0])
    assert torch.equal(whole_storage(case.grad_output), before[1])
    for name, tensor in (("output", y), ("dx", got.input)):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
        assert tensor.untyped_storage().data_ptr() != case.input.untyped_storage().data_ptr(), name


@pytest.mark.parametrize("offset", range(1, 17))
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float64"])
def test_every_misalignment(dtypes: str, offset: int, device: str) -> None:
    """Storage offsets in single elements, with gradients that are misaligned otherwise."""
    case = cases.make_case((2, 16, 5, 9), dtypes, device=device)
    for to_layout in (cases.LAYOUTS["nchw"], cases.LAYOUTS["channels_last"]):
        shifted = case._replace(
            input=cases._shifted(to_layout(case.input), offset),
            grad_output=cases._shifted(to_layout(case.grad_output), 17 - offset),
        )
        check_forward(shifted, f"offset {offset}")
        check_gradients(shifted, f"offset {offset}")


@pytest.mark.parametrize("shape", [(33, 4100, 2, 1), (5, 8200, 2, 1)])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_wide_rows(dtypes: str, shape: tuple[int, ...], device: str) -> None:
    """Wider than a block of rows is on a CPU, in one chunk and in two."""
    options = {"layout": "channels_last", "grad_layout": "channels_last", "device": device}
    for mode in ("train", "eval"):
        case = cases.make_case(shape, dtypes, mode=mode, **options)
        check_forward(case, mode)
        check_gradients(case, mode)


@pytest.mark.parametrize("dtypes", cases.DTYPES)
def test_evaluation_of_planes_and_rows(dtypes: str) -> None:
    """Bit for bit the same on a CPU: each element gets the numbers of its own channel, also where
    a vector goes from one plane to the next, and where blocks end. In NCHW, planes of less than a
    line of the cache, of whole vectors, and others; 37 channels of 331 elements fill two blocks."""
    for positions in (15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 100, 331):
        case = cases.make_case((2, 37, 1, positions), dtypes, mode="eval")
        rows = case.input.contiguous(memory_format=torch.channels_last)
        want = bnext.batchnorm2d(rows, **case.arguments)
        for offset in (0, 1, 7):
            planes = cases._shifted(case.input, offset)
            got = bnext.batchnorm2d(planes, **case.arguments)
            assert got.is_contiguous(), f"{positions} positions"
            assert torch.equal(got, want), f"{positions} positions, {offset} elements on"


@pytest.mark.parametrize(
    ("channels", "of", "is_row"),
    [(1, 4, False), (3, 3, True), (3, 4, False), (3, 32, True), (4, 8, True)],
)
def test_few_channels_are_no_row(channels: int, of: int, is_row: bool) -> None:
    """Three of four are taken one by one; but not where none lie between, or many do."""
    x = torch.randn(2, of, 5, 6).contiguous(memory_format=torch.channels_last)[:, :channels]
    walk = "rows" if is_row else "planes (strided positions)"
    assert walk in bnext.explain(x, "cpu")


@pytest.mark.parametrize("channels", range(1, 35))
def test_every_channel_count(channels: int, device: str) -> None:
    """Rows and planes that end anywhere within a vector."""
    for layout in ("nchw", "channels_last", "sliced_c_channels_last"):
        for shape in ((5, channels, 3, 1), (2, 3, 1, channels), (3, channels, 5, 7)):
            if shape[0] * shape[2] * shape[3] == 1:
                continue
            for dtypes in ("float32", "float16", "bfloat16"):
                options = {"layout": layout, "grad_layout": layout, "device": device}
                case = cases.make_case(shape, dtypes, **options)
                check_forward(case, f"{shape} {layout}")
                check_gradients(case, f"{shape} {layout}")


def test_gradient_of_a_broadcast_sum(device: str) -> None:
    """`y.sum().backward()` hands down an expanded scalar: strides of zero."""
    case = cases.make_case(SHAPE, device=device)
    x = case.input.requires_grad_()
    ones = torch.ones_like(case.input)
    for training in (True, False):
        stats = (case.running_mean, case.running_var)
        y = bnext.batchnorm2d(x, *stats, case.weight, training=training, momentum=0.0)
        (dx,) = torch.autograd.grad(y.sum(), x)
        want = reference.backward(ones, x, case.weight, *stats, training)
        want.input.check(dx, f"training={training}")
