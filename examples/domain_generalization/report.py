"""Results: one record per run, the table, and what its differences mean at this number of runs.

A *cell* is one held-out domain with one seed. All methods of a cell are paired: same fp32 start, same batches. So
methods are compared by their differences within cells, and the standard error is that of these differences. The errors
of the two means would also contain the scatter between domains, and hide most differences.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

from .study import METHODS, Settings, Trained

Record = Mapping[str, Any]

BASELINE = "lsq"
FP32 = "fp32"


def run_record(
    method: str,
    target: str,
    seed: int,
    settings: Settings,
    run: Trained,
    accuracies: Mapping[str, float],
    fp32_accuracies: Mapping[str, float],
    **more_settings: Any,
) -> Record:
    """The record of one run in results.json."""
    return {
        "method": method,
        "target": target,
        "seed": seed,
        "bits": settings.bits,
        "source_validation_accuracy": run.validation,
        "selected_step": run.selected_step,
        **accuracies,
        FP32: fp32_accuracies,
        "seconds": round(run.seconds, 2),
        "settings": asdict(settings) | more_settings,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    try:
        own_version = version("gaqat-optim")
    except PackageNotFoundError:  # run from the source folder, without an installation
        own_version = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gaqat_optim": own_version,
    }


def save_results(records: Sequence[Record], path: str | Path) -> None:
    """Write the records as a JSON list, one object per run."""
    Path(path).write_text(json.dumps(list(records), indent=2) + "\n", encoding="utf-8")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error. A single value has the standard error NaN."""
    return float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan


class Difference(NamedTuple):
    """The mean of paired differences, its standard error, the p-value of its t test, and the number of pairs."""

    mean: float
    error: float
    p_value: float
    cells: int

    def __str__(self) -> str:
        return _format_mean(self.mean, self.error, sign="+")


def paired_difference(
    records: Sequence[Record], method: str, measure: str, *, baseline: str = BASELINE
) -> Difference | None:
    """`method` minus `baseline` within each cell that has both. None if no cell has both."""
    ours, theirs = (_values_by_cell(records, name, measure) for name in (method, baseline))
    differences = [ours[cell] - theirs[cell] for cell in ours if cell in theirs]
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    p_value = float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1)) if error > 0 else math.nan
    return Difference(mean, error, p_value, len(differences))


def table(records: Sequence[Record], measures: Mapping[str, str]) -> str:
    """Methods by targets for each measure (record key to title): percent, mean, standard error, difference to LSQ."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    methods = [name for name in METHODS if any(record["method"] == name for record in records)]
    rows: list[list[str]] = []
    for measure, measure_title in measures.items():
        title = measure_title
        for name in (FP32, *methods):
            values = _values_by_cell(records, name, measure)
            if not values:
                continue
            of_target = [[value for cell, value in values.items() if cell[0] == target] for target in targets]
            difference = None if name in (FP32, BASELINE) else paired_difference(records, name, measure)
            rows.append(
                [
                    title,
                    "fp32 start" if name == FP32 else METHODS[name].title,
                    *(f"{np.mean(cells):.1f}" if cells else "" for cells in of_target),
                    _format_mean(*mean_and_error(list(values.values()))),
                    "" if difference is None else str(difference),
                ]
            )
            title = ""
    headers = ["accuracy in percent", "method", *targets, "mean", f"- {METHODS[BASELINE].title}, paired"]
    alignment = ("left", "left", *["right"] * (len(headers) - 2))
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=alignment)


def verdict(records: Sequence[Record], measure: str = "last_step_accuracy", *, where: str = "at the last step") -> str:
    """One sentence: what the differences to LSQ mean at this number of cells."""
    pairs = [(method.title, name, BASELINE) for name, method in METHODS.items() if name != BASELINE]
    pairs.append(("freezing alone (GAQAT - LSQ+SAGM)", "gaqat", "lsq+sagm"))
    differences = {
        title: difference
        for title, method, baseline in pairs
        if (difference := paired_difference(records, method, measure, baseline=baseline)) is not None
    }
    if not differences or all(record["method"] != BASELINE for record in records):
        return "Nothing to compare: a comparison takes LSQ and at least one other method."
    comparisons = "; ".join(
        f"{title} {difference} ({_significance(difference, len(differences))})"
        for title, difference in differences.items()
    )
    cells = max(difference.cells for difference in differences.values())
    return (
        f"Against LSQ {where}, at n={cells} paired cell{'s' if cells > 1 else ''} (one held-out domain, one seed "
        f"each), in points: {comparisons}. In the pilot study, seeing a difference of one point took 30-55 paired "
        "cells."
    )


def costs(records: Sequence[Record]) -> str:
    """One sentence: training time of each method as a multiple of LSQ's, the mean over paired cells."""
    ratios_by_method = []
    baseline_seconds = _values_by_cell(records, BASELINE, "seconds")
    for name, method in METHODS.items():
        seconds = _values_by_cell(records, name, "seconds")
        ratios = [seconds[cell] / baseline_seconds[cell] for cell in seconds if baseline_seconds.get(cell)]
        if ratios and name != BASELINE:
            ratios_by_method.append(f"{method.title} {np.mean(ratios):.1f}")
    return f"Training time as a multiple of LSQ's: {', '.join(ratios_by_method)}." if ratios_by_method else ""


def _values_by_cell(records: Sequence[Record], method: str, measure: str) -> dict[tuple[str, int, int], float]:
    """The measure of one method in each cell (target, seed, bits). `FP32` stands for the checkpoint of the cell."""
    values = {}
    for record in records:
        accuracies = record.get(FP32, {}) if method == FP32 else record
        if method in (FP32, record["method"]) and measure in accuracies:
            values[record["target"], record["seed"], record["bits"]] = float(accuracies[measure])
    return values


def _format_mean(mean: float, error: float, sign: str = "") -> str:
    number = f"{mean:{sign}.1f}"
    return number if math.isnan(error) else f"{number} +- {error:.1f}"


def _significance(difference: Difference, comparisons: int) -> str:
    if math.isnan(difference.error):
        return "one cell has no standard error, so nothing can be concluded"
    if abs(difference.mean) <= 2 * difference.error:
        return "cannot be told apart from noise"
    if math.isnan(difference.p_value):
        return "more than two standard errors"
    # With few cells the standard error is itself uncertain, and with several comparisons one is soon large by chance.
    # So 5 % is the level of all of them together (Bonferroni).
    chance = ""
    if difference.p_value > 0.05 / comparisons:
        chance = ", not significant" + (f" in {comparisons} comparisons" if comparisons > 1 else "")
    return f"more than two standard errors{chance}: t test p={difference.p_value:.2g}"
