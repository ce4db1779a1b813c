"""What the tests of the examples share: a torchvision that can be imported, and small image trees."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# torchvision registers shape functions for these two operators when it is imported. Where its compiled part does not
# fit the installed torch (no build of it fits this one on a CPU), the operators do not exist and the import fails.
# Their names are then enough: models and transforms call none of them.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library object that defined it


def _import_torchvision() -> None:
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _OPERATORS:
            library.define(operator)
        _libraries.append(library)
        import torchvision
    assert torchvision.__version__


@pytest.fixture(scope="session")
def torchvision() -> None:
    """Makes `import torchvision` work, whether or not its compiled part does; without the package, skips."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of the compiled part that it could not load
            _import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")


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
