"""ResNet-50: its weights from a file, and BatchNorm with frozen statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from domain_generalization import resnet50
from domain_generalization.study.settings import make_settings
from domain_generalization.study.training import train_mode


@pytest.mark.usefixtures("torchvision")
def test_batchnorm_statistics_are_frozen_and_its_weights_are_trained() -> None:
    model = resnet50.resnet50(3, weights=None, pretrained=False, dropout=0.5, seed=0)
    train_mode(model, make_settings("published", {}))
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
