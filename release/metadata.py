"""The metadata of wheel and sdist are what a package index accepts. Run by `make release-check`, after `twine check`.

`twine check` reads the description. An index also refuses unknown classifiers, requirements by URL, and more.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import parse_sdist_filename, parse_wheel_filename
from trove_classifiers import classifiers, deprecated_classifiers


def metadata_of(file: Path) -> bytes:
    """The core metadata inside a wheel or an sdist."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return archive.read(name)
    with tarfile.open(file) as archive:
        return archive.extractfile(f"{file.name.removesuffix('.tar.gz')}/PKG-INFO").read()


def faults(raw: bytes, version: str) -> list[str]:
    """What an index would refuse, and what a reader of its page would miss."""
    metadata = Metadata.from_email(raw, validate=True)  # raises for what the specifications forbid, licence included
    ours, urls, requirements = metadata.classifiers or [], metadata.project_urls or {}, metadata.requires_dist or []
    wrong = [f"unknown classifier: {c}" for c in ours if c not in classifiers]
    wrong += [f"deprecated classifier: {c}" for c in ours if c in deprecated_classifiers]
    wrong += [f"classifier of a licence beside License-Expression: {c}" for c in ours if "License ::" in c]
    wrong += [f"a requirement by URL: {requirement}" for requirement in requirements if requirement.url]
    wrong += [f"a URL that is not https: {url}" for url in urls.values() if not url.startswith("https://")]
    wrong += [f"a label of more than 32 characters: {label}" for label in urls if len(label) > 32]
    if str(metadata.version) != version:
        wrong.append(f"version {metadata.version}, and the file name says {version}")
    if metadata.version.local or metadata.version.is_devrelease:
        wrong.append(f"a version that is not for an index: {metadata.version}")
    if metadata.description_content_type != "text/markdown" or not (metadata.description or "").strip():
        wrong.append("no description in Markdown")
    if not metadata.summary or len(metadata.summary) > 512:
        wrong.append("a summary of 1 to 512 characters is needed")
    for field in ("requires_python", "license_expression", "license_files", "project_urls", "keywords"):
        if not getattr(metadata, field):
            wrong.append(f"no {field}")
    return wrong


def core_requirements(raw: bytes) -> list[Requirement]:
    """The requirements that no extra asks for."""
    requirements = Metadata.from_email(raw).requires_dist or []
    return [r for r in requirements if r.marker is None or "extra" not in str(r.marker)]


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    wheel_name, sdist_name = parse_wheel_filename(wheel.name), parse_sdist_filename(sdist.name)
    wrong = faults(metadata_of(wheel), str(wheel_name[1])) + faults(metadata_of(sdist), str(sdist_name[1]))
    if {str(tag) for tag in wheel_name[3]} != {"py3-none-any"}:
        wrong.append(f"{wheel.name} is not for every Python 3 and platform")
    if metadata_of(wheel) != metadata_of(sdist):
        wrong.append("wheel and sdist have different metadata")
    if wrong:
        sys.exit("\n".join(wrong))
    core = ", ".join(map(str, core_requirements(metadata_of(wheel))))
    print(f"{wheel_name[0]} {wheel_name[1]}: metadata that an index accepts; core requirements: {core}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
