"""The loss around two trained 3-bit networks, of LSQ and of LSQ+SAGM: docs/images/loss-surface.png.

Digits, held-out domain sketch, seed 0, W3A3, the demo's settings: both networks start from the same floating-point
network and see the same batches. Both are moved along the same two random directions, filter by filter in units of the
filter's own length (filter normalization, Li et al., 2018); biases, BatchNorm and scales stay. At each point the loss
is that of the quantized network on the images of the three source domains that were held out of training.

What can be concluded: in this plane, around these two networks, the loss of LSQ+SAGM rises more slowly. What cannot:
that it does so in every direction (two are random ones of 80,000), for every seed, or that flatness is why a network
does better on a new domain.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from figure_style import BLUE, ORANGE, Row, Tables, command, new_figure, number

if TYPE_CHECKING:
    from torch import Tensor, nn

METHODS = {"lsq": ("one pass: LSQ", ORANGE), "lsq+sagm": ("two passes: LSQ+SAGM", BLUE)}
REACH, POINTS = 0.5, 15
LEVELS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)


def run(folder: Path) -> Tables:
    """Train both networks, and compute their losses on the grid."""
    import torch

    import digit_runs
    from domain_generalization.deployment import trained_network
    from domain_generalization.study.data import collate

    torch.set_num_threads(1)
    study = digit_runs.train(folder, list(METHODS))
    fold = study.data.fold(digit_runs.TARGET, 0, study.settings)
    images, labels = collate([source.sample(i, None) for source in fold.holdouts for i in range(len(source))])
    rows = []
    for method in METHODS:
        model = trained_network(study, digit_runs.job(method))
        directions = [filter_normalized(model, seed) for seed in (1, 2)]
        rows += [
            {"method": method, "x": number(x), "y": number(y), "loss": number(loss)}
            for (x, y), loss in losses(model, directions, images, labels).items()
        ]
    return {"loss_surface": rows}


def filter_normalized(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A random direction for the weights, with the length of the weights in every filter."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        noise = torch.randn(weight.shape, generator=generator).flatten(1)
        lengths = weight.detach().flatten(1).norm(dim=1, keepdim=True)
        direction[name] = (noise / noise.norm(dim=1, keepdim=True) * lengths).view_as(weight)
    return direction


def losses(
    model: nn.Module, directions: list[dict[str, Tensor]], images: Tensor, labels: Tensor
) -> dict[tuple[float, float], float]:
    """The loss of the quantized network at each point of the plane."""
    import torch
    from torch.nn.functional import cross_entropy

    first = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    results = {}
    with torch.no_grad():
        for y in np.linspace(-REACH, REACH, POINTS).tolist():
            for x in np.linspace(-REACH, REACH, POINTS).tolist():
                for name in directions[0]:
                    moved = first[name] + x * directions[0][name] + y * directions[1][name]
                    model.get_parameter(name).copy_(moved)
                results[x, y] = cross_entropy(model(images), labels).item()
    return results


def draw(rows: list[Row]) -> Figure:
    """Both planes on one scale of colours, and below them the mean loss at each distance from the centre."""
    figure = new_figure(8)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1))
    below = figure.add_subplot(grid[1, :])
    planes = [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])]
    for axes, (method, (title, colour)) in zip(planes, METHODS.items(), strict=True):
        own = [row for row in rows if row["method"] == method]
        x, y, loss = (np.array([float(row[key]) for row in own]).reshape(POINTS, POINTS) for key in ("x", "y", "loss"))
        filled = axes.contourf(x, y, loss, LEVELS, norm=LogNorm(LEVELS[0], LEVELS[-1]), cmap="cividis", extend="both")
        axes.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=8)
        axes.set_title(title)
        axes.set_aspect("equal")
        axes.set_xticks([-REACH, 0, REACH])
        axes.set_yticks([-REACH, 0, REACH])
        axes.set_xlabel("random direction 1")
        distance = np.hypot(x, y)
        rings = np.linspace(0, REACH, POINTS // 2 + 1)
        around = [loss[np.abs(distance - ring) <= rings[1] / 2 + 1e-3] for ring in rings]
        below.plot(rings, [values.mean() for values in around], "o-", color=colour, label=title)
        below.fill_between(rings, *zip(*((v.min(), v.max()) for v in around), strict=True), color=colour, alpha=0.2)
    planes[0].set_ylabel("random direction 2")
    bar = figure.colorbar(filled, ax=planes, orientation="horizontal", format="%g", ticks=LEVELS, aspect=40)
    bar.set_label("loss on images of the training domains that were held out")
    below.legend(loc="upper left")
    below.set_yscale("log")
    below.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    below.minorticks_off()
    below.set_title("Mean loss at each distance (shaded: least to most)")
    below.set_xlabel("how far the weights are moved, in lengths of the filters")
    below.set_ylabel("loss")
    return figure


if __name__ == "__main__":
    sys.exit(command("loss-surface", draw, run, suffix=".png"))
