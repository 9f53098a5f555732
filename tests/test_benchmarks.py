"""The benchmark suite reports what it measured: its checks, its comparison, its files, its command.

The timer is tested in test_benchmarks_timing.py. No test asserts how long something takes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks_timing import one_thread, processor_time  # noqa: F401
from torch import Tensor

import bnext

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    predicted,
    providers,
    report,
    results,
    runner,
    shapes,
    training_steps,
)
from benchmarks.checks import Reference, Tensors, make_tensors  # noqa: E402

SMALL = shapes.Shape(2, 5, 8, 9)


# Providers with a planted defect. Each differs from bnext in one thing.


class Slower(providers.Bnext):
    """Does the same twenty times over where its twin does it twelve times."""

    def __init__(self, name: str, times: int) -> None:
        self.name = name
        self.times = times

    def prepare(self, case: shapes.Case, t: Tensors) -> providers.Call:
        call = super().prepare(case, t)

        def repeat() -> Any:
            for _ in range(self.times - 1):
                call()
            return call()

        return repeat


class Wrong(providers.Bnext):
    """One term of dx left out: the mean of dy. Counts how often it is called."""

    name = "wrong"
    calls = 0

    def prepare(self, case: shapes.Case, t: Tensors) -> providers.Call:
        call = super().prepare(case, t)

        def broken() -> Any:
            self.calls += 1
            found = list(call())
            scale = t.weight.detach() / t.x.detach().std((0, 2, 3), unbiased=False)
            found[0] = found[0] + (scale * t.dy.mean((0, 2, 3))).view(1, -1, 1, 1)
            return found

        return broken


def run(cases: list[shapes.Case], *others: providers.Provider, rounds: int = 5) -> list[Any]:
    benchmark = runner.Benchmark([*others], 0.0, min_rounds=rounds, device=processor_time())
    return [row for _, rows in benchmark.run(cases) for row in rows]


def case(direction: str = "backward", shape: shapes.Shape = SMALL, **options: str) -> shapes.Case:
    return shapes.Case("custom", shape, direction=direction, **options)


def test_a_wrong_provider_is_reported_and_not_timed() -> None:
    wrong = Wrong()
    rows = {row.provider: row for row in run([case()], providers.Bnext(), wrong)}
    assert rows["wrong"].note.startswith("wrong: dx is off by ")
    assert rows["wrong"].ms is None and rows["wrong"].vs_bnext is None
    assert rows["wrong"].max_error > 0.1
    assert wrong.calls == 1, "ran for its check, never for a time"
    assert rows["bnext"].ms > 0 and rows["bnext"].note is None and rows["bnext"].max_error < 1e-5


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_the_check_tells_right_from_wrong(dtype: str) -> None:
    """What is right passes, in every direction; each result that is 5 % off in one place fails.

    The bar of a 16-bit formula, rounded after each operation, is the widest: some 10 % for
    bfloat16. It is not used here, but for the formula itself.
    """
    ours = providers.Bnext()
    for direction in shapes.DIRECTIONS:
        one = case(direction, dtype=dtype, layout="channels_last")
        reference = Reference(one, make_tensors(one))
        found = ours.run_once(one, make_tensors(one))
        assert set(providers.RESULTS[direction]) <= set(found)
        assert reference.check(one, found).problem is None
        for name, tensor in found.items():
            planted = tensor.detach().clone()
            flat = planted.view(-1) if planted.dim() == 1 else planted[0, 0, :, 0]
            place = int(flat.abs().argmax())
            flat[place] *= 1.05
            verdict = reference.check(one, {**found, name: planted})
            assert verdict.problem and name in verdict.problem, f"{direction} {name}"
            flat[place] = float("nan")
            assert "NaN" in str(reference.check(one, {**found, name: planted}).problem)
    by_hand = case("derivative", dtype=dtype)
    reference = Reference(by_hand, make_tensors(by_hand))
    found = providers.Formula().run_once(by_hand, make_tensors(by_hand))
    assert reference.check(by_hand, found, rounds_often=True).problem is None


def test_large_tensors_are_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some channels beyond a size, the first and the last among them; NaN anywhere is seen."""
    monkeypatch.setitem(runner.make_tensors.__globals__["LIMIT"], "cpu", 1)
    one = case("forward", shapes.Shape(2, 9, 4, 4))
    reference = Reference(one, make_tensors(one))
    assert reference.channels.tolist() == [0, 4, 8]
    found = providers.Bnext().run_once(one, make_tensors(one))
    assert reference.check(one, found).problem is None
    found["output"] = found["output"].detach().clone()
    found["output"][0, 8, 0, 0] += 1
    assert "output" in str(reference.check(one, found).problem)
    found["output"][0, 8, 0, 0] -= 1
    found["output"][0, 1, 0, 0] = torch.inf
    assert "output" in str(reference.check(one, found).problem)


