"""How far apart the styles are before any training: linear classifiers on frozen features, and on raw pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from .pictogram_study import Drawings, PictogramData
from .study.settings import make_settings

PIXELS = 16  # side of the images whose raw pixels are classified

Array = NDArray[np.float64]
Extract = Callable[[Tensor], Tensor]


class Probe(NamedTuple):
    """Accuracies on a held-out style, in percent: by frozen features and by raw pixels."""

    target: str
    seen: float
    unseen: float
    seen_by_pixels: float
    unseen_by_pixels: float


def probe(data: PictogramData, extract: Extract, targets: Sequence[str], seed: int = 0) -> list[Probe]:
    """Train linear classifiers on the training pictograms of the source styles, and measure on each held-out style.

    Args:
        data: the pictograms.
        extract: gives the features of a batch of images.
        targets: the styles to hold out.
        seed: decides which pictograms are unseen.
    """
    settings = make_settings("recommended", data.presets["recommended"])
    accuracies: dict[str, list[float]] = {target: [] for target in targets}
    for features, penalty in ((_Features(extract), 1e-2), (_Features(_raw_pixels), 1e-3)):
        for target in targets:
            fold = data.fold(target, seed, settings)
            classify = _fit(*features.gather(fold.training), penalty)
            for name in ("seen", "unseen"):
                x, y = features.gather([fold.targets[name]])
                accuracies[target].append(100 * float((classify(x) == y).mean()))
    return [Probe(target, *values) for target, values in accuracies.items()]


class _Features:
    """The features of sources. Held-out styles share most of their sources: each is computed once."""

    def __init__(self, extract: Extract) -> None:
        self._extract = extract
        self._known: dict[tuple[Path, ...], Array] = {}

    def gather(self, sources: Sequence[Drawings]) -> tuple[Array, NDArray[np.int64]]:
        """Features and labels of all pictures of these sources."""
        return np.concatenate(list(map(self._features, sources))), np.concatenate([s.labels for s in sources])

    def _features(self, source: Drawings) -> Array:
        files = tuple(source.files)
        if files not in self._known:
            images = torch.stack([source.sample(index, None)[0] for index in range(len(source))])
            with torch.inference_mode():
                features = [self._extract(chunk) for chunk in images.split(100)]
            self._known[files] = torch.cat(features).double().numpy()
        return self._known[files]


def _raw_pixels(images: Tensor) -> Tensor:
    return interpolate(images, (PIXELS, PIXELS), mode="bilinear", antialias=True).flatten(1)


def _fit(x: Array, y: NDArray[np.int64], penalty: float) -> Callable[[Array], Array]:
    """Logistic regression on standardized features. `penalty` is scikit-learn's C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe does not need the last digits of convergence
        return model.fit(x, y).predict
