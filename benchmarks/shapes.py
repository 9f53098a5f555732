"""What is measured: shapes in suites, directions, and one Case for each line of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bnext.__main__ import DTYPES, LAYOUTS
from bnext.__main__ import parse_shape as parse_sizes


def meta_input(size: Sequence[int], dtype: str, layout: str) -> torch.Tensor:
    """An input without data, to ask for plans."""
    x = torch.empty(size, dtype=DTYPES[dtype], device="meta")
    return x.contiguous(memory_format=LAYOUTS[layout])


class Shape(NamedTuple):
    """A batch-norm input, and how often it occurs in the network of its suite."""

    N: int
    C: int
    H: int
    W: int
    count: int = 1

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Shape:
        """The shape of a row of a file, without its count."""
        return cls(row["N"], row["C"], row["H"], row["W"])

    def __str__(self) -> str:
        return f"{self.N}×{self.C}×{self.H}×{self.W}"

    @property
    def numel(self) -> int:
        return self.N * self.C * self.H * self.W

    def num_bytes(self, dtype: str) -> int:
        """T: the bytes of one activation tensor."""
        return self.numel * DTYPES[dtype].itemsize


# (channels, side of the image, layers) of ResNet-50 at 224×224.
_RESNET50 = (
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
)
SUITES: dict[str, tuple[Shape, ...]] = {
    "resnet50": tuple(
        Shape(batch, C, side, side, count) for batch in (32, 256) for C, side, count in _RESNET50
    ),
    "few-channels": (
        Shape(20, 6, 256, 256),
        Shape(24, 6, 160, 96),
        Shape(6, 3, 400, 300),
        Shape(64, 16, 128, 128),
        Shape(8, 3, 512, 512),
    ),
    # A detector's backbone on one or two images of 800×1333.
    "detection": (
        Shape(2, 64, 400, 667),
        Shape(1, 256, 200, 334),
        Shape(2, 512, 100, 167),
        Shape(1, 1024, 50, 84),
        Shape(2, 2048, 25, 42),
    ),
    # The price of a call: hardly any arithmetic.
    "tiny": (Shape(2, 16, 4, 4), Shape(8, 64, 8, 8), Shape(1, 256, 7, 7), Shape(64, 128, 1, 1)),
    # More than 2**31 elements.
    "huge": (Shape(256, 1024, 96, 96), Shape(300, 128, 256, 256), Shape(2, 64, 4160, 4160)),
    # Planes and channels that are multiples of nothing.
    "odd": (
        Shape(32, 100, 7, 7),
        Shape(16, 67, 33, 35),
        Shape(17, 40, 33, 35),
        Shape(5, 129, 31, 17),
        Shape(8, 13, 99, 101),
        Shape(3, 250, 13, 13),
    ),
}
# One or two of each suite: what --quick runs.
QUICK: dict[str, tuple[Shape, ...]] = {
    "resnet50": (Shape(32, 64, 56, 56, 6), Shape(32, 256, 14, 14, 11)),
    "few-channels": (Shape(20, 6, 256, 256),),
    "detection": (Shape(1, 256, 200, 334),),
    "tiny": (Shape(8, 64, 8, 8),),
    "odd": (Shape(16, 67, 33, 35),),
}

# Bytes that must move, in units of the activation tensor: read x, write y; read x and dy, write dx.
# `derivative` is the backward pass as a function, nothing kept from a forward pass.
PASSES = {"forward": 2, "backward": 3, "step": 5, "derivative": 3, "inference": 2}
DIRECTIONS = tuple(PASSES)
# A PyTorch op that moves just these bytes.
FLOORS = {
    "forward": "clone",
    "backward": "add",
    "step": "clone+add",
    "derivative": "add",
    "inference": "clone",
}
FLOOR_NAMES = frozenset(FLOORS.values())


def is_peer(provider: str) -> bool:
    """Not a floor, not bnext, nor a variant of bnext."""
    return provider not in FLOOR_NAMES and provider.split("-")[0] != "bnext"


# call: the public call as a user writes it, autograd and Python included.
# op: the raw operators below autograd; on CUDA, kernels alone, replayed from a graph.
LEVELS = ("call", "op")


@dataclass(frozen=True)
class Case:
    """One line of the table: every provider of it does the same work on the same data."""

    suite: str
    shape: Shape
    dtype: str = "float32"
    layout: str = "nchw"
    direction: str = "backward"
    level: str = "call"
    cache: str = "cold"
    device: str = "cpu"

    @property
    def tensor_bytes(self) -> int:
        """T: the bytes of one activation tensor."""
        return self.shape.num_bytes(self.dtype)

    @property
    def bytes_min(self) -> int:
        """The bytes that any implementation must move."""
        return PASSES[self.direction] * self.tensor_bytes

    @property
    def data(self) -> tuple[object, ...]:
        """Cases for which this is the same share their inputs."""
        return (self.shape[:4], self.dtype, self.layout, self.cache, self.device)


def parse_shape(text: str) -> Shape:
    """``"32,64,56,56"`` as a Shape."""
    return Shape(*parse_sizes(text))


def make_cases(
    suites: dict[str, Sequence[Shape]],
    directions: Sequence[str],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    levels: Sequence[str],
    caches: Sequence[str],
    device: str,
) -> Iterator[Case]:
    """All combinations. Those that share their inputs come one after the other."""
    for suite, shapes in suites.items():
        # What a tiny shape costs is the call, so it is measured as a call on every device.
        wanted = tuple(dict.fromkeys((*levels, "call"))) if suite == "tiny" else levels
        for dtype in dtypes:
            for layout in layouts:
                for shape in shapes:
                    for cache in caches:
                        for level in wanted:
                            for direction in directions:
                                yield Case(
                                    suite, shape, dtype, layout, direction, level, cache, device
                                )
