"""What freezing does to accuracy where scales move, and where they rest: docs/images/freezing.svg.

Part 1 of docs/study.md.

    python docs/figures/freezing.py --run --keep runs/study

reads the folders ``rest``, ``fraction`` and ``move`` that the commands of docs/study.md made into its table, and prints
the paired differences. They take hours, so this script does not run them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import paired_runs  # lets the examples be imported
from domain_generalization.study import runner
from figure_style import Row, Tables, command, new_figure, number
from paired_runs import MEASURES, Values

FOLDERS = {"rest": "rest", "fraction": "move", "move": "move"}  # what the scales do in each
NEVER, COLLAPSED = "lsq+sagm", 20.0  # the row that never freezes; the accuracy in percent below which a run collapsed
COMPARISONS = {  # what the scales do, a row, and the row that it is compared with
    "move: GAQAT - LSQ+SAGM": ("move", "gaqat", NEVER),
    "move: random mask - LSQ+SAGM": ("move", "random", NEVER),
    "move: freeze both - LSQ+SAGM": ("move", "both", NEVER),
    "move: freeze smooth - LSQ+SAGM": ("move", "smooth", NEVER),
    "move: GAQAT - random mask": ("move", "gaqat", "random"),
    "rest: GAQAT - LSQ+SAGM": ("rest", "gaqat", NEVER),
}


def run(folder: Path) -> Tables:
    """An entry for each run: what its scales do, method, held-out domain, seed, results. Prints what the plan asks for.

    A row of the study with fewer runs than others is not complete. It is left out, and named.

    Raises:
        FileNotFoundError: one of the folders has no run.
    """
    rows = []
    for name, scales in FOLDERS.items():
        records = runner.results(folder / name)
        if not records:
            raise FileNotFoundError(f"{folder / name}: no run; docs/study.md has the command")
        for record in records:
            results = {key: number(record[key], 6) for key in (*MEASURES, "frozen", "scale_change")}
            cell = {key: record[key] for key in ("method", "target", "seed")}
            rows.append({"scales": scales, **cell, **results})
    rows = paired_runs.complete(rows, "scales", "method")
    for scales in ("rest", "move"):
        own = [row for row in rows if row["scales"] == scales]
        for method in dict.fromkeys(row["method"] for row in own):
            runs = [row for row in own if row["method"] == method]
            accuracy, frozen, change = (
                np.array([float(row[key]) for row in runs]) for key in ("last_step_accuracy", "frozen", "scale_change")
            )
            print(
                f"{scales}, {method}: {len(runs)} runs, {accuracy.mean():.1f} %, {(accuracy < COLLAPSED).sum()} "
                f"collapsed, frozen {frozen.mean():.3f}, |log(s_end / s_start)| {change.mean():.2f}"
            )
    for measure, title in MEASURES.items():
        print(f"\n{title}\n\n{paired_runs.table('', differences(rows, measure))}")
    return {"freezing": rows}


def differences(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Values]:
    """The comparisons within each cell, and the interaction: GAQAT's where scales move, minus that where they rest.

    Those without runs are left out.
    """

    def row(scales: str, method: str) -> Values:
        return paired_runs.values_of(rows, measure, scales=scales, method=method)

    found = {
        label: paired_runs.difference(row(scales, method), row(scales, baseline))
        for label, (scales, method, baseline) in COMPARISONS.items()
    }
    moving, resting = found["move: GAQAT - LSQ+SAGM"], found["rest: GAQAT - LSQ+SAGM"]
    found["interaction: move - rest"] = paired_runs.difference(moving, resting)
    return {label: values for label, values in found.items() if values}


def draw(rows: list[Row]) -> Figure:
    """For each comparison the difference in every run, and their mean with its 95 % interval."""
    found = differences(rows, "last_step_accuracy")
    figure = new_figure(1.5 + 0.6 * len(found))
    axes = figure.subplots()
    paired_runs.plot(axes, found)
    axes.set_title("Accuracy: freezing where scales move, and where they rest", x=-0.3)
    return figure


if __name__ == "__main__":
    sys.exit(command("freezing", draw, run))
