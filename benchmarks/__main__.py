"""``python -m benchmarks``: bnext beside what a user would take instead, and beside the floor.

python -m benchmarks [--suite ...] [--output FILE]   measure; see --help
python -m benchmarks network                         whole training steps of two networks
python -m benchmarks plans [--shape ...]             other plans of CUDA kernels than the chosen one
python -m benchmarks summary FILE                    what a run said at its end, from its file
python -m benchmarks plot FILE                       figures from a result file
python -m benchmarks compare OLD NEW                 fail if bnext has become slower
python -m benchmarks.fit FILE                        fit the model that chooses plans
python -m benchmarks.host_cost [--cold]              what one call costs on the host
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.providers import PROVIDERS, VARIANTS


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of any measurement of cases."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--suite", nargs="+", choices=shapes.SUITES, help="default: all that the device can hold")
    add("--shape", nargs="+", type=shapes.parse_shape, metavar="N,C,H,W", help="instead of suites")
    add("--batch", nargs="+", type=int, help="of the suite resnet50; default 32, on CUDA 32 256")
    add("--direction", nargs="+", choices=shapes.DIRECTIONS, help="default: all but inference")
    add(
        "--dtype", nargs="+", choices=shapes.DTYPES, help="default float32; on CUDA all but float64"
    )
    add("--layout", nargs="+", choices=shapes.LAYOUTS, help="default nchw; on CUDA both")
    add("--level", nargs="+", choices=shapes.LEVELS, help="default: call; on CUDA op, and call "
        "for the suite tiny. See providers.py")  # fmt: skip
    add("--cache", nargs="+", choices=("cold", "warm"), default=["cold"], help="default: cold, "
        "where the shape is not too small for it")  # fmt: skip
    add("--seconds", type=float, help="for each line of the table; default 1, on CUDA 0.2")
    add("--threads", type=int, help="of the CPU")
    add("--quick", action="store_true", help="few shapes, short: one or two minutes")
    add("--output", type=Path, metavar="FILE", help="write environment and rows as JSON")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a comparison."""
    parser = make_parser("python -m benchmarks", __doc__ or "")
    names = (*PROVIDERS, "variants")
    parser.add_argument("--providers", nargs="+", choices=names, default=list(PROVIDERS),
        help="default: all; variants: bnext with each family of CUDA kernels forced, with no "
        "persistent blocks, with no packs in registers, with no blocks that begin late, and with "
        "kernels that begin one after the other")  # fmt: skip
    arguments = parser.parse_args(argv)
    fill_defaults(arguments, parser)
    return arguments


