"""Files that are written whole or not at all, and locks that end with their process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock


class StorageError(Exception):
    """A file of a study cannot be written or read. The message is for users."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place: a reader sees the old or the new content.

    Raises:
        StorageError: it cannot be written, for example on a full disk. The old content is still there.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        part.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot be written ({_first_line(error)}). What was there before is unchanged. Make room or "
            "choose another --out, then run the same command again: it goes on from the last checkpoint."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file; None if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error}). Remove it to have this part computed anew.") from error


def write_tensors(path: Path, value: Any) -> None:
    """Write tensors and numbers whole."""
    write_whole(path, lambda part: torch.save(value, part))


def read_tensors(path: Path) -> Any:
    """Read what `write_tensors` wrote, to the CPU; None if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip, pickle or runtime error, by what is broken in the file
        raise StorageError(
            f"{path}: cannot be read ({_first_line(error)}). Remove it, and this training begins anew; "
            "everything else is kept."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every entry in which two nested mappings differ, in words."""
    found = []
    for key in {**there, **here}:
        old, new = there.get(key, "none"), here.get(key, "none")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} here")
    return found


def lock(path: Path) -> FileLock:
    """A lock for `with lock.acquire(timeout=...)`. The system ends it with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
