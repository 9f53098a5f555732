"""The build: where CUDA is looked for, what is said without it, the flags, what an sdist holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import scripts

import bnext

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None))
CUDA_TORCH = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="13.0"))
CUDA_12_TORCH = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="12.8"))
CUDA_SOURCES = ["csrc/cuda/launch.cu"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module: its functions, without running setup()."""
    return scripts.load("setup.py")


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def toolkit(root: Path, version: int = 13000, headers: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit; its nvcc answers --dryrun as the real one does."""
    bin = root / "bin"
    script(bin / "nvcc", f"echo '#$ _HERE_={bin}' >&2; echo '#$ TOP={bin}/..' >&2")
    if headers:
        (root / "include").mkdir()
        (root / "include/cuda_runtime.h").touch()
        (root / "include/cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return root


class TestFindToolkit:
    def test_nvcc_on_path(self, setup_py: ModuleType, tmp_path: Path) -> None:
        root = toolkit(tmp_path / "cuda")
        assert setup_py.find_toolkit({"PATH": str(root / "bin")}) == root

    def test_nvcc_is_a_link(self, setup_py: ModuleType, tmp_path: Path) -> None:
        # This nvcc cannot say where it lies: the link alone has to lead there.
        root = toolkit(tmp_path / "cuda")
        script(root / "bin/nvcc", "exit 1")
        (tmp_path / "links").mkdir()
        (tmp_path / "links/nvcc").symlink_to(root / "bin/nvcc")
        assert setup_py.find_toolkit({"PATH": str(tmp_path / "links")}) == root

    @pytest.mark.parametrize("said", ["TOP", "_HERE_"])
    def test_nvcc_is_a_wrapper_script(
        self, setup_py: ModuleType, tmp_path: Path, said: str
    ) -> None:
        # The folder above the wrapper's holds no headers; torch would take it all the same.
        root = toolkit(tmp_path / "opt/cuda-13.0")
        path = f"{root}/bin/.." if said == "TOP" else f"{root}/bin"
        script(root / "bin/nvcc", f"echo '#$ {said}={path}' >&2")
        wrapper = script(tmp_path / "usr/bin/nvcc", f'exec {root}/bin/nvcc "$@"')
        assert setup_py.find_toolkit({"PATH": str(wrapper.parent)}) == root

    @pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
    def test_a_named_toolkit_comes_first(
        self, setup_py: ModuleType, tmp_path: Path, name: str
    ) -> None:
        other, named = toolkit(tmp_path / "other"), toolkit(tmp_path / "named")
        assert setup_py.find_toolkit({"PATH": str(other / "bin"), name: str(named)}) == named

    @pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
    def test_a_wrong_name_is_an_error_though_another_toolkit_is_there(
        self, setup_py: ModuleType, tmp_path: Path, name: str
    ) -> None:
        other, bare = toolkit(tmp_path / "other"), toolkit(tmp_path / "bare", headers=False)
        with pytest.raises(LookupError) as error:
            setup_py.find_toolkit({"PATH": str(other / "bin"), name: str(bare)})
        assert f"{name}={bare}" in str(error.value)
        assert "include/cuda_runtime.h" in str(error.value)

    def test_fallback(self, setup_py: ModuleType, tmp_path: Path) -> None:
        root = toolkit(tmp_path / "cuda")
        assert setup_py.find_toolkit({"PATH": ""}, fallback=str(root)) == root

    def test_without_headers_it_says_where_it_looked(
        self, setup_py: ModuleType, tmp_path: Path
    ) -> None:
        bare = toolkit(tmp_path / "bare", headers=False)
        with pytest.raises(LookupError) as error:
            setup_py.find_toolkit({"PATH": str(bare / "bin")}, fallback=str(tmp_path / "none"))
        for part in (str(bare), str(tmp_path / "none"), "set CUDA_HOME"):
            assert part in str(error.value)


class TestChooseCuda:
    @pytest.mark.parametrize("mode", [None, "", "auto", "1"])
    def test_takes_cuda_when_nothing_is_missing(
        self, setup_py: ModuleType, tmp_path: Path, mode: str | None
    ) -> None:
        root = toolkit(tmp_path / "cuda")
        env = {"CUDA_HOME": str(root)} | ({} if mode is None else {"BNEXT_CUDA": mode})
        assert setup_py.choose_cuda(CUDA_TORCH, CUDA_SOURCES, env)[0] == root

    def test_0_never(self, setup_py: ModuleType, tmp_path: Path) -> None:
        env = {"CUDA_HOME": str(toolkit(tmp_path / "cuda")), "BNEXT_CUDA": "0"}
        assert setup_py.choose_cuda(CUDA_TORCH, CUDA_SOURCES, env)[0] is None

    @pytest.mark.parametrize(
        ("torch", "sources", "version", "headers", "said"),
        [
            (CPU_TORCH, CUDA_SOURCES, 13000, True, "torch 2.13.0+cpu is a CPU build"),
            (CUDA_TORCH, [], 13000, True, "this source tree holds no CUDA sources"),
            (CUDA_TORCH, ["csrc/cuda/plan.cpp"], 13000, True, "holds no CUDA sources"),
            (CUDA_TORCH, CUDA_SOURCES, 12080, True, "is CUDA 12, but torch was built with CUDA 13"),
            (CUDA_12_TORCH, CUDA_SOURCES, 12010, True, "is CUDA 12.1, but the kernels need 12.4"),
            (CUDA_TORCH, CUDA_SOURCES, 13000, False, "include/cuda_runtime.h"),
        ],
        ids=["cpu torch", "no sources", "no .cu", "other major version", "too old", "no headers"],
    )
    def test_one_thing_missing(
        self,
        setup_py: ModuleType,
        tmp_path: Path,
        torch: SimpleNamespace,
        sources: list[str],
        version: int,
        headers: bool,
        said: str,
    ) -> None:
        env = {"CUDA_HOME": str(toolkit(tmp_path / "cuda", version, headers))}
        root, why = setup_py.choose_cuda(torch, sources, env)
        assert root is None and said in why
        with pytest.raises(SystemExit) as error:
            setup_py.choose_cuda(torch, sources, env | {"BNEXT_CUDA": "1"})
        assert said in str(error.value)
        # It names what is missing, and nothing else.
        assert str(error.value).count("\n") == 1

    @pytest.mark.parametrize("mode", ["2", "yes", "AUTO", "01"])
    def test_other_values(self, setup_py: ModuleType, mode: str) -> None:
        with pytest.raises(SystemExit, match=f"must be auto, 0 or 1, not '{mode}'"):
            setup_py.choose_cuda(CPU_TORCH, [], {"BNEXT_CUDA": mode})


def test_the_error_reaches_whoever_runs_the_build() -> None:
    env = os.environ | {"BNEXT_CUDA": "on"}
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert run.stderr.strip() == "bnext: BNEXT_CUDA must be auto, 0 or 1, not 'on'"


def test_flags_keep_the_build_portable_and_exact(setup_py: ModuleType) -> None:
    flags = [flag for part in setup_py.FLAGS.values() for flag in part]
    assert "-O3" in setup_py.FLAGS["cxx"]
    for bad in ("march", "mtune", "mcpu", "mavx", "fast", "unsafe-math", "finite-math", "std="):
        assert not [flag for flag in flags if bad in flag]


def test_at_parallel_for_is_parallel(setup_py: ModuleType) -> None:
    # Without this flag at::parallel_for compiles to a plain loop.
    if sys.platform == "linux":
        assert "-fopenmp" in setup_py.FLAGS["cxx"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in an sdist made from a clean copy: SOURCES.txt of an earlier build would add files."""
    copy = tmp_path_factory.mktemp("sdist") / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, ignore=ignore, symlinks=True)
    (copy / "bnext/_C.another-python.so").touch()
    # setuptools adds the files that this build compiles; for others it takes MANIFEST.in.
    (copy / "csrc/cuda/kernels").mkdir(parents=True, exist_ok=True)
    (copy / "csrc/cuda/kernels/planted.cu").touch()
    make = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run = subprocess.run([sys.executable, "-c", make], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (archive,) = (copy / "dist").glob("*.tar.gz")
    assert archive.name == f"bnext-{bnext.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar if member.isfile()}


def test_sdist_holds_every_source(sdist: set[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "bnext", "tests", "examples", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".md"}
        and "__pycache__" not in path.parts
    }
    wanted |= {"bnext/py.typed", "bnext/_C.pyi", "csrc/problem.h", "csrc/bindings.cpp"}
    wanted |= {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "requirements.txt"}
    wanted |= {"setup.py", "pyproject.toml", ".clang-format", ".ci/run"}
    wanted |= {"csrc/cuda/kernels/planted.cu"}
    assert wanted <= sdist, sorted(wanted - sdist)


def test_sdist_holds_nothing_compiled(sdist: set[str]) -> None:
    assert not [name for name in sdist if name.endswith((".so", ".o", ".pyc"))]


def test_the_installed_package_is_typed() -> None:
    package = Path(bnext.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()
