"""A row of the table, and the command line of a part, which measures rows until its time is over.

A row says on which device its tensors were; the report refuses rows of another device than its heading's.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from peers import OURS, PEERS, missing_peers
from timing import Ratio, Times, ratio, silence_other_packages

SWITCHED = "ours, switched on"  # the quantizers of an eager network through torch.compile: quant/lsq/compiled.py
SAM_PEER = "pytorch_optimizer"
COLUMNS = (OURS, SWITCHED, *PEERS, SAM_PEER)


@dataclass
class Row:
    """A measurement of every column, or why there is none."""

    what: str
    multiples_of: str
    device: str
    cells: dict[str, Ratio | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """What fits the device: a GPU's figures, or seconds on a CPU."""

    device: torch.device
    full: bool = False

    @property
    def is_small(self) -> bool:
        return self.device.type == "cpu"

    @property
    def runs(self) -> int:
        return 2 if self.is_small else 7

    @property
    def batch(self) -> int:
        return 2 if self.is_small else 64

    @property
    def image(self) -> int:
        return 32 if self.is_small else 224


Measurements = Iterator[tuple[str, Callable[[], list[Row]]]]


def part_command(measurements: Callable[[Sizes], Measurements]) -> None:
    """The command line of a part: rows, what failed and what was left out, written after each measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    silence_other_packages()
    torch.manual_seed(0)
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 wherever there is no autocast
    result = measure_until(time.monotonic() + options.seconds, measurements(Sizes(options.device, options.full)))
    unfinished = options.json.with_suffix(".unfinished")
    for state in result:
        unfinished.write_text(json.dumps(state))
        unfinished.replace(options.json)  # at once, since this process may be ended at any time


def measure_until(deadline: float, measurements: Measurements) -> Iterator[dict[str, object]]:
    """The result so far, after each measurement."""
    result: dict[str, list[object]] = {"rows": [], "failed": [], "left_out": []}
    for what, measure in measurements:
        if time.monotonic() > deadline:
            result["left_out"].append(what)
        else:
            try:
                rows = measure()
                for row in rows:
                    print(f"  {row.what}: {row.cells.get(OURS, row.cells.get(SWITCHED))}", flush=True)
                result["rows"] += [asdict(row) for row in rows]
            except Exception as error:  # one measurement that fails costs no other
                result["failed"].append(f"{what}: {described(error)}")
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            gc.collect()
        yield result


def described(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def usable(
    candidates: Mapping[str, Callable[[], object]], needed: tuple[str, ...]
) -> tuple[dict[str, Callable[[], object]], dict[str, Ratio | str]]:
    """The candidates that run, and the error of each peer that does not. A needed one that fails raises."""
    running: dict[str, Callable[[], object]] = {}
    failed: dict[str, Ratio | str] = {}
    for name, run in candidates.items():
        try:
            run()
        except Exception as error:
            if name in needed:
                raise
            failed[name] = described(error)
        else:
            running[name] = run
    return running, failed


def ratios(times: Mapping[str, Times], reference: str, factor: float = 1.0) -> dict[str, Ratio | str]:
    return {name: ratio(t, times[reference], factor) for name, t in times.items() if name in COLUMNS}


def absent() -> dict[str, Ratio | str]:
    return {name: f"not installed: {reason}" for name, reason in missing_peers().items()}


def peak_bytes(run: Callable[[], object], network: nn.Module, device: torch.device) -> int:
    """The most memory that a run holds, gradients included, beyond what was held before."""
    network.zero_grad(set_to_none=True)
    if device.type != "cuda":
        from memory import bytes_held

        return max(bytes_held(run))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
