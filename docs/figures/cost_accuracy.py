"""Accuracy on domains never seen against the time of training, for every row of a study: docs/images/cost-accuracy.svg.

    python docs/figures/cost_accuracy.py --run --keep runs/study/cost

reads the results.json of a study (docs/studies.md) into its table. The study is part 2 of docs/study.md. It takes
hours, so this script does not run it. Time is a multiple of LSQ's in the same cell, accuracy the mean over cells. A
line is the standard error of the difference to LSQ, paired by cell.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from figure_style import BLUE, GREY, INK, ROOT, Row, Tables, command, new_figure, number

MEASURE = "last_step_accuracy"


def run(folder: Path) -> Tables:
    """A row for each method and width of the study in the folder.

    Raises:
        FileNotFoundError: the folder has no results.json.
        ValueError: the study has no LSQ, which costs are multiples of.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    from domain_generalization.study import report

    results = folder / "results.json"
    records = json.loads(results.read_text(encoding="utf-8"))
    rows = []
    for bits in sorted({record["bits"] for record in records} - {report.UNQUANTIZED}):
        own = [record for record in records if record["bits"] in (bits, report.UNQUANTIZED)]
        seconds = report.values_by_cell(own, report.BASELINE, "seconds")
        if not seconds:
            raise ValueError(f"{results}: no row lsq at {bits} bits, whose time is the unit of cost")
        for method in report.in_order({record["method"] for record in own}):
            accuracies = report.values_by_cell(own, method, MEASURE)
            times = report.values_by_cell(own, method, "seconds")
            difference = report.paired_difference(own, method, MEASURE)
            error = difference.error if difference is not None and method != report.BASELINE else float("nan")
            rows.append(
                {
                    "bits": bits,
                    "method": method,
                    "title": report.title_of(method),
                    "cost": number(float(np.mean([times[cell] / seconds[cell] for cell in times if cell in seconds]))),
                    "accuracy": number(float(np.mean(list(accuracies.values())))),
                    "error": number(error),
                    "cells": len(accuracies),
                }
            )
    return {"cost_accuracy": rows}


def draw(rows: list[Row]) -> Figure:
    """A panel for each width: a point for each row of the study, and LSQ with more steps joined by a line."""
    widths = sorted({int(row["bits"]) for row in rows})
    figure = new_figure(0.6 + 3.4 * len(widths))
    panels = figure.subplots(len(widths), 1, sharex=True, squeeze=False)[:, 0]
    for axes, bits in zip(panels, widths, strict=True):
        own = [row for row in rows if int(row["bits"]) == bits]
        more_steps = sorted((float(row["cost"]), float(row["accuracy"])) for row in own if is_lsq(row))
        axes.plot(*zip(*more_steps, strict=True), color=GREY, linewidth=1, linestyle="dashed", zorder=0)
        for row in own:
            x, y = float(row["cost"]), float(row["accuracy"])
            colour = GREY if is_lsq(row) else BLUE
            error = float(row["error"])
            axes.errorbar(x, y, yerr=None if np.isnan(error) else error, fmt="o", color=colour, markersize=8, capsize=4)
            # LSQ's are below their points, in a row of their own.
            place = {"xytext": (0, -20), "ha": "center"} if is_lsq(row) else {"xytext": (9, 5)}
            low = y - np.nan_to_num(error) if is_lsq(row) else y
            axes.annotate(row["title"], (x, low), textcoords="offset points", color=INK, **place)
        axes.set_title(f"{bits} bits: accuracy on a new domain, {max(int(row['cells']) for row in own)} runs a row")
        axes.set_ylabel("correct, in percent")
        axes.margins(0.15, 0.2)
        axes.set_xlim(right=1.3 * max(float(row["cost"]) for row in rows))  # room for the last title
    panels[-1].set_xlabel("training time, as a multiple of LSQ's")
    return figure


def is_lsq(row: Row) -> bool:
    """Whether a row is LSQ alone, with however many steps."""
    return row["method"].partition("-x")[0] == "lsq"


if __name__ == "__main__":
    sys.exit(command("cost-accuracy", draw, run))
