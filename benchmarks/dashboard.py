"""Draws the panels of the Grafana dashboard for the documentation: ``make dashboard``.

Grafana itself is not needed. The demo shop runs under load with Redis, a real Prometheus scrapes
it, and for a minute in the middle the Redis is frozen. Then the queries of the dashboard are asked
of that Prometheus, and what it answers is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.gunicorn import Gunicorn
from tests.harness.prometheus import SHOP, Prometheus, visitors
from tests.harness.servers import RedisServer

PICTURES = Path(__file__).parent.parent / "docs" / "images"
CONTRIB = files("flask_gsession.contrib")
SCRAPES = 1  # seconds between two of them
STEP = 2  # seconds between two points of the picture
# Grafana's values for the variables, at this scrape interval.
VARIABLES = {"$job": ".+", "$instance": ".+", "$__rate_interval": "10s"}
ALERTS = {
    "title": "Alerts that fire (not in the dashboard)",
    "fieldConfig": {"defaults": {"unit": "none"}},
    "targets": [
        {
            "expr": 'max by (alertname) (ALERTS{alertstate="firing"})',
            "legendFormat": "{{alertname}}",
        }
    ],
}
UNITS = {"ops": "per second", "s": "milliseconds", "bytes": "bytes", "none": "", "short": ""}

Series = tuple[str, list[float]]  # label, values


class Panel(NamedTuple):
    """The contents of one frame."""

    title: str
    unit: str
    series: list[Series]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the shop for three times ``--seconds``, and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args(arguments)
    panels, outage = watch(options.seconds)
    draw(panels, outage, options.out / "dashboard.svg", columns=2)
    draw(panels, outage, options.out / "dashboard-phone.svg", columns=1)


def watch(seconds: float) -> tuple[list[Panel], tuple[float, float]]:
    """The panels of a run, and when in it the Redis was frozen, in minutes."""
    rules = (CONTRIB / "prometheus-rules.yml").read_text(encoding="utf-8")
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer() as redis,
        Prometheus(rules, f"{SCRAPES}s") as prometheus,
    ):
        figures = Path(folder) / "figures"
        figures.mkdir()
        environment = {
            "WORKERS_STORE": redis.url,
            "WORKERS_PREFIX": "dashboard:",
            "PROMETHEUS_MULTIPROC_DIR": str(figures),
        }
        with Gunicorn(
            Path(folder), "--threads", "8", workers=2, environment=environment, app=SHOP
        ) as shop:
            prometheus.scrape(shop.port)
            with visitors(f"http://127.0.0.1:{shop.port}", count=6, pause=0.05):
                time.sleep(15)  # until there are rates
                begin = time.time()
                time.sleep(seconds)
                frozen = time.time()
                with redis.paused():
                    time.sleep(seconds)
                well = time.time()
                time.sleep(seconds)
                end = time.time()
        dashboard = json.loads((CONTRIB / "grafana-dashboard.json").read_text(encoding="utf-8"))
        panels = [_ask(prometheus, panel, begin, end) for panel in [*dashboard["panels"], ALERTS]]
    return panels, ((frozen - begin) / 60, (well - begin) / 60)


def _ask(prometheus: Prometheus, panel: Mapping[str, Any], begin: float, end: float) -> Panel:
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    factor = 1000 if unit == "s" else 1
    points = int((end - begin) / STEP) + 1
    series: list[Series] = []
    for target in panel["targets"]:
        query = target["expr"]
        for variable, meaning in VARIABLES.items():
            query = query.replace(variable, meaning)
        assert "$" not in query, query  # Prometheus would answer with nothing
        for found in prometheus.query_range(query, begin, end, STEP):
            values = {round((at - begin) / STEP): float(value) for at, value in found["values"]}
            if any(value > 0 for value in values.values()):
                # A point that is not there is a gap in the line.
                line = [values.get(index, math.nan) * factor for index in range(points)]
                series.append((_label(target["legendFormat"], found["metric"]), line))
    return Panel(panel["title"], UNITS.get(unit, unit), series)


def _label(form: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), form)


def draw(panels: Sequence[Panel], outage: tuple[float, float], path: Path, *, columns: int) -> None:
    """Writes the frames, with text that can be read where a row of them fills the page."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "flask-gsession", "svg.fonttype": "none", "font.family": "sans-serif"}
    )
    from matplotlib import pyplot

    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    # In inches: the plot with its title, and two labels in each line of the legend.
    heights = [2.0 + 0.15 * max((len(panel.series) + 1) // 2 for panel in row) for row in rows]
    total = max(len(line) for panel in panels for _, line in panel.series) * STEP / 60
    figure, grid = pyplot.subplots(
        len(rows),
        columns,
        figsize=(4 * columns, sum(heights) + 0.3),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        for number, (label, values) in enumerate(panel.series):
            minutes = [index * STEP / 60 for index in range(len(values))]
            if panel.title == ALERTS["title"]:
                values = [value - number * 0.3 for value in values]  # not one upon the other
            axes.plot(minutes, values, label=label, linewidth=1.2)
        axes.axvspan(*outage, color="#d55e00", alpha=0.12, linewidth=0)
        title = f"{panel.title}, {panel.unit}" if panel.unit not in panel.title else panel.title
        axes.set_title(title.rstrip(", "), fontsize=9, fontweight="bold", loc="left", x=-0.1)
        axes.set_xlim(0, total)
        if panel.unit == UNITS["s"]:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if panel.title == ALERTS["title"]:
            axes.set_yticks([])
        axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if panel.series:
            axes.legend(
                fontsize=8,
                frameon=False,
                loc="upper left",
                bbox_to_anchor=(-0.1, -0.12),
                ncols=2,
                borderaxespad=0,
                labelspacing=0.2,
                handlelength=1.2,
            )
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("Minutes. In the shaded one the Redis was frozen.", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    # Six decimals of a point, and a list of fonts at each word, are half of the file.
    text = re.sub(r"(\d+\.\d)\d{2,}", r"\1", path.read_text(encoding="utf-8"))
    text = re.sub(r"font-family: [^;\"]*sans-serif", "font-family: sans-serif", text)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
