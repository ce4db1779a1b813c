"""The digits study of ``examples/digits.py`` in its own settings, with every network kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figure_style import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from domain_generalization.digit_study import DigitData
from domain_generalization.study.jobs import Job, Study
from domain_generalization.study.runner import plan, prepare, undone, work
from domain_generalization.study.settings import make_settings

TARGET = "sketch"  # the held-out domain of all pictures
SETTINGS = make_settings("recommended", DigitData.presets["recommended"])


def job(method: str, *, seed: int = 0, bits: int | None = 3) -> Job:
    """A method in a cell."""
    return Job(TARGET, seed, bits, method)


def train(folder: Path, methods: Sequence[str], *, seeds: Sequence[int] = (0,), bits: Sequence[int] = (3,)) -> Study:
    """Train what is not in the folder yet. The gradients of GAQAT with seed 0 at 3 bits are recorded.

    Raises:
        RuntimeError: a training failed.
    """
    study = Study(DigitData(), SETTINGS, folder, threads=1, save_models=True, example=job("gaqat"))
    jobs = plan([TARGET], seeds, bits, methods)
    prepare(study)
    work(study, jobs, lambda job, line: print(f"{job.title}: {line}", flush=True) if line else None)
    if problems := undone(study, jobs):
        raise RuntimeError("not everything was trained:\n" + "\n".join(problems))
    return study


def record(study: Study, of: Job) -> dict[str, Any]:
    """What the study recorded of a job."""
    result = study.result(of)
    assert result is not None
    return dict(result["records"][0])
