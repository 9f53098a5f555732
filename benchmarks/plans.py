"""``python -m benchmarks plans``: would another plan be faster than the one that is chosen?

Every plan that the environment variables of docs/kernels.md can force for a case is asked for; of
those that can run, the best by the model and some of each kind are timed side by side with the
chosen one, in the rounds of one run. A row's provider says what forces its plan:
``bnext-FAMILY=cluster,TEAM=2`` is bnext with ``BNEXT_CUDA_FAMILY=cluster BNEXT_CUDA_TEAM=2``.
benchmarks/fit.py fits the model to such rows.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.providers import Bnext, Settings, Variant, forced, plan_text, plans_of
from benchmarks.shapes import FLOOR_NAMES, Case
from benchmarks.timing import geomean
from bnext._extension import _C

MOST = 24  # plans of a case that are timed, unless said otherwise
MOST_TEAMS = 64  # of a grid
CASE = ("N", "C", "H", "W", "dtype", "layout", "direction")


def every_setting(case: Case, device: str) -> Iterator[Settings]:
    """What forces plans of each kind; not all of them can run, and some are the same."""
    yield {"FAMILY": "streaming"}
    for threads in ("256", "128"):
        streaming = {"FAMILY": "streaming", "THREADS": threads}
        yield streaming
        with forced(streaming):
            (usual,) = plans_of(case, device)
        for share in (0.5, 2, 4):
            yield streaming | {"TEAM": str(math.ceil(share * usual["team"]))}
    num_sms = int(_C.cuda_device(device)["num_sms"])
    blocks = {n * num_sms // teams for n in (1, 2) for teams in range(1, MOST_TEAMS + 1)}
    kinds: list[Settings] = [{"FAMILY": "resident"}]
    kinds += [{"FAMILY": "cluster", "TEAM": str(n)} for n in (2, 4, 8, 16)]
    kinds += [{"FAMILY": "grid", "TEAM": str(n)} for n in sorted(blocks, reverse=True) if n]
    ways: dict[str, tuple[Settings, ...]] = {
        "grid": ({"REGISTERS": "0"}, {"REGISTERS": "always"}),
        "": (
            {"PERSISTENT": "0"},
            {"PERSISTENT": "always", "REGISTERS": "0"},
            {"PERSISTENT": "always", "REGISTERS": "always"},
        ),
    }
    widths: tuple[Settings, ...] = ({"ROW_BYTES": "128"}, {"ROW_BYTES": "64"})
    for kind in kinds:
        for way in ways.get(kind["FAMILY"], ways[""]):
            for width in widths if case.layout == "channels_last" else ({},):
                for threads in ("512", "256", "128", "64"):
                    yield kind | way | width | {"THREADS": threads}


def candidates(case: Case, device: str = "cuda", most: int = MOST) -> list[Settings]:
    """Settings of plans that can run, and differ: the best one of each family and size of a
    cluster, by the model, and the best of all others."""
    found: dict[str, tuple[float, Settings]] = {}
    for settings in every_setting(case, device):
        with forced(settings):
            (plan,) = plans_of(case, device)
        if not plan["error"]:
            found.setdefault(plan["text"], (plan["microseconds"], settings))
    by_time = [settings for _, settings in sorted(found.values(), key=lambda pair: pair[0])]
    of_kind: dict[tuple[str, str], Settings] = {}
    for settings in by_time:
        team = settings.get("TEAM", "") if settings["FAMILY"] == "cluster" else ""
        of_kind.setdefault((settings["FAMILY"], team), settings)
    taken = list(of_kind.values())[:most]
    taken += [settings for settings in by_time if settings not in taken][: most - len(taken)]
    # What else the chosen plan can do without.
    usual = plan_text(case, device)
    for settings in ({"LATE": "0"}, {"EARLY": "0"}, {"OVERLAP": "0"}):
        with forced(settings):
            if plan_text(case, device) != usual:
                taken.append(settings)
    return taken


class Forced(Variant):
    """Timed also where the plan is the chosen one: so the chosen one has a row for fit.py, too."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name_of(settings), settings)

    def why_not(self, case: Case) -> str | None:
        return None


def name_of(settings: Settings) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def settings_of(provider: str) -> Settings | None:
    """What a row's provider says of its plan; None where nothing is forced."""
    text = provider.removeprefix("bnext-")
    if text == provider or "=" not in text:
        return None
    return dict(part.split("=") for part in text.split(","))


