"""README.md: its code runs, from top to bottom in an empty folder, and its links lead to what the documentation has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What a reader pastes, and checks of it, which a comment hides.
CODE = re.compile(r"^(?:```|<!-- )python\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((.+?)\)")


def test_the_code_runs_in_an_empty_folder(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = list(CODE.finditer(README))
    assert len(blocks) == 5
    for block in blocks:
        line = README.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], "README.md", "exec"), namespace)
    assert {path.name for path in tmp_path.iterdir()} == {"network.onnx"}


def test_every_link_is_absolute_and_leads_to_a_page_or_a_picture_of_the_documentation():
    docs = ROOT / "docs"
    pages = "\n".join(page.read_text(encoding="utf-8") for page in docs.rglob("*.md"))
    base, _, _ = next(link for link in LINK.findall(README) if link.endswith("/quickstart.html")).rpartition("/")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'^Documentation = "(.+)"$', project, re.MULTILINE)) <= {base}
    for link in LINK.findall(README):
        place = link.removeprefix(f"{base}/")
        if place.startswith("_images/"):
            # A picture is there under this address if a page shows it.
            picture = place.removeprefix("_images/")
            assert (docs / "images" / picture).is_file(), link
            assert f" images/{picture}" in pages, link
        elif place != link:
            assert (docs / place).with_suffix(".md").is_file(), link
        else:
            assert link.startswith("https://arxiv.org/"), link


def test_it_is_short():
    assert len(README.splitlines()) <= 150
