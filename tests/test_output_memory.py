"""Large outputs on a CPU: their memory is kept for the next ones, and nobody can tell."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bnext
from bnext._extension import _C

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch's own memory elsewhere")


@pytest.fixture(autouse=True)
def empty() -> None:
    bnext.empty_cache()


def large(megabytes: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(megabytes, 4, 256, 256, generator=generator)


def normalized(x: Tensor) -> Tensor:
    return bnext.batchnorm2d(x, training=True)


def in_process(program: str, **environment: str) -> None:
    """Runs the program, which asserts for itself, in a process with this environment."""
    imports = "import torch, bnext\nfrom bnext._extension import _C\n"
    command = [sys.executable, "-c", imports + program]
    run = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("width", [92, 100, 150, 181, 300])
def test_sizes_are_rounded_up_by_an_eighth(width: int) -> None:
    """At most; blocks of such sizes fit outputs of about that size."""
    x = torch.ones(1, 64, width, width)
    y = normalized(x)
    del y
    assert x.nbytes <= _C.cached_output_bytes() <= 1.125 * x.nbytes


def test_a_storage_that_shrinks_has_whole_pages() -> None:
    """They are what the system maps: of 64 KiB, where they are largest."""
    y = normalized(large())
    bytes_before = y.nbytes
    y.untyped_storage().resize_(100)
    del y
    assert _C.cached_output_bytes() == bytes_before + 64 * 1024
    bnext.empty_cache()
    assert _C.cached_output_bytes() == 0


def test_a_freed_output_leaves_its_memory_to_the_next() -> None:
    x = large()
    y = normalized(x)
    address, want = y.data_ptr(), y.clone()
    del y
    assert _C.cached_output_bytes() == x.nbytes
    again = normalized(x)
    assert again.data_ptr() == address
    assert _C.cached_output_bytes() == 0
    torch.testing.assert_close(again, want, rtol=0, atol=0)


def test_outputs_alive_at_once_are_apart() -> None:
    x = large()
    outputs = [normalized(x) for _ in range(3)]
    begins = sorted(y.data_ptr() for y in outputs)
    assert all(b - a >= x.nbytes for a, b in pairwise(begins))


def test_small_outputs_are_left_to_torch() -> None:
    normalized(torch.randn(2, 3, 8, 8))
    assert _C.cached_output_bytes() == 0


def test_a_block_serves_only_what_fills_most_of_it() -> None:
    normalized(large(16))
    kept = _C.cached_output_bytes()
    y = normalized(large(8))
    assert _C.cached_output_bytes() == kept  # half of a block would be wasted
    z = normalized(large(14))
    assert _C.cached_output_bytes() == 0
    del y, z


def test_empty_cache_gives_everything_back() -> None:
    normalized(large())
    assert _C.cached_output_bytes() > 0
    bnext.empty_cache()
    assert _C.cached_output_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_of_the_last_output_is_left(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x = large(8).to(dtype).contiguous(memory_format=memory_format)
    want = normalized(x).clone(memory_format=torch.preserve_format)
    bnext.empty_cache()
    poison = normalized(torch.full_like(x, torch.nan))
    address = poison.data_ptr()
    assert poison.isnan().all()
    del poison
    y = normalized(x)
    assert y.data_ptr() == address
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, want)


def test_gradients_come_from_there_too() -> None:
    x = large().requires_grad_()
    (dx,) = torch.autograd.grad(normalized(x), x, large(seed=1))
    address = dx.data_ptr()
    del dx
    before = _C.cached_output_bytes()
    assert before >= 2 * x.nbytes  # y and dx
    (dx,) = torch.autograd.grad(normalized(x), x, large(seed=1))
    assert _C.cached_output_bytes() == before - x.nbytes  # y is free again
    assert address % (2 * MB) == dx.data_ptr() % (2 * MB) == 0


def test_tensors_do_what_tensors_do() -> None:
    y = normalized(large())
    want = y.numpy().copy()
    shared = y.clone().share_memory_()
    lazy = torch._lazy_clone(y)
    deep = copy.deepcopy(y)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    view = y[1:]
    for other in (shared, lazy, deep, torch.load(file), torch.from_dlpack(y)):
        assert (other.numpy() == want).all()
    del y
    assert (view.numpy() == want[1:]).all()  # a view keeps it alive
    grown = normalized(large())
    grown.resize_(grown.numel() + 1)
    assert (grown[:-1].numpy() == want.ravel()).all()
    moved = normalized(large())
    moved.share_memory_()
    assert (moved.numpy() == want).all()
    lazy += 1
    assert (deep.numpy() == want).all()


def test_many_threads() -> None:
    inputs = [large(2 + k, k) for k in range(4)]
    wants = [normalized(x).clone() for x in inputs]
    wrong = []

    def work(k: int) -> None:
        for i in range(12):
            j = (k + i) % 4
            if not torch.equal(normalized(inputs[j]), wants[j]):
                wrong.append((k, j))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_freed_by_another_thread() -> None:
    outputs = [normalized(large())]
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    assert _C.cached_output_bytes() == large().nbytes


def test_the_profiler_sees_memory_come_and_go() -> None:
    x = large()
    with torch.autograd.profiler.profile(profile_memory=True) as run:
        y = normalized(x)
        del y
    changes = [e.cpu_memory_usage for e in run.function_events]
    assert max(changes) >= x.nbytes
    assert min(changes) <= -x.nbytes


def test_what_is_kept_stays_below_its_limit() -> None:
    in_process(
        """
