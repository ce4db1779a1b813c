"""A study that takes seconds: a small tree of images in PACS' layout, and a network of three layers.

Also a script, for tests that start processes: ``python tiny_study.py --root ROOT --out OUT ...``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from domain_generalization.image_folder_study import ImageFolderData
from domain_generalization.image_folders import PACS
from domain_generalization.study.data import Draw, Fold, Source
from domain_generalization.study.jobs import Job, Study
from domain_generalization.study.program import run_program, study_parser
from domain_generalization.study.settings import Settings, make_settings

SETTINGS = {
    "steps": 4,
    "fp32_steps": 2,
    "flat_steps": 2,
    "every": 2,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "rho": 0.5,
    "window": 2,
    "size": 16,
    "calibration_batches": 1,
}


class TinyData(ImageFolderData):
    """PACS in small, also in float64."""

    def __init__(self, root: Path = Path(), cache: Path | None = None, *, double: bool = False) -> None:
        super().__init__("pacs", root, cache=cache)
        self.double = double
        self.presets = {"published": SETTINGS, "recommended": SETTINGS}
        self.defaults = {**self.defaults, "workers": 0, "seeds": (0,), "targets": ("sketch",), "device": "cpu"}

    def check_network(self) -> None:
        pass

    def network(self, seed: int, settings: Settings) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Conv2d(3, 4, 3, stride=2),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 8, 3, stride=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(settings.dropout),
                nn.Linear(8, 2),
            )
        return network.double() if self.double else network

    def fold(self, target: str, seed: int, settings: Settings) -> Fold:
        fold = super().fold(target, seed, settings)
        return replace(fold, **{part: _double(getattr(fold, part)) for part in vars(fold)}) if self.double else fold


class DoubleSource:
    """The images of another source in float64."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, draw: Draw | None) -> tuple[torch.Tensor, int]:
        image, label = self.source.sample(index, draw)
        return image.double(), label


def _double(sources: Any) -> Any:
    if isinstance(sources, dict):
        return {name: DoubleSource(source) for name, source in sources.items()}
    return [DoubleSource(source) for source in sources]


def write_tree(root: Path, count: int = 3) -> Path:
    """Real JPEG files in DomainBed's layout. Returns the root."""
    rng = np.random.default_rng(0)
    for number, domain in enumerate(PACS.domains):
        for shade, label in ((60, "dog"), (180, "house")):
            home = root / "PACS" / domain / label
            home.mkdir(parents=True)
            for image in range(count):
                pixels = np.clip(rng.normal(shade, 20 * (number + 1), size=(24, 28, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(home / f"pic_{image:03d}.jpg")
    return root


def tiny_study(root: Path, out: Path, preset: str = "recommended", **changes: Any) -> Study:
    """A study in this process. Changes are of the settings, or of the study where it has the field."""
    of_study = {name: changes.pop(name) for name in list(changes) if name in Study.__dataclass_fields__}
    settings = make_settings(preset, {**SETTINGS, "dropout": 0.0}, changes)
    return replace(Study(TinyData(root), settings, out), **of_study)


def job(method: str, bits: int | None = 3) -> Job:
    """A method in the only cell."""
    return Job("sketch", 0, bits, method)


def environment() -> dict[str, str]:
    """For processes that run this file."""
    root = Path(__file__).resolve().parents[1]
    folders = [*sys.path, root / "src", root / "examples", root / "tests"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    parser = study_parser(TinyData(), "A tiny study.")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--double", action="store_true")

    def make_data(options: argparse.Namespace) -> TinyData:
        return TinyData(options.root, getattr(options, "cached", None), double=options.double)

    return run_program(parser, make_data, argv)


if __name__ == "__main__":
    sys.exit(main())
