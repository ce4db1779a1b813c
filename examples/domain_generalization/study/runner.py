"""Many jobs: one after the other, in several processes, or in slices on several machines."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from .data import DataError
from .job_training import run_job
from .jobs import Job, Study
from .methods import METHODS
from .report import Record, in_order
from .storage import StorageError, differences, lock, read_json, write_json, write_whole

DONE, BUSY, FAILED = "done", "busy", "failed"
Progress = Callable[[Job, str], object]  # after every step; with a line after a validation


def plan(targets: Sequence[str], seeds: Sequence[int], bits: Sequence[int], methods: Iterable[str]) -> list[Job]:
    """The jobs of a study, cell by cell. Methods without quantization are trained once for all widths."""
    names = in_order(methods)
    jobs = [
        Job(target, seed, width if METHODS[name].quantized else None, name)
        for seed in seeds
        for target in targets
        for width in bits
        for name in names
    ]
    return list(dict.fromkeys(jobs))


def slice_of(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """The `number`-th of `count` slices, from 1 on. A cell (held-out domain and seed) is in one slice as a whole."""
    cells = list(dict.fromkeys((job.target, job.seed) for job in jobs))[number - 1 :: count]
    return [job for job in jobs if (job.target, job.seed) in cells]


def with_origins(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, and before each those that it starts from."""
    found: dict[Job, None] = {}
    for job in jobs:
        chain = [job]
        while (origin := chain[-1].origin) is not None:
            chain.append(origin)
        found.update(dict.fromkeys(reversed(chain)))
    return list(found)


def prepare(study: Study) -> None:
    """Write down what the folder is for, or check that it is for this.

    Raises:
        StorageError: the folder has another data set or other settings; the message names each difference.
    """
    mine = {
        "data": study.data.name,
        "measures": dict(study.data.measures),
        "identity": dict(study.data.identity()),
        "settings": asdict(study.settings),
    }
    path = study.out / "study.json"
    with lock(study.out / "lock"):
        there = read_json(path)
        if there is None:
            write_json(path, mine)
        elif found := differences(there, mine):
            raise StorageError(
                f"{study.out}: holds a study with other settings:\n  " + "\n  ".join(found) + "\nChoose another --out, "
                "or the same settings."
            )


def attempt(study: Study, job: Job, failed: set[Job], progress: Progress) -> str:
    """Train a job and before it what it starts from, unless it is done, or in the hands of another process.

    An error is written to the job's folder, and the job added to `failed`.
    """
    if job in failed:
        return FAILED
    try:
        return _attempt(study, job, failed, progress)
    except Exception as error:
        known = isinstance(error, (DataError, StorageError))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        _write_error(study, job, reason, "" if known else traceback.format_exc())
        failed.add(job)
        if study.ranks.world > 1:  # the others wait for this process: torchrun ends them
            raise
        return FAILED


def _attempt(study: Study, job: Job, failed: set[Job], progress: Progress) -> str:
    ranks = study.ranks
    if ranks.from_first(study.result(job) is not None):
        return DONE
    if job.origin is not None:
        outcome = attempt(study, job.origin, failed, progress)
        if outcome == FAILED:
            raise StorageError(f"what it starts from, {job.origin.name}, failed")
        if outcome == BUSY:
            return BUSY
    own_lock = lock(study.folder(job) / "lock")
    if not ranks.from_first(ranks.rank > 0 or _acquired(own_lock)):
        return BUSY
    try:
        # Another process may have done it since.
        if not ranks.from_first(study.result(job) is not None):
            run_job(study, job, lambda line: progress(job, line))
        return DONE
    finally:
        own_lock.release()


def _acquired(own_lock: Any) -> bool:
    try:
        own_lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _write_error(study: Study, job: Job, reason: str, details: str = "") -> None:
    try:
        text = f"{reason}\n{details and chr(10)}{details}"
        write_whole(study.folder(job) / "error.txt", lambda part: part.write_text(text, encoding="utf-8"))
    except StorageError:
        pass  # on a full disk: the list at the end says that the job is not done


def work(study: Study, jobs: Sequence[Job], progress: Progress = lambda job, line: None) -> None:
    """Train all jobs that are not done, and wait for those that other processes train. A failure stops no other job."""
    if study.threads is not None:
        torch.set_num_threads(study.threads)
    failed: set[Job] = set()
    waiting = list(jobs)
    while waiting:
        before = len(waiting)
        waiting = [job for job in waiting if attempt(study, job, failed, progress) == BUSY]
        if len(waiting) == before:
            time.sleep(1)
    if study.ranks.rank == 0:
        save_results(study)


def _worker(study: Study, jobs: Sequence[Job], number: int, count: int) -> None:
    if study.device == "cuda":
        study = replace(study, device=f"cuda:{number % torch.cuda.device_count()}")
    first = number * len(jobs) // count  # processes begin in different cells
    work(study, [*jobs[first:], *jobs[:first]], lambda job, line: print(f"{job.title}: {line}") if line else None)


def work_in_processes(study: Study, jobs: Sequence[Job], count: int) -> list[str]:
    """`work` in so many processes, one per GPU where there are some. Returns a line for each that was killed."""
    if study.threads is None and study.device == "cpu":
        study = replace(study, threads=max(1, (os.cpu_count() or 1) // count))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(study, jobs, number, count)) for number in range(count)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    return [
        f"process {number + 1} of {count} ended with status {process.exitcode}"
        for number, process in enumerate(processes)
        if process.exitcode
    ]


def undone(study: Study, jobs: Iterable[Job]) -> list[str]:
    """A line for each job without a result: why."""
    lines = []
    for job in jobs:
        try:
            if study.result(job) is not None:
                continue
            reason = (study.folder(job) / "error.txt").read_text(encoding="utf-8").strip().partition("\n\n")[0]
        except FileNotFoundError:
            reason = "not done"
        except StorageError as error:
            reason = str(error)
        lines.append(f"{job.name}: {reason}")
    return lines


def results(out: Path) -> list[Record]:
    """The records of all methods that are done in a folder, cell by cell."""
    records: list[Record] = []
    for path in sorted(out.glob("jobs/*/*/done.json")):
        records += [record for record in read_json(path)["records"] if "method" in record]
    order = {name: number for number, name in enumerate(in_order({record["method"] for record in records}))}
    return sorted(records, key=lambda r: (r["seed"], r["target"], r["bits"], order[r["method"]]))


def save_results(study: Study) -> None:
    """Write results.json anew."""
    with lock(study.out / "lock"):
        write_json(study.out / "results.json", results(study.out))
