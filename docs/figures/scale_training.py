"""One scale through a training, of the run of conflict.py: docs/images/scale-training.svg."""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from figure_style import BLUE, GREY, ORANGE, PALE, Row, command, new_figure

SCALE = "block3.conv1.input_quantizer"  # the first of the table: its gradients had opposite signs most often
WINDOW, THRESHOLD = 20, 0.3  # of the demo


def draw(rows: list[Row]) -> Figure:
    """The scale, both gradients, and how often each changed its sign, one above the other."""
    rows = [row for row in rows if row["scale"].startswith(SCALE)]
    steps, value, task, smooth, frozen, turns_task, turns_smooth = (
        np.array([float(row[key]) for row in rows])
        for key in ("step", "value", "task", "smooth", "frozen", "disorder_task", "disorder_smooth")
    )
    figure = new_figure(7.6)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.3, 1.2))
    for axes in panels:
        shade = axes.fill_between(
            steps, 0, 1, where=frozen > 0, step="mid", transform=axes.get_xaxis_transform(), color=PALE, linewidth=0
        )
    shade.set_label("frozen: the task gradient is left out")

    panels[0].set_title("The scale: the distance between the 8 values of a layer's input")
    panels[0].plot(steps, value, color="black")

    panels[1].set_title("Its two gradients, and which way they pull it")
    panels[1].axhline(0, color=GREY, linewidth=0.8)
    panels[1].plot(steps, task, color=BLUE, label="task gradient: at the weights as they are")
    panels[1].plot(steps, smooth, color=ORANGE, label="flatness gradient: at the worst weights nearby")
    reach = 0.8 * max(abs(task).max(), abs(smooth).max())
    panels[1].set_yticks([-reach, 0, reach], ["larger", "0", "smaller"])

    panels[2].set_title(f"How often each gradient changed its sign in the last {WINDOW} steps")
    panels[2].axhline(THRESHOLD, color=GREY, linewidth=1, linestyle="dashed")
    judged = slice(WINDOW - 1, len(steps) - 1)  # from the first full window to the last that something followed on
    panels[2].step(steps[judged], turns_task[judged], color=BLUE, where="post")
    panels[2].step(steps[judged], turns_smooth[judged], color=ORANGE, where="post")
    panels[2].set_ylim(-0.03, 0.83)
    panels[2].yaxis.set_major_formatter(PercentFormatter(1))
    panels[2].text(steps[-1], THRESHOLD + 0.02, "the blue line below this: frozen", ha="right", color=GREY, fontsize=11)
    panels[2].set_xlabel("training step")
    figure.legend(loc="outside lower left")
    return figure


if __name__ == "__main__":
    sys.exit(command("scale-training", draw, table="conflict"))