def fill_defaults(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What was not said, by device and --quick."""
    a = arguments
    if a.device is None:
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif a.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here, or torch was built without CUDA")
    cuda = a.device == "cuda"
    a.dtype = a.dtype or (
        ["float32", "bfloat16", "float16"] if cuda and not a.quick else ["float32"]
    )
    a.layout = a.layout or (["nchw", "channels_last"] if cuda and not a.quick else ["nchw"])
    a.level = a.level or (["op"] if cuda else ["call"])
    a.batch = a.batch or ([32, 256] if cuda else [32])
    directions = ["forward", "backward", "step"]
    a.direction = a.direction or (directions if a.quick else [*directions, "derivative"])
    a.seconds = a.seconds or (0.1 if a.quick else 0.2 if cuda else 1.0)
    if a.shape:
        a.suites = {"custom": a.shape}
        return
    source = shapes.QUICK if a.quick else shapes.SUITES
    names = a.suite or [name for name in source if cuda or name != "huge"]
    if "huge" in names and not cuda:
        parser.error("the suite huge is for a GPU")
    a.suites = {
        name: [s for s in source.get(name, ()) if name != "resnet50" or s.N in a.batch]
        for name in names
    }


def cases_of(a: argparse.Namespace) -> list[shapes.Case]:
    """What the options ask for."""
    return list(
        shapes.make_cases(a.suites, a.direction, a.dtype, a.layout, a.level, a.cache, a.device)
    )


def lines_above_a_bar(total: int) -> tuple[Any, Any, Any]:
    """Functions to print a line, to advance the progress bar and to close it."""
    try:
        from tqdm import tqdm
    except ImportError:  # plain lines do as well
        return lambda line: print(line, flush=True), lambda text: None, lambda: None
    bar = tqdm(total=total, unit="case", file=sys.stderr, disable=None, leave=False)

    def say(line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def advance(text: str) -> None:
        bar.update()
        bar.set_postfix_str(text)

    return say, advance, bar.close


def measure(arguments: argparse.Namespace, providers: Sequence[Any] | None = None) -> list[Any]:
    """Run the table and print it; the rows as dicts."""
    from benchmarks import report, results
    from benchmarks.runner import Benchmark

    a = arguments
    if a.threads:
        torch.set_num_threads(a.threads)
    cases = cases_of(a)
    if providers is None:
        # bnext goes along also where it was not asked for: ratios need it.
        names = dict.fromkeys(("bnext", *a.providers))
        providers = [PROVIDERS[name]() for name in names if name != "variants"]
        providers += [make() for make in VARIANTS if "variants" in names]
    environment = results.environment(a.device)
    say, advance, close = lines_above_a_bar(len(cases))
    say(report.describe(environment))
    busy = results.other_work()
    if busy:
        what = "what follows is" if a.device == "cpu" else "calls that wait for the host are"
        say(f"Other programs keep {busy:.1f} processors busy: {what} not worth keeping.")
    # Who can run nothing here has no column, but rows, and a reason below the table.
    able = [p.name for p in providers if not all(p.why_not(case) for case in cases)]
    table = report.Table(able, say)
    benchmark = Benchmark(providers, a.seconds, min_rounds=5 if a.quick else 7)
    rows = []
    try:
        for case, found in benchmark.run(cases):
            table.add(case, found)
            rows += [asdict(row) for row in found]
            if a.output:  # a crash, or a hang, loses no more than the case that it is in
                results.save(a.output, environment, rows)
            advance(f"{case.suite} {case.shape} {case.direction}")
    finally:  # an interrupted run keeps what it has
        close()
        table.end()
        if a.output and rows:
            print(f"\n{len(rows)} rows in {a.output}")
    print(f"\n{report.summary(rows)}")
    print("\nRatios are medians of round by round, peer over bnext: above 1 bnext is faster.")
    if a.device == "cpu":
        print("Times of a CPU hold for this run only; compare ratios and shares of the floor.")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv else ""
    if command == "plot":
        from benchmarks.plots import main as plot

        return plot(argv[1:])
    if command == "network":
        from benchmarks.training_steps import main as network

        return network(argv[1:])
    if command == "plans":
        from benchmarks.plans import main as plans

        return plans(argv[1:])
    if command == "compare":
        return compare(argv[1:])
    if command == "summary":
        return summarize(argv[1:])
    return 1 if any(map(is_defect, measure(parse(argv)))) else 0


def is_defect(row: dict[str, Any]) -> bool:
    """Whether bnext could not do what a row asks for. A variant may refuse, but not be wrong."""
    note = row["note"] or ""
    if row["provider"].startswith("bnext-"):
        return note.startswith("wrong")
    no_room = note.startswith("needs ") or "OutOfMemoryError" in note
    return row["provider"] == "bnext" and note != "" and not no_room


def summarize(argv: Sequence[str]) -> int:
    """What a run said at its end, from its file."""
    from benchmarks import plans, report, results

    parser = argparse.ArgumentParser(prog="python -m benchmarks summary")
    parser.add_argument("file", type=Path)
    parser.add_argument("--below-mib", type=float, help="of shapes whose tensors are smaller")
    a = parser.parse_args(argv)
    environment, rows = results.load_for(parser, a.file)
    networks = any("network" in row for row in rows)
    if a.below_mib is not None:
        if networks:
            parser.error("--below-mib is for files of shapes, and this one is of networks")
        limit = a.below_mib * 2**20
        rows = [r for r in rows if shapes.Shape.of_row(r).num_bytes(r["dtype"]) < limit]
    print(f"{report.describe(environment)}\n")
    if networks:
        from benchmarks.training_steps import Step, show

        show([Step(**row) for row in rows])
    elif plans.by_case(rows):
        print(plans.summary(rows))
    else:
        print(report.summary(rows))
        if environment.get("device") == "cuda":
            from benchmarks.gpu_summary import headline

            print(f"\n{headline(rows)}")
    return 0


def compare(argv: Sequence[str]) -> int:
    """0 without a regression, 1 with one."""
    from benchmarks import results

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=results.compare.__doc__
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="default 0.1: 10 %%")
    a = parser.parse_args(argv)
    old, new = (results.load_for(parser, path) for path in (a.old, a.new))
    good = results.compare(old, new, a.threshold)
    print("no regression" if good else "regression")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
