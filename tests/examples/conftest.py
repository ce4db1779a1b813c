"""Small image trees for the tests of the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny_study import write_tree


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


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the tiny study. Tests leave them as they are."""
    return write_tree(tmp_path_factory.mktemp("tiny"))
