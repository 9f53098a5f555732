"""What people see from a shell: `python -m bnext`, `explain`, the version, the demo's options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_ROOT = Path(bnext.__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=PACKAGE_ROOT,
        timeout=120,
        check=False,
    )


def test_module() -> None:
    done = run("-m", "bnext")
    assert done.returncode == 0, done.stderr
    assert bnext.__version__ in done.stdout
    assert torch.__version__ in done.stdout


def test_module_explains_a_shape() -> None:
    done = run("-m", "bnext", "--explain", "2,3,8,8", "--layout", "channels_last")
    assert done.returncode == 0, done.stderr
    assert "(2, 3, 8, 8) float32" in done.stdout
    refused = run("-m", "bnext", "--explain", "2,3,8")
    assert refused.returncode == 2
    assert "N,C,H,W" in refused.stderr


def test_explain(device: str) -> None:
    x = torch.randn(2, 3, 8, 8, device=device)
    planes = bnext.explain(x)
    rows = bnext.explain(x.contiguous(memory_format=torch.channels_last))
    assert isinstance(planes, str)
    assert "(2, 3, 8, 8)" in planes
    assert "float32" in planes
    assert planes != rows
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        bnext.explain(torch.zeros(2, 3))


def test_public_surface() -> None:
    assert set(bnext.__all__) == {
        "BatchNorm2d",
        "BatchNorm2dGradients",
        "LazyBatchNorm2d",
        "batchnorm2d",
        "batchnorm2d_backward",
        "convert",
        "explain",
        "layer_gradients",
        "revert",
    }
    for name in bnext.__all__:
        assert getattr(bnext, name).__doc__, f"{name} has no docstring"
    assert bnext.BatchNorm2dGradients._fields == ("input", "weight", "bias", "mean", "var")
    assert (Path(bnext.__file__).parent / "py.typed").exists()


def test_demo_says_what_it_takes() -> None:
    script = ROOT / "examples" / "train_digits.py"
    for needed in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    done = run(str(script), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
