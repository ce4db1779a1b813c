"""Tasks of a cluster, by submitit's local executor."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

import tiny_study
from domain_generalization.study import cluster
from domain_generalization.study.runner import results
from tiny_study import job


def test_tasks_do_the_jobs_of_their_slices(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    for name, value in tiny_study.environment().items():
        monkeypatch.setenv(name, value)
    arguments = ["--root", str(tiny_root), "--dropout", "0", "--methods", "lsq", "--out", str(tmp_path)]
    options = ["--cluster", "local", "--tasks", "1", "--cluster-options", "timeout_min=5"]
    assert tiny_study.main([*arguments, *options]) == 0
    assert [(r["target"], r["method"]) for r in results(tmp_path)] == [("sketch", "lsq")]
    assert "Written to" in capsys.readouterr().out
    assert list((tmp_path / "cluster").glob("*_log.out"))


def test_a_preempted_task_is_submitted_again(tiny_root: Path, tmp_path: Path) -> None:
    helpers = pytest.importorskip("submitit.helpers")
    task = pickle.loads(pickle.dumps(cluster.Task(tiny_study.tiny_study(tiny_root, tmp_path), [job("lsq")])))
    again = task.checkpoint()
    assert isinstance(again, helpers.DelayedSubmission)
    again.function()
    assert len(results(tmp_path)) == 1


def test_without_submitit_the_extra_is_named(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert tiny_study.main(["--root", str(tiny_root), "--out", str(tmp_path), "--cluster", "slurm"]) == 2
    assert 'pip install ".[cluster]"' in capsys.readouterr().err


def test_slurm_that_is_not_there_is_an_error(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tiny_study.main(["--root", str(tiny_root), "--out", str(tmp_path), "--cluster", "slurm"]) == 2
    assert "--cluster slurm: " in capsys.readouterr().err
