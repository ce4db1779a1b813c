"""examples/pacs.py and examples/domainnet.py, end to end on small image trees."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import domainnet
import pacs
from domain_generalization import image_folder_study, resnet50
from domain_generalization.image_folders import DOMAINNET, PACS, find_domains, load_split

EXAMPLES = Path(pacs.__file__).parent
Tree = Callable[..., Path]

TINY = ["--no-pretrained", "--crop", "64", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
TINY += ["--steps", "2", "--fp32-steps", "1", "--flat-steps", "1", "--eval-every", "1"]


def test_as_a_command_in_the_environment_that_make_sets_up(image_tree: Tree, tmp_path: Path) -> None:
    """As a user runs it, with a worker: nothing that pytest imported before helps."""
    root, out = image_tree("PACS", PACS.domains, count=2), tmp_path / "results"
    arguments = ["--root", str(root), "--targets", "photo", "--methods", "gaqat", "--out", str(out), *TINY]
    done = subprocess.run(
        [sys.executable, pacs.__file__, *arguments, "--workers", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Written to" in done.stdout
    (record,) = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["target"] == "photo"


def test_a_worker_that_starts_anew_reads_images(image_tree: Tree, tmp_path: Path) -> None:
    """As DataLoader's do on Windows and macOS: the first that they hear of torchvision is the data set."""
    root = image_tree("PACS", PACS.domains, count=3)
    split = load_split(find_domains(root, PACS)["photo"], holdout=0.3, seed=0, crop=32)
    assert split.training[0][0].shape == (3, 32, 32)  # In this process it has its images already.
    (tmp_path / "pickled").write_bytes(pickle.dumps((split.training, split.holdout, split.whole)))
    program = "import pickle, sys; print([len(d) * d[0][0].numel() for d in pickle.load(open(sys.argv[1], 'rb'))])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pickled")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([len(d) * 3 * 32 * 32 for d in (split.training, split.holdout, split.whole)])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, r"torchvision is not installed\. In a copy of the repository: pip install"),
        (
            "raise RuntimeError('built forine')",
            "cannot be imported beside torch .* built for",
        ),
        ("raise OSError('libcudart.so: no such file')", "cannot be imported beside torch .* libcudart.so"),
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
    done = subprocess.run(
        [sys.executable, "-c", program, "--root", str(root), *TINY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    if fault is not None:
        assert "Install the version that belongs to it: pip install" in done.stderr


@pytest.mark.usefixtures("torchvision")
def test_pacs_end_to_end(image_tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_tree("PACS", PACS.domains, count=2)
    out = tmp_path / "results"
    arguments = ["--root", str(root), "--targets", "sketch", "--bits", "3", "--window", "2", "--out", str(out), *TINY]
    assert pacs.main(arguments) == 0
    records = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [record["method"] for record in records] == ["lsq", "lsq+sagm", "gaqat", "gaqat-flat"]
    for record in records:
        assert (record["target"], record["seed"], record["bits"]) == ("sketch", 0, 3)
        for key in ("source_validation_accuracy", "held_out_accuracy", "last_step_accuracy"):
            assert 0 <= record[key] <= 100
        assert record["settings"]["dropout"] == 0.5
        assert record["settings"]["start"] == "random"
    text = capsys.readouterr().out
    assert "GAQAT, flat start" in text
    assert "chosen by source validation" in text


@pytest.mark.usefixtures("torchvision")
def test_domainnet_end_to_end(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree("domain_net", DOMAINNET.domains, count=1)
    out = tmp_path / "results"
    arguments = ["--root", str(root), "--targets", "clipart", "--methods", "gaqat", "--out", str(out), *TINY]
    assert domainnet.main(arguments) == 0
    (record,) = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["settings"]["alpha"] == 5e-4
    assert record["settings"]["weight_decay"] == 1e-6


@pytest.mark.parametrize(
    ("benchmark", "steps", "decay", "alpha"),
    [(pacs.BENCHMARK, 5001, 1e-4, 1e-3), (domainnet.BENCHMARK, 15001, 1e-6, 5e-4)],
)
def test_the_published_settings_are_the_defaults(
    benchmark: image_folder_study.Benchmark, steps: int, decay: float, alpha: float
) -> None:
    options = image_folder_study.build_parser(benchmark).parse_args(["--root", "data"])
    assert (options.steps, options.weight_decay, options.alpha) == (steps, decay, alpha)
    assert (options.learning_rate, options.rho, options.batch_size, options.every) == (3e-5, 0.05, 32, 100)
    assert (options.dropout, options.holdout, options.crop) == (0.5, 0.2, 224)


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


@pytest.mark.usefixtures("torchvision")
def test_batchnorm_statistics_are_frozen_and_its_weights_are_trained() -> None:
    model = resnet50.resnet50(3, weights=None, pretrained=False, dropout=0.5, seed=0)
    resnet50.frozen_batchnorm_train(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    assert all(module.weight.requires_grad for module in norms)
    assert model.training
    assert isinstance(model.fc, nn.Sequential)
    assert model.fc[0].training


@pytest.mark.usefixtures("torchvision")
def test_weights_come_from_a_file(tmp_path: Path) -> None:
    given = resnet50.resnet50(3, weights=None, pretrained=False, dropout=0.5, seed=0).state_dict()
    given["fc.weight"] = torch.zeros(1000, 2048)  # ImageNet's classifier, which is not used
    torch.save({name: value for name, value in given.items() if not name.startswith("fc.1")}, tmp_path / "start.pt")
    loaded = resnet50.resnet50(5, weights=tmp_path / "start.pt", pretrained=True, dropout=0.5, seed=1)
    assert torch.equal(loaded.conv1.weight, given["conv1.weight"])
    assert loaded.fc[1].out_features == 5


@pytest.mark.usefixtures("torchvision")
def test_a_file_with_other_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "head": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "shape.pt")
    for name, message in (
        ("other.pt", "264 entries are missing .* 1 are unknown .first: head"),
        ("text.pt", "cannot be read as a state dict"),
        ("list.pt", "holds a list, not a state dict"),
        ("shape.pt", "does not fit torchvision's resnet50"),
        ("absent.pt", "cannot be read as a state dict"),
    ):
        with pytest.raises(resnet50.WeightsError, match=message):
            resnet50.resnet50(3, weights=tmp_path / name, pretrained=True, dropout=0.5, seed=0)
