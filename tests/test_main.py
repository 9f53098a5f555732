"""What people see from a shell: `python -m bnext`, `explain`, the version, the demo's options."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bnext
from bnext._extension import _C

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


def test_module_explains_a_plan() -> None:
    options = ("--device", "h200", "--pass", "backward", "--family", "streaming")
    done = run("-m", "bnext", "--explain", "32,64,56,56", "--dtype", "bfloat16", *options)
    assert done.returncode == 0, done.stderr
    (plan,) = plans(done.stdout)
    assert plan.startswith("streaming backward, planes of bfloat16")
    here = "can show the plan, not run it" if not _C.build["cuda_archs"] else "holds kernels for"
    assert here in done.stdout
    refused = run("-m", "bnext", "--explain", "2,3,8,8", "--device", "k20")
    assert refused.returncode == 2
    assert "h200" in refused.stderr


def test_module_explains_a_shape() -> None:
    done = run(
        "-m", "bnext", "--explain", "2,3,8,8", "--layout", "channels_last", "--device", "cpu"
    )
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


def plans(text: str) -> list[str]:
    """The lines that begin with a family."""
    families = tuple(_C.cuda_families())
    return [line.strip() for line in text.splitlines() if line.strip().startswith(families)]


@pytest.mark.parametrize("device", _C.cuda_devices())
def test_explain_for_a_device_that_is_not_here(device: str) -> None:
    x = torch.empty(32, 64, 56, 56, device="meta")
    text = bnext.explain(x, device)
    assert f"on {device}:" in text
    forward, backward = plans(text)
    assert " forward, planes of float32" in forward
    assert " backward, planes of float32" in backward
    # 2 and 3 tensors of 25.69 MB must move.
    assert "where 51.38 MB must be moved" in text
    assert "where 77.07 MB must be moved" in text
    assert plans(bnext.explain(x, device, direction="backward")) == [backward]


def test_named_devices() -> None:
    """Figures of which a wrong one would show: each architecture with its own."""
    fields = {name: _C.cuda_device(name) for name in _C.cuda_devices()}
    assert {"t4", "a100", "rtx4090", "h200", "b200", "rtx5090"} <= fields.keys()
    for name, arch, sms in (("t4", 75, 40), ("a100", 80, 108), ("h200", 90, 132)):
        assert (fields[name]["arch"], fields[name]["num_sms"]) == (arch, sms)
    for name, found in fields.items():
        assert found["threads_per_sm"] in (1024, 1536, 2048), name
        assert 1 <= found["l2_bytes"] / 2**20 <= 128, name
    with pytest.raises(ValueError, match="not k20"):
        _C.cuda_device("k20")


def test_explain_families() -> None:
    x = torch.empty(8, 6, 7, 7, dtype=torch.float16, device="meta")
    text = bnext.explain(x, "h200", family="all")
    found = [line.split()[:2] for line in plans(text)]
    families = _C.cuda_families()
    assert found == [[f, p] for p in ("forward,", "backward,") for f in families]
    for family in families:
        lines = plans(bnext.explain(x, "h200", family=family))
        assert [line.split()[0] for line in lines] == [family, family]
    # What reads its tensors once is streamed, whichever family is asked for.
    for family in ("cluster", "all"):
        lines = plans(bnext.explain(x, "h200", family=family, training=False))
        assert [line.split()[0] for line in lines] == ["streaming", "streaming"]
    # No kernel for no elements, and no crash.
    for shape in ((0, 4, 8, 8), (4, 0, 8, 8), (2, 4, 0, 3)):
        for family in ("auto", "cluster"):
            text = bnext.explain(torch.empty(shape, device="meta"), "h100", family=family)
            assert text.count("cannot run: there is nothing to do") == 2
    # Streaming is for everything.
    assert "cannot run" not in bnext.explain(x, "t4", family="streaming")
    with pytest.raises(RuntimeError, match=r"^family should be auto.* not fastest"):
        bnext.explain(x, "h200", family="fastest")
    with pytest.raises(ValueError, match="name a CUDA device"):
        bnext.explain(torch.ones(2, 3, 4, 4), family="streaming")


def test_a_shape_that_no_tensor_has() -> None:
    command = [sys.executable, "-m", "bnext", "--explain", "1000000000000000000000,1,1,1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "has more elements than a tensor can have" in run.stderr


def test_explain_marks_what_is_chosen(environment: Callable[[str, str], None]) -> None:
    x = torch.empty(32, 64, 56, 56, device="meta")
    lines = bnext.explain(x, "h200", family="all").splitlines()
    chosen = [line.removesuffix(" (chosen)") for line in lines if line.endswith(" (chosen)")]
    assert chosen == [line for line in bnext.explain(x, "h200").splitlines() if line in chosen]
    assert len(chosen) == 2
    # Where a grid is faster and not taken, it says why.
    x = torch.empty(32, 128, 28, 28, dtype=torch.float16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    lines = plans(bnext.explain(x, "h200", family="all", direction="backward"))
    cluster, grid = (next(i for i in lines if i.startswith(f)) for f in ("cluster", "grid"))
    assert cluster.endswith("(chosen)")
    predicted = [float(i.partition("predicted ")[2].split()[0]) for i in (cluster, grid)]
    assert predicted[1] < predicted[0] < float(grid.partition("counts as ")[2].split()[0])
    # A family that was asked for and cannot run is not taken.
    environment("BNEXT_CUDA_FAMILY", "cluster")
    assert "(chosen)" not in bnext.explain(x, "t4", family="all")


def test_explain_on_a_cpu_sees_the_output_too() -> None:
    """Planes in one tensor and rows in the other have no inner index in common."""
    x = torch.empty(8, 56, 32, 56).permute(0, 2, 3, 1)
    assert "one element at a time" in bnext.explain(x)
    assert "single elements" in bnext.explain(x, "h100")
    assert bnext.explain(x.contiguous()).endswith(_C.cpu_isa())


def test_explain_takes_a_device() -> None:
    x = torch.ones(2, 3, 4, 4)
    assert bnext.explain(x, torch.device("cpu")) == bnext.explain(x)
    with pytest.raises(TypeError, match="argument 'input' must be Tensor, not list"):
        bnext.explain([1])


def test_explain_reads_the_forced_family(environment: Callable[[str, str], None]) -> None:
    x = torch.empty(8, 6, 7, 7, device="meta")
    for family in _C.cuda_families():
        environment("BNEXT_CUDA_FAMILY", family)
        assert bnext.explain(x, "h200") == bnext.explain(x, "h200", family=family)
    environment("BNEXT_CUDA_FAMILY", "fastest")
    with pytest.raises(RuntimeError, match=r"^BNEXT_CUDA_FAMILY should be auto.* not fastest"):
        bnext.explain(x, "h200")


def test_who_gets_a_grid(environment: Callable[[str, str], None]) -> None:
    """Its launch waits for what other streams do: not for those that send gradients."""
    x = torch.empty(32, 256, 56, 56, device="meta").contiguous(memory_format=torch.channels_last)
    for world, grid, chosen in (
        *(("", "", True), ("1", "", True), ("8", "", False)),
        *(("8", "1", True), ("1", "0", False)),
    ):
        environment("WORLD_SIZE", world)
        environment("BNEXT_CUDA_GRID", grid)
        backward = plans(bnext.explain(x, "h100"))[1]
        assert backward.startswith("grid ") == chosen, (world, grid)
        assert plans(bnext.explain(x, "h100", family="grid"))[1].startswith("grid ")
    environment("BNEXT_CUDA_GRID", "yes")
    with pytest.raises(RuntimeError, match=r"^BNEXT_CUDA_GRID should be 0 or 1, not yes"):
        bnext.explain(x, "h100")


def test_who_has_persistent_blocks(environment: Callable[[str, str], None]) -> None:
    """They hold their SMs, so there are none where other streams send gradients."""
    x = torch.empty(32, 256, 56, 56, device="meta")
    for world, persistent, wanted in (
        *(("", "", True), ("1", "", True), ("8", "", False)),
        *(("8", "1", True), ("1", "0", False), ("8", "always", True)),
    ):
        environment("WORLD_SIZE", world)
        environment("BNEXT_CUDA_PERSISTENT", persistent)
        environment("BNEXT_CUDA_GRID", "0")
        found = plans(bnext.explain(x, "h200"))
        assert [" slabs each" in plan for plan in found] == [wanted] * 2, (world, persistent)
    environment("BNEXT_CUDA_PERSISTENT", "no")
    message = r"^BNEXT_CUDA_PERSISTENT should be 0, 1 or always, not no"
    with pytest.raises(RuntimeError, match=message):
        bnext.explain(x, "h200")


def test_who_keeps_packs_in_registers(environment: Callable[[str, str], None]) -> None:
    x = torch.empty(256, 256, 56, 56, device="meta")
    for registers, wanted in (("", True), ("1", True), ("always", True), ("0", False)):
        environment("BNEXT_CUDA_REGISTERS", registers)
        _, backward = plans(bnext.explain(x, "h200"))
        assert (" in registers per block" in backward) == wanted
    environment("BNEXT_CUDA_REGISTERS", "2")
    message = r"^BNEXT_CUDA_REGISTERS should be 0, 1 or always, not 2"
    with pytest.raises(RuntimeError, match=message):
        bnext.explain(x, "h200")


@pytest.mark.parametrize(
    ("name", "device", "family", "words"),
    [
        ("BNEXT_CUDA_LATE", "h100", None, "us late"),
        ("BNEXT_CUDA_EARLY", "h200", None, "of a later slab early"),
        ("BNEXT_CUDA_OVERLAP", "h100", "streaming", ", overlapping"),
    ],
)
def test_what_plans_do_without(
    name: str, device: str, family: str | None, words: str, environment: Callable[[str, str], None]
) -> None:
    x = torch.empty(256, 512, 14, 14, device="meta")
    for value, is_there in (("", True), ("1", True), ("0", False)):
        environment(name, value)
        found = plans(bnext.explain(x, device, family=family))
        assert [words in plan for plan in found] == [is_there] * 2
    environment(name, "2")
    with pytest.raises(RuntimeError, match=rf"^{name} should be 0 or 1, not 2"):
        bnext.explain(x, device)


@pytest.mark.parametrize(
    ("name", "value", "found", "wrong", "known"),
    [
        ("TEAM", "22", ": 88 x 512 in 4 teams", "-3", "a number of blocks"),
        ("THREADS", "128", " x 128 in 4 teams", "100", "64, 128, 256 or 512"),
        ("ROW_BYTES", "64", " x 256 in 8 teams", "32", "64 or 128"),
    ],
)
def test_what_numbers_force(
    name: str, value: str, found: str, wrong: str, known: str, environment: Callable[..., None]
) -> None:
    x = torch.empty(32, 256, 56, 56, device="meta", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    texts = []
    for text in ("", value):
        environment(f"BNEXT_CUDA_{name}", text)
        texts.append(bnext.explain(x, "h200", family="grid", direction="backward"))
    assert [found in text for text in texts] == [False, True]
    environment(f"BNEXT_CUDA_{name}", wrong)
    message = rf"^BNEXT_CUDA_{name} should be {known}, not {wrong}"
    with pytest.raises(RuntimeError, match=message):
        bnext.explain(x, "h200")


def test_numbers_that_no_plan_has(environment: Callable[..., None]) -> None:
    """An error of the families on chip, where one is asked for; else another family does it."""
    environment("BNEXT_CUDA_TEAM", "100000")
    x = torch.empty(32, 256, 56, 56, device="meta")
    assert "streaming backward" in bnext.explain(x, "a100", direction="backward")
    asked = bnext.explain(x, "h200", family="cluster")
    assert "cannot run: no plan has the team, the threads and the rows that are asked" in asked


def test_other_costs() -> None:
    """What the model would say if something took longer; and what is no cost of it."""
    x = torch.empty(32, 64, 56, 56, device="meta")
    costs = _C.cuda_costs("h200")
    usual, same, slower = (
        _C.cuda_plans(x, "h200", "streaming", True, changed)[1]["microseconds"]
        for changed in ({}, costs, {"launch_us": costs["launch_us"] + 1})
    )
    assert usual == same
    assert slower == pytest.approx(usual + 2)  # two kernels
    with pytest.raises(RuntimeError, match="the model of plans has no cost lunch_us"):
        _C.cuda_plans(x, "h200", "", True, {"lunch_us": 1.0})


def test_explain_writes_large_numbers_out() -> None:
    x = torch.empty(512, 64, 112, 112, device="meta")
    text = bnext.explain(x, "h200", family="streaming")
    assert re.search(r"predicted \d{4} us", text)
    assert "e+" not in text


def test_explain_looks_at_strides_and_alignment() -> None:
    x = torch.zeros(2, 6, 8, 8)
    assert "planes of float32 in packs" in bnext.explain(x, "a100")
    rows = x.contiguous(memory_format=torch.channels_last)
    assert "rows of float32 in packs" in bnext.explain(rows, "a100")
    # Channels that do not fill packs, at an address that is no multiple of 16 bytes.
    shifted = torch.zeros(x.numel() + 1)[1:].as_strided(rows.shape, rows.stride())
    assert "rows of float32 in single elements" in bnext.explain(shifted, "a100")


@pytest.mark.parametrize(
    ("training", "family"), [(True, "streaming"), (False, "streaming"), (False, "cluster")]
)
def test_explain_bytes(training: bool, family: str) -> None:
    """In evaluation nothing is read twice, whatever the family."""
    x = torch.empty(32, 64, 56, 56, device="meta")
    for plan in _C.cuda_plans(x, "h200", family, training):
        least = (2 if plan["pass"] == "forward" else 3) * x.numel() * 4
        assert plan["bytes_min"] == least
        assert (plan["bytes_moved"] == least) == (not training)


def test_explain_refuses() -> None:
    x = torch.empty(2, 3, 4, 4, device="meta")
    with pytest.raises(ValueError, match=r"device should be cpu, .*h200.* not k20"):
        bnext.explain(x, "k20")
    with pytest.raises(ValueError, match="not meta"):
        bnext.explain(x)
    with pytest.raises(ValueError, match="direction should be"):
        bnext.explain(x, "h200", direction="sideways")
    if not _C.build["cuda_archs"]:
        with pytest.raises(RuntimeError, match="this build of bnext holds CPU kernels only"):
            bnext.explain(x, "cuda")


def test_public_surface() -> None:
    assert set(bnext.__all__) == {
        "BatchNorm2d",
        "BatchNorm2dGradients",
        "LazyBatchNorm2d",
        "batchnorm2d",
        "batchnorm2d_backward",
        "convert",
        "empty_cache",
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
