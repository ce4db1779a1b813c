"""The table of a study, and what its differences mean at this number of runs.

A *cell* is one held-out domain with one seed and one width. All methods of a cell are paired: same fp32 start, same
batches. So methods are compared by their differences within cells, and the standard error is that of these differences.
The errors of the two means would also contain the scatter between domains, and hide most differences.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

import gaqat_optim

from .methods import ERM, METHODS

Record = Mapping[str, Any]
Cell = tuple[str, int, int]  # held-out domain, seed, bits

BASELINE = "lsq"
START = "start"  # in the place of a method: the fp32 network from which the methods of a cell start
UNQUANTIZED = 32  # bits in the records of methods without quantization, which belong to the cells of every width
WIDTH = 79


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gaqat_optim": gaqat_optim.__version__,
    }


def title_of(method: str) -> str:
    """The title of a row, which may be one of averaged weights: `gaqat+swad`."""
    if method == START:
        return ERM.title
    if method in METHODS:
        return METHODS[method].title
    base, _, average = method.rpartition("+")
    return f"{METHODS[base].title} ({average.upper()})"


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of the table, each before its averaged weights."""
    names = list(METHODS)
    return sorted(
        set(methods), key=lambda name: (names.index(name if name in METHODS else name.rpartition("+")[0]), name)
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error. A single value has the standard error NaN."""
    return float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan


class Difference(NamedTuple):
    """Paired differences: mean, standard error, p-value of the t test, number of pairs, and how many are positive.

    `sign_p_value` is that of the sign test, which asks only in how many cells one method was better.
    """

    mean: float
    error: float
    p_value: float
    cells: int
    wins: int
    sign_p_value: float

    def __str__(self) -> str:
        return _format_mean(self.mean, self.error, sign="+")

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the 95 % interval of the mean, by Student's t. NaN at a single cell."""
        reach = self.error * float(stats.t.ppf(0.975, max(1, self.cells - 1)))
        return self.mean - reach, self.mean + reach


def paired_difference(
    records: Sequence[Record], method: str, measure: str, *, baseline: str = BASELINE
) -> Difference | None:
    """`method` minus `baseline` within each cell that has both. None if no cell has both."""
    ours, theirs = (values_by_cell(records, name, measure) for name in (method, baseline))
    return difference_of([ours[cell] - theirs[cell] for cell in ours if cell in theirs])


def difference_of(differences: Sequence[float]) -> Difference | None:
    """The statistics of differences within cells. None without any."""
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    p_value = float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1)) if error > 0 else math.nan
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    sign_p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else math.nan
    return Difference(mean, error, p_value, len(differences), wins, sign_p_value)


def values_by_cell(records: Sequence[Record], method: str, measure: str) -> dict[Cell, float]:
    """The measure of one method in each cell."""
    widths = _widths(records)
    values = {}
    for record in records:
        accuracies = record.get("fp32", {}) if method == START else record
        if method in (START, record["method"]) and measure in accuracies:
            for bits in widths if record["bits"] == UNQUANTIZED else [record["bits"]]:
                values[record["target"], record["seed"], bits] = float(accuracies[measure])
    return values


def _widths(records: Sequence[Record]) -> list[int]:
    return sorted({record["bits"] for record in records} - {UNQUANTIZED}) or [UNQUANTIZED]


