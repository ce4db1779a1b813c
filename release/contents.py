"""The files in the wheel and in the sdist are those that they must have, and no other.

The wheel has the package and its metadata; the sdist has what git tracks. Run by `make wheel-test` and
`make release-check`, with the folder of both files.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

from release.placeholders import ROOT, tracked_files

MEBIBYTE = 2**20


def wheel_files(tracked: list[str], info: str) -> set[str]:
    """The files of a wheel, given what git tracks and the name of its folder of metadata."""
    package = {file.removeprefix("src/") for file in tracked if file.startswith("src/gaqat_optim/")}
    return package | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}


def sdist_files(tracked: list[str], folder: str) -> set[str]:
    """The files of an sdist, given what git tracks and the name of its folder."""
    return {f"{folder}/{file}" for file in [*tracked, "PKG-INFO"]}


def difference(actual: set[str], expected: set[str]) -> list[str]:
    return [f"too much: {name}" for name in sorted(actual - expected)] + [
        f"missing: {name}" for name in sorted(expected - actual)
    ]


def machine_paths(texts: dict[str, str]) -> list[str]:
    """The files that name the home of somebody, or the folder that they were built in."""
    pattern = re.compile(r"/(?:home|Users)/\w+|[A-Z]:\\Users\\|" + re.escape(str(ROOT)))
    return [f"names a path of a machine: {name}" for name, text in texts.items() if pattern.search(text)]


def check_wheel(wheel: Path, tracked: list[str]) -> list[str]:
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = {name: archive.read(name).decode(errors="ignore") for name in names}
    return difference(set(names), wheel_files(tracked, info)) + machine_paths(texts)


def check_sdist(sdist: Path, tracked: list[str]) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
        odd = [f"no plain file: {m.name}" for m in archive.getmembers() if not (m.isfile() or m.isdir())]
        texts = {name: archive.extractfile(name).read().decode(errors="ignore") for name in names}
    large = [f"larger than 1 MiB: {name}" for name, text in texts.items() if len(text) > MEBIBYTE]
    expected = sdist_files(tracked, sdist.name.removesuffix(".tar.gz"))
    return difference(names, expected) + odd + large + machine_paths(texts)


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tracked = tracked_files(ROOT)
    faults = check_wheel(wheel, tracked) + check_sdist(sdist, tracked)
    if faults:
        hint = "What is too much is not tracked: git add it, or name it in .gitignore."
        sys.exit("\n".join([*faults, hint]))
    for file in (wheel, sdist):
        print(f"{file.name}: {file.stat().st_size // 1024} KiB, the expected files and no other")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
