"""The statistics of the report, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from domain_generalization.study import report


def record(method: str, target: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "target": target, "seed": seed, "bits": 3, "last_step_accuracy": accuracy, **more}


# GAQAT minus LSQ in the four cells: 4, 2, 0, 2. Mean 2, deviations 2, 0, -2, 0, variance 8/3, error sqrt(8/3/4).
PAIRED = [
    record("lsq", "blended", 0, 40.0),
    record("lsq", "blended", 1, 44.0),
    record("lsq", "sketch", 0, 50.0),
    record("lsq", "sketch", 1, 54.0),
    record("gaqat", "sketch", 1, 56.0),
    record("gaqat", "blended", 0, 44.0),
    record("gaqat", "blended", 1, 46.0),
    record("gaqat", "sketch", 0, 50.0),
]


def test_mean_and_standard_error() -> None:
    mean, error = report.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))  # deviations -2, -1, 0, 3


def test_one_value_has_no_standard_error() -> None:
    mean, error = report.mean_and_error([7.0])
    assert mean == 7.0
    assert math.isnan(error)


def test_paired_difference_pairs_by_cell_not_by_order() -> None:
    difference = report.paired_difference(PAIRED, "gaqat", "last_step_accuracy")
    assert difference is not None
    assert difference.cells == 4
    assert difference.mean == pytest.approx(2.0)
    assert difference.error == pytest.approx(math.sqrt(2 / 3))
    # Student's t with 3 degrees of freedom: 1 - 2/pi (x / (1 + x^2) + atan x) with x = t / sqrt 3, here sqrt 2.
    x = 2 / math.sqrt(2 / 3) / math.sqrt(3)
    assert difference.p_value == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))


def test_cells_without_a_partner_do_not_count() -> None:
    records = [*PAIRED[:1], *PAIRED[4:6]]
    difference = report.paired_difference(records, "gaqat", "last_step_accuracy")
    assert difference is not None
    assert difference[0] == 4.0
    assert difference.cells == 1
    assert report.paired_difference(PAIRED, "lsq+sagm", "last_step_accuracy") is None
    other_bits = [PAIRED[0], PAIRED[5] | {"bits": 4}]
    assert report.paired_difference(other_bits, "gaqat", "last_step_accuracy") is None


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([44.0, 46.0, 50.0, 56.0], "GAQAT +2.0 +- 0.8 (more than two standard errors, not significant: t test p="),
        ([44.0, 48.1, 54.0, 57.9], "GAQAT +4.0 +- 0.0 (more than two standard errors: t test p="),
        ([44.0, 40.0, 51.0, 54.0], "GAQAT +0.2 +- 1.7 (cannot be told apart from noise)"),
        ([38.0, 42.1, 48.0, 51.9], "GAQAT -2.0 +- 0.0 (more than two standard errors"),
        ([40.0, 44.0, 50.0, 54.0], "GAQAT +0.0 +- 0.0 (cannot be told apart from noise)"),
    ],
)
def test_the_sentence_follows_the_numbers(accuracies: list[float], expected: str) -> None:
    cells = [("blended", 0), ("blended", 1), ("sketch", 0), ("sketch", 1)]
    gaqat = [record("gaqat", *cell, accuracy) for cell, accuracy in zip(cells, accuracies, strict=True)]
    sentence = report.verdict([*PAIRED[:4], *gaqat])
    assert expected in sentence
    assert "n=4 paired cells" in sentence


def test_the_sentence_for_one_cell_and_for_nothing_to_compare() -> None:
    assert "no standard error, so nothing can be concluded" in report.verdict([PAIRED[0], PAIRED[5]])
    assert "Nothing to compare" in report.verdict(PAIRED[:4])


def test_what_freezing_does_is_said_apart() -> None:
    sagm = [
        record("lsq+sagm", r["target"], r["seed"], r["last_step_accuracy"]) for r in PAIRED if r["method"] == "gaqat"
    ]
    sentence = report.verdict([*PAIRED, *sagm])
    assert "freezing alone (GAQAT - LSQ+SAGM) +0.0 +- 0.0 (cannot be told apart from noise)" in sentence


def test_several_comparisons_share_the_five_percent() -> None:
    start = {"sketch": 50.0, "blended": 40.0}
    gains = {("blended", 0): 3.0, ("blended", 1): 5.0, ("sketch", 0): 2.0, ("sketch", 1): 6.0}  # 4 +- 0.9
    alone = [record("lsq", *cell, start[cell[0]]) for cell in gains]
    alone += [record("gaqat", *cell, start[cell[0]] + gain) for cell, gain in gains.items()]
    assert "GAQAT +4.0 +- 0.9 (more than two standard errors: t test p=0.022)" in report.verdict(alone)
    together = [*alone, *(r | {"method": "lsq+sagm"} for r in alone if r["method"] == "lsq")]
    few = "GAQAT +4.0 +- 0.9 (more than two standard errors, not significant in 3 comparisons: t test p=0.022)"
    assert few in report.verdict(together)


def test_costs_are_ratios_within_cells() -> None:
    records = [
        record("lsq", "sketch", 0, 0.0, seconds=2.0),
        record("lsq", "sketch", 1, 0.0, seconds=4.0),
        record("gaqat", "sketch", 0, 0.0, seconds=4.0),
        record("gaqat", "sketch", 1, 0.0, seconds=12.0),
    ]
    assert report.costs(records) == "Training time as a multiple of LSQ's: GAQAT 2.5."
    assert report.costs(records[:2]) == report.costs(records[2:]) == ""


def words(line: str) -> str:
    return " ".join(line.split())


def test_the_table_has_means_errors_and_paired_differences() -> None:
    start = {"last_step_accuracy": 30.0}
    title, _, head, _, *rows = report.table(
        [r | {"fp32": start} for r in PAIRED], {"last_step_accuracy": "last step"}
    ).splitlines()
    assert (title, words(head)) == ("last step", "method blended sketch mean - LSQ, paired")
    fp32, lsq, gaqat = map(words, rows)
    assert fp32 == "fp32 start 30.0 30.0 30.0 +- 0.0"
    assert lsq == "LSQ 42.0 52.0 47.0 +- 3.1"
    assert gaqat == "GAQAT 45.0 53.0 49.0 +- 2.6 +2.0 +- 0.8"


def test_no_cell_is_dropped_from_the_table() -> None:
    cells = [*report.all_cells(PAIRED), ("photo", 0, 3)]
    text = report.table(PAIRED[:-1], {"last_step_accuracy": "last"}, methods=["lsq", "gaqat", "lsq+sagm"], cells=cells)
    rows = [words(line) for line in text.splitlines()]
    assert "LSQ 42.0 52.0 missing 47.0 +- 3.1*" in rows
    assert "GAQAT 45.0 56.0* missing 48.7 +- 3.7* +2.7 +- 0.7" in rows
    assert "LSQ+SAGM missing missing missing missing" in rows
    assert "* LSQ lacks photo seed 0" in rows
    assert "* GAQAT lacks sketch seed 0, photo seed 0" in rows
    assert "* LSQ+SAGM lacks blended seed 0, blended seed 1, sketch seed 0, sketch seed 1, photo seed 0" in rows


def test_many_targets_stay_within_a_terminal() -> None:
    targets = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch", "a_rather_long_domain"]
    records = [record(m, t, s, 40.0 + s) for m in ("lsq", "lsq+sagm-flat") for t in targets for s in (0, 1)]
    text = report.table(records, {"last_step_accuracy": "last step"})
    assert max(map(len, text.splitlines())) <= 79
    for target in targets:
        assert sum(target in line.split() for line in text.splitlines()) == 1
    assert max(map(len, report.comparisons(records, "last_step_accuracy").splitlines())) <= 79


def test_fp32_methods_are_in_the_cells_of_every_width() -> None:
    records = [*PAIRED, *(r | {"bits": 4} for r in PAIRED), record("fp32", "sketch", 0, 60.0) | {"bits": 32}]
    assert report.values_by_cell(records, "fp32", "last_step_accuracy") == {("sketch", 0, 3): 60, ("sketch", 0, 4): 60}
    assert report.paired_difference(records, "fp32", "last_step_accuracy").mean == 10  # type: ignore[union-attr]
    text = report.table(records, {"last_step_accuracy": "last"})
    assert text.index("W3A3, last") < text.index("W4A4, last")


def test_averaged_weights_are_rows_behind_their_methods() -> None:
    records = [*PAIRED, *(r | {"method": "lsq+swad"} for r in PAIRED[:4])]
    assert report.in_order({"gaqat", "lsq+swad", "lsq", "lsq+sagm"}) == ["lsq", "lsq+swad", "lsq+sagm", "gaqat"]
    assert "LSQ (SWAD)" in report.table(records, {"last_step_accuracy": "last"})


def test_comparisons_have_an_interval_and_a_sign_test() -> None:
    (*_, row) = report.comparisons(PAIRED, "last_step_accuracy").splitlines()
    # 2 +- 3.182 * 0.816; three cells better, one equal: the sign test of 3 in 3 is 2 / 8.
    assert words(row) == "GAQAT +2.00 -0.6 to +4.6 0.092 3 of 4 0.25"


@pytest.mark.parametrize(("layout", "piece"), [("github", "| LSQ "), ("latex_booktabs", r"\toprule")])
def test_other_layouts(layout: str, piece: str) -> None:
    text = report.table(PAIRED, {"last_step_accuracy": "last step"}, layout=layout)
    assert piece in text
    assert "49.0 ± 2.6" in text


def test_versions_name_what_a_result_depends_on() -> None:
    assert set(report.versions()) == {"python", "torch", "numpy", "gaqat_optim"}
