"""The processes of torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import tiny_study
from domain_generalization.study.ranks import Ranks
from domain_generalization.study.storage import read_tensors


def test_a_process_alone_waits_for_nobody() -> None:
    ranks = Ranks()
    assert ranks.part == (0, 1)
    assert ranks.from_first("mine") == "mine"
    assert ranks.sum(torch.ones(2)).tolist() == [1, 1]


def test_two_processes_equal_one_at_the_same_total_batch(tiny_root: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(tiny_root), "--dropout", "0", "--bits", "3", "--methods", "gaqat", "--save-models"]
    arguments += ["--double"]  # in float32, Adam makes steps of full size of gradients that are rounding alone
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    run = subprocess.run(
        [*command, "--rdzv-endpoint", "localhost:0", tiny_study.__file__, *arguments, "--out", str(tmp_path / "two")],
        env=tiny_study.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Written to") == 1
    assert tiny_study.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    two, one = (
        read_tensors(tmp_path / name / "jobs" / "sketch-seed0" / "gaqat-w3" / "model.pt")["last"]
        for name in ("two", "one")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-6, msg=name)
