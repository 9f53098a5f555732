"""Builds the extension module bnext._C: its sources, its flags, and whether CUDA is in it.

BNEXT_CUDA=auto|0|1 asks for CUDA, TORCH_CUDA_ARCH_LIST for GPU architectures, MAX_JOBS for the
number of compiler processes. Names, versions and dependencies are in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).resolve().parent
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# No -march and no fast-math: wheels move between machines, and NaN and Inf must survive.
# at::parallel_for is a template: compiled without OpenMP it runs on one thread and says nothing.
# psabi warns of vectors passed between files; here they stay inside one file's inline functions.
FLAGS = {
    "cxx": ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *OPENMP],
    "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"],
}
OLDEST_CUDA = (12, 4)  # as csrc/cuda/device/grid.cuh says
DEFAULT_ARCHS = "8.0;9.0+PTX"  # for a build machine that has no GPU to ask
PLANS = "csrc/cuda/plan*.cpp"  # plain C++, in every build: plans can be shown without a GPU
TOOLKIT_FILES = ("bin/nvcc", "include/cuda_runtime.h")
NEEDS_TORCH = """bnext: the build needs torch, and this Python cannot import it ({}).
Install torch first, then build without isolation: pip install --no-build-isolation ."""


def find_files(*patterns: str) -> list[str]:
    """Paths relative to this folder, as setuptools wants them, in an order that never changes."""
    return sorted(path.relative_to(ROOT).as_posix() for p in patterns for path in ROOT.glob(p))


def is_toolkit(root: Path) -> bool:
    return all((root / name).is_file() for name in TOOLKIT_FILES)


def toolkit_version(root: Path) -> tuple[int, int] | None:
    header = root / "include/cuda_runtime_api.h"
    found = header.is_file() and re.search(r"define\s+CUDART_VERSION\s+(\d+)", header.read_text())
    return (int(found[1]) // 1000, int(found[1]) % 1000 // 10) if found else None


def roots_named_by(nvcc: str) -> list[Path]:
    """Roots that `nvcc --dryrun` prints: the way past a wrapper script before the real nvcc."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    named = re.findall(r"^#\$ (TOP|_HERE_)=(.+)$", run.stderr, re.MULTILINE)
    return [Path(path) if name == "TOP" else Path(path).parent for name, path in named]


def find_toolkit(env: Mapping[str, str], fallback: str = "/usr/local/cuda") -> Path:
    """The root with nvcc and headers. torch would take the folder above nvcc's without a look."""
    need = " and ".join(TOOLKIT_FILES)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            if is_toolkit(Path(env[name])):
                return Path(env[name]).resolve()
            raise LookupError(f"{name}={env[name]} does not hold {need}: correct it or unset it")
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    roots = [Path(nvcc).resolve().parent.parent, *roots_named_by(nvcc)] if nvcc else []
    roots = [root.resolve() for root in [*roots, Path(fallback)]]
    for root in roots:
        if is_toolkit(root):
            return root
    looked = ", ".join(dict.fromkeys(map(str, roots)))
    hint = "install one, or set CUDA_HOME to the folder that holds its bin and include"
    raise LookupError(f"no CUDA toolkit with {need} found (looked in {looked}): {hint}")


def choose_cuda(torch: Any, sources: list[str], env: Mapping[str, str]) -> tuple[Path | None, str]:
    """The toolkit to build with, or None for a CPU build; and why."""
    mode = env.get("BNEXT_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"bnext: BNEXT_CUDA must be auto, 0 or 1, not {mode!r}")
    if mode == "0":
        return None, "BNEXT_CUDA=0"
    missing, root = [], None
    if not torch.version.cuda:
        missing.append(f"torch {torch.__version__} is a CPU build: install a CUDA build of torch")
    if not any(source.endswith(".cu") for source in sources):
        missing.append("this source tree holds no CUDA sources (csrc/cuda/*.cu)")
    try:
        root = find_toolkit(env)
        found, wanted = toolkit_version(root), torch.version.cuda
        hint = "set CUDA_HOME to a toolkit that fits"
        if found and wanted and found[0] != int(wanted.split(".")[0]):
            missing.append(
                f"{root} is CUDA {found[0]}, but torch was built with CUDA {wanted}: {hint}"
            )
        elif found and found < OLDEST_CUDA:
            oldest, version = (".".join(map(str, v)) for v in (OLDEST_CUDA, found))
            missing.append(f"{root} is CUDA {version}, but the kernels need {oldest}: {hint}")
    except LookupError as error:
        missing.append(str(error))
    if missing and mode == "1":
        raise SystemExit("\n  - ".join(["bnext: BNEXT_CUDA=1 was asked for, but", *missing]))
    return (None, "; ".join(missing)) if missing else (root, f"toolkit {root}")


def build_options() -> dict[str, Any]:
    """What setup() is told about the extension."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(NEEDS_TORCH.format(error)) from None
    sources, macros = find_files("csrc/*.cpp", "csrc/cpu/*.cpp", PLANS), []
    cuda_sources = find_files("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp")
    cuda_sources = [source for source in cuda_sources if source not in sources]
    toolkit, why = choose_cuda(torch, cuda_sources, os.environ)
    target = "CPU and CUDA" if toolkit else "CPU"
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # cpp_extension reads it once, when imported
        gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        visible = ";".join(f"{major}.{minor}" for major, minor in sorted(set(gpus)))
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or visible or DEFAULT_ARCHS
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        macros = [("BNEXT_WITH_CUDA", "1"), ("BNEXT_CUDA_ARCHS", f'"{archs}"')]
        sources += cuda_sources
    # The ninja that pip installed lies beside this Python, and comes first even where no venv is
    # active: when two ninjas take turns in a build folder, each throws the other's work away.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    from torch.utils import cpp_extension

    class TorchBuild(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # setuptools would compile it all anew in a temporary folder
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def run(self) -> None:
            print(f"bnext: building for {target} ({why})", flush=True)
            try:
                super().run()
            except RuntimeError as error:  # a traceback would bury what the compiler said
                raise SystemExit(f"bnext: {error}") from None

    extension = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    options = {"define_macros": macros, "include_dirs": [str(ROOT / "csrc")]}
    options |= {"depends": find_files("csrc/**/*.h", "csrc/**/*.cuh")}
    options |= {"extra_compile_args": FLAGS, "extra_link_args": OPENMP}
    modules = [extension("bnext._C", sources, **options)]
    return {"ext_modules": modules, "cmdclass": {"build_ext": TorchBuild}}


if __name__ == "__main__":  # true under pip's build backend, too
    if int(setuptools.__version__.split(".")[0]) < 77:  # older ones misread pyproject.toml
        upgrade = "run pip install --upgrade setuptools"
        raise SystemExit(f"bnext: setuptools {setuptools.__version__} is below 77: {upgrade}")
    setuptools.setup(**build_options())
