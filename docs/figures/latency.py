"""How long ResNet-18 takes for an image of 224 x 224 in onnxruntime: docs/images/latency.svg.

From ``benchmarks/deploy.py`` on one thread: float32, W4A4 with ``output_bits=8``, and onnxruntime's own static int8.
The table names the processor. Without VNNI, integers gain less than with it; docs/speed.md has figures of one that has
it. The machine was shared with other work, which lengthens most runs; the fastest of each file is what it can do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from figure_style import BLUE, GREY, ORANGE, ROOT, Row, Tables, command, new_figure, number

NETWORK = "resnet18"
RUNS = 60
OURS, FLOAT = "ours W4A4, output_bits=8", "float32"


def run(folder: Path) -> Tables:
    """Run the benchmark, and keep its float32 file, our 4-bit file, and the faster one of its own int8 files."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import deploy

    result = folder / "latency.json"
    deploy.main(["--networks", NETWORK, "--runs", str(RUNS), "--json", str(result)])
    files = json.loads(result.read_text(encoding="utf-8"))["results"][NETWORK]
    peer = min(deploy.PEERS, key=lambda label: files[label]["fastest ms"])
    keys = ("fastest ms", "median ms", "spread", "smaller")
    rows = [{"file": label, **{key: number(files[label][key]) for key in keys}} for label in (FLOAT, peer, OURS)]
    return {"latency": rows}


def draw(rows: list[Row]) -> Figure:
    """A bar for each file."""
    figure = new_figure(3.4)
    axes = figure.subplots()
    titles = ["float32", "8 bits, static,\nby onnxruntime", "4 bits, by\nthis package"]
    times = [float(row["fastest ms"]) for row in rows]
    for place, (row, time, colour) in enumerate(zip(rows, times, (GREY, ORANGE, BLUE), strict=True)):
        axes.barh(place, time, color=colour, height=0.6)
        text = f"{time:.0f} ms"
        if place:
            text += f": {times[0] / time:.1f} times as fast,\nfile {float(row['smaller']):.1f} times smaller"
        axes.annotate(text, (time, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), titles)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(times))
    axes.set_xlabel("milliseconds for one image: the fastest of 60 runs")
    axes.set_title("ResNet-18, 224 x 224 pixels, one x86 core without VNNI")
    return figure


if __name__ == "__main__":
    sys.exit(command("latency", draw, run))
