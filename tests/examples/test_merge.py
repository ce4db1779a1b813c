"""One table of the results of several folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import merge
from domain_generalization.study.storage import write_json

SETTINGS = {"oracle": True, "rho": 0.5}


def write(folder: Path, seed: int, settings: dict[str, Any] = SETTINGS, **methods: float) -> str:
    measures = {"held_out_accuracy": "chosen by source validation", "last_step_accuracy": "last step"}
    write_json(folder / "study.json", {"data": "PACS", "measures": measures, "settings": settings})
    for name, accuracy in methods.items():
        record = {"method": name, "target": "sketch", "seed": seed, "bits": 3, "seconds": 2.0}
        record |= {f"{key}_accuracy": accuracy for key in ("held_out", "last_step", "oracle")}
        write_json(folder / "jobs" / f"sketch-seed{seed}" / f"{name}-w3" / "done.json", {"records": [record]})
    return str(folder)


def test_folders_make_one_table_of_three_selections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / f"{seed}", seed, lsq=50.0 + seed, gaqat=52.0 + 2 * seed) for seed in range(3)]
    assert merge.main(folders) == 0
    text = capsys.readouterr().out
    for piece in ("chosen by source validation", "last step", "oracle: best", "n=3 paired cells", "+3.0 +- 0.6"):
        assert piece in text
    assert "3 of 3" in text
    assert max(map(len, text.splitlines())) <= 79
    for layout, piece in (("markdown", "| GAQAT "), ("latex", "\\begin{tabular}")):
        assert merge.main([*folders, "--layout", layout]) == 0
        assert piece in capsys.readouterr().out


def test_a_cell_that_a_method_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / "a", 0, lsq=50.0, gaqat=52.0), write(tmp_path / "b", 1, lsq=51.0)]
    assert merge.main(folders) == 0
    assert "* GAQAT lacks sketch seed 1" in capsys.readouterr().out


def test_what_does_not_belong_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", 0, lsq=50.0)
    for other, message in (
        (write(tmp_path / "b", 1, {**SETTINGS, "rho": 0.1}, lsq=51.0), "settings.rho: 0.5 there, 0.1 here"),
        (write(tmp_path / "c", 0, lsq=51.0), "another result for"),
        (str(tmp_path), "no study.json in it"),
    ):
        assert merge.main([first, other]) == 2
        assert message in capsys.readouterr().err
    assert merge.main([first, write(tmp_path / "d", 0, lsq=50.0)]) == 0  # the same result twice


def test_folders_without_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main([write(tmp_path / "a", 0)]) == 2
    assert "no method is done" in capsys.readouterr().err
    (tmp_path / "a" / "study.json").write_text(json.dumps([])[:1])
    assert merge.main([str(tmp_path / "a")]) == 2
