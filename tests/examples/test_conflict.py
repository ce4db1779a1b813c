"""Both gradients of every scale, as the recorder sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from domain_generalization import conflict, study

MakeTrainer = Callable[..., study.Trainer]


def test_recording_both_gradients_changes_nothing(
    tmp_path: Path, trainer: MakeTrainer, small_network: Callable[[], nn.Module], settings: study.Settings
) -> None:
    plain = trainer().quantized(small_network(), study.METHODS["gaqat"]).last
    recorder = conflict.ConflictRecorder()
    recorded = trainer().quantized(small_network(), study.METHODS["gaqat"], step=recorder.step).last
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))

    scales = len(recorder.names)
    assert scales == 6  # two quantizers in each of three layers
    for rows in (recorder.task, recorder.smooth, recorder.frozen, recorder.disorder_task, recorder.disorder_smooth):
        assert [row.shape for row in rows] == [(scales,)] * settings.steps
    assert any((first != second).any() for first, second in zip(recorder.task, recorder.smooth, strict=True))
    assert not any(row.any() for row in recorder.frozen[: settings.window])  # nothing is frozen in the first window
    assert len(set(recorder.most_conflicting(3))) == 3
    conflict.save_conflict_plot(recorder, tmp_path / "conflict.png", threshold=settings.threshold)
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_the_recorded_gradients_are_those_of_the_two_passes(
    trainer: MakeTrainer, small_network: Callable[[], nn.Module], settings: study.Settings
) -> None:
    model = small_network()
    settings = replace(settings, rho=0.0, alpha=0.0)  # no perturbation: both passes are the same
    recorder = conflict.ConflictRecorder()
    run = trainer()
    study.Trainer(settings, run.stream, run.validate).quantized(model, study.METHODS["gaqat"], step=recorder.step)
    for task, smooth in zip(recorder.task, recorder.smooth, strict=True):
        assert task.tolist() == smooth.tolist()
        assert task.any()


def test_recording_needs_two_passes(trainer: MakeTrainer, small_network: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match="two passes of a GAQATOptimizer, not Adam"):
        trainer().quantized(small_network(), study.METHODS["lsq"], step=conflict.ConflictRecorder().step)
