"""What the tests of the examples share: small image trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tests share their cores: one thread each, and the caller's number again afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
