"""How long ResNet-18 takes for an image of 224 x 224 in onnxruntime: docs/images/latency.svg.

The files are those of ``benchmarks/deploy.py``: float32, W4A4 with ``output_bits=8``, and onnxruntime's own static
int8, signed or unsigned, whichever is faster. They run in turns on one thread. What counts is processor time, since the
machine was shared with other work. The table names the processor. One with VNNI gains more from integers: see
docs/speed.md.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from figure_style import BLUE, GREY, ORANGE, ROOT, Row, Tables, command, new_figure, number

NETWORK = "resnet18"
RUNS = 40
OURS = "ours W4A4, output_bits=8"


def run(folder: Path) -> Tables:
    """Export and time the files; keep the faster one of onnxruntime's."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import deploy
    import timing

    torch.set_num_threads(1)
    files = deploy.export_all(NETWORK, folder, {OURS: deploy.OURS[OURS]})
    runs = timing.interleaved(deploy.onnxruntime_runs(files), RUNS)
    times = {label: seconds for (_, label), seconds in runs.items()}
    milliseconds = {label: 1000 * statistics.median(seconds) for label, seconds in times.items()}
    peer = min(deploy.PEERS, key=milliseconds.__getitem__)
    rows = []
    for label in (deploy.FLOAT, peer, OURS):
        low, _, high = statistics.quantiles(times[label], n=4)
        spread = {"median_ms": milliseconds[label], "low_ms": 1000 * low, "high_ms": 1000 * high}
        size = files[label].stat().st_size
        rows.append({"file": label, **{key: number(value) for key, value in spread.items()}, "bytes": size})
    return {"latency": rows}


def draw(rows: list[Row]) -> Figure:
    """A bar for each file, with the middle half of the runs."""
    figure = new_figure(3.6)
    axes = figure.subplots()
    titles = ["32 bits, float", "8 bits, static,\nby onnxruntime", "4 bits, by\nthis package"]
    times, sizes = ([float(row[key]) for row in rows] for key in ("median_ms", "bytes"))
    for place, (row, colour) in enumerate(zip(rows, (GREY, ORANGE, BLUE), strict=True)):
        low, high = float(row["low_ms"]), float(row["high_ms"])
        axes.barh(place, times[place], color=colour, height=0.6)
        axes.plot([low, high], [place, place], color="black", linewidth=1.5, marker="|")
        text = f"{times[place]:.0f} ms, {sizes[place] / 1e6:.1f} MB"
        if place:
            text += f"\n{times[0] / times[place]:.1f} times as fast,\n{sizes[0] / sizes[place]:.1f} times smaller"
        axes.annotate(text, (high, place), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), titles)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.55 * max(times))
    axes.set_xlabel("processor time for one image in ms (line: middle half of the runs)")
    axes.set_title("ResNet-18 without VNNI: smaller, but not faster")
    return figure


if __name__ == "__main__":
    sys.exit(command("latency", draw, run))