def test_every_provider_runs_or_says_why() -> None:
    """In each direction and level; the compiled one, which is slow, below."""
    others = [kind() for name, kind in providers.PROVIDERS.items() if name != "inductor"]
    cases = [case(d, level=level) for level in shapes.LEVELS for d in shapes.DIRECTIONS]
    rows = run(cases, *others, rounds=1)
    assert len(rows) == len(cases) * (1 + len(others))
    for row in rows:
        assert (row.ms is None) == (row.note is not None), row
        assert row.ms is None or row.ms > 0
    reasons = {(row.provider, row.note) for row in rows if row.note}
    assert ("cudnn", "cuDNN runs on CUDA only") in reasons
    assert ("cudnn-frontend", "cuDNN runs on CUDA only") in reasons
    assert ("formula", "only a derivative: see direction derivative") in reasons
    assert not [reason for reason in reasons if reason[0] in ("bnext", "native")]
    inductor = providers.Inductor()
    assert inductor.why_not(case()) is None
    assert inductor.why_not(case(level="op")) == "no operator below autograd"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="needs a C++ compiler")
def test_the_compiled_provider() -> None:
    """Compiled before the clock starts; its graph stays, though it has run many times."""
    cases = [case("backward"), case("step")]
    rows = run(cases, providers.Bnext(), providers.Native(), providers.Inductor(), rounds=2)
    assert [row.note for row in rows] == [None] * len(rows)
    assert sum(row.provider == "inductor" and row.ms > 0 for row in rows) == 2


def test_a_provider_that_fails_says_so() -> None:
    class Broken(providers.Bnext):
        name = "broken"

        def apply(self, t: Tensors, training: bool) -> Tensor:
            raise ValueError("no such thing\nand a second line")

    rows = {row.provider: row for row in run([case()], providers.Bnext(), Broken())}
    assert rows["broken"].note == "ValueError: no such thing"
    assert rows["broken"].ms is None and rows["bnext"].ms is not None


def test_like_is_compared_with_like() -> None:
    """A call records a graph on every side, a raw operator on none."""
    for provider in (providers.Bnext(), providers.Native()):
        for level in shapes.LEVELS:
            one = case("forward", level=level)
            found = provider.prepare(one, make_tensors(one))()
            output = found if isinstance(found, Tensor) else found[0]
            assert output.requires_grad == (level == "call"), f"{provider.name} {level}"


# Comparison of two files.


def made_rows(slower: float = 1.0, noise: float = 0.02, machine: float = 1.0) -> list[dict]:
    """Rows of bnext whose times are known: `slower` times a floor, with reproducible noise."""
    rows = []
    wobble = random.Random(0)
    for direction in ("forward", "backward"):
        for side in (7, 14, 28, 56):
            one = case(direction, shapes.Shape(8, 64, side, side))
            row = results.new_row(one, "bnext")
            floor = [machine * 1e-3 * (1 + noise * wobble.uniform(-1, 1)) for _ in range(21)]
            ours = [
                machine * 1.1e-3 * slower * (1 + noise * wobble.uniform(-1, 1)) for _ in range(21)
            ]
            results.fill_times(row, ours, floor, ours)
            rows.append(row.__dict__)
    return rows


def compared(old: list[dict], new: list[dict], **environment: str) -> tuple[bool, str]:
    said: list[str] = []
    environment = {"device": "cpu", "name": "a processor", **environment}
    good = results.compare((environment, old), (environment, new), say=said.append)
    return good, "\n".join(said)


def test_compare_sees_a_slowdown_of_a_fifth() -> None:
    good, said = compared(made_rows(), made_rows())
    assert good and "0 slower" in said
    good, said = compared(made_rows(), made_rows(slower=1.2))
    assert not good and "8 slower" in said and "slower: 1.20×" in said
    good, said = compared(made_rows(slower=1.2), made_rows())
    assert good


def test_compare_of_a_cpu_does_not_see_the_machine() -> None:
    """Half the speed for everybody is no regression of bnext on a CPU; on one GPU it is."""
    assert compared(made_rows(), made_rows(machine=2.0))[0]
    assert not compared(made_rows(), made_rows(machine=2.0), device="cuda")[0]


