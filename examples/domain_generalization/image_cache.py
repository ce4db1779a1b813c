"""Decoded images on disk: one file of bytes for each domain, of images with a shorter side of at most 256.

Decoding a photograph takes several times as long as reading its pixels. The file is made once, by the first process
that needs it; a folder whose files have changed gets a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .study.storage import lock, write_whole

SHORTER_SIDE = 256


class ImageCache:
    """The decoded images of one folder.

    Args:
        cache: the folder of all caches.
        folder: where the images are.
        files: the images.
    """

    def __init__(self, cache: Path, folder: Path, files: Sequence[Path]) -> None:
        self._files = list(files)
        stats = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        digest = hashlib.sha256(json.dumps([SHORTER_SIDE, str(folder.resolve()), stats]).encode()).hexdigest()[:16]
        self._path = cache / f"{folder.name}-{digest}.bin"
        self._shapes: np.ndarray | None = None
        self._pixels: Any = None

    def read(self, index: int, decode: Callable[[Path], Image.Image]) -> Image.Image:
        """An image; the first call makes the file, by `decode`."""
        if self._pixels is None:
            self._open(decode)
        assert self._shapes is not None
        offset, width, height = self._shapes[index].tolist()
        pixels = self._pixels[offset : offset + 3 * width * height]
        return Image.frombytes("RGB", (width, height), pixels.tobytes())

    def _open(self, decode: Callable[[Path], Image.Image]) -> None:
        table = self._path.with_suffix(".npy")
        with lock(self._path.with_suffix(".lock")):
            if not table.exists():  # written last
                shapes: list[tuple[int, int, int]] = []
                write_whole(self._path, lambda part: self._write(part, shapes, decode))
                write_whole(table, lambda part: _save_array(part, np.array(shapes, dtype=np.int64)))
        self._shapes = np.load(table)
        self._pixels = np.memmap(self._path, dtype=np.uint8, mode="r")

    def _write(self, part: Path, shapes: list[tuple[int, int, int]], decode: Callable[[Path], Image.Image]) -> None:
        offset = 0
        with part.open("wb") as out:
            for path in self._files:
                image = shrunk(decode(path))
                shapes.append((offset, *image.size))
                offset += out.write(image.tobytes())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pixels": None, "_shapes": None}  # a process that loads images opens the file itself


def shrunk(image: Image.Image) -> Image.Image:
    """The image with a shorter side of at most `SHORTER_SIDE` pixels."""
    factor = SHORTER_SIDE / min(image.size)
    if factor >= 1:
        return image
    width, height = (max(SHORTER_SIDE, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _save_array(part: Path, array: np.ndarray) -> None:
    with part.open("wb") as file:
        np.save(file, array)
