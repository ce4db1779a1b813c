"""Accuracy on a domain never seen against the size of the file, at 2 to 8 bits: docs/images/size-accuracy.svg.

Digits, held-out domain sketch, seeds 0 to 2, LSQ+SAGM with the demo's settings, first and last layer 8 bits. Sizes are
of ``export_onnx(..., storage="packed")``. The network in floating point is the one that all others start from. It had
160 steps less, of one pass each, so that its accuracy is lower.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from domain_generalization.study.jobs import Study

from figure_style import BLUE, GREY, INK, Row, Tables, command, new_figure, number

SEEDS = (0, 1, 2)
BITS = (2, 3, 4, 6, 8)
FLOAT = 32  # in the place of the bits


def run(folder: Path) -> Tables:
    """Train every width, and measure the files."""
    import digit_runs

    study = digit_runs.train(folder, ["lsq+sagm"], seeds=SEEDS, bits=BITS)
    rows = []
    for bits in (*BITS, FLOAT):
        size = file_of(study, bits).stat().st_size
        for seed in SEEDS:
            record = digit_runs.record(study, digit_runs.job("lsq+sagm", seed=seed, bits=min(bits, BITS[-1])))
            measured = record["fp32"] if bits == FLOAT else record
            accuracy = number(measured["last_step_accuracy"])
            rows.append({"bits": bits, "seed": seed, "bytes": size, "accuracy": accuracy})
    return {"size_accuracy": rows}


def file_of(study: Study, bits: int) -> Path:
    """The file of the first seed, which is as large as the others. A folder that is kept has it already."""
    import torch

    import digit_runs
    from domain_generalization.deployment import export_fp32, trained_network
    from gaqat_optim import export_onnx

    path = study.out / f"{bits}-bits.onnx"
    if not path.exists():
        sample = torch.rand(8, 3, 32, 32)
        job = digit_runs.job("lsq+sagm", bits=min(bits, BITS[-1]))
        if bits == FLOAT:
            assert job.origin is not None
            export_fp32(trained_network(study, job.origin), sample, path)
        else:
            export_onnx(trained_network(study, job), sample, path, storage="packed", check=False)
    return path


def draw(rows: list[Row]) -> Figure:
    """A point for each width: the mean over seeds, and each seed."""
    figure = new_figure(5)
    axes = figure.subplots()
    points = []
    for bits in sorted({int(row["bits"]) for row in rows}):
        own = [row for row in rows if int(row["bits"]) == bits]
        size = float(own[0]["bytes"]) / 1000
        accuracies = [float(row["accuracy"]) for row in own]
        colour = GREY if bits == FLOAT else BLUE
        axes.plot([size] * len(own), accuracies, "_", color=colour, markersize=10, alpha=0.7)
        axes.plot(size, np.mean(accuracies), "o", color=colour, markersize=9)
        label = "float:\nthe start" if bits == FLOAT else f"{bits} bits"
        top = (size, max(accuracies))
        axes.annotate(label, top, (0, 8), textcoords="offset points", ha="center", color=INK)
        if bits != FLOAT:
            points.append((size, np.mean(accuracies)))
    axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks([40, 60, 100, 200, 300], ["40", "60", "100", "200", "300"])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.15)
    axes.set_title("Accuracy on a new domain, and the size of the file")
    axes.set_xlabel("size of the ONNX file in kB (dashes: three seeds, dots: their means)")
    axes.set_ylabel("correct, in percent")
    return figure


if __name__ == "__main__":
    sys.exit(command("size-accuracy", draw, run))
