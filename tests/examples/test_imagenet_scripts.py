"""examples/pacs.py and examples/domainnet.py, end to end on small image trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import domainnet
import pacs
from domain_generalization import imagenet_study, resnet
from domain_generalization.folders import DOMAINNET, PACS

Tree = Callable[..., Path]

TINY = ["--no-pretrained", "--crop", "64", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
TINY += ["--steps", "2", "--fp32-steps", "1", "--flat-steps", "1", "--eval-every", "1"]


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
    benchmark: imagenet_study.Benchmark, steps: int, decay: float, alpha: float
) -> None:
    options = imagenet_study.build_parser(benchmark).parse_args(["--root", "data"])
    assert (options.steps, options.weight_decay, options.alpha) == (steps, decay, alpha)
    assert (options.lr, options.rho, options.batch_size, options.eval_every) == (3e-5, 0.05, 32, 100)
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
    model = resnet.resnet50(3, weights=None, pretrained=False, dropout=0.5, seed=0)
    resnet.frozen_batchnorm_train(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    assert all(module.weight.requires_grad for module in norms)
    assert model.training
    assert isinstance(model.fc, nn.Sequential)
    assert model.fc[0].training


@pytest.mark.usefixtures("torchvision")
def test_weights_come_from_a_file(tmp_path: Path) -> None:
    given = resnet.resnet50(3, weights=None, pretrained=False, dropout=0.5, seed=0).state_dict()
    given["fc.weight"] = torch.zeros(1000, 2048)  # ImageNet's classifier, which is not used
    torch.save({name: value for name, value in given.items() if not name.startswith("fc.1")}, tmp_path / "start.pt")
    loaded = resnet.resnet50(5, weights=tmp_path / "start.pt", pretrained=True, dropout=0.5, seed=1)
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
        with pytest.raises(resnet.WeightsError, match=message):
            resnet.resnet50(3, weights=tmp_path / name, pretrained=True, dropout=0.5, seed=0)
