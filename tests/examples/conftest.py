"""Small image trees and a small study, for the tests of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from domain_generalization import study


@pytest.fixture
def image_tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes real JPEG files in DomainBed's layout below a new root, and returns the root."""

    def write(folder: str, domains: Sequence[str], classes: Sequence[str] = ("dog", "house"), count: int = 3) -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / "data"
        for domain in domains:
            for label in classes:
                home = root / folder / domain / label
                home.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, size=(72, 80, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(home / f"pic_{number:03d}.jpg")
        return root

    return write


@pytest.fixture
def settings() -> study.Settings:
    return study.Settings(
        bits=3,
        steps=6,
        fp32_steps=3,
        flat_steps=2,
        every=2,
        batch_size=4,
        learning_rate=1e-2,
        rho=0.1,
        alpha=1e-3,
        window=2,
        threshold=0.6,
        cosine=True,
        calibration_batches=2,
    )


@pytest.fixture
def small_network() -> Callable[[], nn.Module]:
    """Makes the same network of three layers in each call."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 8),
            nn.ReLU(),
            nn.Linear(8, 2),
        )

    return make


@pytest.fixture
def trainer(settings: study.Settings) -> Callable[..., study.Trainer]:
    """Makes a trainer on two domains of 20 images. Arguments replace those of `Trainer`."""

    def small_domain(seed: int) -> study.Batch:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(20, 3, 8, 8, generator=generator), torch.randint(2, (20,), generator=generator)

    domains = [small_domain(0), small_domain(1)]

    def stream(phase: int) -> Iterator[study.Batch]:
        return study.endless_batches(domains, 4, seed=phase)

    def make(**changes: object) -> study.Trainer:
        arguments: dict[str, object] = {"validate": lambda model: study.accuracy(model, *domains[0]), **changes}
        return study.Trainer(settings, stream, **arguments)  # type: ignore[arg-type]

    return make
