"""``python -m benchmarks plot FILE``: figures of a result file, for a light and a dark page.

ratio     how many times as long each peer takes, shape by shape
floor     the share of the floor that bnext reaches, beside the best peer's
roofline  bytes per second over size, under the memory's own speed

One of each per dtype and layout, named after the file and put beside it. Drawn from the file alone.
figures.py holds the drawing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import FIGURES, THEMES, Lines, Rows, style
from benchmarks.results import load


def by_line(rows: Rows) -> Lines:
    """Rows by (suite, shape), direction and provider; only what bnext has a time for."""
    lines: Lines = {}
    for row in rows:
        if row.get("ms") is not None:
            shape = f"{row['N']}×{row['C']}×{row['H']}×{row['W']}"
            directions = lines.setdefault((row["suite"], shape), {})
            directions.setdefault(row["direction"], {})[row["provider"]] = row
    return lines


def selections(rows: Rows) -> dict[str, Rows]:
    """The figures' parts: a dtype and layout each; the level most rows have, and cold inputs."""
    timed = [row for row in rows if row.get("ms") is not None]
    levels = [row["level"] for row in timed if row["suite"] != "tiny"] or ["call"]
    level = max(set(levels), key=levels.count)
    found: dict[str, Rows] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in sorted(timed, key=lambda row: row["cache"]):  # cold before warm
        usual = "call" if row["suite"] == "tiny" else level
        key = tuple(row[k] for k in ("suite", "direction", "provider", "N", "C", "H", "W"))
        key = (*key, row["dtype"], row["layout"])
        if row["level"] == usual and key not in seen:
            seen.add(key)
            found.setdefault(f"{row['dtype']}-{row['layout']}", []).append(row)
    order = {id(row): place for place, row in enumerate(rows)}
    return {name: sorted(part, key=lambda r: order[id(r)]) for name, part in found.items()}


def draw(file: Path, folder: Path, formats: Sequence[str] = ("svg",)) -> list[Path]:
    """Write all figures of a result file; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    environment, rows = load(file)
    parts = selections([row for row in rows if "provider" in row])
    if not parts:
        raise ValueError(f"{file} holds no times of batch norm")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, chosen in parts.items():
        lines = by_line(chosen)
        for kind, make in FIGURES.items():
            for theme in THEMES:
                with plt.rc_context(style(theme)):
                    figure = make(lines, part, environment)
                    for suffix in formats:
                        path = folder / f"{file.stem}-{part}-{kind}-{theme}.{suffix}"
                        metadata = {"Date": None} if suffix == "svg" else {}
                        figure.savefig(path, dpi=160, metadata=metadata)
                        written.append(path)
                    plt.close(figure)
    return written


def main(argv: Sequence[str]) -> int:
    """Draw; say what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, help="default: the file's own")
    parser.add_argument("--format", nargs="+", choices=("svg", "png"), default=["svg"])
    a = parser.parse_args(argv)
    try:
        for path in draw(a.file, a.folder or a.file.parent, a.format):
            print(path)
    except (ImportError, ValueError) as error:
        print(f"no figures: {error}")
        return 1
    return 0
