"""Fixtures and settings for all tests: the device, its skip, and how hypothesis runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import bnext
from bnext._extension import _C

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
