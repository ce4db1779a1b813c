"""How the cost of a GAQAT step grows with the batch, the width, the depth, the scales, and the window.

A W4A4 chain of linear layers, one thread. Each row has the cost relative to the smallest size. The last column divides
the largest size's growth in cost by its growth in work, which is proportional to batch, depth and scales, and to the
square of the width: linear growth is at most 1 there, and less if a fixed cost is spread over more work. The cost of
bookkeeping should not depend on the window, nor should any memory.

    python benchmarks/growth.py [--runs 5] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gaqat_optim import DisorderFreeze, GAQATOptimizer
from gaqat_optim.optim.scale_tracker import ScaleTracker
from networks import Chain, closure_of, w4a4
from timing import Ratio, Table, command, interleaved, ratio

BATCHES, WIDTHS, DEPTHS = (64, 256, 1024, 4096), (64, 128, 256, 512, 1024), (2, 8, 32, 128)
SCALES, WINDOWS = (10, 100, 1_000, 10_000), (2, 10, 100, 1_000, 10_000)


def tables(runs: int) -> Iterator[Table]:
    sweeps = {
        "batch (4 layers of width 256)": ({n: step(n, 256, 4) for n in BATCHES}, lambda n: n),
        "width (4 layers, batch 256)": ({n: step(256, n, 4) for n in WIDTHS}, lambda n: n * n),
        "depth (width 64, batch 64)": ({n: step(64, 64, n) for n in DEPTHS}, lambda n: n),
        "scales, bookkeeping alone (window 100)": ({n: bookkeeping(n, 100) for n in SCALES}, lambda n: n),
    }
    for label, (candidates, work) in sweeps.items():
        times = interleaved(by_label(candidates), runs)
        table = Table(f"Cost of a step against {label}: multiples of the smallest", ["", *times, "largest / linear"])
        table.rows.append(["cost", *(ratio(t, times[str(min(candidates))]) for t in times.values())])
        smallest, largest = min(candidates), max(candidates)
        table.rows[-1].append(ratio(times[str(largest)], times[str(smallest)], work(smallest) / work(largest)))
        yield table
    times = interleaved(by_label({n: bookkeeping(100, n, steps=1_000) for n in WINDOWS}), runs)
    table = Table("Bookkeeping of 100 scales against the window: multiples of window 100", ["", *times])
    table.rows.append(["cost", *(ratio(t, times["100"]) for t in times.values())])
    table.rows.append(["bytes of state", *(state_bytes(n) for n in WINDOWS)])
    yield table


def by_label(candidates: dict[int, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    return {str(n): candidate for n, candidate in candidates.items()}


def step(batch: int, width: int, depth: int) -> Callable[[], object]:
    x, y = torch.randn(batch, width), torch.randint(10, (batch,))
    model = w4a4(Chain(depth, width), x, init="lsq")
    optimizer, closure = GAQATOptimizer(torch.optim.Adam(model.parameters(), lr=1e-6), model), closure_of(model, x, y)
    return lambda: [optimizer.step(closure) for _ in range(3)]


def tracker_of(count: int, window: int) -> ScaleTracker:
    scales = {f"scale{i}": torch.nn.Parameter(torch.ones(1)) for i in range(count)}
    return ScaleTracker(scales, DisorderFreeze(window=window), True)


def bookkeeping(count: int, window: int, steps: int = 10) -> Callable[[], object]:
    """Gather and count the gradients of ``count`` scales. With 1,000 steps a run, windows up to 1,000 end in each."""
    tracker = tracker_of(count, window)
    task, smooth = ({p: torch.randn_like(p) for p in tracker.scales.values()} for _ in range(2))
    return lambda: [tracker.commit(tracker.gather(task), tracker.gather(smooth)) for _ in range(steps)]


def state_bytes(window: int) -> Ratio:
    tracker = tracker_of(100, window)
    return Ratio(sum(t.nbytes for t in tracker.state_tensors().values()), spread=None, digits=0)


if __name__ == "__main__":
    command(tables, __doc__, runs=5)