def test_compare_waits_for_certainty() -> None:
    """12 % in one case that varies by 40 % from round to round is noise; by 2 %, it is not.

    Of 21 ratios of two numbers that vary by ±40 % the median has a standard error of some 10 %.
    """
    for noise, good in ((0.4, True), (0.02, False)):
        old, new = made_rows(noise=noise), made_rows(noise=noise)
        new[3] = made_rows(slower=1.12, noise=noise)[3]
        assert compared(old, new)[0] == good


def test_compare_misses_nothing() -> None:
    """A case that has lost its time fails; a file with other cases cannot pass either."""
    new = made_rows()
    new[2].update(floor_share=None, ms=None, note="wrong: dx")
    good, said = compared(made_rows(), new)
    assert not good and "no longer measured" in said and "wrong: dx" in said
    assert not compared(made_rows(), [])[0]


def test_compare_sees_a_provider_with_extra_work(tmp_path: Path) -> None:
    """Measured for real: 20 calls where there were 12, 1.67 times the work, against the floor.

    Both files hold the floor beside them. A busy machine may blur one attempt; not three.
    """
    one = case("backward", shapes.Shape(8, 16, 28, 28))
    code = 1
    for _ in range(3):
        files = []
        for name, times in (("old", 12), ("new", 20)):
            rows = run([one], Slower("bnext", times), rounds=25)
            files.append(tmp_path / f"{name}.json")
            results.save(files[-1], {"device": "cpu", "name": "this"}, rows)
        code = command.main(["compare", *map(str, files)])
        if code == 1 and command.main(["compare", *map(str, files[:1] * 2)]) == 0:
            return
    pytest.fail(f"compare returned {code}")


# Files, table, figures and the command.


def test_files_keep_rows(tmp_path: Path) -> None:
    rows = run([case("forward"), case("derivative")], providers.Bnext(), providers.Formula())
    path = tmp_path / "folder" / "file.json"
    results.save(path, {"device": "cpu"}, rows)
    environment, back = results.load(path)
    assert environment == {"device": "cpu"} and len(back) == len(rows)
    for row, got in zip(rows, back, strict=True):
        assert tuple(got) == results.FIELDS
        assert got["note"] == row.note
        assert got["ms"] == (None if row.ms is None else pytest.approx(row.ms, rel=1e-4))
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no environment"):
        results.load(path)


def test_environment_names_all_that_matters() -> None:
    found = results.environment("cpu")
    assert found["torch"] == torch.__version__ and found["bnext"] == bnext.__version__
    assert found["name"] and found["copy_gbps"] > 0 and found["cache_mib"] > 0
    assert str(ROOT) not in json.dumps(found)


def test_summary_adds_up() -> None:
    """Known times: ratios, the worst case, the floor's share and the network's total."""
    rows = []
    for shape in shapes.SUITES["resnet50"][:12]:
        one = shapes.Case("resnet50", shape)
        worst = 2.0 if shape.C == 2048 else 1.0
        times = {"add": 1e-3, "bnext": 2e-3 * worst, "native": 6e-3, "inductor": 5e-3}
        for name, seconds in times.items():
            row = results.new_row(one, name)
            results.fill_times(row, [seconds] * 3, [times["add"]] * 3, [times["bnext"]] * 3)
            rows.append(row.__dict__)
    text = report.summary(rows)
    for name, ratio in (("native", 3.0), ("inductor", 2.5), ("best peer", 2.5)):
        expected = ratio * 0.5 ** (1 / 12)  # one of twelve shapes takes bnext twice as long
        assert re.search(rf"{name} +{expected:.2f}×", text)
    assert "at worst 1.25× (resnet50 32×2048×7×7)" in text
    assert "at worst 25 % (resnet50 32×2048×7×7)" in text
    # 53 layers of 6 ms; 49 of 2 ms and 4 of 4 ms; the floor 53 of 1 ms.
    assert "all 53 layers of ResNet-50, batch 32: add 53.0 ms, bnext 114 ms" in text
    assert "native 318 ms" in text
    # Warm rows beside them are of the same layers.
    again = report.summary(rows + [row | {"cache": "warm"} for row in rows])
    assert "all 53 layers of ResNet-50, batch 32: add 53.0 ms, bnext 114 ms" in again


