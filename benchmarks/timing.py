"""What the scripts in this folder share: interleaved runs, ratios with their spread, tables, JSON.

Time is the CPU time of this process on one thread, so that other processes on the machine lengthen a run by what they
take of caches and memory bandwidth, but not by the time for which they hold the processor. On a GPU it is the time
until the device has finished. Candidates run in turns, a, b, c, b, c, a, ..., and are compared within a turn: a ratio
is the median over turns of the ratio in each turn, and its spread is the interquartile range of these, divided by their
median. The first turns, for warming up, are not counted.

glibc is told to keep the memory it has. Otherwise it gives some back to the system whenever much is free at the end of
its heap, which is a matter of luck, and costs more than what is measured here: the pages of a new tensor then have to
be made again. ``--allocator default`` leaves it as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate

Times = list[float]
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**35)}


@dataclass(frozen=True)
class Ratio:
    """How many times the reference's time something takes; ``spread`` is ``None`` for what is counted, not timed."""

    value: float
    spread: float | None
    digits: int = 2

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ±{self.spread:.0%}"
        return f"{round(self.value, self.digits) + 0.0:.{self.digits}f}{spread}"  # no "-0.00"


@dataclass
class Table:
    """A table of ratios; ``None`` is a cell that was not measured, or does not exist."""

    title: str
    columns: list[str]
    rows: list[list[str | Ratio | None]] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        cells = [["-" if cell is None else str(cell) for cell in row] for row in self.rows]
        text = tabulate(cells, self.columns, tablefmt="pipe", disable_numparse=True)
        return f"\n{self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def interleaved(candidates: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 2) -> dict[str, Times]:
    """Seconds of ``runs`` runs of each, in turns that each begin with another one, after ``warm_up`` uncounted ones."""
    names = list(candidates)
    times: dict[str, Times] = {name: [] for name in names}
    for turn in range(-warm_up, runs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = timed(candidates[name])
            if turn >= 0:
                times[name].append(seconds)
    return times


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run, without garbage collection."""
    gc.collect()
    gc.disable()
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if on_gpu() else (lambda: None, time.process_time)
    try:
        wait()
        start = clock()
        run()
        wait()
        return clock() - start
    finally:
        gc.enable()


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def ratio(times: Times, reference: Times, factor: float = 1.0, digits: int = 2) -> Ratio:
    """``factor`` times the median ratio of ``times`` to ``reference`` within a turn."""
    within = sorted(factor * a / b for a, b in zip(times, reference, strict=True))
    middle = statistics.median(within)
    low, _, high = statistics.quantiles(within, n=4, method="inclusive")
    return Ratio(middle, (high - low) / abs(middle) if middle else 0.0, digits)


def setting() -> dict[str, object]:
    machine = torch.cuda.get_device_name() if on_gpu() else f"{torch.get_num_threads()} thread"
    return {"torch": torch.__version__, "python": platform.python_version(), "machine": machine}


def command(tables: Callable[[int], Iterable[Table]], description: str, runs: int) -> None:
    """The command line of a script: prints its tables as they come."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs, help="measured turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the tables here as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep", help="(default: %(default)s)")
    options = parser.parse_args()
    if options.allocator == "keep" and not KEEP_MEMORY.keys() <= os.environ.keys():  # It is read when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_default_device(options.device)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of what torchao could not load, and would not be used here
    torch.manual_seed(0)
    done = []
    for table in tables(options.runs):
        print(table, flush=True)
        done.append(asdict(table))
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(), "tables": done}, indent=1) + "\n")
