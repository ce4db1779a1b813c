"""``plot_conflict`` of the run of conflict.py, after its last window but one: docs/images/scale-report.svg."""

from __future__ import annotations

import sys

from matplotlib.figure import Figure

from figure_style import Row, command, new_figure
from gaqat_optim import ScaleRecord, plot_conflict


def draw(rows: list[Row]) -> Figure:
    """The package's own plot."""
    records = [
        ScaleRecord(**{key: value if key == "name" else float(value) for key, value in row.items()}) for row in rows
    ]
    figure = new_figure(2.4 + 0.3 * len(records))
    plot_conflict(records, ax=figure.subplots())
    return figure


if __name__ == "__main__":
    sys.exit(command("scale-report", draw, table="scale_report"))
