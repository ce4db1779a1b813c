"""Decoded images on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from domain_generalization import image_cache
from domain_generalization.image_folders import FolderError, ImageFolder


def photo_folder(root: Path) -> Path:
    return root / "PACS" / "photo"


def test_small_images_come_back_to_the_bit(tiny_root: Path, tmp_path: Path) -> None:
    plain = ImageFolder(photo_folder(tiny_root), 16)
    cached = ImageFolder(photo_folder(tiny_root), 16, tmp_path)
    copies = [cached, pickle.loads(pickle.dumps(cached)), ImageFolder(photo_folder(tiny_root), 16, tmp_path)]
    for index in (0, 5, 3):
        for draw in (None, (1, 2)):
            expected, label = plain.sample(index, draw)
            for folder in copies:
                image, own_label = folder.sample(index, draw)
                assert torch.equal(image, expected)
                assert own_label == label
    assert len(list(tmp_path.glob("*.bin"))) == 1


def test_large_images_are_shrunk() -> None:
    image = image_cache.shrunk(Image.fromarray(np.zeros((300, 500, 3), dtype=np.uint8)))
    assert image.size == (427, 256)
    small = Image.fromarray(np.zeros((30, 500, 3), dtype=np.uint8))
    assert image_cache.shrunk(small) is small


def test_a_changed_folder_gets_a_new_file_and_a_broken_image_none(tmp_path: Path) -> None:
    home = tmp_path / "photo" / "dog"
    home.mkdir(parents=True)
    for number in range(2):
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(home / f"{number}.png")
    ImageFolder(home.parent, 8, tmp_path / "cache").sample(0, None)
    Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)).save(home / "2.png")
    assert len(ImageFolder(home.parent, 8, tmp_path / "cache")) == 3
    ImageFolder(home.parent, 8, tmp_path / "cache").sample(2, None)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2
    (home / "1.png").write_bytes(b"no image")
    with pytest.raises(FolderError, match=r"1.png: cannot be read as an image"):
        ImageFolder(home.parent, 8, tmp_path / "cache").sample(0, None)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2
