"""The jobs of a study as an array job, by submitit: on Slurm, or with its local executor."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jobs import Job, Study
from .runner import work


class ClusterError(Exception):
    """Nothing could be submitted. The message is for users."""


@dataclass(frozen=True)
class Task:
    """What one task of the array does. It goes on where it was if Slurm takes its machine away."""

    study: Study
    jobs: Sequence[Job]

    def __call__(self) -> None:
        work(self.study, self.jobs, lambda job, line: print(f"{job.title}: {line}", flush=True) if line else None)

    def checkpoint(self) -> Any:
        """Called by submitit when the task is preempted or at its time limit: submit it again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(study: Study, slices: Sequence[Sequence[Job]], cluster: str, parameters: Mapping[str, Any]) -> list[Any]:
    """Submit a task for each slice. Returns submitit's jobs.

    Args:
        study: the study; its folder has to be the same on all machines.
        slices: the jobs of each task.
        cluster: "slurm", or "local" for processes on this machine.
        parameters: what submitit's `update_parameters` takes, such as `slurm_partition`, `gpus_per_node`,
            `timeout_min`.

    Raises:
        ClusterError: submitit is missing, or it cannot submit.
    """
    try:
        import submitit
    except ImportError as error:
        raise ClusterError('--cluster needs submitit. In a copy of the repository: pip install ".[cluster]"') from error
    # The tasks import this package.
    examples = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [examples, os.environ.get("PYTHONPATH", "")]))
    try:
        executor = submitit.AutoExecutor(folder=study.out / "cluster", cluster=cluster)
        executor.update_parameters(**({"timeout_min": 24 * 60} | dict(parameters)))
        with executor.batch():
            return [executor.submit(Task(study, jobs)) for jobs in slices]
    except Exception as error:
        raise ClusterError(f"--cluster {cluster}: {type(error).__name__}: {error}") from error


def wait(jobs: Sequence[Any]) -> list[str]:
    """Wait for tasks. Returns a line for each that did not end itself."""
    lines = []
    for job in jobs:
        try:
            job.result()
        except Exception as error:
            lines.append(f"task {job.job_id}: {str(error).strip().splitlines()[-1]}")
        print(job.stdout() or "", end="", file=sys.stderr)
    return lines
