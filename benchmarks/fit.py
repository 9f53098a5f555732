"""Fits the constants of the model that chooses plans (Costs, csrc/cuda/plan.h) to measurements.

python -m benchmarks.fit FILE [--device h200] [--only NAME ...] [--hold N]

FILE is of ``python -m benchmarks plans``: each of its rows says what forces its plan, and what that
took. The plan is made again, with other constants, and the root mean square of the logarithm of
measured over predicted time is made small, one constant after the other. A constant that hardly
matters stays where it is. Prints the constants, before and after, and the errors; one in N cases is
held back, to show what the fit is worth where it has not been.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plans, results
from benchmarks.providers import Settings, forced, plans_of
from benchmarks.shapes import Case, Shape
from bnext._extension import _C

Costs = dict[str, float]
STEPS = (1.5, 1.15, 1.04)  # by which a constant is tried to be larger or smaller
LEAST_GAIN = 1e-5  # of the error: less is not worth another constant


class Measured(NamedTuple):
    """A plan that has been timed."""

    case: tuple[Any, ...]
    settings: Settings
    microseconds: float


def measured(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """Of plans that something forces: what is not forced may be another plan by now."""
    return [
        Measured(case, settings, 1e3 * row["ms"])
        for case, timed in plans.by_case(rows).items()
        for row in timed
        if (settings := plans.settings_of(row["provider"])) and "FAMILY" in settings
    ]


def predict(found: Sequence[Measured], device: str, costs: Costs) -> list[float]:
    """Microseconds of each by the model with these constants."""
    times = []
    for (*shape, dtype, layout, direction), settings, _ in found:
        case = Case("", Shape(*shape), dtype, layout, direction)
        with forced(settings):
            (plan,) = plans_of(case, device, costs=costs)
        times.append(plan["microseconds"])
    return times


def error(found: Sequence[Measured], device: str, costs: Costs) -> float:
    """How far the model is off with these constants."""
    times = (m.microseconds for m in found)
    return plans.error(zip(times, predict(found, device, costs), strict=True))


def descend(
    loss: Callable[[Costs], float],
    start: Costs,
    names: Sequence[str],
    say: Callable[[str], None] = print,
) -> Costs:
    """Coordinate descent by factors, larger ones first, until no constant is worth a change."""
    best, least = dict(start), loss(start)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for name in names:
                for factor in (step, 1 / step):
                    while (now := loss(tried := best | {name: best[name] * factor})) < (
                        least - LEAST_GAIN
                    ):
                        best, least, improved = tried, now, True
        say(f"steps of {step - 1:.0%}: error {least:.3f}")
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path)
    add("--device", default="h200", choices=_C.cuda_devices(), help="what it is of; default h200")
    add("--only", nargs="+", metavar="NAME", help="constants that may change; default: all")
    add("--hold", type=int, default=5, metavar="N", help="one in N cases is held back; default 5")
    a = parser.parse_args(argv)
    start = _C.cuda_costs(a.device)
    names = a.only or list(start)
    unknown = [name for name in names if name not in start]
    if unknown:
        parser.error(f"no constant {', '.join(unknown)}; there are {', '.join(start)}")
    found = measured(results.load_for(parser, a.file)[1])
    cases = list(dict.fromkeys(m.case for m in found))
    held = set(cases[a.hold - 1 :: a.hold]) if a.hold else set()
    parts = {
        "fitted": [m for m in found if m.case not in held],
        "held back": [m for m in found if m.case in held],
    }
    if not parts["fitted"]:
        parser.error(f"{a.file} holds no plans: it should be of python -m benchmarks plans")
    print(f"{len(found)} plans of {len(cases)} passes, {len(held)} of which are held back")
    best = descend(
        lambda costs: error(parts["fitted"], a.device, costs),
        start,
        names,
    )
    for name, value in best.items():
        print(
            f"{name:<30} {start[name]:10.4g} {value:10.4g}{'' if value == start[name] else '  *'}"
        )
    for name, part in parts.items():
        if part:
            before, after = (error(part, a.device, costs) for costs in (start, best))
            print(f"{name}: error {before:.3f} before, {after:.3f} after")
    return 0


if __name__ == "__main__":
    main()
