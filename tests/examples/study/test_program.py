"""The command line from end to end: in this process, as torchrun's processes, and as a cluster's tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny_study
from domain_generalization.study.storage import read_tensors

BASE = ["--dropout", "0", "--seeds", "0", "--bits", "3"]


def test_a_study_prints_its_tables_within_a_terminal(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--root",
        str(tiny_root),
        "--out",
        str(tmp_path),
        *BASE,
        "--methods",
        "fp32",
        "lsq",
        "lsq+sagm",
    ]
    assert tiny_study.main([*arguments, "--average", "swad", "--bits", "3", "4", "--oracle"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if not line.startswith("Written to")) <= 79
    for piece in ("Preset published", "our reading", "fp32 (SWAD)", "W3A3, chosen by", "W4A4, last step", "oracle"):
        assert piece in text
    records = json.loads((tmp_path / "results.json").read_text())
    assert len(records) == 2 * (1 + 2 + 2)
    assert records[0]["settings"]["average"] == "swad"

    assert tiny_study.main([*arguments, "--average", "none", "--bits", "3", "4", "--oracle"]) == 2
    assert "settings.average: 'swad' there, 'none' here" in capsys.readouterr().err
    assert tiny_study.main([*arguments, "--average", "swad", "--bits", "4", "--oracle"]) == 0
    assert "3 of 3 jobs were done before" in capsys.readouterr().out


def test_a_failed_job_ends_the_program_with_status_1_and_the_list(
    image_tree: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_tree("PACS", ("art_painting", "cartoon", "photo", "sketch"))
    broken = root / "PACS" / "photo" / "dog" / "pic_001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    arguments = ["--root", str(root), "--out", str(tmp_path / "out"), *BASE, "--methods", "lsq", "lsq+sagm"]
    assert tiny_study.main([*arguments, "--targets", "sketch", "photo", "--holdout", "0.5"]) == 1
    output = capsys.readouterr()
    assert "not everything was done" in output.err
    assert f"{broken}: cannot be read as an image" in output.err or broken.name in output.err


def test_models_are_kept_and_every_row_is_exported(tiny_root: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments = ["--root", str(tiny_root), "--out", str(tmp_path), *BASE, "--methods", "fp32", "gaqat"]
    assert tiny_study.main([*arguments, "--export", "--round-biases"]) == 0
    for name in ("fp32", "gaqat-w3"):
        folder = tmp_path / "jobs" / "sketch-seed0" / name
        assert set(read_tensors(folder / "model.pt")) == {"last", "selected"}
        session = onnxruntime.InferenceSession(folder / "last.onnx", providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: torch.rand(2, 3, 16, 16).numpy()})
        assert scores.shape == (2, 2)
