"""The memory format of results: csrc/api.cpp's ``format_of``, for fake tensors and autograd."""

import torch
from torch import Tensor
from torch._prims_common import (
    is_channels_last_contiguous_or_false_2d,
    is_contiguous_or_false,
    suggest_memory_format,
)


def format_of(t: Tensor) -> torch.memory_format:
    """What torch suggests; channels_last also where dimensions of size 1 have other strides."""
    if not is_contiguous_or_false(t) and is_channels_last_contiguous_or_false_2d(t):
        return torch.channels_last
    return suggest_memory_format(t)
