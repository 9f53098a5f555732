"""The CUDA build, from torch to the launch of each kernel, on simulated devices (simt/device.py).

`make cuda-check` runs these: GPU tests that are short enough."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kernel_code
import pytest
from conftest import NO_GPU
from simt import device

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not kernel_code.asked_for(), reason='"make cuda-check" runs these'),
    pytest.mark.skipif(device.why_not() is not None, reason=device.why_not() or ""),
    pytest.mark.skipif(NO_GPU is None, reason="here is a real device"),
]

# What pytest is told. Not here: what takes longer than it tells, what asks how PyTorch's own CUDA
# kernels behave, and graphs of them.
LAYERS = ("conversion", "errors", "in_place", "modules", "statistics")
GROUPS = {
    "layers": (*(f"tests/test_{name}.py" for name in LAYERS), "-k", "not large"),
    "transforms": ("tests/test_transforms.py",),
    "torch tools": ("tests/test_torch_tools.py", "tests/test_opinfo.py"),
    "layouts": ("tests/test_forward.py", "tests/test_backward.py", "-k", "bfloat16-cropped"),
    "families": (
        "tests/test_gpu.py",
        "-k",
        "takes_the_family or refusal or unknown or explain or (asked_for and train and grid)",
    ),
    "streams": (
        "tests/test_gpu_streams.py",
        "-k",
        "first_call or launch_error or device_of or autocast"
        " or (auto and (current_stream or (graph_replay and True)))",
    ),
}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, on simulated devices."""
    environment = device.environment() | variables
    del environment["BNEXT_STATIC_ARCHS"]
    command = [sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("group", GROUPS)
def test_gpu_tests(group: str) -> None:
    # Each tensor has memory of its own. To free it waits for all streams: their tests go without.
    own_memory = "0" if group == "streams" else "1"
    options = ("-q", "-p", "no:cacheprovider", "-m", "gpu")
    done = run(
        *("-m", "pytest", *options, *GROUPS[group]), PYTORCH_NO_CUDA_MEMORY_CACHING=own_memory
    )
    output = f"{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, output
    assert re.search(r"\d passed", done.stdout), output


STALE = """
import torch, bnext

def of(x):
    y = bnext.batchnorm2d(x, training=True)
    torch.cuda.current_stream().synchronize()
    return y

ones, x = (torch.full((2, 4, 6, 6), float(value), device="cuda") for value in (3, 0))
ones[0] = 1
side, waits = torch.cuda.Stream(), WAITS
with torch.cuda.stream(side):
    torch.cuda._sleep(1)
    x.copy_(ones)
if waits:
    torch.cuda.current_stream().wait_stream(side)
print(torch.equal(of(x), of(ones)))
"""


@pytest.mark.parametrize("waits", [True, False])
def test_streams_are_streams(waits: bool) -> None:
    """Who does not wait for another stream does not see what it will store."""
    done = run("-c", STALE.replace("WAITS", str(waits)))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{waits}\n"


REFUSED = """
import torch, bnext

torch.manual_seed(0)
x, dy = torch.randn(2, 8, 5, 80, 80)
assert bnext.explain(x, "current").count("in clusters of") == 2
found = []
for device in ("cpu", "cuda"):
    layer = bnext.BatchNorm2d(5, momentum=None, device=device)
    input = x.detach().to(device).requires_grad_()
    layer(input).backward(dy.to(device))
    found.append([input.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked])
for cpu, cuda in zip(*found, strict=True):
    torch.testing.assert_close(cuda.cpu(), cpu)
"""


def test_a_stream_with_a_part_of_the_device() -> None:
    """A cluster that has no room there is refused. Another family runs, and counts one batch."""
    for sms in ("16", "1"):
        done = run("-c", REFUSED, BNEXT_SHIM_STREAM_SMS=sms)
        assert done.returncode == 0, done.stderr


UNLOADABLE = """
import torch, bnext

torch.manual_seed(0)
layer = bnext.BatchNorm2d(32, momentum=MOMENTUM, device="cuda")
x = torch.randn(2, 32, 40, 40, device="cuda").to(memory_format=torch.channels_last)
before = {name: t.clone() for name, t in layer.state_dict().items()}
try:
    layer(x)
except RuntimeError as error:
    assert "could not launch" in str(error), error
else:
    raise AssertionError("no error")
for name, t in layer.state_dict().items():
    assert torch.equal(t, before[name]), name
"""


@pytest.mark.parametrize(
    ("family", "kernel", "momentum"),
    [
        ("streaming", "finish_kernel", 0.1),
        ("streaming", "apply_kernel", 0.1),
        ("streaming", "apply_kernel", None),
        ("resident", "count_kernel", None),
    ],
)
def test_a_kernel_that_cannot_be_loaded(family: str, kernel: str, momentum: float | None) -> None:
    """Those before it in the pass have not run: no batch counts, no statistics are updated."""
    program = UNLOADABLE.replace("MOMENTUM", str(momentum))
    done = run(
        *("-c", program),
        BNEXT_CUDA_FAMILY=family,
        BNEXT_SHIM_UNLOADABLE=kernel,
    )
    assert done.returncode == 0, done.stderr
