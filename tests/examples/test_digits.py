"""The demo on a tiny setting, and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import digits
from domain_generalization.study.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_registry")
DEMO = ("lsq", "lsq+sagm", "gaqat", "gaqat-flat")

TINY = ["--steps", "4", "--fp32-steps", "4", "--flat-steps", "2", "--eval-every", "4", "--window", "2", "--seeds", "0"]


@pytest.mark.parametrize("methods", [("lsq", "gaqat"), pytest.param(DEMO, marks=pytest.mark.slow)], ids="/".join)
def test_the_command_writes_every_file_and_prints_the_table(methods: tuple[str, ...], tmp_path: Path) -> None:
    """In a new process, so that no import by pytest helps."""
    out = tmp_path / "new" / "folder"
    chosen = [] if methods == DEMO else ["--methods", *methods]
    command = [sys.executable, digits.__file__, *TINY, *chosen, "--targets", "sketch", "--out", str(out)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in out.iterdir()} == {
        "study.json",
        "results.json",
        "samples.png",
        "conflict.png",
        "gaqat.onnx",
        "fp32.onnx",
        "jobs",
        "lock",
    }
    for name in ("samples.png", "conflict.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "gaqat.onnx").stat().st_size < (out / "fp32.onnx").stat().st_size / 2
    assert b"small_resnet.py" not in (out / "fp32.onnx").read_bytes()  # no stack traces

    records = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [(record["method"], record["target"], record["seed"], record["bits"]) for record in records] == [
        (method, "sketch", 0, 3) for method in methods
    ]
    for record in records:
        for key in ("source_validation", "held_out", "last_step", "blurred", "noisy"):
            assert 0 <= record[f"{key}_accuracy"] <= 100
        assert record["seconds"] > 0
        assert record["settings"]["steps"] == 4
        assert record["settings"]["granularity"] == "tensor"
        assert set(record["versions"]) == {"python", "torch", "numpy", "gaqat_optim"}

    text = run.stdout
    for piece in (*(METHODS[name].title for name in methods), "noisy copies", "n=1 paired cell", "W3A3"):
        assert piece in text
    assert "100.00 % the prediction of convert(model)" in text
    assert max(len(line) for line in text.splitlines() if str(out) not in line) <= 79
    assert "What to do next:" in text
    assert "gaqat.onnx in a program of yours" in " ".join(text.split())


def test_a_study_of_lsq_alone_has_no_conflict_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--targets", "printed", "--methods", "lsq", "--bits", "4", "--out", str(tmp_path)]
    assert digits.main(arguments) == 0
    written = {"study.json", "results.json", "samples.png", "lsq.onnx", "fp32.onnx", "jobs", "lock"}
    assert {path.name for path in tmp_path.iterdir()} == written
    text = capsys.readouterr().out
    assert "Nothing to compare" in text
    assert "No conflict plot" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "1"], "--bits: must be from 2 to 8, got 1"),
        (["--bits", "three"], "--bits: 'three' is not a whole number"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--targets", "photo"], "unknown target: photo (choose from handwritten, printed, blended, sketch)"),
        (["--methods", "lsq", "sam"], "unknown method: sam (choose from fp32, fp32+sam, "),
        (["--seeds", "-1"], "--seeds"),
        (["--cells", "3/2"], "--cells: must be i/n with i from 1 to n"),
        (["--jobs", "0"], "--jobs: must be at least 1"),
        (["--threshold", "2"], "--threshold: must be from 0 to 1, got 2"),
        (["--lr", "nan"], "--lr: must be at least 0, got nan"),
    ],
)
def test_bad_values_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        digits.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit):
        digits.main([*TINY, "--out", str(tmp_path / "file")])
    assert "--out: cannot make the folder" in capsys.readouterr().err


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        digits.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--bits", "--targets", "--seeds", "--methods", "--out", "--full", "--steps", "--fp32-steps"):
        assert option in text
    assert all(action.help for action in digits.build_parser()._actions)


def test_lists_may_be_separated_by_spaces_or_commas() -> None:
    options = digits.build_parser().parse_args(["--targets", "sketch,printed", "sketch", "--seeds", "3,4", "5"])
    assert options.targets == ["sketch", "printed"]
    assert options.seeds == [3, 4, 5]


def test_the_demo_has_four_methods() -> None:
    assert tuple(digits.build_parser().parse_args([]).methods) == DEMO
