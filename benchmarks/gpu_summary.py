"""The one page that a GPU check ends with: its stages, its tests, and the figures that count.

Reads what the stages have left in the folder; what is not there has no section. Needs the built
extension only for the families, so that it can be written when the build has failed.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from xml.etree import ElementTree

from benchmarks.shapes import FLOOR_NAMES, is_peer, meta_input
from benchmarks.timing import geomean

PLAN_FOR = "cuda"  # the device that families are asked for
HEADLINES = ("forward", "backward", "step", "inference")


class StageResult(Protocol):
    """What the summary needs of a stage."""

    stage: str
    status: str
    seconds: float
    notes: list[str]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def stage_table(results: Sequence[StageResult]) -> str:
    rows = [
        (r.stage, r.status, f"{r.seconds:.0f} s", "; ".join(r.notes).replace("|", "/") or "–")
        for r in results
    ]
    return table(("stage", "result", "time", "notes"), rows)


class Outcomes(NamedTuple):
    """Of the tests in a JUnit file."""

    passed: int
    failures: list[tuple[str, str]]  # name and message
    skips: dict[str, int]  # reason and how often


def count_outcomes(path: Path) -> Outcomes:
    """Raises ElementTree.ParseError for a file that was not written to its end."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failures, skips = [], defaultdict(int)
    for case in cases:
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for child in case:
            message = (child.get("message") or "").strip().split("\n")[0][:160]
            if child.tag in ("failure", "error"):
                failures.append((name, message))
            elif child.tag == "skipped":
                skips[message] += 1
    return Outcomes(len(cases) - len(failures) - sum(skips.values()), failures, dict(skips))


def test_section(path: Path) -> str:
    """Counts, the first failures, and why tests were skipped."""
    try:
        passed, failures, skips = count_outcomes(path)
    except ElementTree.ParseError as error:
        return f"### {path.name}\n\nnot readable: {error}"
    head = f"{passed} passed, {len(failures)} failed, {sum(skips.values())} skipped"
    lines = [f"### {path.name}: {head}", ""]
    lines += [f"- `{name}`: {message}" for name, message in failures[:15]]
    if len(failures) > 15:
        lines.append(f"- and {len(failures) - 15} more")
    lines += [f"- {n} skipped: {why}" for why, n in sorted(skips.items(), key=lambda x: -x[1])[:6]]
    return "\n".join(lines)


Cases = dict[tuple[Any, ...], dict[str, dict[str, Any]]]


GROUP = ("direction", "layout", "dtype", "cache")


def grouped(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], Cases]:
    """Rows with a time, by GROUP, case and provider."""
    found: dict[tuple[str, ...], Cases] = defaultdict(dict)
    for row in rows:
        if row.get("ms") is None:
            continue
        case = tuple(row[k] for k in ("suite", "N", "C", "H", "W", "level"))
        group = tuple(row[k] for k in GROUP)
        found[group].setdefault(case, {})[row["provider"]] = row
    return found


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """Best peer's time over bnext's: geometric mean and worst shape; and the share of the floor."""
    lines = []
    groups = grouped(rows)
    for group in sorted(
        groups, key=lambda g: (HEADLINES.index(g[0]) if g[0] in HEADLINES else 9, g)
    ):
        ratios, shares = {}, []
        for case, found in groups[group].items():
            ours = found.get("bnext")
            peers = {
                name: row["vs_bnext"]
                for name, row in found.items()
                if is_peer(name) and row.get("vs_bnext")
            }
            if ours and peers:
                best = min(peers, key=lambda name: peers[name])
                ratios[case] = (peers[best], best)
            if ours and ours.get("floor_share"):
                shares.append(ours["floor_share"])
        if not ratios:
            continue
        worst = min(ratios, key=lambda case: ratios[case][0])
        shape = "×".join(map(str, worst[1:5]))
        lines.append(
            (
                *group,
                len(ratios),
                f"**{geomean(r for r, _ in ratios.values()):.2f}**",
                f"{ratios[worst][0]:.2f} ({worst[0]} {shape}, {ratios[worst][1]})",
                f"{100 * geomean(shares):.0f} % / {100 * min(shares):.0f} %" if shares else "–",
            )
        )
    if not lines:
        return "no case was timed with a peer"
    head = ("cases", "best peer ÷ bnext", "worst", "share of the floor: mean / least")
    return table((*GROUP, *head), lines)


