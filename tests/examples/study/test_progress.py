"""What is shown while jobs train."""

from __future__ import annotations

import re

import pytest

from domain_generalization.digit_study import DigitData
from domain_generalization.study.jobs import START, Job
from domain_generalization.study.options import settings_from, study_parser
from domain_generalization.study.progress import JobProgress, next_steps, step_cost, terminal_width, wrapped
from domain_generalization.study.settings import Settings

JOBS = [Job("sketch", 0, None, START), Job("sketch", 0, 3, "lsq"), Job("sketch", 0, 3, "gaqat")]


@pytest.fixture(name="settings")
def tiny_settings() -> Settings:
    data = DigitData()
    return settings_from(study_parser(data, "").parse_args(["--steps", "2", "--fp32-steps", "4"]), data)


def test_a_step_with_two_passes_costs_twice_as_much(settings: Settings) -> None:
    start, lsq, gaqat = (step_cost(job, settings) for job in JOBS)
    assert start == 1
    assert gaqat == 2 * lsq > 2


def test_a_file_gets_one_line_for_each_job_with_the_time_that_is_left(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with JobProgress(JOBS, settings) as progress:
        for job in JOBS:
            for _ in range(job.steps(settings)):
                progress(job, "")
    output = capsys.readouterr()
    assert output.out == ""
    first, second, third = output.err.splitlines()
    assert first == "1/3 sketch, seed 0: fp32 start"
    assert re.fullmatch(r"2/3 sketch, seed 0, W3A3: LSQ, \d\d:\d\d left for all", second)
    assert re.fullmatch(r"3/3 sketch, seed 0, W3A3: GAQAT, \d\d:\d\d left for all", third)


def test_the_time_left_counts_passes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = JobProgress(JOBS, settings)
    now = iter([0.0, 40.0])  # the first step ends, and the second job begins after 4 of 13 passes
    monkeypatch.setattr("domain_generalization.study.progress.time.monotonic", lambda: next(now))
    for _ in range(4):
        progress(JOBS[0])
    passes = [job.steps(settings) * step_cost(job, settings) for job in JOBS]
    left = round(40 / passes[0] * (passes[1] + passes[2]))
    assert progress._time_left() == f", {left // 60:02}:{left % 60:02} left for all"


def test_a_terminal_gets_a_bar_within_its_width(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    with JobProgress(JOBS[:1], settings) as progress:
        for _ in range(4):
            progress(JOBS[0], "")
    frames = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    assert "loading the data" in frames[0]
    assert frames[-1].startswith("trained")
    assert "100%" in frames[-1]
    assert max(map(len, frames)) <= 59


def test_what_an_interrupted_job_had_done_leaves_the_total(settings: Settings) -> None:
    progress = JobProgress(JOBS, settings, disable=True)
    progress(JOBS[0])  # resumed: 3 of its 4 steps were done before
    progress(JOBS[1])
    assert progress._total == 1 + sum(job.steps(settings) * step_cost(job, settings) for job in JOBS[1:])


def test_text_is_wrapped_to_a_narrow_terminal_and_to_79_columns_on_a_wide_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a sentence of words " * 10 + "\n  a second line"
    for columns, width in (("50", 49), ("200", 79), ("10", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_width() == width
        lines = wrapped(text).splitlines()
        assert max(map(len, lines)) <= width
        assert lines[-1] == "  a second line"
    assert next_steps("look at it", "go on").splitlines() == ["What to do next:", "  1. look at it", "  2. go on"]
