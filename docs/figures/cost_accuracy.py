"""Accuracy on domains never seen against the time of training: docs/images/cost-accuracy.svg.

Part 2 of docs/study.md.

    python docs/figures/cost_accuracy.py --run --keep runs/study

reads the folders ``cost`` and ``pictograms`` that the commands of docs/study.md made into its table, and prints the
paired differences. They take hours, so this script does not run them. Time is the median, over the cells, of the
multiple of LSQ's time in the same cell: the median, since a machine has other work now and then. A line is the standard
error of the difference to LSQ, paired by cell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import paired_runs  # lets the examples be imported
from domain_generalization.study import report, runner
from figure_style import BLUE, GREY, INK, Row, Tables, command, new_figure, number
from paired_runs import MEASURES, Values

FOLDERS = {"cost": "digits", "pictograms": "pictograms"}  # the data of each
SEEN = {"seen_accuracy": "pictograms that the sources have shown, after the last step"}
COLLAPSED = 20.0  # the accuracy in percent below which a run on digits collapsed
COMPARISONS = (  # a row, and the row that it is compared with; the first one is primary
    ("lsq+sagm-flat", "lsq-x3"),
    ("lsq+sagm-flat", "lsq-x4"),
    ("lsq+sagm-flat", "lsq+sagm"),
    ("lsq+sagm-flat", "lsq"),
    ("lsq+sagm", "lsq"),
    ("lsq+sagm", "lsq-x3"),
    ("lsq-x3", "lsq"),
    ("lsq-x4", "lsq"),
)


def run(folder: Path) -> Tables:
    """An entry for each run: data, bits, method, held-out domain, seed, results. Prints what the plan asks for.

    A row of a study with fewer runs than others is not complete. It is left out, and named.

    Raises:
        FileNotFoundError: none of the folders has a run.
        ValueError: a study has no LSQ, which costs are multiples of.
    """
    rows = []
    for name, data in FOLDERS.items():
        for record in runner.results(folder / name):
            keys = (*MEASURES, *SEEN, "seconds")
            results = {key: number(record[key], 6) if key in record else "" for key in keys}
            cell = {key: record[key] for key in ("bits", "method", "target", "seed")}
            rows.append({"data": data, **cell, **results})
    if not rows:
        raise FileNotFoundError(f"{folder}: no run in {' or '.join(FOLDERS)}; docs/study.md has the commands")
    rows = paired_runs.complete(rows, "data", "bits", "method")
    for data, bits in studies(rows):
        own = runs_of(rows, data, bits)
        for method in report.in_order({row["method"] for row in own}):
            accuracies = list(paired_runs.values_of(own, "last_step_accuracy", method=method).values())
            print(
                f"{data}, {bits} bits, {method}: {len(accuracies)} runs, {np.mean(accuracies):.1f} %, "
                f"{sum(accuracy < COLLAPSED for accuracy in accuracies)} collapsed, {cost(own, method):.2f} times LSQ"
            )
        for measure, title in {**MEASURES, **(SEEN if own[0]["seen_accuracy"] else {})}.items():
            print(f"\n{data}, {bits} bits, {title}\n\n{paired_runs.table('', differences(own, measure))}\n")
    return {"cost_accuracy": rows}


def studies(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Data and bits of each part."""
    return list(dict.fromkeys((row["data"], int(row["bits"])) for row in rows))


def runs_of(rows: Sequence[Mapping[str, Any]], data: str, bits: int) -> list[Mapping[str, Any]]:
    """The runs on the data at that many bits."""
    return [row for row in rows if (row["data"], int(row["bits"])) == (data, bits)]


def cost(rows: Sequence[Mapping[str, Any]], method: str) -> float:
    """The time of a row as a multiple of LSQ's: the median over the cells."""
    own, baseline = (paired_runs.values_of(rows, "seconds", method=name) for name in (method, report.BASELINE))
    if not baseline:
        raise ValueError(f"{rows[0]['data']}: no row lsq at {rows[0]['bits']} bits, whose time is the unit of cost")
    return float(np.median([seconds / baseline[cell] for cell, seconds in own.items() if cell in baseline]))


def differences(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Values]:
    """The comparisons within each cell; those without runs are left out."""
    found = {
        f"{report.title_of(method)} - {report.title_of(baseline)}": paired_runs.difference(
            *(paired_runs.values_of(rows, measure, method=name) for name in (method, baseline))
        )
        for method, baseline in COMPARISONS
    }
    return {label: values for label, values in found.items() if values}


def draw(rows: list[Row]) -> Figure:
    """A panel for each study and width: a point for each row, and LSQ with more steps joined by a line."""
    parts = studies(rows)
    figure = new_figure(0.6 + 3.4 * len(parts))
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (data, bits) in zip(panels, parts, strict=True):
        own = runs_of(rows, data, bits)
        _panel(axes, own)
        count = len({(row["target"], row["seed"]) for row in own})
        axes.set_title(f"{data}, {bits} bits: accuracy on a new domain, {count} runs a row")
    panels[-1].set_xlabel("training time, as a multiple of LSQ's")
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    accuracies, points = {}, {}
    for method in report.in_order({row["method"] for row in rows}):
        accuracies[method] = paired_runs.values_of(rows, "last_step_accuracy", method=method)
        points[method] = cost(rows, method), float(np.mean(list(accuracies[method].values())))
    more_steps = sorted(point for method, point in points.items() if is_lsq(method))
    axes.plot(*zip(*more_steps, strict=True), color=GREY, linewidth=1, linestyle="dashed", zorder=0)
    for method, (x, y) in points.items():
        to_lsq = paired_runs.difference(accuracies[method], accuracies[report.BASELINE])
        error = 0.0 if method == report.BASELINE else report.mean_and_error(list(to_lsq.values()))[1]
        colour = GREY if is_lsq(method) else BLUE
        axes.errorbar(x, y, yerr=error if error > 0 else None, fmt="o", color=colour, markersize=8, capsize=4)
        # LSQ's are below their points, in a row of their own.
        place = {"xytext": (0, -20), "ha": "center"} if is_lsq(method) else {"xytext": (9, 5)}
        low = y - np.nan_to_num(error) if is_lsq(method) else y
        axes.annotate(report.title_of(method), (x, low), textcoords="offset points", color=INK, **place)
    axes.set_ylabel("correct, in percent")
    axes.margins(0.15, 0.2)
    axes.set_xlim(right=1.35 * max(x for x, _ in points.values()))  # room for the last title


def is_lsq(method: str) -> bool:
    """Whether a row is LSQ alone, with however many steps."""
    return method.partition("-x")[0] == "lsq"


if __name__ == "__main__":
    sys.exit(command("cost-accuracy", draw, run))
