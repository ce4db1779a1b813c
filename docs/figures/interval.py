"""What fewer second passes do to accuracy: docs/images/interval.svg, part 3 of docs/study.md.

    python docs/figures/interval.py --run --keep runs/study

reads the folders ``interval<n>-<steps>`` that the commands of docs/study.md made into its table, and prints the paired
differences. They take hours, so this script does not run them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import paired_runs  # lets the examples be imported
from domain_generalization.study import runner, storage
from figure_style import Row, Tables, command, new_figure, number
from paired_runs import MEASURES, Values

EVERY_STEP = "interval=1, 160 steps"  # the row that the others are compared with


def run(folder: Path) -> Tables:
    """A row for each run: its setting, held-out domain, seed, accuracies in percent. Prints the comparisons.

    Raises:
        FileNotFoundError: the folder has no run of this part.
    """
    rows = []
    for path in sorted(folder.glob("interval*-*")):
        settings = storage.read_json(path / "study.json")["settings"]
        setting = f"interval={settings['interval']}, {settings['steps']} steps"
        for record in runner.results(path):
            accuracies = {measure: number(record[measure], 6) for measure in MEASURES}
            rows.append({"setting": setting, "target": record["target"], "seed": record["seed"], **accuracies})
    if not rows:
        raise FileNotFoundError(f"{folder}: no run in a folder interval<n>-<steps>; docs/study.md makes them")
    for measure, title in MEASURES.items():
        print(f"{title}\n\n{paired_runs.table('- every step', differences(rows, measure))}\n")
    return {"interval": rows}


def differences(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Values]:
    """Each setting minus a second pass in every step, within each cell."""
    every_step = paired_runs.values_of(rows, measure, setting=EVERY_STEP)
    others = sorted({row["setting"] for row in rows} - {EVERY_STEP})
    values = {other: paired_runs.values_of(rows, measure, setting=other) for other in others}
    return {other: paired_runs.difference(values[other], every_step) for other in others}


def draw(rows: list[Row]) -> Figure:
    """For each setting the difference in every run, and their mean with its 95 % interval."""
    figure = new_figure(4)
    axes = figure.subplots()
    paired_runs.plot(axes, differences(rows, "last_step_accuracy"))
    axes.set_title("Accuracy, against a second pass in every step")
    return figure


if __name__ == "__main__":
    sys.exit(command("interval", draw, run))
