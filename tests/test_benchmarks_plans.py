"""Plans that something forces: which are timed, what is said of them, and how the model is fitted.

No test asserts how long something takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bnext._extension import _C

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import fit, plans, providers, results, runner, shapes  # noqa: E402

SHAPES = (shapes.Shape(32, 256, 56, 56), shapes.Shape(32, 512, 7, 7), shapes.Shape(8, 64, 112, 112))


def case_of(shape: shapes.Shape, direction: str, dtype: str, layout: str) -> shapes.Case:
    return shapes.Case("custom", shape, dtype, layout, direction, "op", device="cuda")


CASES = [
    case_of(shape, direction, dtype, layout)
    for shape in SHAPES
    for direction in ("forward", "backward")
    for dtype in ("float32", "float16")
    for layout in ("nchw", "channels_last")
]


@pytest.mark.parametrize("device", ["h200", "a10"])
@pytest.mark.parametrize("case", CASES[::5])
def test_candidates(case: shapes.Case, device: str) -> None:
    """All can run and differ, the chosen one is among them, and so is each kind of plan."""
    found = plans.candidates(case, device)
    assert 4 <= len(found) <= plans.MOST + 3
    texts, families = [], set()
    for settings in found:
        with providers.forced(settings):
            (plan,) = providers.plans_of(case, device)
        assert plan["error"] == "", plan["text"]
        assert settings.get("FAMILY", plan["family"]) == plan["family"]
        if "TEAM" in settings and plan["family"] == "cluster":
            assert f"in clusters of {settings['TEAM']}" in plan["text"]
        if "THREADS" in settings:
            assert f"x {settings['THREADS']}" in plan["text"]
        texts.append(plan["text"])
        families.add(plan["family"])
    assert len(set(texts)) == len(texts)
    assert providers.plan_text(case, device) in texts
    assert {"streaming", "grid"} <= families
    assert ("cluster" in families) <= (device == "h200")


def test_the_environment_is_left_as_it_was(environment: Callable[[str, str], None]) -> None:
    environment("BNEXT_CUDA_FAMILY", "streaming")
    case = CASES[0]
    before = providers.plan_text(case, "h200")
    assert before.startswith("streaming")
    with providers.forced({"FAMILY": "grid"}):
        assert providers.plan_text(case, "h200").startswith("grid")
    plans.candidates(case, "h200")
    assert providers.plan_text(case, "h200") == before


def test_names_tell_settings() -> None:
    settings = {"FAMILY": "cluster", "TEAM": "2", "THREADS": "512"}
    variant = plans.Forced(settings)
    assert variant.why_not(CASES[0]) is None
    assert variant.name == "bnext-FAMILY=cluster,TEAM=2,THREADS=512"
    assert plans.settings_of(variant.name) == settings
    assert not shapes.is_peer(variant.name)
    for name in ("bnext", "bnext-streaming", "cudnn-frontend", "add"):
        assert plans.settings_of(name) is None


def row(case: shapes.Case, provider: str, us: float | None, plan: str = "") -> dict[str, Any]:
    found = vars(results.new_row(case, provider)).copy()
    return found | {"ms": us and us / 1e3, "plan": plan or None}


def test_summary() -> None:
    case, other = CASES[0], CASES[1]
    rows = [
        row(case, "clone", 10),
        row(case, "bnext", 30, "a; predicted 25 us"),
        row(case, "bnext-FAMILY=grid", 20, "b; predicted 2e+01 us"),
        row(case, "bnext-FAMILY=streaming", None) | {"note": "wrong"},
        # The chosen plan once more, a little faster than itself.
        row(other, "bnext", 40, "c; predicted 40 us"),
        row(other, "bnext-FAMILY=cluster,TEAM=2", 39, "c; predicted 40 us"),
        row(CASES[2], "bnext", 5, "d; predicted 5 us"),  # nothing beside it
    ]
    lines = plans.summary(rows).splitlines()
    assert lines[1].split()[-5:] == ["10.0", "30.0", "20.0", "1.50", "FAMILY=grid"]
    assert lines[2].split()[-3:] == ["40.0", "40.0", "1.00"]
    assert "2 passes" in lines[4] and f"{1.5**0.5:.3f} times" in lines[4]
    assert lines[5].startswith("5 plans: ")
    assert plans.summary(rows[-1:]) == "no case was timed with several plans"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their errors say what is missing, and `summary` knows files of plans."""
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main(["plans", "--shape", "2,5,8,9"])
        assert "there is no CUDA device here" in capsys.readouterr().err
    path = tmp_path / "rows.json"
    results.save(path, {"device": "cuda"}, [row(CASES[0], "bnext", 30, "a; predicted 25 us")])
    with pytest.raises(SystemExit):
        fit.main([str(path)])
    assert "should be of python -m benchmarks plans" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit.main([str(path), "--only", "lunch_us"])
    assert "no constant lunch_us; there are " in capsys.readouterr().err


