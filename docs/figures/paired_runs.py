"""Differences between the rows of a study within its cells: as statistics and as a plot.

A cell is a held-out domain with a seed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from figure_style import BLUE, GREY, INK, ROOT

sys.path.insert(0, str(ROOT / "examples"))
from domain_generalization.study import report

MEASURES = {"last_step_accuracy": "after the last step", "held_out_accuracy": "chosen by source validation"}
Values = dict[tuple[str, str], float]  # by cell


def values_of(rows: Sequence[Mapping[str, Any]], measure: str, **wanted: str) -> Values:
    """The measure in each cell, of the rows that have the wanted entries."""
    own = [row for row in rows if all(row[column] == value for column, value in wanted.items())]
    return {(row["target"], str(row["seed"])): float(row[measure]) for row in own}


def complete(rows: Sequence[Mapping[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The runs of those rows of a study that have as many as any. Others are not complete, and are named.

    Args:
        rows: the runs.
        names: the entries that a row of the study has in all its runs. The first tells the studies apart.
    """

    def row_of(run: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(run[name]) for name in names)

    counts = Counter(map(row_of, rows))
    most = {study: max(count for row, count in counts.items() if row[0] == study) for study, *_ in counts}
    for row, count in counts.items():
        if count < most[row[0]]:
            print(f"{', '.join(row)}: left out, {count} runs of {most[row[0]]}")
    return [dict(run) for run in rows if counts[row_of(run)] == most[row_of(run)[0]]]


def difference(ours: Values, theirs: Values) -> Values:
    """Ours minus theirs in each cell that has both."""
    return {cell: value - theirs[cell] for cell, value in ours.items() if cell in theirs}


def table(headline: str, differences: Mapping[str, Values]) -> str:
    """Mean, 95 % interval, t test, cells won and sign test of each, in Markdown."""
    statistics = {label: report.difference_of(list(values.values())) for label, values in differences.items()}
    return report.comparison_table(headline, statistics, "github")


def plot(axes: Axes, differences: Mapping[str, Values]) -> None:
    """Each difference in a line: ticks for the cells, and the mean with its 95 % interval."""
    for place, values in enumerate(differences.values()):
        statistics = report.difference_of(list(values.values()))
        assert statistics is not None, "no cell has both rows"
        axes.plot(list(values.values()), [place] * len(values), "|", color=GREY, markersize=12, alpha=0.7)
        reach = statistics.mean - statistics.interval[0]
        axes.errorbar(statistics.mean, place, xerr=reach, fmt="o", color=BLUE, markersize=9, capsize=5)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_xlabel("points (ticks: runs; dots: means, 95 % intervals)")
