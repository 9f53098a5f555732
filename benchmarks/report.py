"""What a run says: the live table, line by line, and the summary after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.results import Row
from benchmarks.shapes import FLOOR_NAMES, Case, is_peer
from benchmarks.timing import geomean

WIDTH = 100


def milliseconds(ms: float | None) -> str:
    """Three digits and a unit."""
    if ms is None:
        return "–"
    value, unit = (1e3 * ms, "µs") if ms < 1 else (ms, "ms")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def title(case: Case) -> tuple[str, ...]:
    return (case.suite, case.dtype, case.layout, case.level)


class Table:
    """One line per case: bnext's time, the floor's, and how many times as long each peer takes."""

    def __init__(self, peers: Sequence[str], say: Callable[[str], None]) -> None:
        self.peers = [peer for peer in peers if peer != "bnext"]
        self.say = say
        self.title: tuple[str, ...] | None = None
        self.reasons: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, case: Case, rows: Sequence[Row]) -> None:
        """Print the line of a case; keep the reasons of the providers that have no time."""
        if title(case) != self.title:
            self.title = title(case)
            peers = "".join(f"{peer[:14]:>15}" for peer in self.peers)
            self.say("")
            self.say(" · ".join(self.title))
            self.say(
                f"  {'shape':<17}{'':<4}{'direction':<11}{'cache':<5}{'bnext':>9}{'floor':>10}"
                f"{'of floor':>9}{peers}"
            )
        by_name = {row.provider: row for row in rows}
        for row in rows:
            if row.note:
                self.reasons[row.provider, row.note] += 1
        ours = by_name.get("bnext", rows[0])
        floor = next(row for row in rows if row.provider in FLOOR_NAMES)
        share = "–" if ours.floor_share is None else f"{100 * ours.floor_share:.0f} %"
        cells = "".join(f"{self._cell(by_name[peer]):>15}" for peer in self.peers)
        count = f"×{case.shape.count}" if case.shape.count > 1 else ""
        own = milliseconds(ours.ms) if ours.provider == "bnext" else "–"
        self.say(
            f"  {case.shape!s:<17}{count:<4}{case.direction:<11}{ours.cache:<5}{own:>9}"
            f"{milliseconds(floor.ms):>10}{share:>9}{cells}"
        )
        for row in rows:
            if row.note and row.note.startswith("wrong"):
                self.say(f"    {row.provider}: {row.note}")

    def _cell(self, row: Row) -> str:
        if row.ms is None:
            return "wrong" if row.note and row.note.startswith("wrong") else "–"
        return milliseconds(row.ms) if row.vs_bnext is None else f"{row.vs_bnext:.2f}×"

    def end(self) -> None:
        """Say why some cells are empty."""
        if self.reasons:
            self.say("\nNot timed:")
        for (provider, note), number in sorted(self.reasons.items()):
            self.say(f"  {provider:<16}{_cases(number)}: {note}")


def describe(environment: dict[str, Any]) -> str:
    """The environment in two lines."""
    e = environment
    threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}"
    device = e["name"] if e["device"] == "cuda" else f"{e['name']}, {threads}"
    versions = [f"torch {e['torch']}", f"bnext {e['bnext']} ({e['commit'] or 'no commit'})"]
    if e["device"] == "cuda":
        versions += [f"CUDA {e['cuda']}", f"cuDNN {e['cudnn']}", f"driver {e['driver_version']}"]
    else:
        versions.append(f"kernels {e['isa']}")
    machine = [device, f"cache {e['cache_mib']:g} MiB", f"copies at {e['copy_gbps']} GB/s"]
    if e.get("other_work"):
        machine.append(f"other programs on {e['other_work']:.1f} processors")
    return f"{', '.join(machine)}\n{', '.join(versions)}, {e['date']}"


Group = tuple[str, ...]


def groups(rows: Iterable[dict[str, Any]]) -> dict[Group, dict[Any, dict[str, dict[str, Any]]]]:
    """Timed rows by (direction, dtype, layout, level), case with its cache, and provider."""
    found: dict[Group, dict[Any, dict[str, dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        if row.get("ms") is None:
            continue
        group = tuple(row[k] for k in ("direction", "dtype", "layout", "level"))
        case = tuple(row[k] for k in ("suite", "N", "C", "H", "W", "cache"))
        found[group].setdefault(case, {})[row["provider"]] = row
    return found


def _cases(number: int) -> str:
    return f"{number} case{'s' if number > 1 else ''}"


def _name(case: tuple[Any, ...]) -> str:
    return f"{case[0]} {'×'.join(map(str, case[1:5]))}"


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Geometric means against each peer and the best one, worst cases, floor, network totals."""
    lines = []
    for group, cases in groups(rows).items():
        cases = {case: found for case, found in cases.items() if "bnext" in found}
        if not cases:
            continue
        lines.append(f"\n{' · '.join(group)}: {_cases(len(cases))}")
        against: dict[str, dict[Any, float]] = defaultdict(dict)
        for case, found in cases.items():
            peers = {name: row["vs_bnext"] for name, row in found.items() if is_peer(name)}
            for name, ratio in peers.items():
                against[name][case] = ratio
            if peers:
                against["best peer"][case] = min(peers.values())
        best = against.pop("best peer", None)
        if best and len(against) > 1:
            against["best peer"] = best
        for name, ratio in against.items():
            worst = min(ratio, key=lambda case: ratio[case])
            lines.append(
                f"  {name:<15}{geomean(ratio.values()):6.2f}× bnext's time in geometric mean; "
                f"at worst {ratio[worst]:.2f}× ({_name(worst)})"
            )
        shares = {case: found["bnext"]["floor_share"] for case, found in cases.items()}
        least = min(shares, key=lambda case: shares[case])
        lines.append(
            f"  {'share of floor':<15}{100 * geomean(shares.values()):5.0f} % in geometric mean;"
            f" at worst {100 * shares[least]:.0f} % ({_name(least)})"
        )
        lines += _network_totals(cases)
    return "\n".join(lines).strip("\n")


def _network_totals(cases: dict[Any, dict[str, dict[str, Any]]]) -> list[str]:
    """Time in all batch norms of a ResNet-50: the sum over its shapes, times their counts."""
    lines = []
    for batch in sorted({case[1] for case in cases if case[0] == "resnet50"}):
        shapes: dict[Any, dict[str, dict[str, Any]]] = {}
        for case in sorted(cases):  # cold before warm, where there are both
            if case[:2] == ("resnet50", batch):
                shapes.setdefault(case[:5], cases[case])
        network = list(shapes.values())
        if sum(found["bnext"]["count"] for found in network) < 53:
            continue  # not all of its layers
        names = set.intersection(*(set(found) for found in network))
        totals = {
            name: sum(found[name]["count"] * found[name]["ms"] for found in network)
            for name in names
        }
        text = ", ".join(
            f"{name} {milliseconds(ms)}" for name, ms in sorted(totals.items(), key=lambda x: x[1])
        )
        lines.append(f"  all 53 layers of ResNet-50, batch {batch}: {text}")
    return lines