def not_timed(rows: Iterable[dict[str, Any]]) -> str:
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row.get("note"):
            reasons[row["provider"], row["note"][:120]] += 1
    ordered = sorted(reasons.items(), key=lambda item: (item[0][0] != "bnext", -item[1]))
    return "\n".join(f"- {who}, {n} cases: {why}" for (who, why), n in ordered[:10])


def peer_kernels(rows: Iterable[dict[str, Any]]) -> str:
    """Which kernels each provider ran, and on how many shapes."""
    found: dict[tuple[str, ...], int] = defaultdict(int)
    for row in rows:
        if (
            row.get("kernels")
            and row["provider"] not in FLOOR_NAMES
            and row["direction"] in HEADLINES[:2]
        ):
            names = "; ".join(name.split("(")[0][:70] for name in row["kernels"].split("; "))
            key = (row["provider"], row["direction"], row["layout"], row["dtype"], names)
            found[key] += 1
    ordered = sorted(found.items(), key=lambda item: (item[0][:4], -item[1]))
    rows_ = [(*key[:4], f"`{key[4]}`", n) for key, n in ordered]
    return table(("provider", "direction", "layout", "dtype", "kernels", "cases"), rows_)


def families(rows: Iterable[dict[str, Any]]) -> str:
    """Which family each case takes on the device that is here, asked anew."""
    from bnext._extension import _C

    keys = {(*(row[k] for k in "NCHW"), row["dtype"], row["layout"]) for row in rows}
    chosen: dict[tuple[str, str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for *shape, dtype, layout in keys:
        for plan in _C.cuda_plans(meta_input(shape, dtype, layout), PLAN_FOR, "", True):
            chosen[plan["pass"], layout, dtype][plan["family"]] += 1
    lines = [
        (*group, ", ".join(f"{name} {n}" for name, n in sorted(found.items())))
        for group, found in sorted(chosen.items())
    ]
    return table(("pass", "layout", "dtype", "shapes by family"), lines)


def variants(rows: Sequence[dict[str, Any]]) -> str:
    """Whether something else would have been faster than what the plan chose."""
    lines = []
    for group, cases in sorted(grouped(rows).items()):
        ratios: dict[str, dict[tuple[Any, ...], float]] = defaultdict(dict)
        for case, found in cases.items():
            for name, row in found.items():
                if name.startswith("bnext-") and row.get("vs_bnext"):
                    ratios[name.removeprefix("bnext-")][case] = row["vs_bnext"]
        for variant, times in sorted(ratios.items()):
            best = min(times, key=lambda case: times[case])
            shape = "×".join(map(str, best[1:5]))
            mean = f"{geomean(times.values()):.2f}"
            lines.append((*group, variant, len(times), mean, f"{times[best]:.2f} ({shape})"))
    if not lines:
        return ""
    head = ("variant", "cases", "its time ÷ the choice's", "least")
    return table((*GROUP, *head), lines)


def over_floor(rows: Iterable[dict[str, Any]]) -> str:
    """How much longer than the floor bnext takes, and should take by the model, for
    csrc/cuda/plan_cost.cpp. Where all stays on chip, that is what blocks stop for."""
    from bnext._extension import _C

    found: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        own, _, family = row["provider"].partition("-")
        timed = row.get("ms") and row.get("floor_ms") and row["cache"] == "cold"
        if own != "bnext" or family not in ("", *_C.cuda_families()) or not timed:
            continue
        if row["direction"] not in HEADLINES[:2]:
            continue
        x = meta_input([row[k] for k in "NCHW"], row["dtype"], row["layout"])
        plans = _C.cuda_plans(x, PLAN_FOR, family, True)
        plan = next(p for p in plans if p["pass"] == row["direction"])
        all_kept = plan["bytes_moved"] == plan["bytes_min"]
        kept = "–" if plan["family"] == "streaming" else "all" if all_kept else "in part"
        dtype = "halves" if x.element_size() == 2 else row["dtype"]
        slabs = "–" if plan["family"] == "streaming" else "several" if plan["persistent"] else "one"
        key = (plan["family"], plan["walk"], kept, slabs, row["direction"], dtype)
        predicted = plan["microseconds"] - plan["microseconds_min"]
        found[key].append((1e3 * (row["ms"] - row["floor_ms"]), predicted))
    lines = []
    for key, times in sorted(found.items()):
        cells: list[object] = [*key, len(times)]
        for kind in zip(*times, strict=True):
            cells += [f"{statistics.median(kind):.1f}", f"{min(kind):.1f} to {max(kind):.1f}"]
        lines.append(cells)
    head = ("family", "walk", "on chip", "slabs of a block", "pass", "dtype", "cases")
    head += ("µs", "range", "by the model", "range")
    return "Time beyond the floor's:\n\n" + table(head, lines) if lines else ""


def probe_section(found: dict[str, Any]) -> str:
    """Of the bandwidths the plateau, and what stands alone."""
    lines = []
    if isinstance(found.get("launches"), dict):
        one = found["launches"]
        lines.append(
            f"- a launch: {one['graph_us']} µs in a graph, {one['stream_us']} µs from the host"
        )
    if isinstance(found.get("bandwidths"), list):
        for name in ("copy", "add"):
            for cold, where in ((True, "from memory"), (False, "warm")):
                picked = [
                    r for r in found["bandwidths"] if (r["operation"], r["cold"]) == (name, cold)
                ]
                text = ", ".join(f"{r['mib']:g} MiB {r['gbps']:.0f}" for r in picked)
                lines.append(f"- {name} {where}, GB/s by the size of one tensor: {text}")
    if isinstance(found.get("device"), dict) and found["device"].get("bnext"):
        lines.append(f"- what plans are made of: {found['device']['bnext']}")
    return "\n".join(lines)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def speed_sections(path: Path) -> list[str]:
    """Times, and what plans say of them: for that the extension has to load."""
    bench = load(path)
    rows = bench["rows"]
    gbps = bench["environment"].get("copy_gbps")
    sections = [
        f"## Speed\n\n{len(rows)} rows in bench.json; copies at {gbps} GB/s. Ratios above 1: "
        "bnext is faster than the best of its peers.",
        headline(rows),
    ]
    sections += [f"Not timed, or wrong:\n\n{text}" for text in [not_timed(rows)] if text]
    try:
        sections += ["## Families", families(rows), variants(rows), over_floor(rows)]
    except Exception as error:
        sections.append(f"not known: {type(error).__name__}: {error}")
    return [*sections, "## Kernels", peer_kernels(rows)]


def plan_sections(path: Path) -> list[str]:
    from benchmarks import plans  # needs the extension

    return ["## Plans", f"```\n{plans.summary(load(path)['rows'])}\n```"]


def write_summary(folder: Path, device: dict[str, Any], results: Sequence[StageResult]) -> None:
    """summary.md from all that lies in the folder."""
    about = ", ".join(f"{name} {value}" for name, value in device.items() if name != "name")
    sections = [f"# bnext on {device['name']}", about, "## Stages", stage_table(results)]

    def add(file: str, write: Callable[[Path], list[str]]) -> None:
        path = folder / file
        if not path.exists():
            return
        try:
            sections.extend(write(path))
        except Exception as error:  # a torn file, or one of another version, hides no other
            sections.append(f"{file} is not readable: {type(error).__name__}: {error}")

    for name in ("tests", "cpu-tests"):
        add(f"{name}.xml", lambda path: [test_section(path)])
    add("bench.json", speed_sections)
    add("plans.json", plan_sections)
    add("probe.json", lambda path: ["## Probe", probe_section(load(path))])
    text = "\n\n".join(section for section in sections if section)
    (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
