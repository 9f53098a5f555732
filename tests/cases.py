"""What the tests feed in: dtypes, shapes, memory layouts, options; and the tensors made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# (dtype of input, dtype of weight, bias and running statistics)
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16-float32": (torch.float16, torch.float32),
}
# affine -> (has weight, has bias)
AFFINE = {
    "affine": (True, True),
    "none": (False, False),
    "weight": (True, False),
    "bias": (False, True),
}
MODES = ("train", "eval", "no_stats")

# Channel counts below, at and above vector widths; planes of 1, 7x7 (49, odd) and 33x35; one
# value per plane, one row, one column; few and many values per channel.
SHAPES = (
    (2, 1, 1, 1),
    (3, 3, 1, 1),
    (5, 64, 1, 1),
    (2, 17, 7, 7),
    (1, 64, 7, 7),
    (2, 3, 33, 35),
    (3, 1, 33, 35),
    (1, 5, 1, 19),
    (2, 8, 23, 1),
    (2, 130, 3, 5),
    (2, 33, 4, 4),
    (19, 2, 2, 3),
)
# Enough work for every thread, also with fewer channels than threads; short planes of many.
LARGE_SHAPES = ((2, 3, 160, 161), (16, 65, 28, 28), (11, 83, 7, 7))


def _copied(x: Tensor, *order: int) -> Tensor:
    """The values of x in memory whose dimensions run in this order, outermost first."""
    inverse = [order.index(d) for d in range(4)]
    return x.permute(order).contiguous().permute(inverse)


def _window(x: Tensor, dim: int, *, channels_last: bool = False) -> Tensor:
    """Every second place along one dimension of a larger tensor; NaN lies between."""
    shape = list(x.shape)
    shape[dim] = 2 * shape[dim] + 1
    big = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    if channels_last:
        big = big.contiguous(memory_format=torch.channels_last)
    view = big[(slice(None),) * dim + (slice(1, None, 2),)]
    view.copy_(x)
    return view


def _cropped(x: Tensor, *, channels_last: bool = False) -> Tensor:
    """A box from the middle of a larger tensor, two smaller in H and W and one in C; NaN around."""
    n, c, h, w = x.shape
    big = torch.full((n, c + 1, h + 2, w + 2), torch.nan, dtype=x.dtype, device=x.device)
    if channels_last:
        big = big.contiguous(memory_format=torch.channels_last)
    view = big[:, 1:, 1:-1, 1:-1]
    view.copy_(x)
    return view


def _shifted(x: Tensor, offset: int) -> Tensor:
    """The same strides at a storage offset that breaks every vector alignment."""
    buffer = torch.full((x.numel() + 2 * offset,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, x.stride(), offset)
    view.copy_(x)
    return view


def _overlapping(x: Tensor) -> Tensor:
    """Rows that share all but one of their values, as in a sliding window."""
    n, c, h, w = x.shape
    flat = torch.cat([x.flatten(), x.flatten()])
    return flat.as_strided((n, c, h, w), (c * h, h, 1, 1))


def _negated(x: Tensor) -> Tensor:
    """The values of x as a view that stores their negatives (torch's negative bit is set)."""
    return torch._neg_view(-x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _unsqueezed(x: Tensor) -> Tensor:
    """channels_last, with the strides that unsqueeze gives to dimensions of size 1."""
    x = _channels_last(x)
    of_one = (x.shape[1], 1, 1, 1)
    strides = (of_one[d] if x.shape[d] == 1 else x.stride(d) for d in range(4))
    return x.as_strided(x.shape, tuple(strides))


# Each takes a contiguous tensor and returns one of its shape and dtype in another layout, with the
# same values unless the layout cannot hold them (expanded, overlapping).
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "channels_last_unsqueezed": _unsqueezed,
    "transposed_hw": lambda x: _copied(x, 0, 1, 3, 2),
    "transposed_nc": lambda x: _copied(x, 1, 0, 2, 3),
    "reversed": lambda x: _copied(x, 3, 2, 1, 0),
    "chwn": lambda x: _copied(x, 1, 2, 3, 0),
    "hcnw": lambda x: _copied(x, 2, 1, 0, 3),
    "sliced_n": lambda x: _window(x, 0),
    "sliced_c": lambda x: _window(x, 1),
    "sliced_h": lambda x: _window(x, 2),
    "sliced_w": lambda x: _window(x, 3),
    "sliced_n_channels_last": lambda x: _window(x, 0, channels_last=True),
    "sliced_c_channels_last": lambda x: _window(x, 1, channels_last=True),
    "sliced_h_channels_last": lambda x: _window(x, 2, channels_last=True),
    "sliced_w_channels_last": lambda x: _window(x, 3, channels_last=True),
    "cropped": lambda x: _cropped(x),
    "cropped_channels_last": lambda x: _cropped(x, channels_last=True),
    "misaligned": lambda x: _shifted(x, 1),
    "misaligned_channels_last": lambda x: _shifted(_channels_last(x), 3),
    "expanded_n": lambda x: x[:1].expand(x.shape),
    "expanded_c": lambda x: x[:, :1].expand(x.shape),
    "expanded_h": lambda x: x[:, :, :1].expand(x.shape),
    "expanded_hw": lambda x: x[:, :, :1, :1].expand(x.shape),
    "expanded_all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "overlapping": _overlapping,
    "negative_bit": _negated,
}
# Where every combination would be too many.
SOME_LAYOUTS = ("nchw", "channels_last", "transposed_nc", "cropped")


class Case(NamedTuple):
    """Arguments of one call, in `batchnorm2d`'s names, and a gradient for its output."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    grad_output: Tensor

    @property
    def arguments(self) -> dict[str, object]:
        """For `batchnorm2d` and the oracle. The running statistics are fresh copies."""
        return {
            "running_mean": copied(self.running_mean),
            "running_var": copied(self.running_var),
            "weight": self.weight,
            "bias": self.bias,
            "training": self.training,
        }

    @property
    def backward_arguments(self) -> dict[str, object]:
        """For `batchnorm2d_backward` and the oracle."""
        arguments = self.arguments
        del arguments["bias"]
        return arguments


def copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float) -> Tensor:
    """Normal data whose channels differ in mean (up to `spread`) and scale (0.5 to 2)."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[1]
    mean = (2 * torch.rand(1, c, 1, 1, generator=generator) - 1) * spread
    scale = 0.5 + 1.5 * torch.rand(1, c, 1, 1, generator=generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (noise * scale + mean).to(dtype)


def vector(c: int, dtype: torch.dtype, seed: int, *, positive: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(c, generator=generator, dtype=torch.float64)
    return (values.abs() + 0.25 if positive else values).to(dtype)


def make_case(
    shape: tuple[int, int, int, int],
    dtypes: str = "float32",
    affine: str = "affine",
    mode: str = "train",
    *,
    layout: str = "nchw",
    grad_layout: str = "nchw",
    device: str = "cpu",
    seed: int = 0,
    spread: float = 1.0,
) -> Case:
    """One reproducible call. `spread` is how far from zero the channels' means lie."""
    dtype, parameter_dtype = DTYPES[dtypes]
    c = shape[1]
    has_weight, has_bias = AFFINE[affine]
    has_stats = mode != "no_stats"
    x = random_tensor(shape, dtype, seed, spread)
    dy = random_tensor(shape, dtype, seed + 1, 0.5)

    def channel(there: bool, number: int, positive: bool = False) -> Tensor | None:
        if not there:
            return None
        return vector(c, parameter_dtype, seed + number, positive=positive).to(device)

    return Case(
        LAYOUTS[layout](x.to(device)),
        channel(has_stats, 2),
        channel(has_stats, 3, positive=True),
        channel(has_weight, 4),
        channel(has_bias, 5),
        mode != "eval",
        LAYOUTS[grad_layout](dy.to(device)),
    )


def small_cases(**options: object) -> Iterator[tuple[str, Case]]:
    """Every odd shape with every affine choice, each with a label for messages."""
    for number, shape in enumerate(SHAPES):
        for affine in AFFINE:
            label = f"{'x'.join(map(str, shape))} {affine}"
            yield label, make_case(shape, affine=affine, seed=10 * number, **options)


def memory_format(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions with more than one place."""
    return [st for st, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


class Dropped(torch.autograd.Function):
    """A node behind some outputs that sends nothing back."""

    @staticmethod
    def forward(ctx: object, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in outputs)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * len(gradients)
