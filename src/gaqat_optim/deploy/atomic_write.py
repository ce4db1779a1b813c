"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def file_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file that may not exist yet.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder: path must name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {str(target)!r} does not exist")
    return target


def write_atomically(target: Path, data: bytes) -> int:
    """Write a file under a temporary name, then rename it, so that a failure leaves the old file. Returns the size."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)
