"""`make gpu-check` without a GPU: its stages against stand-ins, its summary, its exit status."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sanitizer_run
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import checks, gpu_check, gpu_summary, probe_device, providers, results, shapes  # noqa: E402
from bnext._extension import _C  # noqa: E402

DEVICE = {"name": "Stand-in 1", "arch": "9.0", "torch": "2.0"}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "device", lambda: (dict(DEVICE), ""))


def run(folder: Path, *arguments: str) -> int:
    return gpu_check.main(["--output", str(folder), *arguments])


def python(code: str) -> gpu_check.Callable[[gpu_check.Run, gpu_check.Result], None]:
    """A stage that runs this code."""

    def stage(run: gpu_check.Run, result: gpu_check.Result) -> None:
        result.add(*run.command("code", sys.executable, "-c", code))

    return stage


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out") == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "DEVICE", "import torch_that_is_not_there")
    found, why = gpu_check.device()
    assert found is None and "torch_that_is_not_there" in why
    monkeypatch.setattr(gpu_check, "DEVICE", "raise ImportError(\"No module named 'torch'\")")
    assert "PYTHON=" in gpu_check.device()[1]


def test_a_failing_stage_does_not_stop_the_others(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: gpu_check.Run, result: gpu_check.Result) -> None:
        raise KeyError("a defect of the stage itself")

    stages = {
        "good": python("print('fine')"),
        "bad": python("print('what went wrong'); raise SystemExit(3)"),
        "broken": broken,
        "last": python("print('still here')"),
    }
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert run(tmp_path) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "# bnext on Stand-in 1" in summary
    rows = dict(line.strip("| ").split(" | ", 1) for line in summary.splitlines() if "|" in line)
    assert rows["good"].startswith("passed") and rows["last"].startswith("passed")
    assert rows["bad"].startswith("failed")
    assert "exit status 3; what went wrong" in rows["bad"]
    assert "KeyError" in rows["broken"]
    assert "still here" in (tmp_path / "log.txt").read_text()
    # One after the other, those that are asked for.
    assert run(tmp_path / "some", "--stages", "last good") == 0
    summary = (tmp_path / "some/summary.md").read_text()
    assert summary.index("| last") < summary.index("| good") and "bad" not in summary
    with pytest.raises(SystemExit) as status:
        run(tmp_path, "--stages", "nonsense")
    assert status.value.code == 2


def test_time_limits(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage past the end is interrupted and may save what it has; those after it do not begin."""
    saving = (
        "import time\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('saved what there was')"
    )
    monkeypatch.setattr(gpu_check, "STAGES", {"long": python(saving), "late": python("print(1)")})
    assert run(tmp_path, "--seconds", "3") == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "| long | out of time |" in summary
    assert "| late | out of time |" in summary and "no time left" in summary
    assert "saved what there was" in (tmp_path / "log.txt").read_text()


def test_missing_tools_are_named(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "missing", lambda modules: list(modules))
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: None)
    assert run(tmp_path, "--stages", "build tests sanitizer") == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "| build | failed |" in summary and "setuptools is missing" in summary
    assert "pip install pytest hypothesis numpy" in summary
    # A tool that few machines have is no failure, but said.
    assert "| sanitizer | skipped |" in summary and "compute-sanitizer is neither" in summary
    assert run(tmp_path, "--stages", "sanitizer") == 0


