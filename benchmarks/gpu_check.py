"""``make gpu-check``: everything that only a machine with a GPU can say, in one folder.

python -m benchmarks.gpu_check [--stages build tests ...] [--seconds S] [--output FOLDER]

Runs in the Python that holds torch there; no network, nothing is installed. A stage that fails
does not stop the others; summary.md is written anew after each, so that a run that is cut short
leaves what it has. Exit status: 0 all went well, 1 something did not, 2 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1800.0  # in all, unless said otherwise
TESTS_SHARE, SANITIZER_SHARE = 0.6, 0.3  # of what is left, or two minutes
CALLS_OF_ALL_KINDS = ROOT / "tests/sanitizer_run.py"
GRACE = 20.0  # for a stage that is told to stop, to save what it has
# Asked of the Python there, once; anything else that a stage needs is in its `needs`.
DEVICE = """
import json, torch
assert torch.cuda.is_available(), "no CUDA device"
p = torch.cuda.get_device_properties(0)
print(json.dumps({"name": p.name, "arch": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
    "memory_gb": round(p.total_memory / 1e9, 1), "l2_mib": p.L2_cache_size / 2**20,
    "torch": torch.__version__, "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version()}))
"""
# In order of what one wants to know first; a run out of time leaves out the last.
PASSES = ("--direction", "forward", "backward")
BENCHMARKS: tuple[tuple[str, ...], ...] = (
    ("--suite", "resnet50", "--batch", "32", *PASSES),
    ("--suite", "few-channels", "odd", "detection", *PASSES),
    ("--suite", "resnet50", "--batch", "256", *PASSES),
    ("--suite", "tiny", "--direction", "forward", "backward", "step", "inference"),
    ("--suite", "resnet50", "--batch", "32", "256", *PASSES, "--providers", "variants"),
    ("--suite", "resnet50", "--batch", "32", *PASSES, "--providers", "inductor"),
    ("--suite", "resnet50", "--batch", "32", "--direction", "step", "derivative", "inference"),
    ("--suite", "huge", "--dtype", "float16", *PASSES),
)
PEERS = ("cudnn", "native", "cudnn-frontend")  # inductor compiles for seconds, each shape anew


@dataclass
class Result:
    """How a stage went."""

    stage: str
    status: str = "passed"  # or failed, skipped, out of time
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, other: str, note: str) -> None:
        """The worse of two statuses; the note of the new one."""
        order = ("passed", "skipped", "out of time", "failed")
        self.status = max(self.status, other, key=order.index)
        if note:
            self.notes.append(note)


@dataclass
class Run:
    """Where a run writes, and how long it may still take."""

    folder: Path
    deadline: float
    pytest: Sequence[str] = ()

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def command(
        self,
        what: str,
        *command: str,
        limit: float | None = None,
        log_file: Path | None = None,
        fine: Sequence[int] = (0,),
        **environment: str,
    ) -> tuple[str, str]:
        """Run it, its output going to log.txt or log_file; its status, and a note if not good.

        At its time limit it is interrupted as by Ctrl-C, and killed only after a while.
        """
        log_file = log_file or self.folder / "log.txt"
        seconds = min(self.left, limit or self.left)
        if seconds < 1:
            return "out of time", f"{what}: no time left"
        print(f"  {what} ...", flush=True)
        with log_file.open("a", encoding="utf-8") as log:
            log.write(f"\n==> {what}: {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._stop(process)
                return "out of time", f"{what}: stopped after {seconds:.0f} s"
            except BaseException:
                self._stop(process)
                raise
        if status in fine:
            return "passed", ""
        return "failed", f"{what}: exit status {status}; {last_line(log_file)}"

    @staticmethod
    def _stop(process: subprocess.Popen[bytes]) -> None:
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
            return


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


# ---- stages --------------------------------------------------------------------------------------


def build(run: Run, result: Result) -> None:
    """The extension, in place, for the GPU that is here."""
    lacking = missing(("setuptools",))
    if lacking:
        result.add("failed", "setuptools is missing: pip install 'setuptools>=77'")
        return
    if missing(("ninja",)):
        result.notes.append("ninja is missing: one file is compiled at a time")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    result.add(*run.command("build", *command, BNEXT_CUDA="1", MAX_JOBS=jobs))
    if result.status == "passed":
        check = "import bnext; from bnext._extension import _C; assert _C.build['cuda_archs']"
        result.add(*run.command("import", sys.executable, "-c", check))


def families(run: Run, result: Result) -> None:
    """Every family of kernels, each in a process of its own, before all that takes long: a kernel
    that the device cannot run ends all others of its process, and the error names the plan."""
    from bnext._extension import _C

    def run_family(name: str) -> tuple[str, str]:
        return run.command(
            f"family {name}",
            *(sys.executable, str(CALLS_OF_ALL_KINDS), "cuda", name),
            limit=60,
            log_file=run.folder / f"family-{name}.txt",
            CUDA_LAUNCH_BLOCKING="1",
            PYTHONPATH=str(ROOT),
        )

    names = ("auto", *_C.cuda_families())
    with ThreadPoolExecutor(len(names)) as pool:
        for status in pool.map(run_family, names):
            result.add(*status)


NO_TESTS = 5  # pytest's exit status where no test is selected


def pytest_stage(
    run: Run, result: Result, name: str, files: Sequence[Path], *selection: str
) -> None:
    """Every file in a process of its own, some at a time: one that crashes takes no other along.

    What they print is in NAME.txt, how each test went in NAME.xml.
    """
    from benchmarks.gpu_summary import count_outcomes

    lacking = missing(("pytest", "hypothesis", "numpy"))
    if lacking:
        result.add("failed", f"missing: pip install {' '.join(lacking)}")
        return
    # A test that hangs would take all the time that is left.
    limits = () if missing(("pytest_timeout",)) else ("--timeout=180",)
    command = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *limits)
    cores = os.cpu_count() or 1
    jobs = max(1, min(6, cores // 2))
    parts = run.folder / name
    parts.mkdir(exist_ok=True)
    # Not all of the time that is left, or a hang would cost the benchmarks.
    until = time.monotonic() + max(120.0, TESTS_SHARE * run.left)

    def run_file(path: Path) -> tuple[str, str]:
        xml, text = parts / f"{path.stem}.xml", parts / f"{path.stem}.txt"
        return run.command(
            f"{name}: {path.name}",
            *(sys.executable, *command, f"--junitxml={xml}", str(path), *selection, *run.pytest),
            limit=max(0.01, until - time.monotonic()),
            log_file=text,
            fine=(0, NO_TESTS),
            OMP_NUM_THREADS=str(max(1, cores // jobs)),
        )

    with ThreadPoolExecutor(jobs) as pool:
        statuses = list(pool.map(run_file, files))
    merged = ElementTree.Element("testsuites")
    with (run.folder / f"{name}.txt").open("w", encoding="utf-8") as output:
        for path, (status, note) in zip(files, statuses, strict=True):
            result.add(status, note)
            text, xml = parts / f"{path.stem}.txt", parts / f"{path.stem}.xml"
            if text.exists():
                output.write(text.read_text(encoding="utf-8", errors="replace"))
            try:
                merged.extend(ElementTree.parse(xml).getroot())
            except (OSError, ElementTree.ParseError):
                if status != "passed":  # it has not come to its end
                    case = ElementTree.SubElement(merged, "testcase", name=path.name)
                    ElementTree.SubElement(case, "error", message=note)
    shutil.rmtree(parts)
    xml = run.folder / f"{name}.xml"
    ElementTree.ElementTree(merged).write(xml, encoding="utf-8")
    if result.status == "passed" and not count_outcomes(xml).passed:
        result.add("failed", "every test was skipped, or there was none")


def tests(run: Run, result: Result) -> None:
    """What needs a GPU: families, graphs, streams first; then every test that takes a device."""
    first = sorted((ROOT / "tests").glob("test_gpu*.py"))
    rest = sorted(path for path in (ROOT / "tests").glob("test_*.py") if path not in first)
    pytest_stage(run, result, "tests", [*first, *rest], "-m", "gpu")


def cpu_tests(run: Run, result: Result) -> None:
    """All others, from the same build."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    pytest_stage(run, result, "cpu-tests", files, "-m", "not gpu")


def sanitizer(run: Run, result: Result) -> None:
    """compute-sanitizer's memcheck and racecheck over a few small calls of every family."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        result.add("skipped", "compute-sanitizer is neither on PATH nor in CUDA_HOME")
        return
    target = (sys.executable, str(CALLS_OF_ALL_KINDS))
    options = ("--error-exitcode", "99", "--print-limit", "20")
    # Not all of the time that is left: as for the tests.
    until = time.monotonic() + max(120.0, SANITIZER_SHARE * run.left)
    for name in ("memcheck", "racecheck", "synccheck"):
        status = run.command(
            name,
            *(str(tool), "--tool", name, *options, *target),
            limit=max(0.01, until - time.monotonic()),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            PYTHONPATH=str(ROOT),
        )
        result.add(*status)


def find_tool(name: str) -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places = [shutil.which(name), f"{home}/bin/{name}", f"{home}/compute-sanitizer/{name}"]
    return next((Path(p) for p in places if p and os.access(p, os.X_OK)), None)


def probe(run: Run, result: Result) -> None:
    """What the model of docs/kernels.md assumes."""
    seconds = min(120.0, run.left / 2)
    output = ("--output", str(run.folder / "probe.json"), "--seconds", f"{seconds:.0f}")
    command = (sys.executable, "-m", "benchmarks.probe_device", *output)
    result.add(*run.command("probe", *command, limit=2 * seconds))


def bench(run: Run, result: Result) -> None:
    """The suites, most wanted first, each with what is left of the time; rows in bench.json."""
    bench_file = run.folder / "bench.json"
    part = run.folder / "bench-part.json"
    for old in (bench_file, part):  # of a run before, into the same folder
        old.unlink(missing_ok=True)
    # 0.05 s a line is enough for medians on a GPU; a short budget has to cover more shapes.
    seconds = "0.2" if run.left > 1200 else "0.05"
    for number, arguments in enumerate(BENCHMARKS):
        providers = () if "--providers" in arguments else ("--providers", *PEERS)
        common = ("--device", "cuda", "--seconds", seconds, "--output", str(part))
        what = f"bench {number + 1} of {len(BENCHMARKS)} ({' '.join(arguments)})"
        command = (sys.executable, "-m", "benchmarks", *arguments, *providers, *common)
        # Each may use all that is left, but for the seconds in which it is told to end.
        status = run.command(what, *command, limit=max(run.left - GRACE, 1))
        result.add(*status)
        if part.exists():
            append_rows(bench_file, part)
            part.unlink()
        if status[0] == "out of time":
            break


def plans(run: Run, result: Result) -> None:
    """Other plans than the chosen ones, for the model: benchmarks/fit.py."""
    options = ("--suite", "resnet50", "--dtype", "float32", "float16", "--seconds", "0.03")
    output = ("--output", str(run.folder / "plans.json"))
    command = (sys.executable, "-m", "benchmarks", "plans", *options, *output)
    result.add(*run.command("plans", *command, limit=max(run.left - GRACE, 1)))


def append_rows(target: Path, part: Path) -> None:
    """Rows of one run after those of the runs before, under the first one's environment."""
    from benchmarks.results import write_whole  # needs torch

    new = json.loads(part.read_text(encoding="utf-8"))
    if target.exists():
        old = json.loads(target.read_text(encoding="utf-8"))
        new = {"environment": old["environment"], "rows": old["rows"] + new["rows"]}
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in new["rows"])
    environment = json.dumps(new["environment"], ensure_ascii=False)
    text = f'{{"environment": {environment},\n"rows": [\n{rows}\n]}}\n'
    write_whole(target, text)


STAGES: dict[str, Callable[[Run, Result], None]] = {
    "build": build,
    "families": families,
    "tests": tests,
    "probe": probe,
    "sanitizer": sanitizer,
    "bench": bench,
    "plans": plans,
    "cpu-tests": cpu_tests,
}


def device() -> tuple[dict[str, object] | None, str]:
    """What the device is, or None and why there is none."""
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    last = (done.stderr.strip().splitlines() or ["?"])[-1]
    if "No module named 'torch'" in last:
        return None, f"{sys.executable} has no torch: PYTHON=... names the Python that has it"
    return None, f"no CUDA device ({last})"


def first_line(*command: str) -> str:
    """What a tool says first, or nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--stages", nargs="*", help=f"of {' '.join(STAGES)}; default: all, in this order")
    add("--seconds", type=float, default=SECONDS, help=f"for all; default {SECONDS:.0f}")
    add("--output", type=Path, help="default: benchmarks/results/local/gpu-check-DATE")
    add("--pytest-args", default="", help='for each file, such as "-k name"')
    a = parser.parse_args(argv)
    stages = [name for text in a.stages or STAGES for name in text.split()] or list(STAGES)
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    found, why = device()
    if found is None:
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    from benchmarks.gpu_summary import write_summary  # needs torch, which is known to be there now

    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M")
    folder = (a.output or ROOT / "benchmarks/results/local" / f"gpu-check-{now}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    found["driver"] = first_line("nvidia-smi", query, "--format=csv,noheader") or "unknown"
    found["commit"] = first_line("git", "describe", "--always", "--dirty") or "unknown"
    found["python"] = sys.version.split()[0]
    print(f"gpu-check on {found['name']}: {' '.join(stages)}\n  into {folder}", flush=True)
    run = Run(folder, time.monotonic() + a.seconds, shlex.split(a.pytest_args))
    results: list[Result] = []
    for name in stages:
        result = Result(name)
        begin = time.monotonic()
        try:
            STAGES[name](run, result)
        except Exception as error:  # a defect here must not cost the other stages
            result.add("failed", f"{type(error).__name__}: {error}")
        result.seconds = time.monotonic() - begin
        results.append(result)
        print(
            f"  {name:<10} {result.status:<12} {result.seconds:6.0f} s", *result.notes, flush=True
        )
        write_summary(folder, found, results)
    print(f"\n{(folder / 'summary.md').read_text(encoding='utf-8')}")
    return 1 if any(result.status in ("failed", "out of time") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
