"""torchvision's ResNet-50 as DomainBed uses it: ImageNet weights, a new classifier with dropout, BatchNorm frozen."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from .study.data import DataError
from .torchvision_import import import_torchvision


class WeightsError(DataError):
    """The initial weights cannot be loaded. The message is for users."""


def resnet50(classes: int, *, weights: Path | None, pretrained: bool, dropout: float, seed: int) -> nn.Module:
    """torchvision's ResNet-50 with dropout and a new classifier.

    Args:
        classes: number of classes.
        weights: a file with a state dict of torchvision's ResNet-50; its classifier is not used.
        pretrained: without a file, load torchvision's ImageNet weights (downloaded once), otherwise random weights.
        dropout: probability of dropout before the classifier.
        seed: of all random weights.

    Raises:
        WeightsError: the weights cannot be downloaded, or the file does not hold them.
    """
    import_torchvision()
    from torchvision.models import ResNet50_Weights
    from torchvision.models import resnet50 as torchvision_resnet50

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None and pretrained:
            try:
                model = torchvision_resnet50(weights=ResNet50_Weights.IMAGENET1K_V1)
            except (URLError, OSError) as error:
                raise WeightsError(
                    f"torchvision could not download its ImageNet weights ({error}). Give them as a file with "
                    "--weights FILE, or start from random weights with --no-pretrained."
                ) from error
        else:
            model = torchvision_resnet50(weights=None)
            if weights is not None:
                _load_body(model, weights)
        model.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(model.fc.in_features, classes))
    return model


def _load_body(model: nn.Module, path: Path) -> None:
    """Load a state dict of torchvision's ResNet-50 without its classifier, which is replaced afterwards."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{path}: cannot be read as a state dict ({str(error).splitlines()[0]}).") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not a state dict.")
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    try:
        missing, unexpected = model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{path}: does not fit torchvision's resnet50: {error}") from error
    missing = [name for name in missing if not name.startswith("fc.")]
    if missing or unexpected:
        raise WeightsError(
            f"{path}: not a state dict of torchvision's resnet50: {len(missing)} entries are missing"
            f"{f' (first: {missing[0]})' if missing else ''}, {len(unexpected)} are unknown"
            f"{f' (first: {unexpected[0]})' if unexpected else ''}."
        )
