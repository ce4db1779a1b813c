"""What the terminal shows while jobs train: a bar with the time left; in a file, one line for each job."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from .jobs import Job
from .report import WIDTH
from .settings import Settings

QUANTIZED_PASS = 1.6  # the time of a quantized pass, with evaluations, in fp32 passes: digits on one core


def terminal_width() -> int:
    """The columns that a line may have: those of a narrow terminal, and `WIDTH` on a wide one or in a file."""
    return max(40, min(WIDTH, shutil.get_terminal_size((WIDTH + 1, 24)).columns - 1))


def wrapped(text: str, indent: str = "") -> str:
    """Sentences within the width of the terminal, line by line; further lines of each are indented."""
    return "\n".join(
        textwrap.fill(line, terminal_width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def next_steps(*steps: str) -> str:
    """What can be done next, as a numbered list."""
    items = [wrapped(f"  {number}. {step}", indent="     ") for number, step in enumerate(steps, start=1)]
    return "\n".join(["What to do next:", *items])


def step_cost(job: Job, settings: Settings) -> float:
    """The time of a step of a job, in passes of the fp32 network."""
    passes = 1.0 if job.definition.perturbation == "none" else 1 + 1 / settings.interval
    return passes * (QUANTIZED_PASS if job.definition.quantized else 1)


class JobProgress:
    """Shows which job trains, and how much time is left for all of them.

    Jobs count by their passes, since a step with a second pass takes twice as long; so the time left is right as soon
    as some steps are done. Loading the data, before the first step, does not count.

    Args:
        jobs: those that will be trained, in their order.
        settings: of the study.
        disable: show nothing.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings, *, disable: bool = False) -> None:
        self._numbers = {job: number for number, job in enumerate(jobs, start=1)}
        self._settings = settings
        self._job: Job | None = None
        self._steps_left = 0
        self._lines = not (disable or sys.stderr.isatty())
        self._start: float | None = None
        self._total = self._left = sum(job.steps(settings) * step_cost(job, settings) for job in jobs)
        self._bar = tqdm(
            total=self._total,
            desc="loading the data",
            smoothing=0,  # the mean speed: evaluations between the steps take time as well
            mininterval=0.5,
            ncols=terminal_width(),
            bar_format="{desc}  {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
            disable=disable or self._lines,
        )

    def __call__(self, job: Job, line: str = "") -> None:
        """Count a step of a job."""
        cost = step_cost(job, self._settings)
        if job != self._job:
            self._begin(job)
        self._steps_left -= 1
        self._left -= cost
        if not self._steps_left:
            self._bar.set_description_str(f"{self._title(job)} (measuring)", refresh=False)
        self._bar.update(cost)

    def _begin(self, job: Job) -> None:
        """A job starts. What an interrupted one before it had done already leaves the total."""
        if self._job is None:
            self._start = time.monotonic()
            self._bar.unpause()
        else:
            self._forget(self._steps_left * step_cost(self._job, self._settings))
        self._job, self._steps_left = job, job.steps(self._settings)
        self._bar.set_description_str(self._title(job))
        if self._lines:
            print(f"{self._title(job)}{self._time_left()}", file=sys.stderr, flush=True)

    def _forget(self, cost: float) -> None:
        self._left -= cost
        self._total -= cost
        self._bar.total = self._total

    def _title(self, job: Job) -> str:
        return f"{self._numbers.get(job, '?')}/{len(self._numbers)} {job.title}"

    def _time_left(self) -> str:
        done = self._total - self._left
        if self._start is None or not done:
            return ""
        left = (time.monotonic() - self._start) * self._left / done
        return f", {tqdm.format_interval(left)} left for all"

    def __enter__(self) -> JobProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._job is not None:
            self._forget(self._left)
            self._bar.set_description_str("trained")
        self._bar.close()
