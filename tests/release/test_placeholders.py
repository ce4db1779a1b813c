import subprocess

import pytest
from release.placeholders import HOST, placeholders, tracked_files


def test_each_line_with_the_reserved_host_is_listed(tmp_path):
    (tmp_path / "a.md").write_text(f"first\n  see https://{HOST}/page\n")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\xff")
    assert placeholders(tmp_path, ["a.md", "b.png"]) == [f"a.md:2: see https://{HOST}/page"]


def test_only_files_that_git_tracks_and_that_exist_are_read(tmp_path):
    for name in ("tracked.md", "removed.md", "new.md"):
        (tmp_path / name).write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "tracked.md", "removed.md"], cwd=tmp_path, check=True)
    (tmp_path / "removed.md").unlink()
    assert tracked_files(tmp_path) == ["tracked.md"]


def test_a_folder_without_git_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match="a clone is needed"):
        tracked_files(tmp_path)
