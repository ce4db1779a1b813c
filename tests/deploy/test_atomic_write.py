"""Files appear as a whole or not at all."""

import os

import pytest

from gaqat_optim.deploy.atomic_write import file_path, write_atomically


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file(function, tmp_path, monkeypatch):
    target = tmp_path / "file"
    assert write_atomically(target, b"old") == 3

    def fail(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, function, fail)
        with pytest.raises(OSError, match="no space left"):
            write_atomically(target, b"newer")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    assert write_atomically(target, b"newer") == 5
    assert target.read_bytes() == b"newer"


def test_a_folder_and_a_path_without_one_are_named(tmp_path):
    assert file_path(str(tmp_path / "file")) == tmp_path / "file"
    with pytest.raises(IsADirectoryError, match="is a folder: path must name a file"):
        file_path(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the folder of .* does not exist"):
        file_path(tmp_path / "nowhere" / "file")
