"""Image folders as data sets for studies: ResNet-50 from ImageNet weights, one domain held out.

By default BatchNorm statistics are frozen, as in SAGM's and SWAD's experiments: BatchNorm stays in evaluation mode
while its weights and biases are trained. Held-out accuracy counts all images of the held-out domain.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .image_folders import (
    DOMAINNET,
    OFFICEHOME,
    PACS,
    TERRAINCOGNITA,
    VLCS,
    Collection,
    FolderError,
    ImageFolder,
    find_domains,
)
from .resnet50 import resnet50
from .study.data import DataSet, Fold, SourceSubset, split_indices
from .study.program import run_program, study_parser
from .study.settings import Settings
from .torchvision_import import INSTALL, import_torchvision

# What SAGM's paper and code give for each data set; the rest is the preset's.
PUBLISHED: Mapping[str, tuple[Collection, Mapping[str, Any]]] = {
    "pacs": (PACS, {"learning_rate": 3e-5, "alpha": 1e-3}),
    "vlcs": (VLCS, {"learning_rate": 1e-5, "alpha": 1e-3}),
    "officehome": (OFFICEHOME, {"learning_rate": 1e-5, "alpha": 5e-4}),
    "terraincognita": (TERRAINCOGNITA, {"learning_rate": 1e-5, "alpha": 1e-3}),
    "domainnet": (DOMAINNET, {"learning_rate": 3e-5, "alpha": 5e-4, "weight_decay": 1e-6, "steps": 15001}),
}

load_folder = cache(ImageFolder)


@dataclass(frozen=True)
class Start:
    """Where the weights of ResNet-50 come from: a file, or torchvision's ImageNet weights, or a random start."""

    file: Path | None = None
    pretrained: bool = True

    def __str__(self) -> str:
        if self.file is not None:
            return self.file.name
        return "ImageNet (IMAGENET1K_V1)" if self.pretrained else "random"


class ImageFolderData(DataSet):
    """A collection of image folders with ResNet-50.

    Args:
        name: one of `PUBLISHED`.
        root: the folder that holds the collection's.
        start: where its weights come from.
        cache: where decoded images are kept, if at all.
    """

    measures: ClassVar = {"held_out_accuracy": "chosen by source validation", "last_step_accuracy": "last step"}

    def __init__(self, name: str, root: Path = Path(), start: Start = Start(), cache: Path | None = None) -> None:
        self.collection, settings = PUBLISHED[name]
        self.name, self.domains = self.collection.name, self.collection.domains
        self.presets = {"published": settings, "recommended": settings}
        self.defaults = {
            "preset": "published",
            "methods": ("fp32", "lsq", "lsq+sam", "lsq+sagm", "gaqat", "gaqat-flat"),
            "targets": self.domains,
            "seeds": (0, 1, 2),
            "bits": (4,),
            "workers": 4,
        }
        self._root, self._start, self._cache = root, start, cache

    def check(self) -> None:
        find_domains(self._root, self.collection)
        self.check_network()

    def check_network(self) -> None:
        """Whether the network can be made."""
        import_torchvision()

    def identity(self) -> Mapping[str, Any]:
        folders = {name: load_folder(path, 0, None) for name, path in find_domains(self._root, self.collection).items()}
        return {"start": str(self._start), "images": {name: len(folder) for name, folder in folders.items()}}

    def network(self, seed: int, settings: Settings) -> nn.Module:
        classes = len(next(iter(self._folders(settings).values())).classes)
        return resnet50(
            classes,
            weights=self._start.file,
            pretrained=self._start.pretrained,
            dropout=settings.dropout,
            seed=seed,
        )

    def fold(self, target: str, seed: int, settings: Settings) -> Fold:
        training, holdouts = [], []
        folders = self._folders(settings)
        for number, (name, folder) in enumerate(folders.items()):
            if name == target:
                continue
            if len(folder) < 2:
                raise FolderError(
                    f"{folder.folder}: {len(folder)} image cannot be split into a training part and a hold-out."
                )
            indices = split_indices(len(folder), settings.holdout, seed=1000 * seed + number)
            for part, index in zip((training, holdouts), indices, strict=True):
                part.append(SourceSubset(folder, index.tolist()))
        return Fold(training, holdouts, {"all": folders[target]})

    def _folders(self, settings: Settings) -> dict[str, ImageFolder]:
        found = find_domains(self._root, self.collection)
        return {name: load_folder(path, settings.size, self._cache) for name, path in found.items()}


def build_parser(name: str) -> argparse.ArgumentParser:
    """The command line of a study on this collection."""
    data = ImageFolderData(name)
    collection = data.collection
    parser = study_parser(
        data,
        f"Leave-one-domain-out study of low-bit ResNet-50 on {collection.name}: low-bit methods and their controls "
        "from one fp32 network, models chosen by source validation.",
        epilog=f"Layout of the data (DomainBed's): ROOT/{collection.folders[0]}/<domain>/<class>/<image>. "
        f"The network is torchvision's, in the version that belongs to your torch; any build will do: {INSTALL}",
    )
    option = parser.add_argument
    option("--root", type=Path, required=True, help=f"the folder that holds {collection.folders[0]}/ with all domains")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", type=Path, metavar="FILE", help="start from this state dict of ResNet-50")
    weights.add_argument("--no-pretrained", action="store_true", help="start from random weights, to try the script")
    return parser


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the study that the command line describes."""

    def make_data(options: argparse.Namespace) -> ImageFolderData:
        start = Start(options.weights, not options.no_pretrained)
        return ImageFolderData(name, options.root, start, getattr(options, "cached", None))

    return run_program(build_parser(name), make_data, argv)
