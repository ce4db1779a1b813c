"""How far apart the styles are before any training: a linear classifier on frozen features, and on raw pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from .efficientnet_lite0 import EfficientNetLite0, imagenet_weights
from .pictogram_study import Drawings, PictogramData
from .study.settings import make_settings

PIXELS = 32  # side of the images whose raw pixels are classified


class Probe(NamedTuple):
    """Accuracies on a held-out style, in percent: by frozen features and by raw pixels."""

    target: str
    seen: float
    unseen: float
    seen_by_pixels: float
    unseen_by_pixels: float


def probe(data: PictogramData, target: str, seed: int = 0) -> Probe:
    """Train linear classifiers on the training pictograms of the source styles, and measure on the held-out style."""
    settings = make_settings("recommended", data.presets["recommended"])
    fold = data.fold(target, seed, settings)
    network = EfficientNetLite0()
    network.load_state_dict(imagenet_weights())
    network.eval()

    def raw(images: Tensor) -> Tensor:
        return interpolate(images, (PIXELS, PIXELS), mode="bilinear", antialias=True).flatten(1)

    accuracies = []
    for features, penalty in ((network.features, 1e-2), (raw, 1e-3)):
        classifier = _fit(*_gather(fold.training, features), penalty)
        for name in ("seen", "unseen"):
            x, y = _gather([fold.targets[name]], features)
            accuracies.append(100 * float((classifier(x) == y).mean()))
    return Probe(target, *accuracies)


Array = NDArray[np.float64]


def _gather(sources: list[Drawings], features: Callable[[Tensor], Tensor]) -> tuple[Array, Array]:
    samples = [source.sample(index, None) for source in sources for index in range(len(source))]
    images = torch.stack([image for image, _ in samples])
    with torch.inference_mode():
        x = torch.cat([features(chunk) for chunk in images.split(100)])
    return x.double().numpy(), np.array([label for _, label in samples])


def _fit(x: Array, y: Array, penalty: float) -> Callable[[Array], Array]:
    """Logistic regression on standardized features. `penalty` is scikit-learn's C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the last digits of convergence, which a probe does not need
        return model.fit(x, y).predict