def test_the_sanitizer_is_called(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that fails for racecheck and passes its program's output on."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "tool $2, caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n'
        'if [ "$2" = racecheck ]; then echo "ERROR SUMMARY: 1 error"; exit 99; fi\n'
        'for last; do :; done\ntest -f "$last"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert run(tmp_path / "out", "--stages", "sanitizer") == 1
    summary = (tmp_path / "out/summary.md").read_text()
    assert "racecheck: exit status 99; ERROR SUMMARY: 1 error" in summary
    assert "memcheck" not in summary and "synccheck" not in summary
    assert "tool memcheck, caching off: 1" in (tmp_path / "out/log.txt").read_text()


def test_every_family_has_a_process(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in in which one of them cannot run."""
    program = tmp_path / "calls.py"
    program.write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['CUDA_LAUNCH_BLOCKING'])\n"
        "if sys.argv[2] == 'cluster': sys.exit('an illegal instruction; the plan was: cluster')\n"
    )
    monkeypatch.setattr(gpu_check, "CALLS_OF_ALL_KINDS", program)
    assert run(tmp_path / "out", "--stages", "families") == 1
    summary = (tmp_path / "out/summary.md").read_text()
    assert "family cluster: exit status 1; an illegal instruction; the plan was" in summary
    assert summary.count("exit status") == 1
    for name in ("auto", *_C.cuda_families()):
        assert f"['cuda', '{name}'] 1" in (tmp_path / f"out/family-{name}.txt").read_text()


def test_the_program_under_the_sanitizer(tmp_path: Path) -> None:
    """On the CPU: what it calls is right; the families are those of the build."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/sanitizer_run.py"), "cpu"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "auto, persistent 1: 64 steps, 0 refused" in done.stdout
    assert "streaming, persistent 1: 64 steps" in done.stdout
    assert "cluster, persistent always: 4 steps, 0 refused" in done.stdout


def test_the_program_takes_families(
    environment: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FAMILY", "PERSISTENT", "REGISTERS"):  # which it sets
        environment(f"BNEXT_CUDA_{name}", "")
    sanitizer_run.main("cpu", ["grid"])
    assert capsys.readouterr().out == "grid, persistent 1: 64 steps, 0 refused\n"


def test_what_the_sanitizer_runs_is_persistent(environment: Callable[[str, str], None]) -> None:
    """Where it should be, on every kind of device that has such blocks."""
    for name in ("BNEXT_CUDA_PERSISTENT", "BNEXT_CUDA_REGISTERS"):
        environment(name, "always")
    kept: set[tuple[str, str, torch.dtype]] = set()
    for run in sanitizer_run.RUNS:
        if run.persistent != "always":
            continue
        for device, shape, dtype, layout in itertools.product(
            _C.cuda_devices(), run.shapes, sanitizer_run.DTYPES, sanitizer_run.LAYOUTS
        ):
            x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
            for plan in _C.cuda_plans(x, device, run.family, True):
                assert plan["persistent"] or plan["error"], (device, plan["text"])
                if " in registers" in plan["text"]:
                    kept.add((device, plan["pass"], dtype))
    for device in ("h100", "h200"):
        assert {(device, "forward", torch.float32), (device, "backward", torch.float32)} < kept
        assert (device, "backward", torch.float16) in kept


def test_tests_that_are_all_skipped_are_no_success(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without CUDA kernels skips them all."""
    for number, (body, status) in enumerate((("pass", "passed"), ("pytest.skip('no')", "failed"))):
        tests = tmp_path / f"test_{number}.py"
        tests.write_text(f"import pytest\n\ndef test_it():\n    {body}\n")

        def stage(run: gpu_check.Run, result: gpu_check.Result, path: Path = tests) -> None:
            gpu_check.pytest_stage(run, result, "tests", [path])

        monkeypatch.setattr(gpu_check, "STAGES", {"tests": stage})
        assert run(tmp_path / str(number)) == (status == "failed")
        assert f"| tests | {status} |" in (tmp_path / str(number) / "summary.md").read_text()


def test_a_file_that_crashes_takes_no_other_along(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {"crash": "import os; os._exit(9)", "fail": "assert 1 == 2", "fine": "pass"}
    for name, body in bodies.items():
        text = f"import pytest\n\n@pytest.mark.gpu\ndef test_{name}():\n    {body}\n"
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "test_none.py").write_text("def test_for_the_cpu():\n    pass\n")

    def stage(run: gpu_check.Run, result: gpu_check.Result) -> None:
        selection = ("-m", "gpu", "-W", "ignore::pytest.PytestUnknownMarkWarning")
        gpu_check.pytest_stage(run, result, "tests", sorted(tmp_path.glob("test_*.py")), *selection)

    monkeypatch.setattr(gpu_check, "STAGES", {"tests": stage})
    folder = tmp_path / "out"
    assert run(folder) == 1
    summary = (folder / "summary.md").read_text()
    assert "tests.xml: 1 passed, 2 failed, 0 skipped" in summary
    assert "test_crash.py: exit status 9" in summary
    assert "test_none" not in summary
    assert "assert 1 == 2" in (folder / "tests.txt").read_text()
    assert not (folder / "tests").exists()


def row(provider: str, ratio: float, side: int = 56, **other: object) -> dict[str, object]:
    """A timed row of a backward pass that takes `ratio` ms where bnext takes 1."""
    case = shapes.Case("resnet50", shapes.Shape(32, 64, side, side), device="cuda", level="op")
    made = results.new_row(case, provider).__dict__
    made |= {"ms": ratio, "vs_bnext": ratio, "floor_share": 0.8 / ratio, "kernels": f"{provider}_k"}
    return made | other


def write_bench(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text(json.dumps({"environment": {"copy_gbps": 4000}, "rows": rows}))


def test_headline() -> None:
    """The best peer counts, shape by shape; floors are no peers; rows without a time no cases."""
    rows = [
        *(row("bnext", 1.0), row("native", 4.0), row("cudnn", 2.0), row("add", 0.8)),
        *(row("bnext", 1.0, 7), row("native", 0.5, 7), row("cudnn", 1.5, 7)),
        row("bnext", 1.0, 14, ms=None, note="needs 900 GiB of memory"),
        row("cudnn", 1.0, direction="forward", ms=None, note="cannot"),
    ]
    (line,) = gpu_summary.headline(rows).splitlines()[2:]
    # Geometric mean of 2.0 and 0.5.
    assert line.startswith("| backward | nchw | float32 | cold | 2 | **1.00** |")
    assert "0.50 (resnet50 32×64×7×7, native)" in line
    assert "80 % / 80 %" in line
    assert "bnext, 1 cases: needs 900 GiB" in gpu_summary.not_timed(rows).splitlines()[0]
    kernels = gpu_summary.peer_kernels(rows)
    assert "| cudnn | backward | nchw | float32 | `cudnn_k` | 2 |" in kernels
    assert "add_k" not in kernels
    # What was timed warm is another table's row: calls of tiny tensors wait for the host.
    rows += [{**r, "cache": "warm"} for r in rows[:2]]
    assert "| float32 | warm | 1 | **4.00** |" in gpu_summary.headline(rows)
    assert line in gpu_summary.headline(rows)
    assert gpu_summary.headline([]) == "no case was timed with a peer"


def test_variants() -> None:
    """What something else than the plan's choice would take, but not as a peer."""
    rows = [
        *(row("bnext", 1.0), row("bnext-streaming", 1.6), row("bnext-together", 0.9)),
        *(row("bnext", 1.0, 7), row("bnext-streaming", 0.4, 7), row("cudnn", 2.0, 7)),
    ]
    assert "| 1 | **2.00** |" in gpu_summary.headline(rows)
    lines = gpu_summary.variants(rows).splitlines()[2:]
    assert [line.split(" | ")[4:] for line in lines] == [
        ["streaming", "2", "0.80", "0.40 (32×64×7×7) |"],
        ["together", "1", "0.90", "0.90 (32×64×56×56) |"],
    ]
    assert gpu_summary.variants(rows[3:4]) == ""


def test_a_variant_reaches_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, and no longer; forward passes before a backward one are not concerned."""
    seen: list[tuple[str, str]] = []
    variable = ""

    def spy(name: str) -> gpu_check.Callable[..., object]:
        original = getattr(providers.Bnext, name)

        def call(self: providers.Bnext, *arguments: object) -> object:
            seen.append((name, os.environ.get(variable, "")))
            return original(self, *arguments)

        return call

    for name in ("op_forward", "op_backward"):
        monkeypatch.setattr(providers.Bnext, name, spy(name))
    # The environment is read when one says so.
    read: list[str] = []
    original_read = providers._C.read_environment

    def read_environment() -> None:
        read.append(os.environ[variable])
        original_read()

    monkeypatch.setattr(providers._C, "read_environment", read_environment)
    case = shapes.Case("odd", shapes.Shape(2, 5, 8, 9), level="op")
    for number, name, variable, usual, value in (
        (0, "streaming", "BNEXT_CUDA_FAMILY", "auto", "streaming"),
        (-5, "one-slab", "BNEXT_CUDA_PERSISTENT", "1", "0"),
        (-4, "slots", "BNEXT_CUDA_REGISTERS", "1", "0"),
        (-3, "together", "BNEXT_CUDA_LATE", "1", "0"),
        (-2, "unasked", "BNEXT_CUDA_EARLY", "1", "0"),
        (-1, "apart", "BNEXT_CUDA_OVERLAP", "1", "0"),
    ):
        seen.clear()
        monkeypatch.setenv(variable, usual)
        variant = providers.VARIANTS[number]()
        assert variant.name == f"bnext-{name}" and not shapes.is_peer(variant.name)
        assert "CUDA" in str(variant.why_not(case))
        call = variant.prepare(case, checks.make_tensors(case))
        read.clear()
        call()
        assert seen == [("op_forward", usual), ("op_backward", value)]
        assert read == [value, usual]
        assert os.environ[variable] == usual


def test_a_variant_with_the_same_plan_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[[str, str], None]
) -> None:
    planned = _C.cuda_plans
    monkeypatch.setattr(
        providers._C, "cuda_plans", lambda x, _, *options: planned(x, "h200", *options)
    )
    environment("BNEXT_CUDA_REGISTERS", "1")
    (variant,) = (v for v in (kind() for kind in providers.VARIANTS) if v.name == "bnext-slots")
    for side, direction, reason in (
        (56, "backward", None),
        (14, "backward", "it plans the same"),
        (56, "inference", "it plans the same"),
    ):
        shape = shapes.Shape(32, 256, side, side)
        case = shapes.Case("resnet50", shape, direction=direction, device="cuda")
        assert variant.why_not(case) == reason
        assert os.environ["BNEXT_CUDA_REGISTERS"] == "1"


def test_over_floor(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[[str, str], None]
) -> None:
    """What bnext takes, and by the model should take, beyond the floor, by kind of kernel."""
    environment("BNEXT_CUDA_PERSISTENT", "1")
    monkeypatch.setattr(gpu_summary, "PLAN_FOR", "h200")
    rows = []
    for family, side, ms in (("streaming", 56, 1.0), ("resident", 28, 1.0), ("resident", 14, 1.1)):
        rows.append(row(f"bnext-{family}", ms, side, floor_ms=0.8, cache="cold", C=512))
    # Peers are not in it, nor variants of the same plan.
    rows += [{**rows[0], "provider": "cudnn"}, {**rows[0], "provider": "bnext-together"}]
    model = {}
    for side, family in ((56, "streaming"), (28, "resident"), (14, "resident")):
        x = torch.empty(32, 512, side, side, device="meta")
        plan = _C.cuda_plans(x, "h200", family, True)[1]
        model[side] = plan["microseconds"] - plan["microseconds_min"]
    resident, streaming = gpu_summary.over_floor(rows).splitlines()[4:]
    head = "| streaming | planes | – | – | backward | float32 | 1 | 200.0 | 200.0 to 200.0 |"
    assert streaming == f"{head} {model[56]:.1f} | {model[56]:.1f} to {model[56]:.1f} |"
    head = "| resident | planes | all | one | backward | float32 | 2 | 250.0 | 200.0 to 300.0 |"
    least, most = sorted((model[28], model[14]))
    assert resident == f"{head} {(least + most) / 2:.1f} | {least:.1f} to {most:.1f} |"
    assert gpu_summary.over_floor(rows[3:4]) == ""


JUNIT = """<testsuites><testsuite name="pytest" tests="4">
<testcase classname="tests.test_gpu" name="test_a[x]" time="1"/>
<testcase classname="tests.test_gpu" name="test_b"><failure message="assert 1 == 2&#10;more">x</failure></testcase>
<testcase classname="tests.test_gpu" name="test_c"><skipped message="one CUDA device here">x</skipped></testcase>
<testcase classname="tests.test_gpu" name="test_d"><error message="in a fixture">x</error></testcase>
</testsuite></testsuites>"""  # noqa: E501


def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that stages leave has its section, and a torn file does not hide the others."""
    (tmp_path / "tests.xml").write_text(JUNIT)
    (tmp_path / "cpu-tests.xml").write_text(JUNIT[:100])
    write_bench(tmp_path / "part.json", [row("bnext", 1.0), row("cudnn", 2.0)])
    gpu_check.append_rows(tmp_path / "bench.json", tmp_path / "part.json")
    write_bench(tmp_path / "part.json", [row("bnext", 1.0, 28), row("cudnn", 2.0, 28)])
    gpu_check.append_rows(tmp_path / "bench.json", tmp_path / "part.json")
    environment, rows = results.load(tmp_path / "bench.json")
    assert environment["copy_gbps"] == 4000 and len(rows) == 4
    monkeypatch.setattr(gpu_summary, "PLAN_FOR", "h200")
    code = probe_device.main(
        [
            "--device",
            "cpu",
            "--seconds",
            "0.2",
            "--sizes",
            "0.25",
            "--output",
            str(tmp_path / "probe.json"),
        ]
    )
    assert code == 0
    gpu_summary.write_summary(tmp_path, DEVICE, [gpu_check.Result("tests", "failed", 3.0, ["a|b"])])
    text = (tmp_path / "summary.md").read_text()
    assert "| tests | failed | 3 s | a/b |" in text
    assert "tests.xml: 1 passed, 2 failed, 1 skipped" in text
    assert "`test_gpu::test_b`: assert 1 == 2\n" in text
    assert "1 skipped: one CUDA device here" in text
    assert "cpu-tests.xml\n\nnot readable" in text
    assert "| backward | nchw | float32 | cold | 2 | **2.00** |" in text
    assert "| backward | nchw | float32 | " in text.split("## Families")[1]
    assert "copy from memory, GB/s by the size of one tensor: 0.25 MiB" in text
    (tmp_path / "bench.json").write_text("{")
    gpu_summary.write_summary(tmp_path, DEVICE, [gpu_check.Result("tests", "failed", 3.0, ["a|b"])])
    text = (tmp_path / "summary.md").read_text()
    assert "bench.json is not readable: JSONDecodeError" in text
    assert "copy from memory, GB/s by the size of one tensor: 0.25 MiB" in text


def test_the_probe_names_peers() -> None:
    rows = probe_device.peers_of_shape(shapes.Case("odd", shapes.Shape(2, 5, 8, 9), level="op"))
    native, cudnn = sorted(rows, key=lambda r: r["provider"] != "native")
    assert "native_batch_norm" in native["forward"]
    assert "native_batch_norm_backward" in native["backward"]
    assert cudnn["forward"] == "cuDNN runs on CUDA only"


def test_the_suites_that_are_run() -> None:
    """Their options are the benchmarks' own, and every shape of every suite is in one of them."""
    from benchmarks import __main__ as command

    seen = set()
    for arguments in gpu_check.BENCHMARKS:
        if "huge" in arguments:
            assert not torch.cuda.is_available() or command.parse([*arguments])
            seen.add("huge")
            continue
        seen |= set(command.parse([*arguments, "--device", "cpu"]).suites)
    assert seen == set(shapes.SUITES)