def test_predictions_against_what_peers_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best peer counts, and neither the floor nor bnext nor what has a note. Large tensors in
    NCHW have the floor beside them."""
    rows = []
    for shape, ratio in zip(shapes.SUITES["resnet50"][:3], (1.1, 9, 1.2), strict=True):
        one = shapes.Case("resnet50", shape, "float16", "nchw", "forward")
        us = predicted.plan("h100", shape, ("forward", "float16", "nchw"), "auto")["microseconds"]
        row = results.new_row(one, "clone")
        results.fill_times(row, *[[1e-6 * us / ratio] * 3] * 3)
        rows.append(row)
    for number, shape in enumerate(shapes.SUITES["resnet50"][:3]):
        one = shapes.Case("resnet50", shape, "float16", "channels_last", "backward")
        us = predicted.plan("h100", shape, ("backward", "float16", "channels_last"), "auto")
        best = (2 if number == 1 else 4) * 1e-6 * us["microseconds"]
        for name, seconds in {
            **{"add": best / 9, "bnext": best / 9, "bnext-grid": best / 9},
            **{"native": 2 * best, "cudnn": best, "inductor": best / 9},
        }.items():
            row = results.new_row(one, name)
            results.fill_times(row, [seconds] * 3, [best / 9] * 3, [best / 9] * 3)
            row.note = "wrong: dx is off" if name == "inductor" else None
            rows.append(row)
    path = tmp_path / "h100.json"
    results.save(path, {"device": "cuda"}, rows)
    predicted.main(["h100", str(path)])
    shape = ", ".join(map(str, shapes.SUITES["resnet50"][1][:4]))
    line = f"| backward | float16 | channels_last | 3 | 3.17 | 2.00 ({shape}) |"
    found = capsys.readouterr().out
    assert line in found
    assert [2 * s.numel > 25e6 for s in shapes.SUITES["resnet50"][:3]] == [True, False, True]
    assert "over the measured floor: 1.10 to 1.20; 1 of 2 at 1.15 or less" in found


def test_suites_are_the_ones_documented() -> None:
    for batch in (32, 256):
        layers = [s for s in shapes.SUITES["resnet50"] if batch == s.N]
        assert len(layers) == 12 and sum(s.count for s in layers) == 53
    assert all(s.numel > 2**31 for s in shapes.SUITES["huge"])
    assert set(shapes.QUICK) < set(shapes.SUITES)


def test_a_quick_run_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as a user gives it, on two small shapes; then its figures, from its file."""
    file = tmp_path / "run.json"
    line = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1"]
    line += ["--providers", "native", "formula", "cudnn", "--seconds", "0.01"]
    line += ["--shape", "2,3,8,8", "4,16,14,14", "--output", str(file)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2×3×8×8" in done.stdout and "cuDNN runs on CUDA only" in done.stdout
    environment, rows = results.load(file)
    # 2 shapes, 3 directions; the floor, bnext and three more.
    assert len(rows) == 2 * 3 * 5 and environment["device"] == "cpu"
    timed = {row["provider"] for row in rows if row["ms"]}
    assert timed == {"bnext", "native", "add", "clone", "clone+add"}

    assert command.main(["summary", str(file)]) == 0
    summary = capsys.readouterr().out.partition("\n\n")[2].strip()
    assert summary.startswith("forward") and summary in done.stdout
    # Their tensors have 1.5 and 49 KiB.
    for kib, cases in ((1.5, 0), (1.6, 1), (49, 1), (50, 2)):
        assert command.main(["summary", str(file), "--below-mib", str(kib / 1024)]) == 0
        named = re.findall(r"call: (\d+) case", capsys.readouterr().out)
        assert named == [str(cases)] * (3 if cases else 0)
    network = ROOT / "benchmarks" / "results" / "cpu-amd-epyc-2026-11-25-network.json"
    with pytest.raises(SystemExit):
        command.main(["summary", str(network), "--below-mib", "1"])
    assert "this one is of networks" in capsys.readouterr().err

    pytest.importorskip("matplotlib")
    assert command.main(["plot", str(file)]) == 0
    for kind in ("ratio", "floor", "roofline"):
        light, dark = (
            (tmp_path / f"run-float32-nchw-{kind}-{theme}.svg").read_text()
            for theme in ("light", "dark")
        )
        assert light.startswith("<?xml") and len(light) > 5000 and light != dark
    written = len(list(tmp_path.iterdir()))
    results.save(file, environment, [row for row in rows if not row["ms"]])
    assert command.main(["plot", str(file)]) == 1  # says that there is nothing to draw
    assert len(list(tmp_path.iterdir())) == written


def test_lines_without_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table needs no tqdm."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    say, advance, close = command.lines_above_a_bar(2)
    say("a line")
    advance("somewhere")
    close()
    assert capsys.readouterr() == ("a line\n", "")


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    refused = [
        ["--suite", "everything"],
        ["--shape", "1,2"],
        ["--suite", "huge", "--device", "cpu"],
    ]
    if not torch.cuda.is_available():
        refused.append(["--device", "cuda"])
    for arguments in refused:
        with pytest.raises(SystemExit) as stop:
            command.parse(arguments)
        assert stop.value.code == 2
    assert "GPU" in capsys.readouterr().err


# Whole networks, and what a profiler shows.


def test_networks_are_what_they_claim() -> None:
    resnet = training_steps.NETWORKS["resnet50"]().eval()
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032
    norms = [m for m in resnet.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 53
    seen: dict[tuple[int, int], int] = {}
    for norm in norms:
        norm.register_forward_pre_hook(
            lambda _, x: seen.update({(x[0].shape[1:3]): seen.get(x[0].shape[1:3], 0) + 1})
        )
    with torch.no_grad():
        resnet(torch.zeros(1, 3, 224, 224))
    suite = {(s.C, s.H): s.count for s in shapes.SUITES["resnet50"][:12]}
    assert {tuple(shape): number for shape, number in seen.items()} == suite


def test_a_step_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    """Both variants run, use their own batch norm, and keep the same tensors for backward."""
    rows = training_steps.run_network(
        "detector", "eager", "cpu", 1, 64, "float32", "nchw", seconds=0.0
    )
    training_steps.show(rows)
    assert "bnext.convert" in capsys.readouterr().out
    torch_row, ours = rows
    for row in rows:
        assert row.note is None and row.ms > 0 and 0 < row.batch_norm_share < 1
    assert ours.vs_bnext == 1
    # Saved: inputs of all layers on both sides; the (C,) statistics may be kept in other pieces.
    assert ours.memory_mib == pytest.approx(torch_row.memory_mib, rel=0.05)


def test_saved_bytes_are_counted_once() -> None:
    """x² keeps x, and exp its result: 2 tensors; the second use of x costs nothing."""
    layer = torch.nn.Linear(1, 1)
    x = torch.ones(1000, requires_grad=True)
    with training_steps.count_saved(layer) as kept:
        ((x**2).sum() + (x**3).sum() + x.exp().sum()).backward()
    assert sum(kept.values()) == 2 * 4000


@pytest.mark.parametrize("training", [True, False])
def test_the_profiler_names_our_calls(training: bool) -> None:
    """A readable name for each kernel call, forward and backward, around what it allocates."""
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    mean, var = torch.zeros(4), torch.ones(4)
    with profile(activities=[ProfilerActivity.CPU]) as run_:
        y = bnext.batchnorm2d(x, mean, var, training=training)
        torch.autograd.grad(y.sum(), x)
        bnext.batchnorm2d_backward(y.detach(), x.detach(), None, mean, var, training)
    counts = {event.key: event.count for event in run_.key_averages()}
    assert counts[f"bnext::batchnorm2d_{'forward' if training else 'eval'}"] == 1
    assert counts["bnext::batchnorm2d_backward"] == 2
    assert counts["bnext::batchnorm2d_statistics"] == 1
    assert counts["BatchNorm2dFunction"] == 1 and counts["BatchNorm2dFunctionBackward"] == 1


def test_who_fails_while_all_are_timed_costs_no_other_case() -> None:
    class FailsLater(providers.Native):
        def prepare(self, case: shapes.Case, t: Tensors) -> providers.Call:
            call, calls = super().prepare(case, t), itertools.count()

            def later() -> Any:
                if case.shape == SMALL and next(calls) > 2:
                    raise RuntimeError("an illegal memory access")
                return call()

            return later

    other = SMALL._replace(N=SMALL.N + 1)
    found = run([case(), case(shape=other)], providers.Bnext(), FailsLater())
    for row in found:
        if row.N == other.N:
            assert row.ms > 0 and row.note is None
        else:
            assert row.note == "while all were timed: RuntimeError: an illegal memory access"
    assert [command.is_defect(asdict(row)) for row in found if row.provider == "bnext"] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("provider", "note", "defect"),
    [
        ("bnext", None, False),
        ("bnext", "wrong: dx is off by 1", True),
        ("bnext", "RuntimeError: CUDA error", True),
        ("bnext", "OutOfMemoryError: CUDA out of memory", False),
        ("bnext", "needs 200 GiB of memory", False),
        ("bnext-grid", "wrong: dx is off by 1", True),
        ("bnext-grid", "RuntimeError: it has no plan", False),
        ("native", "wrong: dx is off by 1", False),
    ],
)
def test_what_is_a_defect(provider: str, note: str | None, defect: bool) -> None:
    assert command.is_defect({"provider": provider, "note": note}) == defect
