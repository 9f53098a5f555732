"""Fixtures and settings for all tests: the device, its skip, and how hypothesis runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import kernel_code
import pytest
import torch
from hypothesis import HealthCheck, settings
from simt import library as simt

import bnext
from bnext._extension import _C

# The first calls read these, and tests set them for themselves. With other instruction sets
# (BNEXT_CPU_ISA), and without some of what plans may do (BNEXT_CUDA_GRID=0 and the like), all
# tests should pass.
FORCING = ("BNEXT_CUDA_FAMILY", "BNEXT_CUDA_TEAM", "BNEXT_CUDA_THREADS", "BNEXT_CUDA_ROW_BYTES")
for variable in ("BNEXT_CPU_CACHE_MB", *FORCING, "WORLD_SIZE"):
    os.environ.pop(variable, None)

settings.register_profile(
    "bnext",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bnext")


def why_no_gpu() -> str | None:
    """Why the GPU tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    try:
        bnext.batchnorm2d(torch.ones(1, 1, 1, 2, device="cuda"), training=True)
    except RuntimeError as error:
        if "rebuild" in str(error):
            return f"no CUDA kernels in this build: {error}"
        raise
    return None


NO_GPU = why_no_gpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if NO_GPU is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device a test runs on."""
    return request.param


@pytest.fixture
def environment() -> Iterator[Callable[[str, str], None]]:
    """Sets a variable of the environment for the length of a test, and has it read."""
    with pytest.MonkeyPatch.context() as patch:

        def set_variable(name: str, value: str) -> None:
            patch.setenv(name, value)
            _C.read_environment()

        yield set_variable
    _C.read_environment()


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nvcc() -> Path:
    if not kernel_code.asked_for():
        pytest.skip('BNEXT_STATIC_ARCHS is not set; "make cuda-check" sets it')
    try:
        return kernel_code.toolkit() / "bin/nvcc"
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compilations(
    nvcc: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Future[kernel_code.Compiled]]:
    """All architectures that are asked for and known to nvcc, as many at a time as there are
    cores."""
    folder = tmp_path_factory.mktemp("kernels")
    known = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True).stdout
    pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    source = kernel_code.ROOT / "csrc/cuda/launch.cu"
    wanted = [arch for arch in kernel_code.asked_for() if f"sm_{arch}" in known.split()]
    submit = pool.submit
    return {a: submit(kernel_code.compile_kernels, nvcc, source, a, folder) for a in wanted}


@pytest.fixture(scope="session")
def ptx(compilations: dict[int, Future[kernel_code.Compiled]]) -> Callable[[int], simt.Ptx]:
    """What nvcc has made of the kernels for an architecture."""

    @cache
    def load(arch: int) -> simt.Ptx:
        if arch not in compilations:
            pytest.skip(f"sm_{arch}: not asked for, or this nvcc does not know it")
        return simt.Ptx(compilations[arch].result().ptx)

    return load


@pytest.fixture(
    params=[arch for arch in kernel_code.RUN_ARCHS if arch in kernel_code.asked_for()] or [None],
    ids=lambda arch: f"sm_{arch}" if arch else "sources",
)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the shim runs: the kernels' sources, or what nvcc has made of them."""
    if simt.compiler() is None:
        pytest.skip("no C++ compiler here")
    if request.param is None:
        yield
        return
    with request.getfixturevalue("ptx")(request.param):
        yield
