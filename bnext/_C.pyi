from typing import Any

from torch import Tensor

build: dict[str, str | None]

def batchnorm2d_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    skip_nonfinite: bool,
    return_stats: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Any, Any]: ...  # Tensor, or None without return_stats
def batchnorm2d_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    /,
) -> tuple[Tensor, Tensor]: ...
def batchnorm2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    training: bool,
    output_mask: tuple[bool, ...],
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    out: Tensor | None = None,
    /,
) -> tuple[Any, Any, Any, Any, Any]: ...  # Tensor, or None where output_mask is False
def check_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    /,
) -> None: ...
def check_updated(name: str, t: Tensor, /) -> None: ...
def check_statistics_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    /,
) -> None: ...
def check_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    /,
) -> None: ...
def check_out(out: Tensor, input: Tensor, /) -> None: ...
def explain_cpu(input: Tensor, /) -> str: ...
def cuda_plans(
    input: Tensor, device: str, family: str, training: bool, costs: dict[str, float] = ...
) -> list[dict[str, Any]]: ...  # the fields of PlanReport, csrc/api.h
def cuda_device(name: str, /) -> dict[str, float]: ...
def cuda_costs(name: str, /) -> dict[str, float]: ...
def read_environment() -> None: ...
def cuda_families() -> list[str]: ...
def cuda_devices() -> list[str]: ...
def cached_output_bytes() -> int: ...
def empty_output_cache() -> None: ...
def last_cache_bytes() -> int: ...
def cpu_isa() -> str: ...
