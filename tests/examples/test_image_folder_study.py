"""The scripts on image folders, end to end on small image trees."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import domainnet
import folders
import pacs
from domain_generalization import image_folder_study
from domain_generalization.image_folders import DOMAINNET, PACS, VLCS

EXAMPLES = Path(pacs.__file__).parent
Tree = Callable[..., Path]

TINY = ["--no-pretrained", "--size", "32", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
TINY += ["--steps", "2", "--fp32-steps", "1", "--flat-steps", "1", "--eval-every", "1"]


def test_domainnet_as_a_command_with_a_worker(image_tree: Tree, tmp_path: Path) -> None:
    """In a new process, so that no import by pytest helps."""
    root, out = image_tree("domain_net", DOMAINNET.domains, count=1), tmp_path / "results"
    arguments = ["--root", str(root), "--targets", "clipart", "--methods", "gaqat", "--out", str(out), *TINY]
    arguments += ["--seeds", "0"]
    run = subprocess.run(
        [sys.executable, domainnet.__file__, *arguments, "--workers", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "Written to" in run.stdout
    (record,) = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (record["target"], record["method"]) == ("clipart", "gaqat")
    assert (record["settings"]["alpha"], record["settings"]["weight_decay"]) == (5e-4, 1e-6)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, r"torchvision is not installed\. In a copy of the repository: pip install"),
        (
            "raise RuntimeError('built forine')",
            "cannot be imported beside torch .* built for",
        ),
        pytest.param(
            "raise OSError('libcudart.so: no such file')",
            "cannot be imported beside torch .* libcudart.so",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["missing", "broken", "without its libraries"],
)
def test_a_torchvision_that_cannot_be_imported_ends_the_script_with_what_to_do(
    fault: str | None, message: str, image_tree: Tree, tmp_path: Path
) -> None:
    root = image_tree("PACS", PACS.domains, count=2)
    begin = "import sys; sys.modules['torchvision'] = None\n" if fault is None else ""
    if fault is not None:
        (tmp_path / "first" / "torchvision").mkdir(parents=True)
        (tmp_path / "first" / "torchvision" / "__init__.py").write_text(fault)
        begin = f"import sys; sys.path.insert(0, {str(tmp_path / 'first')!r})\n"
    program = f"{begin}sys.path.insert(0, {str(EXAMPLES)!r})\nimport pacs\nsys.exit(pacs.main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", program, "--root", str(root), *TINY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 2, run.stderr
    assert re.search(message, run.stderr)
    assert "Traceback" not in run.stderr
    if fault is not None:
        assert "Install the version that belongs to it: pip install" in run.stderr


@pytest.mark.usefixtures("torchvision")
def test_another_collection_end_to_end(image_tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_tree("VLCS", VLCS.domains, count=2)
    out = tmp_path / "results"
    arguments = ["--root", str(root), "--targets", "SUN09", "--bits", "3", "--seeds", "0", "--out", str(out), *TINY]
    arguments += ["--methods", "lsq", "--preset", "recommended", "--cache", str(tmp_path / "cache")]
    assert folders.main(["--collection", "vlcs", *arguments]) == 0
    (record,) = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (record["target"], record["seed"], record["bits"], record["method"]) == ("SUN09", 0, 3, "lsq")
    for key in ("source_validation_accuracy", "held_out_accuracy", "last_step_accuracy"):
        assert 0 <= record[key] <= 100
    assert (record["settings"]["dropout"], record["settings"]["learning_rate"]) == (0.5, 1e-5)
    assert record["settings"]["cached"] is True
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 4
    assert json.loads((out / "study.json").read_text())["identity"]["start"] == "random"
    assert "chosen by source validation" in capsys.readouterr().out


def test_collections_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        folders.main(["--collection", "cifar"])
    assert "invalid choice: 'cifar'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        folders.main(["--collection", "vlcs", "--help"])
    assert "ROOT/VLCS/<domain>/<class>/<image>" in " ".join(capsys.readouterr().out.split())
    assert set(image_folder_study.PUBLISHED) == {"pacs", "vlcs", "officehome", "terraincognita", "domainnet"}


def test_a_missing_domain_ends_the_script_with_the_reason(image_tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_tree("PACS", PACS.domains[:3])
    assert pacs.main(["--root", str(root), *TINY]) == 2
    error = capsys.readouterr().err
    assert "missing domain sketch" in error
    assert "Traceback" not in error


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("toaster", "cuda:99"):
        with pytest.raises(SystemExit):
            pacs.main(["--root", str(tmp_path), "--device", device])
        assert f"--device: {device} cannot be used here" in capsys.readouterr().err
