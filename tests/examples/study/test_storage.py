"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from domain_generalization.study import storage
from domain_generalization.study.storage import StorageError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    storage.write_json(path, [1])

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"value.json: cannot be written .*No space left.*What was there before"):
        storage.write_whole(path, fail)
    assert storage.read_json(path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_tensors_and_json_come_back_and_missing_files_are_none(tmp_path: Path) -> None:
    value = {"x": torch.rand(3), "n": 1, "list": [2.5, None]}
    storage.write_tensors(tmp_path / "new" / "value.pt", value)
    loaded = storage.read_tensors(tmp_path / "new" / "value.pt")
    assert torch.equal(loaded["x"], value["x"])
    assert (loaded["n"], loaded["list"]) == (1, [2.5, None])
    assert storage.read_tensors(tmp_path / "absent.pt") is storage.read_json(tmp_path / "absent.json") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"text"])
def test_broken_files_say_what_to_do(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(StorageError, match=r"broken.pt: cannot be read .*Remove it, and this training begins anew"):
        storage.read_tensors(tmp_path / "broken.pt")
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"broken.json: cannot be read"):
        storage.read_json(tmp_path / "broken.json")


def test_differences_name_every_entry() -> None:
    there = {"data": "PACS", "settings": {"rho": 0.05, "steps": 3, "old": 1}}
    here = {"data": "PACS", "settings": {"rho": 0.1, "steps": 3, "new": None}}
    assert storage.differences(there, here) == [
        "settings.rho: 0.05 there, 0.1 here",
        "settings.old: 1 there, 'none' here",
        "settings.new: 'none' there, None here",
    ]
    assert storage.differences(there, there) == []
