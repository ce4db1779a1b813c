"""Both gradients of every scale, as the recorder sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from domain_generalization import conflict
from domain_generalization.study.jobs import Job, Study
from domain_generalization.study.runner import attempt
from tiny_study import job, tiny_study


def finish(study: Study, method: str) -> dict[str, object]:
    failed: set[Job] = set()
    assert attempt(study, job(method), failed, lambda job, line: None) == "done", failed
    weights = study.weights(job(method))
    assert weights is not None
    return weights


def recorded(study: Study, method: str) -> conflict.ConflictRecorder:
    recorder = conflict.ConflictRecorder()
    recorder.load_state_dict(finish(replace(study, example=job(method)), method)["recorder"])  # type: ignore[arg-type]
    return recorder


def test_recording_both_gradients_changes_nothing(tiny_root: Path, tmp_path: Path) -> None:
    changes = {"steps": 6, "threshold": 0.6}
    plain = finish(tiny_study(tiny_root, tmp_path / "plain", save_models=True, **changes), "gaqat")["last"]
    study = tiny_study(tiny_root, tmp_path / "recorded", **changes)
    recorder = recorded(study, "gaqat")
    last = study.weights(job("gaqat"))["last"]  # type: ignore[index]
    assert all(torch.equal(value, last[name]) for name, value in plain.items())  # type: ignore[attr-defined]

    scales = len(recorder.names)
    assert scales == 6  # two quantizers in each of three layers
    for rows in (
        recorder.value,
        recorder.task,
        recorder.smooth,
        recorder.frozen,
        recorder.disorder_task,
        recorder.disorder_smooth,
    ):
        assert [row.shape for row in rows] == [(scales,)] * 6
    assert any((first != second).any() for first, second in zip(recorder.task, recorder.smooth, strict=True))
    assert not any(row.any() for row in recorder.frozen[:2])  # nothing is frozen in the first window
    assert len(set(recorder.most_conflicting(3))) == 3
    conflict.save_conflict_plot(recorder, tmp_path / "conflict.png", threshold=0.6, window=2)
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_the_recorded_gradients_are_those_of_the_two_passes(tiny_root: Path, tmp_path: Path) -> None:
    recorder = recorded(tiny_study(tiny_root, tmp_path, rho=0.0, alpha=0.0), "gaqat")  # both passes are the same
    for task, smooth in zip(recorder.task, recorder.smooth, strict=True):
        assert task.tolist() == smooth.tolist()
        assert task.any()


def test_with_an_interval_the_steps_with_two_passes_are_recorded(tiny_root: Path, tmp_path: Path) -> None:
    recorder = recorded(tiny_study(tiny_root, tmp_path, steps=6, interval=3), "gaqat")
    assert len(recorder.task) == len(recorder.smooth) == len(recorder.value) == len(recorder.disorder_task) == 2
    conflict.save_conflict_plot(recorder, tmp_path / "conflict.png", threshold=0.6, window=2)
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_recording_needs_two_passes() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match="two passes of a GAQATOptimizer, not Adam"):
        conflict.ConflictRecorder().begin(optimizer)