def test_what_the_command_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every case the chosen plan and its candidates, on a device that says what it is."""
    planned, device = _C.cuda_plans, _C.cuda_device

    class Clock:
        def __init__(self, providers: object, seconds: float, *, names_kernels: bool) -> None:
            assert seconds == 0.5 and not names_kernels

        providers: list[providers.Bnext]

        def run_case(self, case: shapes.Case) -> list[results.Row]:
            rows = [results.new_row(case, "clone")]
            for number, provider in enumerate(self.providers):
                assert provider.why_not(case) is None
                rows.append(results.new_row(case, provider.name))
                rows[-1].ms, rows[-1].plan = 0.02 - 0.001 * number, provider.plan(case)
            return rows

    for module in (providers, plans):
        monkeypatch.setattr(
            module._C, "cuda_plans", lambda x, _, *a, **b: planned(x, "h200", *a, **b)
        )
        monkeypatch.setattr(module._C, "cuda_device", lambda _: device("h200"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    named = ("name", "torch", "bnext", "commit", "cuda", "cudnn", "driver_version", "date")
    facts = {"device": "cuda", "threads": 1, "cache_mib": 60.0, "copy_gbps": 1.0}
    facts |= dict.fromkeys(named, "x")
    monkeypatch.setattr(results, "environment", lambda _: facts)
    monkeypatch.setattr(runner, "Benchmark", Clock)
    path = tmp_path / "plans.json"
    options = ["--shape", "32,64,14,14", "--dtype", "float32", "--most", "5", "--seconds", "0.5"]
    assert command.main(["plans", *options, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "4 passes: the chosen plan takes" in printed and "plans: " in printed
    rows = results.load(path)[1]
    found = plans.by_case(rows)
    assert len(found) == 4 and all(6 <= len(timed) <= 8 for timed in found.values())
    assert len(fit.measured(rows)) == 4 * 5
    assert command.main(["summary", str(path)]) == 0
    assert "4 passes: the chosen plan takes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["plans", *options, "--direction", "step"])
    assert "a plan is of one pass" in capsys.readouterr().err


def test_a_fit_finds_the_constants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of plans that take what the model says with other constants."""
    true = {"launch_us": 3.1, "rows_reduction_us": 2.9, "reduction_us": 5.0}
    rows = []
    for case in CASES[::3]:
        rows.append(row(case, "bnext", 1, "chosen"))  # of no use: what is chosen may change
        for settings in plans.candidates(case, "h200", most=8):
            with providers.forced(settings):
                (plan,) = providers.plans_of(case, "h200", costs=true)
            name = f"bnext-{plans.name_of(settings)}"
            rows.append(row(case, name, plan["microseconds"], plan["text"]))
    path = tmp_path / "plans.json"
    results.save(path, {"device": "cuda"}, rows)
    fit.main([str(path), "--device", "h200", "--hold", "4", "--only", *true])
    lines = capsys.readouterr().out.splitlines()
    found = {words[0]: float(words[2]) for words in map(str.split, lines) if words[0] in true}
    for name, value in true.items():
        assert found[name] == pytest.approx(value, rel=fit.STEPS[-1] - 1), name
    unchanged = next(words for words in map(str.split, lines) if words[0] == "trip_us")
    assert float(unchanged[1]) == float(unchanged[2]) == _C.cuda_costs("h200")["trip_us"]
    for line in lines[-2:]:
        before, after = (float(line.split()[i]) for i in (-4, -2))
        assert after < before / 3


@pytest.mark.gpu
def test_plans_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plans.json"
    options = ["--shape", "4,64,14,14", "--dtype", "float32", "--most", "6", "--seconds", "0.01"]
    assert command.main(["plans", *options, "--output", str(path)]) == 0
    rows = results.load(path)[1]
    assert len(plans.by_case(rows)) == 4  # two passes, two layouts
    assert all(r["plan"] for r in rows if r["provider"].startswith("bnext") and r["ms"])
    assert "times as long as the fastest" in capsys.readouterr().out
    assert len(fit.measured(rows)) >= 16
