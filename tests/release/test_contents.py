import io
import tarfile
import zipfile

import pytest
from release.contents import ROOT, check_sdist, check_wheel

TRACKED = ["LICENSE", "README.md", "docs/conf.py", "src/gaqat_optim/__init__.py", "src/gaqat_optim/py.typed"]
IN_THE_WHEEL = [
    "gaqat_optim/__init__.py",
    "gaqat_optim/py.typed",
    *(f"gaqat_optim-1.0.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")),
]


def wheel_with(folder, files):
    path = folder / "gaqat_optim-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def sdist_with(folder, files):
    path = folder / "gaqat_optim-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"gaqat_optim-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_the_package_and_its_metadata_are_a_wheel(tmp_path):
    assert check_wheel(wheel_with(tmp_path, dict.fromkeys(IN_THE_WHEEL, "")), TRACKED) == []


@pytest.mark.parametrize("name", IN_THE_WHEEL)
def test_a_file_that_the_wheel_lacks_is_named(tmp_path, name):
    wheel = wheel_with(tmp_path, {other: "" for other in IN_THE_WHEEL if other != name})
    assert check_wheel(wheel, TRACKED) == [f"missing: {name}"]


def test_a_file_beside_the_package_is_named(tmp_path):
    wheel = wheel_with(tmp_path, dict.fromkeys([*IN_THE_WHEEL, "tests/conftest.py"], ""))
    assert check_wheel(wheel, TRACKED) == ["too much: tests/conftest.py"]


def test_the_sdist_is_what_git_tracks_with_the_metadata(tmp_path):
    assert check_sdist(sdist_with(tmp_path, dict.fromkeys([*TRACKED, "PKG-INFO"], "")), TRACKED) == []


def test_files_that_git_does_not_track_or_that_are_large_are_named(tmp_path):
    files = dict.fromkeys([*TRACKED, "PKG-INFO", "notes.txt"], "") | {"docs/conf.py": "x" * (2**20 + 1)}
    assert check_sdist(sdist_with(tmp_path, files), TRACKED) == [
        "too much: gaqat_optim-1.0/notes.txt",
        "larger than 1 MiB: gaqat_optim-1.0/docs/conf.py",
    ]


@pytest.mark.parametrize("path", [str(ROOT / "data"), "/home/" + "somebody/data", "C:\\Users\\" + "somebody"])
def test_a_path_of_a_machine_is_named(tmp_path, path):
    files = dict.fromkeys(IN_THE_WHEEL, "") | {"gaqat_optim/__init__.py": f"PATH = {path!r}".replace("\\\\", "\\")}
    assert check_wheel(wheel_with(tmp_path, files), TRACKED) == [
        "names a path of a machine: gaqat_optim/__init__.py",
    ]
