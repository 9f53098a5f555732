"""The drawing of the figures: a ratio or a share per shape, and the roofline.

Works on rows grouped by line and direction; knows no files. Figures are made inside
``matplotlib.rc_context(style(theme))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.shapes import FLOOR_NAMES, is_peer

THEMES = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "grid": "#d9dee3"},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "grid": "#30363d"},
}
# Okabe and Ito's colours, which stay apart for colour-blind readers and on both pages.
COLOURS = {
    "bnext": "#d55e00",
    "native": "#0072b2",
    "cudnn": "#009e73",
    "cudnn-frontend": "#e69f00",
    "inductor": "#cc79a7",
    "formula": "#56b4e9",
    "floor": "#8b949e",
}
MARKERS = {
    "bnext": "o",
    "native": "s",
    "cudnn": "D",
    "cudnn-frontend": "P",
    "inductor": "^",
    "formula": "v",
    "floor": "_",
}
DIRECTIONS = ("forward", "backward", "step", "derivative", "inference")
TITLES = {"step": "training step", "derivative": "derivative by hand"}
Rows = list[dict[str, Any]]
# suite, shape and direction → provider → row
Lines = dict[tuple[str, str], dict[str, dict[str, dict[str, Any]]]]


def style(theme: str) -> dict[str, Any]:
    t = THEMES[theme]
    return {
        "figure.facecolor": t["page"],
        "axes.facecolor": t["page"],
        "savefig.facecolor": t["page"],
        "text.color": t["ink"],
        "axes.labelcolor": t["soft"],
        "axes.edgecolor": t["grid"],
        "xtick.color": t["soft"],
        "ytick.color": t["ink"],
        "grid.color": t["grid"],
        "grid.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "axes.titlesize": 11,
        "legend.frameon": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "bnext",  # the same file from the same numbers
    }


def _short(environment: dict[str, Any], part: str) -> str:
    name = environment["name"]
    if environment["device"] == "cpu":
        threads = environment["threads"]
        name += f", {threads} thread{'s' if threads > 1 else ''}"
    dtype, layout = part.split("-", 1)
    return f"{name}, {dtype}, {layout}, torch {environment['torch']}, {environment['date']}"


def _panels(lines: Lines, part: str, environment: dict[str, Any], title: str) -> Any:
    """A figure with a column per direction and a row per shape, suites apart."""
    import matplotlib.pyplot as plt

    directions = [d for d in DIRECTIONS if any(d in found for found in lines.values())]
    places, labels, suites, y, last = {}, [], [], 0.0, None
    for suite, shape in lines:
        if suite != last:
            y += 0.2 if last is None else 1.35
            suites.append((y, suite))
        y += 1
        last = suite
        places[suite, shape] = y
        labels.append(shape)
    height = 0.2 * (y + 1.3) + 1.36
    figure, axes = plt.subplots(
        1, len(directions), figsize=(8.6, height), sharey=True, squeeze=False
    )
    top, bottom = 1 - 0.62 / height, 0.74 / height
    figure.subplots_adjust(left=0.185, right=0.985, top=top, bottom=bottom, wspace=0.09)
    figure.suptitle(title, x=0.012, y=1 - 0.1 / height, ha="left", va="top", fontsize=12.5)
    soft = plt.rcParams["axes.labelcolor"]
    figure.text(
        0.012, 0.06 / height, _short(environment, part), fontsize=8.5, color=soft, va="bottom"
    )
    axes[0, 0].set_yticks(list(places.values()), labels, fontsize=9)
    axes[0, 0].set_ylim(y + 0.8, -0.5)
    for axis, direction in zip(axes[0], directions, strict=True):
        axis.set_title(TITLES.get(direction, direction), loc="left", fontsize=10.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        for place in places.values():
            axis.axhline(place, color=plt.rcParams["grid.color"], linewidth=0.4, zorder=0)
    for place, suite in suites:
        axes[0, 0].annotate(
            suite,
            (0, place),
            xycoords=("axes fraction", "data"),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold",
        )
    return figure, axes[0], directions, places


def _legend(figure: Any, entries: Sequence[str], labels: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[n], color=COLOURS[n], label=labels.get(n, n))
        for n in entries
    ]
    figure.legend(
        handles=handles,
        loc="lower right",
        ncols=len(handles),
        fontsize=9,
        handletextpad=0.1,
        columnspacing=1.2,
        bbox_to_anchor=(0.99, 0.17 / figure.get_figheight()),
    )


def _log_ticks(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    if high / low > 40:
        ticks = (0.1, 1, 10, 100)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_xlim(low, high)
    axis.tick_params(axis="x", labelsize=9)


def ratio_figure(lines: Lines, part: str, environment: dict[str, Any]) -> Any:
    """Peers' times over bnext's, with the 20th to 80th percentile of the rounds."""
    figure, axes, directions, places = _panels(
        lines, part, environment, "Time of a peer over bnext's: right of 1× bnext is faster"
    )
    names = [n for n in COLOURS if n not in ("bnext", "floor")]
    peers = [n for n in names if any(n in by for found in lines.values() for by in found.values())]
    for axis, direction in zip(axes, directions, strict=True):
        values = [1.0]
        axis.axvline(1, color=COLOURS["bnext"], linewidth=1.4, zorder=1)
        for line, place in places.items():
            found = lines[line].get(direction, {})
            for peer in peers:
                row = found.get(peer)
                if row is None or row["vs_bnext"] is None:
                    continue
                values.append(row["vs_bnext"])
                span = [row["vs_bnext_p20"], row["vs_bnext_p80"]]
                axis.plot(span, [place] * 2, color=COLOURS[peer], linewidth=1.4, alpha=0.55)
                axis.plot(
                    row["vs_bnext"], place, MARKERS[peer], color=COLOURS[peer], markersize=5.2
                )
        _log_ticks(axis, min(0.8, 0.9 * min(values)), max(2.2, 1.25 * max(values)))
    _legend(figure, peers, {})
    return figure


def floor_figure(lines: Lines, part: str, environment: dict[str, Any]) -> Any:
    """Shares of the floor: a PyTorch operation that moves as many bytes as batch norm must."""
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    figure, axes, directions, places = _panels(
        lines,
        part,
        environment,
        "Share of the floor (add, clone): 100 % is the price of moving bytes",
    )
    for axis, direction in zip(axes, directions, strict=True):
        values = [1.0]
        axis.axvline(1, color=COLOURS["floor"], linewidth=1.4, zorder=1)
        for line, place in places.items():
            found = dict(lines[line].get(direction, {}))
            ours = found.pop("bnext", None)
            shares = [r["floor_share"] for n, r in found.items() if is_peer(n)]
            if shares:
                axis.plot(max(shares), place, "s", color=COLOURS["native"], markersize=4.4)
                values.append(max(shares))
            if ours:
                axis.barh(place, ours["floor_share"], 0.6, color=COLOURS["bnext"], alpha=0.75)
                values.append(ours["floor_share"])
        axis.set_xlim(0, min(1.08 * max(values), 4))
        axis.xaxis.set_major_locator(MultipleLocator(0.5 if max(values) < 1.3 else 1))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.tick_params(axis="x", labelsize=9)
    _legend(figure, ["bnext", "native"], {"native": "best peer"})
    return figure


def roofline_figure(lines: Lines, part: str, environment: dict[str, Any]) -> Any:
    """Bytes that must move, per second, over the size of the tensor; the copy is the roof."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    directions = [d for d in DIRECTIONS[:3] if any(d in found for found in lines.values())]
    figure, axes = plt.subplots(
        1, len(directions), figsize=(8.6, 3.6), sharey=True, sharex=True, squeeze=False
    )
    figure.subplots_adjust(left=0.075, right=0.985, top=0.83, bottom=0.25, wspace=0.07)
    figure.suptitle(
        "Bandwidth: bytes that must move, per second", x=0.012, y=0.975, ha="left", fontsize=12.5
    )
    soft = plt.rcParams["axes.labelcolor"]
    figure.text(0.012, 0.02, _short(environment, part), fontsize=8.5, color=soft)
    names = [n for n in COLOURS if n not in ("formula",)]
    used: set[str] = set()
    for axis, direction in zip(axes[0], directions, strict=True):
        axis.set_title(TITLES.get(direction, direction), loc="left", fontsize=10.5)
        for found in lines.values():
            for provider, row in found.get(direction, {}).items():
                name = "floor" if provider in FLOOR_NAMES else provider
                if name not in names:
                    continue
                used.add(name)
                size = row["N"] * row["C"] * row["H"] * row["W"]
                size *= {"float64": 8, "float32": 4}.get(row["dtype"], 2) / 2**20
                small = name != "bnext"
                axis.plot(
                    size,
                    row["gbps"],
                    MARKERS[name],
                    color=COLOURS[name],
                    markersize=4 if small else 5.5,
                    alpha=0.75 if small else 1,
                    zorder=2 if small else 3,
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.axhline(environment["copy_gbps"], color=plt.rcParams["text.color"], linewidth=1.2)
        axis.axvline(environment["cache_mib"], color=soft, linewidth=0.8, linestyle=":")
        axis.set_xlabel("MiB of one tensor", fontsize=9)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=9)
    axes[0, 0].set_ylabel("GB/s")
    transform = axes[0, 0].get_yaxis_transform()
    axes[0, 0].text(
        0.03, environment["copy_gbps"] * 1.08, "copy", fontsize=8.5, transform=transform
    )
    axes[0, 0].text(
        environment["cache_mib"] * 0.9,
        0.04,
        "cache",
        fontsize=8.5,
        color=soft,
        ha="right",
        transform=axes[0, 0].get_xaxis_transform(),
    )
    _legend(figure, [n for n in COLOURS if n in used], {"floor": "floor (add, clone)"})
    return figure


FIGURES = {"ratio": ratio_figure, "floor": floor_figure, "roofline": roofline_figure}
