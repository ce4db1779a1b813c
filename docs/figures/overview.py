"""What the package does, from a network in floating point to a file: docs/images/overview.svg.

The numbers are real: a 3 x 3 kernel of the digits network after LSQ+SAGM at 3 bits (held-out domain sketch, seed 0),
its integers, a line through the loss around the networks of loss_surface.py, and the sizes of the two files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figure_style import BLUE, DATA, GREY, INK, ORANGE, PALE, SKY, Row, Tables, command, new_figure, number, read_table

LAYER = "block3.conv2"
TEXTS = (
    ("Your network", "Any PyTorch network. Every weight is a number\nof 32 bits."),
    (
        "quantize_model",
        "Each weight and each input of a layer is rounded\nto a few values, here 8 (3 bits). How far apart they\n"
        "are, the scale, is learned with the weights.",
    ),
    (
        "GAQATOptimizer",
        "Every step takes two passes: at the weights, and\nat the worst weights nearby. Training ends in a\n"
        "wider valley. Scales about which the two\npasses disagree can be frozen.",
    ),
    (
        "convert",
        "The same computation in whole numbers, with one\n"
        "scale for many of them. Here 3 stands for\n3 × {scale:.4f} = {three:.4f}.",
    ),
    (
        "export_onnx",
        "A small file that runs on the device. It is compared\nwith the trained network before you get it.",
    ),
)


def run(folder: Path) -> Tables:
    """Train, and take the kernel with the most different integers."""
    import torch

    import digit_runs
    from domain_generalization.deployment import export_fp32, export_quantized, trained_network
    from gaqat_optim import LSQQuantizer

    study = digit_runs.train(folder, ["lsq+sagm"])
    job = digit_runs.job("lsq+sagm")
    model = trained_network(study, job)
    layer = model.get_submodule(LAYER)
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, LSQQuantizer)
    scale = quantizer.scale.item()
    codes = (layer.weight / scale).round().clamp(quantizer.qmin, quantizer.qmax)
    kernels = codes.flatten(0, 1).flatten(1).int().tolist()
    chosen = max(range(len(kernels)), key=lambda i: len(set(kernels[i])))
    weights = layer.weight.flatten(0, 1)[chosen].flatten().tolist()
    sample = torch.rand(8, 3, 32, 32)
    sizes = []
    for name, write, network in (
        ("float", export_fp32, trained_network(study, job.origin)),
        ("quantized", export_quantized, model),
    ):
        path = folder / f"overview-{name}.onnx"
        write(network, sample, path)
        sizes.append({"what": name, "value": path.stat().st_size, "code": ""})
    pairs = zip(weights, kernels[chosen], strict=True)
    kernel = [{"what": "weight", "value": number(weight), "code": code} for weight, code in pairs]
    return {"overview": [*kernel, {"what": "scale", "value": number(scale), "code": ""}, *sizes]}


def draw(rows: list[Row]) -> Figure:
    """Five small pictures, one below the other, each with its name and a sentence."""
    values = {row["what"]: float(row["value"]) for row in rows}
    kernel = [row for row in rows if row["what"] == "weight"]
    weights = np.array([float(row["value"]) for row in kernel]).reshape(3, 3)
    codes = np.array([int(row["code"]) for row in kernel]).reshape(3, 3)
    figure = new_figure(8.4)
    figure.set_layout_engine("none")
    height = 1 / len(TEXTS)
    pictures = []
    for place, (name, text) in enumerate(TEXTS):
        bottom = 1 - (place + 1) * height
        pictures.append(figure.add_axes((0.03, bottom + 0.22 * height, 0.25, 0.74 * height)))
        font = {"family": "DejaVu Sans Mono"} if place else {}
        figure.text(0.33, bottom + 0.94 * height, name, fontsize=15, fontweight="bold", va="top", color=BLUE, **font)
        text = text.format(scale=values["scale"], three=3 * values["scale"])
        figure.text(0.33, bottom + 0.74 * height, text, va="top", linespacing=1.35)
        if place:
            arrow = {"arrowstyle": "-|>", "color": GREY, "linewidth": 2, "mutation_scale": 18}
            pictures[place].annotate("", (0.5, 1.02), (0.5, 1.24), "axes fraction", arrowprops=arrow)
    draw_grid(pictures[0], weights, [f"{weight:+.2f}" for weight in weights.flat])
    draw_stairs(pictures[1], values["scale"])
    draw_valleys(pictures[2])
    draw_grid(pictures[3], weights, [f"{code:+d}" if code else "0" for code in codes.flat])
    draw_sizes(pictures[4], values["float"], values["quantized"])
    return figure


def draw_grid(axes: Axes, weights: np.ndarray, texts: list[str]) -> None:
    """The kernel, the larger a weight the darker its cell."""
    axes.imshow(np.abs(weights), cmap="Blues", vmin=0, vmax=1.6 * np.abs(weights).max(), aspect="auto")
    for place, text in enumerate(texts):
        axes.text(place % 3, place // 3, text, ha="center", va="center", fontsize=12)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_stairs(axes: Axes, scale: float) -> None:
    """The rounding of a weight to eight values."""
    weights = np.linspace(-5.2 * scale, 4.2 * scale, 800)
    axes.plot(weights, weights, color=PALE)
    axes.plot(weights, np.clip(np.round(weights / scale), -4, 3) * scale, color=BLUE)
    left = -3.5 * scale
    axes.hlines([0, scale], left, [-0.5 * scale, 0.5 * scale], color=GREY, linewidth=1, linestyles="dotted")
    ends = {"arrowstyle": "|-|,widthA=0.3,widthB=0.3", "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (left, 0), (left, scale), arrowprops=ends)
    axes.text(left, 1.4 * scale, "scale", ha="center", va="bottom")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_valleys(axes: Axes) -> None:
    """The loss along one direction of the loss surface, without and with the second pass."""
    for method, name, colour in (("lsq", "one pass", ORANGE), ("lsq+sagm", "two passes", BLUE)):
        rows = [row for row in read_table(DATA / "loss_surface.csv") if row["method"] == method]
        line = [(float(row["x"]), float(row["loss"])) for row in rows if float(row["y"]) == 0]
        axes.plot(*zip(*line, strict=True), color=colour, label=name)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", handlelength=1, borderpad=0)
    axes.set_ylabel("loss", labelpad=2)


def draw_sizes(axes: Axes, floating: float, quantized: float) -> None:
    """Two bars, with the sizes of the files."""
    axes.barh([0, 1], [floating, quantized], color=[GREY, SKY])
    axes.text(0.05 * floating, 0, f"{floating / 1000:.0f} kB", va="center", color="white", fontweight="bold")
    axes.text(1.1 * quantized, 1, f"{quantized / 1000:.0f} kB", va="center", fontweight="bold")
    axes.invert_yaxis()
    axes.set_axis_off()


if __name__ == "__main__":
    sys.exit(command("overview", draw, run))