def predicted_ms(row: dict[str, Any]) -> float | None:
    """What the model said of a row's plan when it was timed."""
    found = re.search(r"predicted ([\d.e+]+) us", row.get("plan") or "")
    return float(found[1]) / 1e3 if found else None


def error(pairs: Iterable[tuple[float, float]]) -> float:
    """Of pairs of a measured and a predicted time: root mean square of the ratio's logarithm."""
    off = [math.log(measured / predicted) for measured, predicted in pairs]
    return math.sqrt(sum(x * x for x in off) / len(off))


def by_case(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The timed rows of each case that has other plans beside the chosen one."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["ms"] and not row["note"]:
            cases[tuple(row[k] for k in CASE)].append(row)
    return {
        case: found
        for case, found in cases.items()
        if any(settings_of(row["provider"]) for row in found)
        and any(row["provider"] == "bnext" for row in found)
    }


def line_of(case: tuple[Any, ...], rows: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """How many times as long as the fastest plan the chosen one takes, and a line that says so.

    Its own time, where something forces it, too, counts as its time.
    """
    (chosen,) = (row for row in rows if row["provider"] == "bnext")
    floors = [row for row in rows if row["provider"] in FLOOR_NAMES]
    ours = [row for row in rows if row["provider"] not in FLOOR_NAMES]
    best = min(ours, key=lambda row: row["ms"])
    if best["plan"] == chosen["plan"]:
        best = chosen
    ratio = chosen["ms"] / best["ms"]
    shape, rest = "×".join(map(str, case[:4])), " ".join(case[4:])
    floor = f"{1e3 * floors[0]['ms']:7.1f}" if floors else f"{'':7}"
    what = "" if best is chosen else best["provider"].removeprefix("bnext-")
    times = f"{floor} {1e3 * chosen['ms']:7.1f} {1e3 * best['ms']:7.1f} {ratio:5.2f}"
    return ratio, f"{shape:<18} {rest:<32} {times}  {what}"


HEAD = (
    f"{'':51} {'floor':>7} {'chosen':>7} {'fastest':>7} {'ratio':>5}  µs; what forces the fastest"
)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each case, what better choices would gain, and how far the model is off."""
    found = [line_of(case, timed) for case, timed in by_case(rows).items()]
    if not found:
        return "no case was timed with several plans"
    lines = [HEAD, *(line for _, line in found)]
    lines.append(
        f"\n{len(found)} passes: the chosen plan takes {geomean(r for r, _ in found):.3f} "
    )
    lines[-1] += "times as long as the fastest, in the geometric mean"
    timed = [row for row in rows if row["ms"] and not row["note"]]
    pairs = [(row["ms"], predicted) for row in timed if (predicted := predicted_ms(row))]
    if pairs:
        mean = geomean(ms / predicted for ms, predicted in pairs)
        lines.append(
            f"{len(pairs)} plans: {mean:.2f} times the predicted time in the mean; "
            f"error {error(pairs):.0%} (root mean square of the logarithm)"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    from benchmarks import __main__ as command
    from benchmarks import results
    from benchmarks.runner import Benchmark

    parser = command.make_parser("python -m benchmarks plans", __doc__)
    parser.add_argument("--most", type=int, default=MOST, help=f"plans of a case; default {MOST}")
    a = parser.parse_args(argv)
    a.direction = a.direction or ["forward", "backward"]
    command.fill_defaults(a, parser)
    if a.device != "cuda":
        parser.error("plans are of CUDA kernels: there is no CUDA device here")
    if not {"forward", "backward"}.issuperset(a.direction):
        parser.error("a plan is of one pass: --direction forward or backward")
    cases = command.cases_of(a)
    environment = results.environment(a.device)
    say, advance, close = command.lines_above_a_bar(len(cases))
    say(HEAD)
    benchmark = Benchmark((), a.seconds, names_kernels=False)
    rows: list[dict[str, Any]] = []
    try:
        for case in cases:
            benchmark.providers = [Bnext(), *map(Forced, candidates(case, most=a.most))]
            found = [asdict(row) for row in benchmark.run_case(case)]
            rows += found
            if a.output:
                results.save(a.output, environment, rows)
            for key, timed in by_case(found).items():
                say(line_of(key, timed)[1])
            advance(f"{case.suite} {case.shape} {case.direction}")
    finally:
        close()
        print("\n" + "\n".join(summary(rows).splitlines()[-2:]))
    return 1 if any(map(command.is_defect, rows)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
