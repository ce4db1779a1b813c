"""The main function of every script: read the command line, run the jobs, print the table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .cluster import ClusterError, submit, wait
from .data import DataError, DataSet
from .jobs import Job, Study
from .options import settings_from, study_parser
from .progress import JobProgress, next_steps, wrapped
from .ranks import end_ranks, start_ranks
from .report import Cell, Record, all_cells, comparisons, costs, table, verdict
from .runner import (
    plan,
    prepare,
    results,
    save_results,
    slice_of,
    undone,
    with_origins,
    work,
    work_in_processes,
)
from .settings import OUR_READING, Settings
from .storage import StorageError

__all__ = ["Finished", "run_program", "study_parser"]


@dataclass(frozen=True)
class Finished:
    """A study whose jobs have ended, for what a script prints of it.

    Attributes:
        study: the study.
        jobs: the methods in their cells.
        records: those of the jobs that are done.
        cells: the cells that the command asked for.
        seconds: how long it took.
    """

    study: Study
    jobs: Sequence[Job]
    records: Sequence[Record]
    cells: Sequence[Cell]
    seconds: float


def run_program(
    parser: argparse.ArgumentParser,
    make_data: Callable[[argparse.Namespace], DataSet],
    argv: Sequence[str] | None = None,
    *,
    example: Callable[[Sequence[Job]], Job | None] = lambda jobs: None,
    finish: Callable[[Finished], None] | None = None,
) -> int:
    """Run the study that the command line describes.

    Args:
        parser: from `study_parser`.
        make_data: the data set that the options describe.
        argv: the command line, by default that of the process.
        example: chooses the job whose gradients are recorded.
        finish: prints the results; by default the tables, differences and costs.

    Returns:
        The exit status: 0, 1 if a job failed, 2 if nothing could start.
    """
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    try:
        device = _device(parser, options)
        data = make_data(options)
        data.check()
        jobs = plan(options.targets, options.seeds, options.bits, options.methods)
        if options.cells:
            jobs = slice_of(jobs, *options.cells)
        study = Study(
            data,
            settings_from(options, data),
            options.out,
            device=device,
            workers=options.workers,
            threads=options.threads,
            save_every=options.save_every,
            save_models=options.save_models or options.export,
            example=example(jobs),
        )
        if study.ranks.world > 1 and (options.jobs > 1 or options.cluster or options.export):
            parser.error("torchrun's processes train each job together: --jobs, --cluster and --export go without it")
        return _run(parser, options, study, jobs, finish or print_results)
    except (DataError, StorageError, ClusterError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
        end_ranks()


def _device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device} cannot be used here: {str(error).splitlines()[0]}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    return str(start_ranks(options.device))


def _run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    study: Study,
    jobs: Sequence[Job],
    finish: Callable[[Finished], None],
) -> int:
    start = time.perf_counter()
    ranks = study.ranks
    error: Exception | None = None
    if ranks.rank == 0:
        try:
            _announce(options, study, jobs)
        except StorageError as caught:
            error = caught
    ranks.raise_first_error(error)  # the others begin when the folder is prepared
    problems: list[str] = []
    if options.cluster:
        tasks = [slice_of(jobs, number + 1, options.tasks) for number in range(options.tasks)]
        submitted = submit(study, [task for task in tasks if task], options.cluster, dict(options.cluster_options))
        if options.cluster == "slurm":
            print(f"Submitted: {', '.join(job.job_id for job in submitted)}. Logs are in {study.out / 'cluster'}.")
            print(f"Later: python {Path(sys.argv[0]).with_name('merge.py')} {study.out}")
            return 0
        problems = wait(submitted)
    elif options.jobs > 1:
        problems = work_in_processes(study, jobs, options.jobs)
    else:
        _work_here(study, jobs)
    if ranks.rank > 0:
        return 0
    save_results(study)
    problems += undone(study, jobs)
    if options.export:
        problems += _export(study, jobs)
    wanted = {(job.target, job.seed, job.bits or 32, job.method) for job in jobs}
    records = [r for r in results(study.out) if _key(r, study.settings) in wanted]
    cells = all_cells(records, [(job.target, job.seed) for job in jobs])
    if records:
        finish(Finished(study, jobs, records, cells, time.perf_counter() - start))
    if problems:
        print(f"{parser.prog}: error: not everything was done:", file=sys.stderr)
        for line in dict.fromkeys(problems):
            print(f"  {line}", file=sys.stderr)
    return 1 if problems else 0


def _key(record: Record, settings: Settings) -> tuple[str, int, int, str]:
    method = record["method"].removesuffix(f"+{settings.average}")
    return record["target"], record["seed"], record["bits"], method


def _announce(options: argparse.Namespace, study: Study, jobs: Sequence[Job]) -> None:
    """Prepare the folder, and say what is special about this run."""
    prepare(study)
    settings = study.settings
    if options.preset == "published":
        print("Preset published. What the papers leave open, and our reading of it:")
        for line in OUR_READING.values():
            print(wrapped("- " + line.format(**asdict(settings)), indent="  "))
        print()
    done = sum(study.result(job) is not None for job in jobs)
    left = [job for job in with_origins(jobs) if study.result(job) is None]
    if done:
        print(f"{done} of {len(jobs)} jobs were done before, in {study.out}.")
    if left:
        steps = sum(job.steps(settings) for job in left)
        print(wrapped(f"Training {len(left)} networks, {steps:,} steps in all, on {study.data.name}."), flush=True)


def _work_here(study: Study, jobs: Sequence[Job]) -> None:
    left = [job for job in with_origins(jobs) if study.result(job) is None]
    with JobProgress(left, study.settings, disable=study.ranks.rank > 0 or not left) as progress:
        work(study, jobs, progress)


def _export(study: Study, jobs: Sequence[Job]) -> list[str]:
    """Write an ONNX file for each row whose weights were kept. Returns a line for each that could not be written."""
    from ..deployment import export_job

    problems = []
    for job in jobs:
        if study.result(job) is None:
            continue
        try:
            export_job(study, job)
        except Exception as error:
            problems.append(f"{job.name}: not exported: {error}")
    return problems


def print_results(finished: Finished) -> None:
    """Tables, differences to LSQ, the verdict, and costs."""
    study, records = finished.study, finished.records
    measures = dict(study.data.measures)
    if study.settings.oracle:
        measures["oracle_accuracy"] = "oracle: best on the held-out domain, not a fair choice"
    methods = {job.method for job in finished.jobs} | {record["method"] for record in records}
    print_report(records, measures, methods=methods, cells=finished.cells, main=study.data.main_measure)
    out = study.out
    print(f"\nWritten to {out / 'results.json'}.\n")
    script = Path(sys.argv[0])
    kept = f"The networks are in {out / 'jobs'}: model.pt, and last.onnx where --export was given."
    print(
        next_steps(
            f"More certainty: python {script} --out {out} --seeds ... with further seeds. What is done is kept.",
            f"A table for a paper: python {script.with_name('merge.py')} {out} --layout latex",
            kept
            if study.save_models
            else "The networks as ONNX files: the same command in another --out, with --export.",
        )
    )


def print_report(
    records: Sequence[Record], measures: dict[str, str], *, main: str, layout: str = "simple", **rows: Any
) -> None:
    """The tables of these records, what their differences mean, and costs."""
    print(table(records, measures, layout=layout, **rows))
    where = "by source validation" if main == "held_out_accuracy" else "at the last step"
    if differences := comparisons(records, main, layout):
        print(f"\nDifferences to LSQ {where}, over all widths\n\n{differences}")
    print()
    for text in (verdict(records, main, where=where), costs(records)):
        if text:
            print(wrapped(text))
