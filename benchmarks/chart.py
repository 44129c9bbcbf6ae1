"""The chart: the time that a session adds to a request, small multiples by view and store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.candidates import COOKIE, FLOOR, OURS, THEIRS
from benchmarks.matrix import Cell

# Okabe and Ito's colours, which everybody can distinguish; markers and dashes help in grey.
STYLES: dict[str, dict[str, Any]] = {
    THEIRS: {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    OURS: {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 2.2},
    COOKIE: {"color": "#009E73", "marker": "^", "linestyle": ":"},
    FLOOR: {"color": "#555555", "marker": "D", "linestyle": "--", "markersize": 4},
}
ROWS = ("untouched", "read", "write")
TITLES = {"redis": "Redis", "mongodb": "MongoDB", "sqlite": "SQLite"}


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Writes an SVG; the same cells give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "flask-gsession", "svg.fonttype": "none", "font.family": "sans-serif"}
    )
    from matplotlib import pyplot

    stores = list(dict.fromkeys(cell.store for cell in cells))
    sizes = list(dict.fromkeys(cell.size for cell in cells))
    figure, grid = pyplot.subplots(
        len(ROWS),
        len(stores),
        figsize=(3.4 * len(stores) + 0.6, 7.6),
        sharex=True,
        squeeze=False,
    )
    for row, view in enumerate(ROWS):
        for column, store in enumerate(stores):
            axes = grid[row][column]
            here = [cell for cell in cells if cell.store == store and cell.view == view]
            _panel(axes, here, sizes, log=view != "untouched")
            if row == 0:
                axes.set_title(TITLES.get(store, store), fontsize=12, fontweight="bold")
            if column == 0:
                axes.set_ylabel(f"{view}\nmicroseconds added", fontsize=9)
            if row == len(ROWS) - 1:
                axes.set_xlabel("session size", fontsize=9)
    handles, labels = grid[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(STYLES), frameon=False)
    figure.text(
        0.5,
        0.005,
        "Lower is better. Medians; bars span the quartiles. Read and write on a logarithmic scale.",
        ha="center",
        fontsize=8,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.02, 1, 0.96))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _panel(axes: Any, cells: Sequence[Cell], sizes: Sequence[str], *, log: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for name, style in STYLES.items():
        line = [cell for cell in cells if cell.candidate == name]
        if not line or (not log and name == FLOOR):
            continue
        medians = [cell.overhead.median for cell in line]
        below = [cell.overhead.median - cell.overhead.q1 for cell in line]
        above = [cell.overhead.q3 - cell.overhead.median for cell in line]
        where = [sizes.index(cell.size) for cell in line]
        axes.errorbar(
            where,
            medians,
            yerr=(below, above),
            label=name,
            capsize=2,
            **{"linewidth": 1.4, **style},
        )
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(visible=True, axis="y", color="#e6e6e6")
    axes.set_xticks(range(len(sizes)), sizes, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
