"""The same bits on every run, under any number of threads, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from test_backward import check_gradients
from test_forward import check_forward
from torch import Tensor

import bnext

SHAPES = ((2, 3, 160, 161), (16, 65, 28, 28), (4, 256, 14, 14), (64, 512, 1, 1), (3, 1, 200, 99))
SHAPES += ((32, 96, 7, 7), (700, 1030, 1, 1))
LAYOUTS = ("nchw", "channels_last", "transposed_nc", "sliced_w")


def everything(case: cases.Case) -> list[Tensor]:
    """All that one call forward and one backward produce."""
    arguments = case.arguments
    x = case.input.detach().requires_grad_()
    weight, bias = (t.detach().requires_grad_() for t in (case.weight, case.bias))
    y = bnext.batchnorm2d(x, **{**arguments, "weight": weight, "bias": bias})
    gradients = torch.autograd.grad(y, (x, weight, bias), case.grad_output)
    by_hand = bnext.batchnorm2d_backward(case.grad_output, case.input, **case.backward_arguments)
    return [y.detach(), *gradients, arguments["running_mean"], arguments["running_var"], *by_hand]


def assert_same_bits(got: list[Tensor], want: list[Tensor], label: str) -> None:
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"{label}: result {number} differs"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32"])
def test_repeated_calls(dtypes: str, layout: str, mode: str, device: str) -> None:
    for shape in SHAPES[:3]:
        options = {"layout": layout, "grad_layout": layout, "mode": mode, "device": device}
        case = cases.make_case(shape, dtypes, **options)
        first = everything(case)
        for _ in range(3):
            # Fresh memory, so that nothing rests on what an output's memory held before.
            noise = torch.full_like(case.input, torch.nan, memory_format=torch.contiguous_format)
            del noise
            assert_same_bits(everything(case), first, str(shape))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_number_of_threads(layout: str, dtypes: str, mode: str, threads: None) -> None:
    """Within the bars for any number; and since the work is cut by shape alone, the same bits."""
    for shape in SHAPES:
        case = cases.make_case(shape, dtypes=dtypes, layout=layout, grad_layout=layout, mode=mode)
        torch.set_num_threads(1)
        alone = everything(case)
        for number in (2, 3, 5, 8):
            torch.set_num_threads(number)
            label = f"{shape}, {number} threads"
            check_forward(case, label)
            check_gradients(case, label)
            assert_same_bits(everything(case), alone, label)


def test_calls_from_many_threads() -> None:
    """No state is shared between calls: each Python thread gets what it would get alone."""
    made = [cases.make_case((4, 16, 40, 41), seed=n, layout=LAYOUTS[n % 4]) for n in range(8)]
    alone = [everything(case) for case in made]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for number, together in enumerate(pool.map(everything, made)):
                assert_same_bits(together, alone[number], f"call {number}")


def test_every_element_is_written(device: str) -> None:
    """Outputs hold none of what their memory held before."""
    for shape in SHAPES:
        for layout in LAYOUTS:
            case = cases.make_case(shape, layout=layout, grad_layout=layout, device=device)
            for _ in range(2):
                garbage = [torch.full(shape, torch.nan, device=device) for _ in range(3)]
                del garbage
                assert all(t.isfinite().all() for t in everything(case)), f"{shape} {layout}"


@pytest.mark.parametrize("dtypes", ["float32", "float64"])
def test_alone_or_in_a_larger_tensor(dtypes: str, device: str) -> None:
    """A channel's statistics do not depend on the channels beside it, up to the order of sums."""
    case = cases.make_case((3, 40, 9, 11), dtypes, device=device)
    for channels in (slice(0, 1), slice(7, 20), slice(33, 40)):
        part = case._replace(
            input=case.input[:, channels],
            grad_output=case.grad_output[:, channels],
            **{n: getattr(case, n)[channels] for n in case._fields[1:5]},
        )
        check_forward(part, str(channels))
        check_gradients(part, str(channels))
