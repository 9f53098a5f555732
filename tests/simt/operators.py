"""PyTorch's own operators on the CUDA devices of runtime.cpp: the CPU runs them, on their memory.

`enable()` puts functions in place of their kernels for CUDA, in this process. Views and what
allocates stay as they are, and so does all that is not torch's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Have a function for CUDA, but start no kernels there.
NATIVE = {"empty", "empty_strided", "resize_", "set_", "is_set_to", "record_stream"}
NATIVE |= {"is_pinned", "_pin_memory"}
# Start kernels, or choose a library that does, and have no function for CUDA alone.
OTHERS = {"copy_", "convolution", "convolution_backward"}
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind

_runtime = ctypes.CDLL(None)
_library = torch.library.Library("aten", "IMPL")
_generators: dict[int, torch.Generator] = {}  # by seed


def extent(tensor: Tensor) -> int:
    """Elements from its first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))


def on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor of the same memory."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * (extent(tensor) * tensor.element_size())).from_address(
        tensor.data_ptr()
    )
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride())


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """The generator that stands for one of a CUDA device."""
    seed = generator.initial_seed()
    if seed not in _generators:
        _generators[seed] = torch.Generator().manual_seed(seed)
    return _generators[seed]


def copy_whole(to: Tensor, source: Tensor, *_: object) -> bool:
    """copy_ in its turn on the stream, as CUDA has it, if all of it is one block of memory."""
    alike = to.dtype == source.dtype and to.size() == source.size()
    alike = alike and to.device == source.device and to.stride() == source.stride()
    if not alike or extent(to) != to.numel():
        return False
    stream = torch.cuda.current_stream(to.device).cuda_stream
    arguments = (to.data_ptr(), source.data_ptr(), to.nbytes, DEVICE_TO_DEVICE, stream)
    with torch.cuda.device(to.device):
        error = _runtime.cudaMemcpyAsync(*map(ctypes.c_void_p, arguments))
    if error:
        raise RuntimeError(f"cudaMemcpyAsync: error {error}")
    return True


def run(operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """`operator` on the CPU, when the streams of its arguments have come that far.

    New tensors go to the device that is asked for, or that of its arguments.
    """
    if operator is torch.ops.aten.copy_.default and copy_whole(*args):
        return args[0]
    of_arguments = None
    originals: dict[int, Tensor] = {}  # by id of what stands for them
    pairs: list[tuple[Tensor, Tensor]] = []

    def convert(value: Any) -> Any:
        nonlocal of_arguments
        if isinstance(value, Tensor):
            host = value
            if value.is_cuda:
                of_arguments = value.device
                torch.cuda.current_stream(value.device).synchronize()
                host = on_cpu(value)
                pairs.append((value, host))
            originals[id(host)] = value
            return host
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            return cpu_generator(value)
        return value

    def convert_back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in originals:
            return originals[id(value)]
        device = kwargs.get("device") or of_arguments
        if device is None or device.type == "cpu":
            return value
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        if value.numel():
            on_cpu(made).copy_(value)
        return made

    inputs, options = pytree.tree_map(convert, (args, kwargs))
    results = operator(*inputs, **options)
    for original, host in pairs:
        if original.size() != host.size():  # an out= of another size
            original.resize_(host.size())
            on_cpu(original).copy_(host)
    return pytree.tree_map(convert_back, results)


def enable() -> None:
    torch.backends.cudnn.enabled = False
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        if namespace != "aten" or base in NATIVE or not (has_kernel or base in OTHERS):
            continue
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")
        if not operator.is_view:
            _library.impl(operator, kernel_of(operator), "CUDA", allow_override=True)


def kernel_of(operator: torch._ops.OpOverload) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return run(operator, *args, **kwargs)

    return kernel
