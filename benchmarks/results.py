"""Result files: the environment and the rows of a run, and the comparison of two of them.

A file is ``{"environment": {...}, "rows": [...]}``. Fields of a row that were not measured are
null, and `note` says why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import bnext
from benchmarks.shapes import Case
from benchmarks.timing import Cpu, Spread, Timer, cache_bytes, ratios, spread

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One provider on one case. Times in milliseconds per call."""

    suite: str
    direction: str
    provider: str
    level: str
    N: int
    C: int
    H: int
    W: int
    count: int
    dtype: str
    layout: str
    cache: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    rounds: int | None = None
    method: str | None = None
    floor_ms: float | None = None
    floor_share: float | None = None  # the floor's time over this one's, median of the rounds
    floor_share_p20: float | None = None
    floor_share_p80: float | None = None
    vs_bnext: float | None = None  # this one's time over bnext's, median of the rounds
    vs_bnext_p20: float | None = None
    vs_bnext_p80: float | None = None
    bytes_min: int | None = None
    gbps: float | None = None  # bytes_min over ms
    kernels: str | None = None
    plan: str | None = None  # of bnext's CUDA kernels, with the model's prediction
    max_error: float | None = None  # largest error over the root mean square of the result
    note: str | None = None


FIELDS = tuple(Row.__dataclass_fields__)
KEY = (
    "suite",
    "direction",
    "provider",
    "level",
    "N",
    "C",
    "H",
    "W",
    "dtype",
    "layout",
    "cache",
)


def new_row(case: Case, provider: str) -> Row:
    shape = case.shape
    return Row(
        case.suite,
        case.direction,
        provider,
        case.level,
        *shape,
        case.dtype,
        case.layout,
        case.cache,
        bytes_min=case.bytes_min,
    )


def fill_times(
    row: Row, times: list[float], floor: list[float] | None, ours: list[float] | None
) -> None:
    """Write the measurement of a row; `floor` and `ours` are of the same rounds."""
    alone = spread([1e3 * t for t in times])
    row.ms, row.ms_p20, row.ms_p80, row.rounds = alone
    assert row.bytes_min is not None
    row.gbps = row.bytes_min / alone.median / 1e6
    if floor:
        row.floor_ms = spread([1e3 * t for t in floor]).median
        share = ratios(floor, times)
        row.floor_share, row.floor_share_p20, row.floor_share_p80 = share[:3]
    if ours:
        ratio = ratios(times, ours)
        row.vs_bnext, row.vs_bnext_p20, row.vs_bnext_p80 = ratio[:3]


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _copy_bandwidth(device: str) -> float:
    """GB/s, read and written, of a copy far larger than the cache, into memory in use."""
    source = torch.empty(8 * cache_bytes(device), dtype=torch.uint8, device=device).fill_(1)
    target = torch.ones_like(source)
    if device == "cuda":
        from benchmarks.timing import Cuda

        clock: Any = Cuda(graph=True, flush=False)
    else:
        clock = Cpu()
    timer = Timer(clock, seconds=0.5, max_rounds=50)
    with clock.context():
        runner = clock.runner([lambda: target.copy_(source)])
        times = timer.measure({"copy": runner})["copy"]
    return 2 * source.numel() / spread(times).median / 1e9


def other_work() -> float:
    """Processors that were busy with other things in the last minute, if that leaves too few."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return 0.0
    return load if load + torch.get_num_threads() > 1.5 * (os.cpu_count() or 1) else 0.0


def environment(device: str) -> dict[str, Any]:
    """Everything about this machine and these programs that a time may depend on."""
    commit = _first_line("git", "rev-parse", "--short=12", "HEAD")
    if commit and _first_line("git", "status", "--porcelain", "--", "csrc", "bnext", "setup.py"):
        commit += " with changes"
    found: dict[str, Any] = {
        "device": device,
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "cache_mib": cache_bytes(device) / 2**20,
        "isa": bnext._extension._C.cpu_isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bnext": bnext.__version__,
        "commit": commit,
        "other_work": round(other_work(), 1),
        "date": datetime.date.today().isoformat(),
        "copy_gbps": round(_copy_bandwidth(device), 1),
    }
    if device == "cuda":
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        found.update(
            name=torch.cuda.get_device_name(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            bnext_archs=bnext._extension._C.build["cuda_archs"],
            **dict(
                zip(
                    query.split(","),
                    (
                        _first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
                        or ""
                    ).split(", "),
                    strict=False,
                )
            ),
        )
    return found


def save(path: Path, environment: dict[str, Any], rows: Iterable[Any]) -> None:
    """One row a line, so that a diff of two files can be read."""
    rows = [asdict(row) if isinstance(row, Row) else row for row in rows]

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}") if math.isfinite(value) else None
        return value

    lines = [json.dumps({k: short(v) for k, v in row.items()}, ensure_ascii=False) for row in rows]
    head = json.dumps(environment, indent=1, ensure_ascii=False)
    text = f'{{"environment": {head},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing: who is killed meanwhile leaves what was there."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and rows of a file; a ValueError says what is not as it should be."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not {"environment", "rows"} <= set(content):
        raise ValueError(f"{path} holds no environment and rows")
    for row in content["rows"]:
        missing = [name for name in KEY if name not in row]
        if "step" not in row and missing:
            raise ValueError(f"{path}: a row lacks {', '.join(missing)}")
    return content["environment"], content["rows"]


def load_for(parser: argparse.ArgumentParser, path: Path) -> tuple[dict[str, Any], list[Any]]:
    """What `load` gives, or the command's own error and exit."""
    try:
        return load(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))


