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

from figure_style import BLUE, GREY, INK, ROOT, Row, Tables, command, new_figure, number

sys.path.insert(0, str(ROOT / "examples"))
from domain_generalization.study import report, runner, storage

MEASURES = {"last_step_accuracy": "after the last step", "held_out_accuracy": "chosen by source validation"}
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
        print(f"{title}\n\n{report.comparison_table('- every step', differences(rows, measure), 'github')}\n")
    return {"interval": rows}


def differences(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, report.Difference]:
    """Each setting minus a second pass in every step, paired by held-out domain and seed."""
    records = [
        {"method": row["setting"], "target": row["target"], "seed": row["seed"], "bits": 3, measure: row[measure]}
        for row in rows
    ]
    others = sorted({row["setting"] for row in rows} - {EVERY_STEP})
    found = {other: report.paired_difference(records, other, measure, baseline=EVERY_STEP) for other in others}
    return {other: difference for other, difference in found.items() if difference is not None}


def draw(rows: list[Row]) -> Figure:
    """For each setting the difference in every run, and their mean with its 95 % interval."""
    measure = "last_step_accuracy"
    accuracies: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        accuracies.setdefault(row["setting"], {})[row["target"], row["seed"]] = float(row[measure])
    every_step = accuracies[EVERY_STEP]
    figure = new_figure(4)
    axes = figure.subplots()
    found = differences(rows, measure)
    for place, (setting, difference) in enumerate(found.items()):
        runs = [value - every_step[cell] for cell, value in accuracies[setting].items() if cell in every_step]
        axes.plot(runs, [place] * len(runs), "|", color=GREY, markersize=12, alpha=0.7)
        reach = difference.mean - difference.interval[0]
        axes.errorbar(difference.mean, place, xerr=reach, fmt="o", color=BLUE, markersize=9, capsize=5)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_title("Accuracy, against a second pass in every step")
    axes.set_xlabel("points (ticks: runs; dots: means, 95 % intervals)")
    return figure


if __name__ == "__main__":
    sys.exit(command("interval", draw, run))