def missing_cells(records: Sequence[Record], method: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cells that a method lacks."""
    there = values_by_cell(records, method, "last_step_accuracy")
    return [cell for cell in cells if cell not in there]


def all_cells(records: Sequence[Record], seeds_and_targets: Iterable[tuple[str, int]] = ()) -> list[Cell]:
    """Every cell in which any method has a record, and those given, at each width."""
    pairs = dict.fromkeys([*seeds_and_targets, *((record["target"], record["seed"]) for record in records)])
    return [(*pair, bits) for pair in pairs for bits in _widths(records)]


def table(
    records: Sequence[Record],
    measures: Mapping[str, str],
    *,
    methods: Iterable[str] | None = None,
    cells: Sequence[Cell] | None = None,
    layout: str = "simple",
) -> str:
    """Methods by targets for each measure (record key to title): percent, mean, standard error, difference to LSQ.

    Args:
        records: the records.
        measures: the tables.
        methods: rows that there have to be; by default those of the records.
        cells: cells that there have to be; by default those in which any method has a record. A cell that a method
            lacks is named under the table, and its means have a star.
        layout: a format of tabulate's; "simple" keeps to 79 columns.
    """
    methods = in_order(methods if methods is not None else {record["method"] for record in records})
    cells = all_cells(records) if cells is None else cells
    parts = []
    for bits in sorted({cell[2] for cell in cells}):
        here = [record for record in records if record["bits"] in (bits, UNQUANTIZED)]
        prefix = f"W{bits}A{bits}, " if len({cell[2] for cell in cells}) > 1 else ""
        own_cells = [cell for cell in cells if cell[2] == bits]
        for measure, title in measures.items():
            if any(values_by_cell(here, name, measure) for name in methods):
                parts.append(f"{prefix}{title}\n\n{_block(here, measure, methods, own_cells, layout)}")
        lines = [
            f"* {title_of(name)} lacks {', '.join(f'{target} seed {seed}' for target, seed, _ in absent)}"
            for name in methods
            if (absent := missing_cells(here, name, own_cells))
        ]
        if lines:
            parts.append("\n".join([f"{prefix}missing cells:", *lines]))
    return "\n\n".join(parts)


def _block(records: Sequence[Record], measure: str, methods: Sequence[str], cells: Sequence[Cell], layout: str) -> str:
    """The table of one measure at one width; if it is too wide, the targets in tables of their own."""
    targets = list(dict.fromkeys(target for target, _, _ in cells))
    summary, by_target = [], []
    for name in (START, *methods):
        values = values_by_cell(records, name, measure)
        if name == START and not values:
            continue
        absent = name != START and bool(missing_cells(records, name, cells))
        difference = None if name in (START, BASELINE) else paired_difference(records, name, measure)
        mean = _format_mean(*mean_and_error(list(values.values()))) if values else "missing"
        summary.append([mean + ("*" if absent and values else ""), "" if difference is None else str(difference)])
        by_target.append([_of_target(values, target, cells) for target in targets])
    titles = [[title_of(name)] for name in (START, *methods)][-len(summary) :]
    ends = ["mean", f"- {METHODS[BASELINE].title}, paired"]

    def text(headers: Sequence[str], *columns: list[list[str]]) -> str:
        rows = [list(chain(*parts)) for parts in zip(titles, *columns, strict=True)]
        alignment = ("left", *["right"] * len(headers))
        return tabulate(
            rows, headers=["method", *headers], disable_numparse=True, colalign=alignment, tablefmt=layout
        ).replace("+-", "+-" if layout == "simple" else "±")

    whole = text([*targets, *ends], by_target, summary)
    if layout != "simple" or _width(whole) <= WIDTH:
        return whole
    parts, first = [text(ends, summary)], 0
    while first < len(targets):
        count = len(targets) - first
        while True:
            chosen = slice(first, first + count)
            part = text(targets[chosen], [row[chosen] for row in by_target])
            if count == 1 or _width(part) <= WIDTH:
                break
            count -= 1
        parts.append(part)
        first += count
    return "\n\n".join(parts)


def _of_target(values: Mapping[Cell, float], target: str, cells: Sequence[Cell]) -> str:
    there = [value for cell, value in values.items() if cell[0] == target]
    star = "" if len(there) >= sum(cell[0] == target for cell in cells) else "*"
    return f"{np.mean(there):.1f}{star}" if there else "missing"


def _width(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def comparisons(records: Sequence[Record], measure: str, layout: str = "simple") -> str:
    """A table of paired differences to LSQ."""
    methods = in_order({record["method"] for record in records} - {BASELINE})
    differences = {title_of(name): paired_difference(records, name, measure) for name in methods}
    return comparison_table("- LSQ, paired", differences, layout)


def comparison_table(headline: str, differences: Mapping[str, Difference | None], layout: str = "simple") -> str:
    """A table of paired differences: mean, 95 % interval, t test, cells won, sign test."""
    rows = []
    for title, difference in differences.items():
        if difference is None:
            continue
        low, high = difference.interval
        rows.append(
            [
                title,
                f"{difference.mean:+.2f}",
                "" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}",
                "" if math.isnan(difference.p_value) else f"{difference.p_value:.2g}",
                f"{difference.wins} of {difference.cells}",
                "" if math.isnan(difference.sign_p_value) else f"{difference.sign_p_value:.2g}",
            ]
        )
    headers = [headline, "mean", "95 % interval", "t test", "won", "sign test"]
    alignment = ("left", *["right"] * 5)
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=alignment, tablefmt=layout) if rows else ""


def verdict(records: Sequence[Record], measure: str = "last_step_accuracy", *, where: str = "at the last step") -> str:
    """One sentence: what the differences to LSQ mean at this number of cells."""
    methods = in_order({record["method"] for record in records})
    pairs = [(title_of(name), name, BASELINE) for name in methods if name != BASELINE]
    pairs.append(("freezing alone (GAQAT - LSQ+SAGM)", "gaqat", "lsq+sagm"))
    differences = {
        title: difference
        for title, method, baseline in pairs
        if (difference := paired_difference(records, method, measure, baseline=baseline)) is not None
    }
    if not differences or BASELINE not in methods:
        return "Nothing to compare: a comparison takes LSQ and at least one other method."
    sentences = "; ".join(
        f"{title} {difference} ({_significance(difference, len(differences))})"
        for title, difference in differences.items()
    )
    cells = max(difference.cells for difference in differences.values())
    return (
        f"Against LSQ {where}, at n={cells} paired cell{'s' if cells > 1 else ''} (one held-out domain, one seed "
        f"each), in points: {sentences}. In the pilot study, seeing a difference of one point took 30-55 paired "
        "cells."
    )


def costs(records: Sequence[Record]) -> str:
    """One sentence: training time of each method as a multiple of LSQ's, the mean over paired cells."""
    ratios_by_method = []
    baseline_seconds = values_by_cell(records, BASELINE, "seconds")
    for name in in_order({record["method"] for record in records} - {BASELINE}):
        seconds = values_by_cell(records, name, "seconds")
        ratios = [seconds[cell] / baseline_seconds[cell] for cell in seconds if baseline_seconds.get(cell)]
        if ratios:
            ratios_by_method.append(f"{title_of(name)} {np.mean(ratios):.1f}")
    return f"Training time as a multiple of LSQ's: {', '.join(ratios_by_method)}." if ratios_by_method else ""


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