@dataclass
class Change:
    """bnext on one case in two files: how many times as long it takes in the new one."""

    label: str
    slowdown: float
    uncertainty: float  # relative standard error of `slowdown`

    def is_regression(self, threshold: float) -> bool:
        return self.slowdown - 1 > max(threshold, 3 * self.uncertainty)


def _spread_of(row: dict[str, Any], name: str) -> Spread:
    return Spread(row[name], row[f"{name}_p20"], row[f"{name}_p80"], row["rounds"])


def compare(
    old: tuple[dict[str, Any], list[dict[str, Any]]],
    new: tuple[dict[str, Any], list[dict[str, Any]]],
    threshold: float = 0.1,
    say: Callable[[str], None] = print,
) -> bool:
    """Whether `new` is free of regressions of bnext against `old`; says what it finds.

    On one and the same GPU times are compared. Times of a CPU, or of two devices, are not
    comparable; there the shares of the floor are, which was timed in the same rounds. A case counts
    as slower beyond `threshold` if that is also more than three standard errors; all cases
    together count beyond half of it, with errors that average out.
    """
    (old_env, old_rows), (new_env, new_rows) = old, new
    same_gpu = old_env.get("device") == "cuda" and old_env.get("name") == new_env.get("name")
    measure = "ms" if same_gpu else "floor_share"
    say(f"compared: {'times' if same_gpu else 'shares of the floor'}")
    for name in sorted(set(old_env) | set(new_env)):
        if name not in ("date", "commit", "copy_gbps", "other_work") and old_env.get(
            name
        ) != new_env.get(name):
            say(f"differs: {name}: {old_env.get(name)} → {new_env.get(name)}")

    def by_key(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(r[k] for k in KEY): r for r in rows if r.get("provider") == "bnext"}

    before, after = by_key(old_rows), by_key(new_rows)
    changes, good = [], True
    for key, was in before.items():
        row = after.get(key)
        if was.get(measure) is None or row is None:
            continue
        label = "{} {} {N}×{C}×{H}×{W} {dtype} {layout} {level}".format(*key[:2], **row)
        if row.get(measure) is None:
            say(f"no longer measured: {label}: {row.get('note')}")
            good = False
            continue
        a, b = _spread_of(was, measure), _spread_of(row, measure)
        slowdown = b.median / a.median if same_gpu else a.median / b.median
        changes.append(Change(label, slowdown, math.hypot(a.standard_error, b.standard_error)))
    if not changes:
        say("no case is in both files")
        return False
    slower = sorted((c for c in changes if c.is_regression(threshold)), key=lambda c: -c.slowdown)
    for change in slower:
        say(f"slower: {change.slowdown:.2f}× ± {change.uncertainty:.2f}  {change.label}")
    mean = math.exp(sum(math.log(c.slowdown) for c in changes) / len(changes))
    error = math.sqrt(sum(c.uncertainty**2 for c in changes)) / len(changes)
    everywhere = mean - 1 > max(threshold / 2, 3 * error)
    say(
        f"{len(changes)} cases in both files ({len(before.keys() - after.keys())} only in the old "
        f"one): {mean:.3f}× the time in the geometric mean (± {error:.3f}); {len(slower)} slower"
    )
    if everywhere:
        say(f"slower as a whole: {mean:.3f}×")
    return good and not slower and not everywhere
