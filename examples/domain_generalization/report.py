"""Results: one record per run, the table, and what its differences mean at this number of runs.

A *cell* is one held-out domain with one seed. Within a cell all methods are paired (same fp32 start and batches), so
methods are compared by their differences within cells. The error of such a difference comes from its own scatter;
the errors of the two means, which hold the scatter between domains as well, would make it look far less certain.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

from .study import METHODS

Record = Mapping[str, Any]

BASELINE = "lsq"
FP32 = "fp32"


class Difference(NamedTuple):
    """The mean of paired differences, its standard error, the probability of one as large by chance, and the pairs."""

    mean: float
    error: float
    chance: float
    cells: int


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    try:
        own = version("gaqat-optim")
    except PackageNotFoundError:  # run from the source folder, without an installation
        own = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gaqat_optim": own,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not a number."""
    return float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan


def paired_difference(
    records: Sequence[Record], method: str, measure: str, *, baseline: str = BASELINE
) -> Difference | None:
    """`method` minus `baseline` within each cell that has both; None if no cell has."""
    first, second = (_by_cell(records, name, measure) for name in (method, baseline))
    differences = [first[cell] - second[cell] for cell in first if cell in second]
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    count = len(differences)
    chance = math.nan
    if error > 0:
        chance = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, error, chance, count)


def table(records: Sequence[Record], measures: Mapping[str, str]) -> str:
    """Methods by targets for each measure (record key to title): percent, mean, standard error, difference to LSQ."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    methods = [name for name in METHODS if any(record["method"] == name for record in records)]
    rows: list[list[str]] = []
    for measure, title in measures.items():
        block = []
        for name in (FP32, *methods):
            cells = _by_cell(records, name, measure)
            if not cells:
                continue
            by_target = [[value for cell, value in cells.items() if cell[0] == target] for target in targets]
            block.append(
                [
                    "fp32 start" if name == FP32 else METHODS[name].title,
                    *(f"{np.mean(values):.1f}" if values else "" for values in by_target),
                    _with_error(*mean_and_error(list(cells.values())), sign=False),
                    _against_baseline(records, name, measure),
                ]
            )
        rows += [[title if number == 0 else "", *row] for number, row in enumerate(block)]
    headers = ["percent right", "method", *targets, "mean", f"- {METHODS[BASELINE].title}, paired"]
    sides = ("left", "left", *["right"] * (len(headers) - 2))
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=sides)


def verdict(records: Sequence[Record], measure: str = "last_step_accuracy", *, where: str = "at the last step") -> str:
    """One sentence: what the differences to LSQ mean at this number of cells."""
    compared = {
        method.title: paired_difference(records, name, measure) for name, method in METHODS.items() if name != BASELINE
    }
    found = {title: difference for title, difference in compared.items() if difference is not None}
    if not found:
        return "Nothing to compare: that takes LSQ and at least one other method."
    freezing = paired_difference(records, "gaqat", measure, baseline="lsq+sagm")
    if freezing is not None:
        found["freezing alone (GAQAT - LSQ+SAGM)"] = freezing
    parts = [f"{title} {_judged(difference, len(found))}" for title, difference in found.items()]
    cells = max(difference.cells for difference in found.values())
    return (
        f"Against LSQ {where}, at n={cells} paired cell{'s' if cells > 1 else ''} (one held-out domain, one seed "
        f"each), in points: {'; '.join(parts)}. In the pilot study, seeing a difference of one point took 30-55 paired "
        "cells."
    )


def costs(records: Sequence[Record], baseline: str = BASELINE) -> str:
    """One sentence: training time of each method as a multiple of the baseline's, the mean over paired cells."""
    parts = []
    own = _by_cell(records, baseline, "seconds")
    for name, method in METHODS.items():
        seconds = _by_cell(records, name, "seconds")
        ratios = [seconds[cell] / own[cell] for cell in seconds if own.get(cell)]
        if ratios and name != baseline:
            parts.append(f"{method.title} {np.mean(ratios):.1f}")
    return f"Training time as a multiple of LSQ's: {', '.join(parts)}." if parts else ""


def save_results(records: Sequence[Record], path: str | Path) -> None:
    """Write the records as a JSON list, one object per run."""
    Path(path).write_text(json.dumps(list(records), indent=2) + "\n", encoding="utf-8")


def _by_cell(records: Sequence[Record], method: str, measure: str) -> dict[tuple[str, int, int], float]:
    """The measure of one method in each cell (target, seed, bits); of `FP32`, what the records say of their start."""
    found = {}
    for record in records:
        source = record.get(FP32, {}) if method == FP32 else record
        if method in (FP32, record["method"]) and measure in source:
            found[record["target"], record["seed"], record["bits"]] = float(source[measure])
    return found


def _with_error(mean: float, error: float, *, sign: bool) -> str:
    number = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return number if math.isnan(error) else f"{number} +- {error:.1f}"


def _against_baseline(records: Sequence[Record], method: str, measure: str) -> str:
    if method in (BASELINE, FP32):
        return ""
    difference = paired_difference(records, method, measure)
    return "" if difference is None else _with_error(difference.mean, difference.error, sign=True)


def _judged(difference: Difference, comparisons: int) -> str:
    number = _with_error(difference.mean, difference.error, sign=True)
    if math.isnan(difference.error):
        return f"{number} (one cell has no standard error, so nothing can be concluded)"
    if abs(difference.mean) <= 2 * difference.error:
        return f"{number} (cannot be told apart from noise)"
    # With few cells the standard error is itself uncertain, and of several comparisons one is soon large by chance: the
    # usual 5 % are for all of them together (Bonferroni).
    few = ", which so few cells show by chance too" if difference.chance > 0.05 / comparisons else ""
    chance = "" if math.isnan(difference.chance) else f"{few}: t test p={difference.chance:.2g}"
    return f"{number} (more than two standard errors{chance})"
