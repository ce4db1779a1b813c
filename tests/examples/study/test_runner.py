"""Plans, slices, folders, failures, and several processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from domain_generalization.study import runner
from domain_generalization.study.jobs import Job
from domain_generalization.study.storage import StorageError, lock
from tiny_study import job, tiny_study


def test_a_plan_has_every_cell_and_trains_fp32_once_for_all_widths() -> None:
    jobs = runner.plan(["a", "b"], [0, 1], [3, 4], ["lsq", "fp32"])
    assert len(jobs) == len(set(jobs)) == 2 * 2 * (2 + 1)
    assert [(j.method, j.bits) for j in jobs if (j.target, j.seed) == ("a", 0)] == [
        ("fp32", None),
        ("lsq", 3),
        ("lsq", 4),
    ]


def test_slices_are_whole_cells_and_complete() -> None:
    jobs = runner.plan(["a", "b", "c"], [0, 1], [3], ["lsq", "gaqat-flat"])
    slices = [runner.slice_of(jobs, number, 4) for number in (1, 2, 3, 4)]
    assert sorted((j for part in slices for j in part), key=repr) == sorted(jobs, key=repr)
    cells = [{(j.target, j.seed) for j in part} for part in slices]
    assert sum(map(len, cells)) == 6
    assert [j.method for j in runner.with_origins(slices[0])][:4] == ["start", "lsq", "flat-start", "gaqat-flat"]


def test_what_is_done_is_not_done_again_and_results_are_collected(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    steps: list[Job] = []
    runner.work(study, [job("lsq")], lambda one, line: steps.append(one))
    assert len(steps) == study.settings.fp32_steps + study.settings.steps
    runner.work(study, [job("lsq"), job("fp32", None)], lambda one, line: steps.append(one))
    assert len(steps) == study.settings.fp32_steps + 2 * study.settings.steps
    records = runner.results(tmp_path)
    assert [(r["method"], r["bits"]) for r in records] == [("lsq", 3), ("fp32", 32)]
    assert (tmp_path / "results.json").exists()
    assert "sources" in (study.folder(job("lsq")) / "log.txt").read_text()
    assert not (study.folder(job("lsq")) / "checkpoint.pt").exists()


def test_a_folder_with_other_settings_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    runner.prepare(study)
    runner.prepare(study)
    with pytest.raises(StorageError) as caught:
        runner.prepare(replace(study, settings=replace(study.settings, rho=0.25, steps=9)))
    message = str(caught.value)
    assert "settings.steps: 4 there, 9 here" in message
    assert "settings.rho: 0.5 there, 0.25 here" in message
    assert "window" not in message


def test_a_failure_stops_no_other_job_and_is_listed(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path, rho=float("nan"))  # SAGM refuses it
    jobs = [job("lsq+sagm"), job("lsq"), job("lsq+sagm-flat")]
    runner.work(study, jobs)
    assert study.result(job("lsq")) is not None
    lines = runner.undone(study, jobs)
    assert len(lines) == 2
    assert lines[0].startswith("sketch-seed0/lsq+sagm-w3: ValueError: SAGM: rho must be a finite number")
    assert "sketch-seed0/lsq+sagm-flat-w3: what it starts from, sketch-seed0/flat-start, failed" in lines[1]
    assert "Traceback" in (study.folder(job("lsq+sagm")) / "error.txt").read_text()


def test_a_broken_result_is_named_and_stops_no_other_job(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    broken = study.folder(job("lsq")) / "done.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(StorageError, match=r"done.json: cannot be read .* Remove it to have this part computed anew"):
        runner.work(study, [job("lsq"), job("lsq+sagm")])  # at its end, in results.json
    assert study.result(job("lsq+sagm")) is not None
    assert [line.partition(": ")[0] for line in runner.undone(study, [job("lsq"), job("lsq+sagm")])] == [
        job("lsq").name
    ]


def test_jobs_of_another_process_are_waited_for(tiny_root: Path, tmp_path: Path) -> None:
    study = tiny_study(tiny_root, tmp_path)
    runner.work(study, [Job("sketch", 0, None, "start")])
    child = os.fork()
    if child == 0:
        with lock(study.folder(job("lsq")) / "lock"):
            (tmp_path / "locked").touch()
            signal.pause()
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    assert runner.attempt(study, job("lsq"), set(), lambda one, line: None) == "busy"
    os.kill(child, signal.SIGKILL)  # the system ends its lock
    os.waitpid(child, 0)
    assert runner.attempt(study, job("lsq"), set(), lambda one, line: None) == "done"


def test_two_processes_do_what_one_does(tiny_root: Path, tmp_path: Path) -> None:
    jobs = [job("lsq"), job("lsq+sagm"), Job("photo", 0, 3, "lsq")]
    two, one = tiny_study(tiny_root, tmp_path / "two"), tiny_study(tiny_root, tmp_path / "one")
    assert runner.work_in_processes(two, jobs, 2) == []
    runner.work(one, jobs)

    def accuracies(out: Path) -> list[dict[str, float]]:
        return [{key: r[key] for key in r if key.endswith("accuracy")} for r in runner.results(out)]

    assert accuracies(two.out) == accuracies(one.out)
    assert len(accuracies(two.out)) == 3


def test_a_process_that_is_killed_is_reported(tiny_root: Path, tmp_path: Path) -> None:
    study = replace(tiny_study(tiny_root, tmp_path), threads=0)  # torch refuses it: the process dies
    (line,) = runner.work_in_processes(study, [job("lsq")], 1)
    assert line == "process 1 of 1 ended with status 1"
    assert runner.undone(study, [job("lsq")]) == ["sketch-seed0/lsq-w3: not done"]