x = torch.randn(4, 4, 256, 256)
for _ in range(3):
    outputs = [bnext.batchnorm2d(x, training=True) for _ in range(4)]
    del outputs
    assert _C.cached_output_bytes() == 8 * 2**20
bnext.batchnorm2d(torch.randn(16, 4, 256, 256), training=True)
# Larger than the limit: not kept, and nothing had to go for it.
assert _C.cached_output_bytes() == 8 * 2**20
""",
        BNEXT_CPU_CACHE_MB="8",
    )


def test_the_system_may_take_what_has_long_been_unused() -> None:
    in_process(
        """
import time
from pathlib import Path

def lazily_free():  # bytes
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree:")) * 1024

x, y = torch.randn(8, 4, 256, 256), torch.randn(4, 4, 256, 256)
begin = time.monotonic()
bnext.batchnorm2d(x, training=True)
for _ in range(3):
    bnext.batchnorm2d(y, training=True)
marked = lazily_free()
assert marked == 0 or time.monotonic() - begin >= 1, marked  # nothing is old enough
time.sleep(1.1)
bnext.batchnorm2d(y, training=True)
assert lazily_free() == x.nbytes, lazily_free()
""",
    )


def test_nothing_is_kept_when_the_limit_is_zero() -> None:
    in_process(
        """
x = torch.randn(4, 4, 256, 256)
y = bnext.batchnorm2d(x, training=True)
assert torch.equal(torch._lazy_clone(y), y)
del y
assert _C.cached_output_bytes() == 0
""",
        BNEXT_CPU_CACHE_MB="0",
    )


def test_what_is_kept_is_given_up_before_memory_runs_out() -> None:
    in_process(
        """
import resource
from pathlib import Path

x = torch.randn(8, 4, 256, 256)  # 8 MB
outputs = [bnext.batchnorm2d(x, training=True) for _ in range(8)]
del outputs
kept = _C.cached_output_bytes()
assert kept == 8 * x.nbytes
big = torch.randn(24, 4, 256, 256)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + big.nbytes // 2,) * 2)
y = bnext.batchnorm2d(big, training=True)
assert _C.cached_output_bytes() == 0 and y.isfinite().all()
try:
    more = [bnext.batchnorm2d(big, training=True) for _ in range(8)]
except torch.OutOfMemoryError as error:
    assert str(big.nbytes) in str(error), error
else:
    raise AssertionError("no error")
""",
    )


def test_a_forked_child_has_its_own() -> None:
    in_process(
        """
import os
torch.set_num_threads(1)
x = torch.randn(4, 4, 256, 256)
want = bnext.batchnorm2d(x, training=True)
bnext.batchnorm2d(x + 1, training=True)
pid = os.fork()
if pid == 0:
    bnext.batchnorm2d(x.neg(), training=True)
    same = torch.equal(bnext.batchnorm2d(x, training=True), want)
    os._exit(0 if same and _C.cached_output_bytes() == x.nbytes else 1)
assert os.waitpid(pid, 0)[1] == 0
assert _C.cached_output_bytes() == x.nbytes
assert torch.equal(bnext.batchnorm2d(x, training=True), want)
""",
    )


def test_a_limit_that_is_no_number_is_refused() -> None:
    in_process(
        """
try:
    bnext.batchnorm2d(torch.randn(4, 4, 256, 256), training=True)
except RuntimeError as error:
    assert "BNEXT_CPU_CACHE_MB" in str(error) and "lots" in str(error), error
else:
    raise AssertionError("no error")
""",
        BNEXT_CPU_CACHE_MB="lots",
    )
