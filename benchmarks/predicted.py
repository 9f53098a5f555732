"""The prediction tables of docs/kernels.md, from the model of csrc/cuda/plan_*.cpp.

Needs no GPU. `time` is over the floor's: one kernel that moves what any implementation must move.
With results of such a device: how long the best peer took there, over bnext's predicted time; and
that over the time of a plain operation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.shapes import DTYPES, LAYOUTS, SUITES, Shape, is_peer, meta_input
from bnext._extension import _C

IN_TABLE = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
SHAPES = [s for s in SUITES["resnet50"] if (s.C, s.H) in IN_TABLE]
SHAPES += [Shape(20, 6, 256, 256), Shape(6, 3, 400, 300)]
# An NCHW pass should be near the floor for tensors of so many bytes and more.
LARGE, AIM = 25e6, 1.15


def plan(device: str, shape: Shape, case: tuple[str, str, str], family: str) -> dict[str, Any]:
    """What cuda_plans says of one direction, dtype and layout; `time` is over the floor's."""
    direction, dtype, layout = case
    x = meta_input(shape[:4], dtype, layout)
    plans = _C.cuda_plans(x, device, family, True)
    (found,) = (p for p in plans if p["pass"] == direction)
    moved = found["bytes_moved"] / (shape.numel * x.element_size())
    return found | {"time": found["microseconds"] / found["microseconds_min"], "T": moved}


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def is_large(shape: Shape, dtype: str) -> bool:
    return shape.num_bytes(dtype) >= LARGE


def print_aim(kind: str, times: list[float]) -> None:
    met = sum(time <= AIM for time in times)
    print(f"nchw, {LARGE / 1e6:.0f} MB and more, over the {kind} floor:", end=" ")
    print(f"{min(times):.2f} to {max(times):.2f}; {met} of {len(times)} at {AIM} or less")


def against_measured(device: str, measured: list[dict[str, Any]]) -> None:
    """ResNet-50, cold, beside the best peer: geometric mean and worst shape, for each pass, dtype
    and layout, and all. And large NCHW tensors beside the plain operation."""
    best: dict[tuple[str, str, str], dict[Shape, float]] = defaultdict(dict)
    floors: dict[tuple[str, str, str], dict[Shape, float]] = defaultdict(dict)
    for row in measured:
        case = (row["direction"], row["dtype"], row["layout"])
        shape = Shape.of_row(row)
        if not row["ms"] or row["note"] or (row["cache"], row["suite"]) != ("cold", "resnet50"):
            continue
        if is_peer(row["provider"]):
            best[case][shape] = min(1e3 * row["ms"], best[case].get(shape, float("inf")))
        if row["floor_ms"]:  # beside each provider; the least is the hardest to keep up with
            floors[case][shape] = min(1e3 * row["floor_ms"], floors[case].get(shape, float("inf")))
    rows, means, large = [], defaultdict(list), []
    for direction, dtype, layout in itertools.product(("forward", "backward"), DTYPES, LAYOUTS):
        case = (direction, dtype, layout)
        times = {
            shape: plan(device, shape, case, "auto")["microseconds"]
            for shape in best[case] | floors[case]
        }
        large += [
            times[shape] / us
            for shape, us in floors[case].items()
            if layout == "nchw" and is_large(shape, dtype)
        ]
        if not best[case]:
            continue
        ratios = {shape: us / times[shape] for shape, us in best[case].items()}
        means[direction].append(statistics.geometric_mean(ratios.values()))
        worst = min(ratios, key=lambda shape: ratios[shape])
        row = [*case, str(len(ratios)), f"{means[direction][-1]:.2f}"]
        rows.append([*row, f"{ratios[worst]:.2f} ({', '.join(map(str, worst[:4]))})"])
    ratio = "best peer, measured ÷ bnext, predicted"
    print_table(["pass", "dtype", "layout", "shapes", ratio, "worst"], rows)
    for direction, found in means.items():
        print(f"{direction}: {statistics.geometric_mean(found):.2f}, geometric mean of these rows")
    if large:
        print_aim("measured", large)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    add = parser.add_argument
    add("device", nargs="?", default="h200", choices=_C.cuda_devices(), help="default h200")
    add("results", nargs="?", type=Path, metavar="FILE", help="what such a device has measured")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if arguments.results:
        environment, rows = results.load_for(parser, arguments.results)
        if environment["device"] != "cuda" or any("network" in row for row in rows):
            parser.error(f"{arguments.results} holds no times of batch norm on a GPU")
        against_measured(device, rows)
        return
    for dtype, direction in itertools.product(("float32", "float16"), ("forward", "backward")):
        rows = []
        for shape in SHAPES:
            row = [", ".join(map(str, shape[:4]))]
            for layout in LAYOUTS:
                best, streaming = (
                    plan(device, shape, (direction, dtype, layout), f)
                    for f in ("auto", "streaming")
                )
                row += [best["family"], f"{best['T']:.2g}T", f"{best['time']:.2f}"]
                row.append(f"{streaming['time']:.2f}")
            rows.append(row)
        columns = [[layout, "bytes", "time", "streaming"] for layout in LAYOUTS]
        print_table([f"{direction}, {dtype}", *itertools.chain(*columns)], rows)
    rows = []
    for direction, dtype in itertools.product(("forward", "backward"), ("float32", "float16")):
        row = [f"{direction}, {dtype}"]
        for layout in LAYOUTS:
            means = (
                statistics.geometric_mean(
                    plan(device, s, (direction, dtype, layout), f)["time"]
                    for s in SUITES["resnet50"]
                )
                for f in ("auto", "streaming")
            )
            row.append("{:.2f} ({:.2f})".format(*means))
        rows.append(row)
    print_table(["ResNet-50, geometric mean", *LAYOUTS], rows)
    times = [
        plan(device, shape, (direction, dtype, "nchw"), "auto")["time"]
        for direction, dtype in itertools.product(("forward", "backward"), ("float32", "float16"))
        for shape in SUITES["resnet50"]
        if is_large(shape, dtype)
    ]
    print_aim("predicted", times)


if __name__ == "__main__":
    main()
