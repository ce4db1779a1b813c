"""The demo's plot of the scales whose two gradients disagree most: docs/images/digits-conflict.png.

From one run of GAQAT at W3A3 on the digits (held-out domain sketch, seed 0), the demo's own settings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from figure_style import Row, Tables, command, number

if TYPE_CHECKING:
    from domain_generalization.conflict import ConflictRecorder

COUNT = 3  # scales in the table
SERIES = ("value", "task", "smooth", "frozen", "disorder_task", "disorder_smooth")


def run(folder: Path) -> Tables:
    """Train. The course of the most conflicting scales, the worst first, and a report of all scales."""
    import digit_runs
    from domain_generalization.conflict import ConflictRecorder

    study = digit_runs.train(folder, ["gaqat"])
    weights = study.weights(digit_runs.job("gaqat"))
    assert weights is not None
    recorder = ConflictRecorder()
    recorder.load_state_dict(weights["recorder"])
    course = [
        {
            "scale": recorder.names[column],
            "step": step + 1,
            **{name: number(getattr(recorder, name)[step][column]) for name in SERIES},
        }
        for column in recorder.most_conflicting(COUNT)
        for step in range(len(recorder.task))
    ]
    return {"conflict": course, "scale_report": report_of(recorder, digit_runs.SETTINGS.window)}


def report_of(recorder: ConflictRecorder, window: int) -> list[dict[str, Any]]:
    """The optimizer's report after the last window but one, whose judgement held for the last."""
    end = len(recorder.task) - window
    task, smooth = (np.array(series[end - window : end]) for series in (recorder.task, recorder.smooth))
    columns = {
        "scale": recorder.value[end],
        "disorder_task": recorder.disorder_task[end - 1],
        "disorder_smooth": recorder.disorder_smooth[end - 1],
        "conflict": (np.sign(task) != np.sign(smooth)).mean(0),
        "opposition": np.sign(task.sum(0)) * np.sign(smooth.sum(0)) < 0,
        "frozen": recorder.frozen[end],
    }
    return [
        {"name": name, **{key: number(values[i]) for key, values in columns.items()}}
        for i, name in enumerate(recorder.names)
    ]


def recorder_of(rows: list[Row]) -> ConflictRecorder:
    """The recorder of a run, with the scales of the table."""
    import digit_runs  # noqa: F401 (finds the examples)
    from domain_generalization.conflict import ConflictRecorder

    names = list(dict.fromkeys(row["scale"] for row in rows))
    recorder = ConflictRecorder(names)
    for series in SERIES:
        columns = [[float(row[series]) for row in rows if row["scale"] == name] for name in names]
        getattr(recorder, series).extend(np.array(columns).T)
    recorder.frozen = [row > 0 for row in recorder.frozen]
    return recorder


def draw(rows: list[Row]) -> Figure:
    """The demo's own plot."""
    import digit_runs
    from domain_generalization.conflict import conflict_figure

    settings = digit_runs.SETTINGS
    return conflict_figure(recorder_of(rows), threshold=settings.threshold, window=settings.window)


if __name__ == "__main__":
    sys.exit(command("digits-conflict", draw, run, table="conflict", suffix=".png"))
