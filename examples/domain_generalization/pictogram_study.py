"""The pictograms as a data set for studies: a style is held out, and so are pictograms that no style has shown.

Each pictogram has one part in a run, the same in every style: it trains (the source styles show it), it selects models
(source styles again), or it is unseen. The held-out style is measured on the trained pictograms ("seen": only the style
is new) and on the unseen ones apart. So no accuracy is measured, and no model selected, on a drawing whose pictogram
took part in the training, save "seen", which says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .augmentation import augmented
from .efficientnet_lite0 import DEVIATION, MEAN, efficientnet_lite0, imagenet_weights
from .image_folders import Collection, find_domains, read_image
from .pictogram_classes import CLASSES, DOMAINS, SHORT, SOURCES, split_pictograms
from .pictogram_drawings import FOLDER
from .study.data import DataSet, Draw, Fold
from .study.settings import Settings

PICTOGRAMS = Collection("pictograms", (FOLDER,), DOMAINS)
MEASURES = {
    "last_step_accuracy": "unseen pictograms, last step",
    "held_out_accuracy": "unseen pictograms, chosen by source validation",
    "seen_accuracy": "seen pictograms, last step",
    "seen_selected_accuracy": "seen pictograms, chosen by source validation",
}


class PictogramData(DataSet):
    """Five styles of drawing with EfficientNet-Lite0.

    Args:
        root: the folder that holds the pictograms' own.
        classes: the classes, `CLASSES` or some of them.
        pretrained: start from ImageNet weights, otherwise from random ones.
    """

    name = "pictograms"
    domains = DOMAINS
    measures = MEASURES
    main_measure = "last_step_accuracy"
    unused = ("cached",)
    presets: ClassVar = {
        "recommended": {
            "steps": 100,
            "fp32_steps": 150,
            "every": 25,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "window": 20,
            "holdout": 0.1,
            "batchnorm": "train",  # ImageNet's statistics are of larger images: frozen, a pilot's loss fell half as far
            "dropout": 0.2,
            "size": 64,
        },
        "published": {"batch_size": 16, "holdout": 0.1, "size": 64, "batchnorm": "train"},
    }
    defaults: ClassVar = {
        "preset": "recommended",
        "methods": ("lsq", "lsq+sagm", "gaqat", "gaqat-flat"),
        "targets": DOMAINS,
        "seeds": (0,),
        "bits": (4,),
    }

    def __init__(self, root: Path, classes: Sequence[str] = SHORT, pretrained: bool = True) -> None:
        self._root, self._classes, self._pretrained = root, tuple(classes), pretrained

    def check(self) -> None:
        find_domains(self._root, PICTOGRAMS)
        if self._pretrained:
            imagenet_weights()

    def identity(self) -> Mapping[str, object]:
        return {"classes": list(self._classes), "start": "ImageNet" if self._pretrained else "random"}

    def network(self, seed: int, settings: Settings) -> nn.Module:
        network = efficientnet_lite0(
            len(self._classes), pretrained=self._pretrained, seed=seed, dropout=settings.dropout
        )
        # On a CPU its depthwise convolutions then take half the time.
        return network.to(memory_format=torch.channels_last)

    def fold(self, target: str, seed: int, settings: Settings) -> Fold:
        folders = find_domains(self._root, PICTOGRAMS)
        labels = labels_of(folders[target], self._classes)
        training, selection, unseen = split_pictograms(labels, settings.holdout, seed)

        def source(domain: str, names: Sequence[str]) -> Drawings:
            return Drawings(folders[domain], {name: labels[name] for name in names}, self._classes, settings.size)

        return Fold(
            [source(domain, training) for domain in SOURCES[target]],
            [source(domain, selection) for domain in SOURCES[target]],
            {"unseen": source(target, unseen), "seen": source(target, training)},
        )


class Drawings:
    """Some pictograms of one style, as a source of a study. Pictures stay in memory once they are read.

    Args:
        folder: the style's folder.
        labels: the class of each pictogram.
        classes: all classes; the position of a class is its number.
        size: width and height of the images in pixels.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str], classes: Sequence[str], size: int) -> None:
        self.files = [folder / label / f"{name}.png" for name, label in labels.items()]
        self.labels = [classes.index(label) for label in labels.values()]
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, draw: Draw | None) -> tuple[Tensor, int]:
        """The picture, augmented as DomainBed does or only resized, and its label."""
        picture = read_once(self.files[index])
        if draw is None:
            picture = picture.resize((self.size, self.size), Image.Resampling.LANCZOS)
        else:
            picture = augmented(picture, self.size, np.random.default_rng(draw))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32) / 255
        return ((pixels - MEAN) / DEVIATION).contiguous(), self.labels[index]


read_once = cache(read_image)  # 28 KB a picture, 110 MB in all


def labels_of(folder: Path, classes: Sequence[str] = tuple(CLASSES)) -> dict[str, str]:
    """The class of each pictogram in a style's folder, in the order of classes and names."""
    return {file.stem: label for label in classes for file in sorted((folder / label).glob("*.png"))}
