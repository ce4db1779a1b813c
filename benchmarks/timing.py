"""What the benchmarks share: interleaved runs, ratios with their spread, tables, the command line.

Time is the CPU time of this process on one thread. Other processes on the machine lengthen a run through caches and
memory bandwidth, but not by holding the processor. On a GPU it is the time until the device has finished. Candidates
run in turns, a, b, c, b, c, a, ..., and are compared within a turn: a ratio is the median over turns of the ratio in
each turn, and its spread is their interquartile range divided by their median. The first turns warm up and do not
count.

glibc is told to keep its memory. By default it returns some to the system whenever much is free at the end of its heap,
which depends on chance. The pages of a new tensor then have to be made again, which takes more time than the operators
measured here. ``--allocator default`` leaves glibc as it is.
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
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

Times = list[float]
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**35)}


@dataclass(frozen=True)
class Ratio:
    """A multiple of the reference's time. A count has the spread ``None``."""

    value: float
    spread: float | None
    digits: int = 2

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ±{self.spread:.0%}"
        return f"{round(self.value, self.digits) + 0.0:.{self.digits}f}{spread}"  # no "-0.00"


@dataclass
class Table:
    """A table of ratios. A cell without a measurement is ``None``."""

    title: str
    columns: list[str]
    rows: list[list[str | Ratio | None]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"\n{self.title}\n\n{markdown(self.columns, self.rows)}\n"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, in columns of equal width; "-" for ``None``."""
    cells = [[*columns], *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join(":" + "-" * (width + 1) for width in widths) + "|")
    return "\n".join(lines)


def interleaved(candidates: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 2) -> dict[str, Times]:
    """Seconds of ``runs`` turns of each candidate, after ``warm_up`` turns. Each turn begins with another candidate."""
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
    synchronize, clock = (torch.cuda.synchronize, time.perf_counter) if on_gpu() else (lambda: None, time.process_time)
    try:
        synchronize()
        start = clock()
        run()
        synchronize()
        return clock() - start
    finally:
        gc.enable()


def on_gpu() -> bool:
    """Whether this process has used a GPU."""
    return torch.cuda.is_initialized()


def ratio(times: Times, reference: Times, factor: float = 1.0, digits: int = 2) -> Ratio:
    """``factor`` times the median ratio of ``times`` to ``reference`` within a turn."""
    ratios = [factor * a / b for a, b in zip(times, reference, strict=True)]
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, (high - low) / abs(median) if median else 0.0, digits)


def setting() -> dict[str, object]:
    machine = torch.cuda.get_device_name() if on_gpu() else f"{torch.get_num_threads()} thread"
    return {"torch": torch.__version__, "python": platform.python_version(), "machine": machine}


def silence_other_packages() -> None:
    logging.disable(logging.WARNING)  # of extensions that torchao could not load and the benchmarks do not use
    warnings.simplefilter("ignore")  # of compilers and peers


def command(tables: Callable[[int], Iterable[Table]], description: str, runs: int) -> None:
    """The command line of a benchmark. Prints each table when it is done."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs, help="measured turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the tables here as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep", help="(default: %(default)s)")
    options = parser.parse_args()
    if options.allocator == "keep" and not KEEP_MEMORY.keys() <= os.environ.keys():  # glibc reads it at the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_default_device(options.device)
    torch.set_num_threads(1)
    silence_other_packages()
    torch.manual_seed(0)
    results = []
    for table in tables(options.runs):
        print(table, flush=True)
        results.append(asdict(table))
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(), "tables": results}, indent=1) + "\n")
